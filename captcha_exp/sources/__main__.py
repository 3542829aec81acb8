"""A drawing process; `drawing` starts it and talks to it."""

from captcha_exp.sources.drawing import serve

serve()
