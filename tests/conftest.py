"""Shared fixtures and helpers: a temporary root directory, and a tiny config that trains in a second."""

import hashlib
import io
import json
import logging
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
from hypothesis import settings
from omegaconf import DictConfig
from PIL import Image
from support.exported import exported as exported

from captcha_exp import compose, load, runs
from captcha_exp.cli import main
from captcha_exp.config import CaptchaLibraryConfig, Config
from captcha_exp.data.dataset import Batch, Split
from captcha_exp.memory.interval import MiBRange
from captcha_exp.memory.plan import Peak, Plan, Planner
from captcha_exp.report import figures
from captcha_exp.runs import SweepInfo
from captcha_exp.runs.info import (
    CHECKSUM_KEY,
    JobInfo,
    MlflowRef,
    OutOfMemory,
    ResultSummary,
    now,
    running_fields,
)
from captcha_exp.runtime import cpu_time
from captcha_exp.runtime.files import sha256_of_json, write_atomically
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
    "device.threads=1",
    "device.precision=fp32",
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
    "speed/cores_used",
    "speed/disturbed",
}

CPU = torch.device("cpu")
Call = Callable[..., tuple[int, str, str]]
Optimizer = Literal["adam", "adamw", "sgd"]
OPTIMIZERS: tuple[Optimizer, ...] = ("adam", "adamw", "sgd")


def pytest_configure() -> None:
    """Use one thread per process, set no deadlines, and restore the SIGINT handler.

    Several threads in each of several processes wait for each other. A suite started with `&` ignores SIGINT,
    and so do its children. Machines are busy: no example of hypothesis has a deadline.
    """
    torch.set_num_threads(1)
    settings.register_profile("without a clock", deadline=None)
    settings.load_profile("without a clock")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def infos(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the status lines that the package has logged in this test."""
    return _messages(caplog, logging.INFO)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings that the package has logged in this test."""
    return _messages(caplog, logging.WARNING)


def _messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    records = (record for record in caplog.records if record.name.startswith("captcha_exp."))
    return [record.getMessage() for record in records if record.levelno == level]


@pytest.fixture(autouse=True)
def package_logger() -> logging.Logger:
    """Return the package's logger without the handler of an earlier call of `main`; caplog gets INFO."""
    logger = logging.getLogger("captcha_exp")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.INFO)
    return logger


def edit_record(directory: Path, filename: str = "run.json", **fields: Any) -> dict[str, Any]:
    """Change fields of a run.json or sweep.json without any check but with its checksum, and return them."""
    values: dict[str, Any] = json.loads((directory / filename).read_text(encoding="utf-8")) | fields
    write_record(directory, filename, values)
    return values


def rewrite(run_dir: Path, name: str, content: str | bytes) -> None:
    """Write another content of a file of a run, with its SHA-256."""
    content = content if isinstance(content, bytes) else content.encode()
    (run_dir / name).write_bytes(content)
    run = runs.load(run_dir)
    run.update(files=run.info.files | {name: hashlib.sha256(content).hexdigest()})


def environment_json(**values: Any) -> dict[str, Any]:
    """Return the content of an environment.json with these values."""
    groups: dict[str, Any] = {"packages": {}, "variables": {}, "device": {}}
    return {"captcha_exp": None, "git": None, "code_sha256": "", **groups, **values}


def dataset_json(**values: Any) -> dict[str, Any]:
    """Return the content of the dataset.json of a generator with these values."""
    return {
        "key": "k",
        "provenance": {"captcha": {}, "source": {}, "dependencies": {}},
        "images_sha256": "",
        "labels_sha256": "",
        "images": 1,
        "distinct_labels": 1,
        "splits": {"train": 1, "validation": 1, "test": 1},
        "files": [],
        "rejected": [],
    } | values


def write_record(directory: Path, filename: str, values: dict[str, Any]) -> None:
    """Write a run.json or sweep.json with its checksum."""
    values = {key: value for key, value in values.items() if key != CHECKSUM_KEY}
    text = json.dumps(values | {CHECKSUM_KEY: sha256_of_json(values)})
    (directory / filename).write_text(text, encoding="utf-8")


def mlflow_ref(run_id: str | None = "a1", closed: bool = True) -> MlflowRef:
    """Return the reference of a record to an MLflow run."""
    return MlflowRef(uri="sqlite:///a.db", experiment_id="1", run_id=run_id, closed=closed)


def result_summary(**fields: Any) -> ResultSummary:
    """Return the results of a finished run, with other values of these fields."""
    result = ResultSummary(
        epochs=3,
        best_epoch=2,
        val_accuracy=0.9,
        test_accuracy=0.875,
        weights_sha256="ab" * 32,
        seconds=12.5,
        process_peak_mib=900.0,
    )
    return result.model_copy(update=fields)


def out_of_memory(during: Literal["training", "evaluation"] = "training") -> OutOfMemory:
    """Return the record of a run that was out of memory."""
    return OutOfMemory(during=during, epoch=1, step=2, peak_mib=3.0, predicted_mib=(1.0, 2.0), remedies=[])


def sweep_info(**fields: Any) -> dict[str, Any]:
    """Return the content of the sweep.json of a sweep with one job, with other values of these fields."""
    job = JobInfo(number=1, name="seed=1", swept={"seed": "1"}, choices={}, sha256="")
    info = SweepInfo(
        **running_fields(),
        name="grid",
        started=now(),
        code_sha256="",
        predicted=[None],
        parallelism=1,
        jobs=[job],
    )
    return info.model_dump() | fields


def generator_config(config: Config) -> CaptchaLibraryConfig:
    """Return the data group of a config that uses the package `captcha`."""
    assert isinstance(config.data, CaptchaLibraryConfig)
    return config.data


def with_train(config: Config, **values: Any) -> Config:
    """Return a config with other values in its group `train`."""
    return replace(config, train=replace(config.train, **values))


def make_batch(config: Config, count: int = 8) -> Batch:
    """Return a batch of random images and labels, with the alphabet and length of the tiny config."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, config.captcha.height, config.captcha.width, config.captcha.channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, 5, (count, 2), generator=generator)
    return Batch(images, targets, torch.arange(count))


def make_checker(config: Config, batch: Batch) -> sanity.SanityChecker:
    """Return a sanity checker of a training split of one batch, whose warnings fail the test."""

    def fail(warning: str) -> None:
        raise AssertionError(warning)

    return sanity.SanityChecker(Split(*batch, CPU), ["01"] * len(batch.indices), config, fail)


@pytest.fixture(scope="session", autouse=True)
def small_figures() -> Iterator[None]:
    """Write a small file for each figure of a training: drawing them takes more time than the training.

    Processes are not affected, and `report/test_figures.py` draws the figures.
    """
    content = io.BytesIO()
    Image.new("L", (2, 2)).save(content, "PNG")

    def save(*arguments: Any) -> None:
        write_atomically(arguments[-1], content.getvalue())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_save_figure", save)
        patch.setattr(figures, "_save_image_grid", save)
        yield


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call no speed disturbed in this process, however busy the machine is."""
    monkeypatch.setattr(cpu_time, "is_disturbed", lambda *_: False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: several are slower for tiny layers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the memory plan of a training, which calls the same functions as the training."""
    mib = MiBRange(1.0, 2.0)
    plan = Plan(
        batch_size=1,
        tensors_mib=1.0,
        state_mib=0.5,
        activations_mib=0.5,
        images_mib=0.0,
        workspace_mib=mib,
        training=Peak(mib, mib),
        evaluation=Peak(mib, mib),
        reserved_mib=mib,
        process_mib=mib,
        budget_mib=None,
        fits=None,
    )
    monkeypatch.setattr(Planner, "plan_for", lambda *_: plan)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a temporary directory for outputs/ and mlruns/."""
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache directory for all tests, in which the tiny images are rendered once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def composed(cache: Path) -> DictConfig:
    """Return the tiny config as composed by Hydra, once per session: it takes 0.1 s."""
    return compose(*TINY, f"data.cache={cache}", "tracking=none")


@pytest.fixture
def tiny(root: Path, composed: DictConfig) -> Config:
    """Return a config that trains in about a second, in a temporary root directory."""
    return load(composed)


@pytest.fixture
def call(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Return a function that runs `captcha-exp` in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["captcha-exp", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def shell(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Call:
    """Return a function that runs `captcha-exp` as a process in an empty working directory."""

    def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "captcha_exp", *arguments],
            cwd=tmp_path_factory.mktemp("cwd"),
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return run
