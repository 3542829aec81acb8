"""Entry point of the worker process; `supervisor` starts it and sends it one job."""

from captcha_exp.sweep.worker import worker_main

worker_main()
