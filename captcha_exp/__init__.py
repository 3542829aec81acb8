"""captcha_exp trains text-captcha recognisers in PyTorch, configured with Hydra and recorded in MLflow.

As a library, three lines do what `captcha-exp train experiment=quickstart` does, without MLflow:

    import captcha_exp
    config = captcha_exp.load(captcha_exp.compose("experiment=quickstart"))
    result = captcha_exp.train(config)

The names are looked up at first use, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from captcha_exp.cli import compose as compose
    from captcha_exp.config import load as load
    from captcha_exp.train import train as train

__version__ = "0.1.0"
__all__ = ["compose", "load", "train"]

_HOMES = {"compose": "captcha_exp.cli", "load": "captcha_exp.config", "train": "captcha_exp.train"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'captcha_exp' has no attribute {name!r}")
    from importlib import import_module

    # A module of the same name becomes an attribute of the package when it is imported; the function wins.
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
