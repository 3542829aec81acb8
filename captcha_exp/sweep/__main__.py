"""Entry point of the worker process; `workers` starts it, and `supervisor` sends it one job."""

from captcha_exp.sweep.worker import worker_main

worker_main()
