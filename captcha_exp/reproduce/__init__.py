"""Reproduce a finished run from its saved config, compare the results bit for bit, and name the cause.

`reference` loads the run, `rerun` trains it again, `compare` finds the differences, `changes` and `images`
find the changes around it, and `causes` attributes the differences to those changes. Only the saved
config and the manifests of a run are read; nothing in them is executed.
"""
