"""Run the command line as `python -m captcha_exp`."""

from captcha_exp.cli.main import main

main()
