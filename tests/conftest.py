"""What the tests share: a root of their own, and a tiny config that trains in a second."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from omegaconf import DictConfig

from captcha_exp import compose, load
from captcha_exp.cli import main
from captcha_exp.config import CaptchaLibraryConfig, Config
from captcha_exp.data.dataset import Batch, Split
from captcha_exp.memory.interval import MiBRange
from captcha_exp.memory.plan import Peak, Plan, Planner
from captcha_exp.runtime.console import NullDisplay
from captcha_exp.training import sanity

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


EVERY_EPOCH = {
    "train/loss",
    "train/accuracy",
    "val/loss",
    "val/accuracy",
    "val/char_accuracy",
    "memory/process_peak_mib",
    "speed/images_per_second",
    "speed/epoch_seconds",
}

CPU = torch.device("cpu")
Call = Callable[..., tuple[int, str, str]]
Optimizer = Literal["adam", "adamw", "sgd"]
OPTIMIZERS: tuple[Optimizer, ...] = ("adam", "adamw", "sgd")


def pytest_configure() -> None:
    """A suite that is started with `&` ignores Ctrl-C, and so would all that it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Heard(NullDisplay):
    """A display that remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def info(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def drawn(config: Config) -> CaptchaLibraryConfig:
    """The data of a config whose pictures the package `captcha` draws."""
    assert isinstance(config.data, CaptchaLibraryConfig)
    return config.data


def training(config: Config, **values: Any) -> Config:
    """The config with these values in its group `train`."""
    return replace(config, train=replace(config.train, **values))


def batch_of(config: Config, count: int = 8) -> Batch:
    """Noise with labels of noise, of the alphabet and the length of the tiny config."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, config.captcha.height, config.captcha.width, config.captcha.channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, 5, (count, 2), generator=generator)
    return Batch(images, targets, torch.arange(count))


def guarding(config: Config, batch: Batch) -> sanity.SanityChecker:
    """A guard of a training on this one batch, that is to have nothing to tell."""

    def tell(trouble: str) -> None:
        raise AssertionError(trouble)

    return sanity.SanityChecker(Split(*batch, CPU), ["01"] * len(batch.indices), config, tell)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Layers this small only wait for each other on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that plans no memory, for who watches what a training calls: a plan calls the same."""
    some = MiBRange(1.0, 2.0)
    planned = Plan(
        batch_size=1,
        tensors_mib=1.0,
        state_mib=0.5,
        activations_mib=0.5,
        images_mib=0.0,
        workspace_mib=some,
        training=Peak(some, some),
        evaluation=Peak(some, some),
        reserved_mib=some,
        process_mib=some,
        budget_mib=None,
        fits=None,
    )
    monkeypatch.setattr(Planner, "plan_for", lambda *_: planned)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of this test's own for outputs/ and mlruns/."""
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of pictures for all tests, so that the tiny pictures are drawn once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def composed(cache: Path) -> DictConfig:
    """The tiny config as Hydra composes it, once: that takes a tenth of a second."""
    return compose(*TINY, f"data.cache={cache}", "tracking=none")


@pytest.fixture
def tiny(root: Path, composed: DictConfig) -> Config:
    """A config that trains in about a second, in a root of its own."""
    return load(composed)


@pytest.fixture
def call(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`captcha-exp ...` in this process: exit code, standard output, standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["captcha-exp", *words])
        with pytest.raises(SystemExit) as ended:
            main.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def shell(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Call:
    """The real command, in an empty working directory."""

    def run(*words: str, **environment: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "captcha_exp", *words],
            cwd=tmp_path_factory.mktemp("cwd"),
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return run
