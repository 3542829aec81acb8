"""Train text-captcha recognizers in PyTorch, configured with Hydra and tracked in MLflow.

The equivalent of `captcha-exp train experiment=quickstart` in Python, without MLflow:

    from captcha_exp import compose, load
    from captcha_exp.training.train import train
    result = train(load(compose("experiment=quickstart")))

The names are imported on first use, which keeps `import captcha_exp` fast.
"""

import os
from typing import TYPE_CHECKING

# libgomp, torch's OpenMP runtime on Linux, spins 300,000 times before a thread sleeps. When other processes
# compete for the cores, this slows training down many times (LOG.md). Read once, when torch is imported; it
# does not affect results.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

# ONNX Runtime would report each use to its maker. Read once, when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from captcha_exp.cli.main import compose as compose
    from captcha_exp.config import load as load
    from captcha_exp.export.predictor import OnnxPredictor as OnnxPredictor

__all__ = ["OnnxPredictor", "compose", "load"]


def __getattr__(name: str) -> object:
    match name:
        case "compose":
            from captcha_exp.cli.main import compose

            return compose
        case "load":
            from captcha_exp.config import load

            return load
        case "OnnxPredictor":
            from captcha_exp.export.predictor import OnnxPredictor

            return OnnxPredictor
        case _:
            raise AttributeError(f"module 'captcha_exp' has no attribute {name!r}")
