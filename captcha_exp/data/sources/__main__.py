"""Run a rendering process, which `rendering` starts and sends requests to."""

from captcha_exp.data.sources.rendering import worker_main

worker_main()
