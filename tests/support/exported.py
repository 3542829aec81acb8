"""A run that has learned something, and its exported file, as a fixture; manifests of models."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captcha_exp import compose, load
from captcha_exp.export.manifest import Manifest

OVERRIDES = (
    *("data=folder", "tracking=none", "device.name=cpu", "device.threads=1", "device.precision=fp32"),
    *("captcha.width=48", "captcha.height=16", "captcha.channels=1", "augment=none"),
    *("model.channels=[16,16,16]", "train=constant_lr", "train.epochs=10", "train.batch_size=16"),
    *("train.learning_rate=0.01", "train.patience=null", "train.label_smoothing=0.1"),
)


def bars(text: str, seed: int) -> Image.Image:
    """Return a colored image of a dark or a bright bar for each character of 0 and 1, with noise."""
    columns = np.repeat([60 if c == "0" else 190 for c in text], 11)
    noise = np.random.default_rng(seed).integers(-25, 26, (22, 66, 3))
    colored = np.stack([255 - columns, columns, np.full(66, 128)], axis=-1)
    return Image.fromarray((colored[None] + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Return the directory of a run that has learned something, and its exported file."""
    # Only the tests of exported models pay for these imports.
    from captcha_exp.export.export import export_run
    from captcha_exp.training.train import train

    root = tmp_path_factory.mktemp("exported")
    (root / "images").mkdir()
    for n in range(384):
        bars(f"{n % 64:06b}", n).save(root / "images" / f"{n:05}-{n % 64:06b}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPTCHA_EXP_ROOT", str(root))
        run_dir = train(load(compose(*OVERRIDES, f"data.path={root}/images"))).run_dir
        export_run(run_dir, root / "model.onnx")
        yield run_dir, root / "model.onnx"


def a_manifest(**values: Any) -> Manifest:
    """Return a manifest with these values."""
    numbers: Mapping[str, float] = {"images": 1, "accuracy": 1.0}
    given: dict[str, Any] = {
        "format": 1,
        **dict.fromkeys(("min_length", "length", "width", "height", "channels", "opset"), 1),
        "head": "position",
        **dict.fromkeys(("alphabet", "case", "run", "config_sha256", "weights_sha256", "torch"), "x"),
        "calibration": {},
        "test": numbers,
        "parity": numbers,
        "reference": {},
        "quantization": "none",
    }
    return Manifest(**(given | values))
