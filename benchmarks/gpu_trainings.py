"""The parts of gpu_session that run whole trainings and the gpu tests, and describe the machine.

Each function is one part and runs in its own process.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gpu_processes import SHARED_DIR, keep_partial

from captcha_exp.runtime import device as devices

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests" / "test_gpu.py"
TEST_OUTPUT_CHARACTERS = 2000  # of each failed test
QUICK = "gpu_quick"  # marker of the essential gpu tests, which take seconds each


# -- the machine ---------------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """Return a description of the machine. Values about the GPU are None on the CPU.

    Raises:
        SystemExit: torch finds no GPU. Use --dry-run.
    """
    found: dict[str, Any] = {
        "gpu": None,
        "gpu_mib": None,
        "compute_capability": None,
        "driver": None,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]  # torch has no types for it
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    if device == "cpu":
        return found
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA GPU here; --dry-run runs every part on the CPU")
    gpu = torch.cuda.get_device_properties(0)
    return found | {
        "gpu": gpu.name,
        "gpu_mib": gpu.total_memory // 2**20,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "driver": devices.driver_version(),
    }


def doctor(device: str) -> list[dict[str, Any]]:
    """Return the findings of `captcha-exp doctor`."""
    from captcha_exp import compose, load
    from captcha_exp.doctor import collect_info, run_checks

    config = load(compose(f"device.name={device}"))
    return [asdict(finding) for finding in run_checks(collect_info(config))]


# -- the tests of the GPU ------------------------------------------------------------------------------------


class Outcomes:
    """A pytest plugin that saves the outcome and the duration of each test as soon as it ends."""

    def __init__(self, group: int | None, groups: int) -> None:
        self.group, self.groups = group, groups
        self.outcomes: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.failures: dict[str, str] = {}

    def figures(self) -> dict[str, Any]:
        """Return the counts, the names of the failed tests with the end of their output, and the seconds."""
        counts = {
            kind: sum(value == kind for value in self.outcomes.values())
            for kind in ("passed", "failed", "skipped")
        }
        return {**counts, "failures": self.failures, "seconds": self.seconds}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.group is not None:
            items[:] = [item for index, item in enumerate(items) if index % self.groups == self.group]

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.rpartition("::")[2]
        self.seconds[name] = round(self.seconds.get(name, 0.0) + report.duration, 2)
        if report.failed:
            self.outcomes[name] = "failed"
            self.failures[name] = str(report.longreprtext)[-TEST_OUTPUT_CHARACTERS:]
        elif report.skipped or report.when == "call":
            self.outcomes.setdefault(name, report.outcome)
        if report.when == "teardown":
            keep_partial(self.figures())


def tests(marks: str, group: int | None, groups: int, collect_only: bool) -> dict[str, Any]:
    """Run the selected gpu tests and return their outcomes; with `collect_only` only collect them.

    `group` selects every `groups`-th test, starting with this one, to split them between parts.

    Raises:
        SystemExit: pytest failed or found no test.
    """
    import pytest

    os.chdir(HERE.parent)
    plugin = Outcomes(group, groups)
    arguments = ["-m", marks, "--tb=short", "-p", "no:cacheprovider", str(TESTS)]
    code = int(pytest.main([*arguments, *(["--collect-only"] if collect_only else [])], plugins=[plugin]))
    if code not in (0, 1):  # 1: tests failed, whose names are among the figures
        raise SystemExit(f"pytest ended with exit code {code}")
    return plugin.figures()


# -- the article's images ------------------------------------------------------------------------------------


def article_loop(device: str, shards: int, shard: int, epochs: int) -> dict[str, Any]:
    """Return the figures of the article's program on files like the article's: GIFs named .png."""
    import article_loop as loop

    with _shared_dir() as directory:
        work = Path(directory, f"shards-{shards}-{shard}")
        if not work.exists():  # another part of this call may have prepared them
            draw_files(Path(directory, "images"), shards * shard)
            loop.prepare(Path(directory, "images"), Path(directory, "draft"), shard=shard)
            Path(directory, "draft").rename(work)
        figures = loop.measure(work, torch.device(device), epochs=epochs)
    figures["seconds_per_1000"] = figures["seconds_per_shard"] * 1000 / shard
    return figures


@contextmanager
def _shared_dir() -> Iterator[str]:
    """Yield the directory shared by the parts of a call, or a temporary one."""
    if shared := os.environ.get(SHARED_DIR):
        yield shared
    else:
        with tempfile.TemporaryDirectory() as directory:
            yield directory


def draw_files(directory: Path, count: int) -> None:
    """Render images of experiment=article as files with the article's names and format, on all cores."""
    workers = min(8, os.cpu_count() or 1, 1 + count // 100)
    directory.mkdir(exist_ok=True)
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))

    def start(worker: int) -> None:
        numbers = map(str, (worker, workers, count))
        command = [sys.executable, str(HERE / "gpu_drawing.py"), str(directory), *numbers]
        subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True)

    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(start, range(workers)))


def ours(
    device: str,
    precision: str,
    shards: int,
    shard: int,
    epochs: int,
    batch: int,
    more: Sequence[str] = (),
) -> dict[str, Any]:
    """Train experiment=article with the package and `more` overrides, and return the figures."""
    from captcha_exp import compose, load
    from captcha_exp.training.train import train

    with _shared_dir() as directory:
        overrides = ("experiment=article", f"data.count={shards * shard}", f"train.epochs={epochs}")
        device_overrides = (
            f"device.name={device}",
            f"device.precision={precision}",
            f"train.batch_size={batch}",
        )
        result = train(
            load(
                compose(
                    *overrides, *device_overrides, f"data.cache={directory}/cache", "tracking=none", *more
                )
            )
        )
        lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line)["metrics"] for line in lines]
        tried = json.loads((result.run_dir / "environment.json").read_text())["precisions_tried"]
    rows = [row for row in rows if "speed/epoch_seconds" in row][1:]
    return {
        "precision": result.config.device.precision,
        "precisions_tried": tried,
        "batch_size": result.config.train.batch_size,
        "epochs": epochs,
        "seconds_per_1000": statistics.median(row["speed/epoch_seconds"] for row in rows)
        / (shards * shard)
        * 1000,
        "training_images_per_second": statistics.median(row["speed/images_per_second"] for row in rows),
        **{key.removeprefix("memory/"): max(row[key] for row in rows) for key in rows[0] if "memory/" in key},
    }
