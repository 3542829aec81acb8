"""`python -m captcha_exp` is `captcha-exp`."""

from captcha_exp.cli import main

main()
