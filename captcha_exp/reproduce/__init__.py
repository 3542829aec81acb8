"""A finished run, run again from what it saved (`running`) and compared to the bit (`results`), with what
has changed around it (`pictures`, `drift`) and which of that is the cause (`judging`).

Of the run only its saved config and manifests are read (`original`); nothing in them is executed.
"""
