"""A drawing process; `drawing` starts it and talks to it."""

from captcha_exp.data.sources.rendering import worker_main

worker_main()
