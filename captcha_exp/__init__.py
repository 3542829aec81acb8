"""captcha_exp trains text-captcha recognisers in PyTorch, configured with Hydra and recorded in MLflow.

As a library, this does what `captcha-exp train experiment=quickstart` does, without MLflow:

    from captcha_exp import compose, load
    from captcha_exp.train import train
    result = train(load(compose("experiment=quickstart")))

The names are looked up at first use, so that importing the package costs nothing.
"""

import os
from typing import TYPE_CHECKING

# Threads of libgomp, which carries torch's CPU arithmetic on Linux, spin for 300,000 turns before they sleep:
# beside any other busy process they wait for each other, and a training takes many times as long (LOG.md).
# This is read once, when torch is imported; the numbers that come out do not depend on it.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

if TYPE_CHECKING:
    from captcha_exp.cli.main import compose as compose
    from captcha_exp.config import load as load

__all__ = ["compose", "load"]


def __getattr__(name: str) -> object:
    match name:
        case "compose":
            from captcha_exp.cli.main import compose

            return compose
        case "load":
            from captcha_exp.config import load

            return load
        case _:
            raise AttributeError(f"module 'captcha_exp' has no attribute {name!r}")
