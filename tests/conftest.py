"""What the tests share: a root of their own, and a tiny config that trains in a second."""

from pathlib import Path

import pytest

from captcha_exp import compose, load
from captcha_exp.config import Config

TINY = (
    "name=tiny",
    "data.count=300",
    "data.workers=1",
    "data.validation_fraction=0.25",
    "data.test_fraction=0.25",
    "captcha.alphabet='01234'",
    "captcha.length=2",
    "captcha.width=32",
    "captcha.height=16",
    "model.channels=[4,8,8]",
    "train.batch_size=64",
    "train.epochs=2",
    "device.name=cpu",
    "device.threads=2",
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of this test's own for outputs/ and mlruns/."""
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of pictures for all tests, so that the tiny pictures are drawn once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(root: Path, cache: Path) -> Config:
    """A config that trains in about a second, in a root of its own."""
    return load(compose(*TINY, f"data.cache={cache}", "tracking=none"))
