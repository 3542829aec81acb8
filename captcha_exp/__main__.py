"""`python -m captcha_exp` is `captcha-exp`."""

from captcha_exp.cli.main import main

main()
