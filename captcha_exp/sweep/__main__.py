"""The process of one training; `supervise` starts it and talks to it."""

from captcha_exp.sweep.worker import worker_main

worker_main()
