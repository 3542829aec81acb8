"""Measure the cost of the record of a training: MLflow, files, checkpoints, progress bar, checks.

An experiment is trained by `train`, with MLflow in a SQLite file and a progress bar. The seconds inside each
part are added up, on the main thread by the wall, on the thread that sends to MLflow as CPU time, which it
takes from the training. Then training steps with and without train.deterministic take turns. Prints one JSON
line: the share of each part in the seconds of the epochs, and of all parts together, with and without that
thread, most of whose time is the import of MLflow, once per training; goal 1 %. Hashing and report come
before the first and after the last epoch; they are listed, but are no part of one.

    python benchmarks/cost_of_tracking.py [--experiment alnum] [--pairs 50] [--threads 1] [OVERRIDE ...]
"""

import argparse
import contextlib
import functools
import io
import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from interference import conclude, exit_code
from loops import Step, prepare, requested_config, temporary_root
from rounds import compare, interleave

from captcha_exp.config import Config
from captcha_exp.data import dataset
from captcha_exp.model.state import TrainState
from captcha_exp.runs import Run
from captcha_exp.runtime import console
from captcha_exp.runtime import device as devices
from captcha_exp.tracking import make_tracker
from captcha_exp.tracking.tracker import MlflowTracker
from captcha_exp.training import checkpointer, progress, recorder, sanity
from captcha_exp.training import train as training

MAX_SHARE = 0.01  # of the seconds of the epochs
SENDER = "MLflow, CPU seconds of its thread"

# Owner, name, part. Those inside another one count there.
IN_EPOCHS: tuple[tuple[Any, str, str], ...] = (
    (recorder.RunRecorder, "log_metrics", "metrics"),
    (Run, "write", "best weights"),
    (training, "weights_to_bytes", "best weights"),
    (TrainState, "update_best", "best weights"),
    (checkpointer.Checkpointer, "maybe_save", "checkpoints"),
    (progress.EpochMeter, "_update_bar", "progress bar"),
    (progress.EpochMeter, "_end_chunk", "CPU clock"),
    (training, "EpochMeter", "CPU clock"),
    (sanity.SanityChecker, "observe", "sanity checks"),
    (sanity.SanityChecker, "check", "sanity checks"),
)
AROUND: tuple[tuple[Any, str, str], ...] = (
    (dataset, "_read_cache", "hash of the images"),
    (training, "_record_inputs", "environment, plan and images"),
    (training, "record_test_results", "report"),
    (Run, "close", "hash of the files"),
    (MlflowTracker, "finish", "end of MLflow"),
)


class Parts:
    """Adds up the seconds inside functions of the main thread, each outermost call once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._is_inside = False

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its seconds added to a part."""

        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            if self._is_inside or threading.current_thread() is not threading.main_thread():
                return function(*arguments, **options)
            self._is_inside, start = True, time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self._is_inside = False
                self.seconds[part] += time.perf_counter() - start

        return timed

    @contextlib.contextmanager
    def measured(self, functions: tuple[tuple[Any, str, str], ...]) -> Iterator[None]:
        """Measure these functions inside the context."""
        with contextlib.ExitStack() as stack:
            for owner, name, part in functions:
                stack.enter_context(mock.patch.object(owner, name, self.wrap(part, getattr(owner, name))))
            yield


def thread_cpu_seconds(name: str) -> float | None:
    """Return the CPU seconds of a thread by its name; None if there is none, or the system has no /proc."""
    thread = next((each for each in threading.enumerate() if each.name == name), None)
    path = Path(f"/proc/self/task/{thread.native_id}/schedstat") if thread else None
    return int(path.read_text().split()[0]) / 1e9 if path is not None and path.exists() else None


def train_measured(requested: Config) -> tuple[float, dict[str, float], dict[str, float]]:
    """Train; return the seconds of the epochs, those of the parts in epochs, and those of the others."""
    inside, around = Parts(), Parts()
    epoch_seconds, sender_seconds = 0.0, 0.0
    original_fit = training.fit

    def fit(*arguments: Any) -> None:
        nonlocal epoch_seconds, sender_seconds
        start = time.perf_counter()
        before = thread_cpu_seconds("mlflow") or 0.0
        with inside.measured(IN_EPOCHS):
            original_fit(*arguments)
        epoch_seconds = time.perf_counter() - start
        sender_seconds = max(0.0, (thread_cpu_seconds("mlflow") or before) - before)

    terminal = console.SafeConsole(file=io.StringIO(), force_terminal=True, width=160)
    with (
        mock.patch.object(console, "console", terminal),
        mock.patch.object(training, "fit", fit),
        around.measured(AROUND),
    ):
        training.train(requested, make_tracker(requested, {}))
    inside.seconds[SENDER] = sender_seconds
    return epoch_seconds, inside.seconds, around.seconds


def cost_of_determinism(step: Step, num_pairs: int) -> dict[str, dict[str, float]]:
    """Return the spread of the ratios of deterministic steps to others, on the same batches."""
    config = step.config

    def train(deterministic: bool) -> None:
        devices.setup_device(replace(config, train=replace(config.train, deterministic=deterministic)))
        step()

    works = {str(each): functools.partial(train, each) for each in (True, False)}
    interleave(works, 3)  # loads kernels
    found = interleave(works, num_pairs)
    return compare(found["True"], found["False"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", default="alnum")
    parser.add_argument("--pairs", type=int, default=50, help="of steps; 0 skips determinism")
    parser.add_argument("--threads", type=int, help="(default: those that a training uses)")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    options = parser.parse_args()
    if options.pairs < 0 or (options.threads is not None and options.threads < 1):
        parser.error("--pairs must be at least 0 and --threads at least 1")
    overrides = [*options.overrides, *([f"device.threads={options.threads}"] if options.threads else [])]
    requested = requested_config(f"experiment={options.experiment}", *overrides, tracking="mlflow")
    with temporary_root():
        config, data = prepare(requested)  # renders the images
        seconds, inside, around = train_measured(requested)
        determinism = cost_of_determinism(Step(config, data), options.pairs) if options.pairs else None
    total = sum(inside.values()) / seconds
    conclusion = conclude(total, at_most=MAX_SHARE)
    figures = {
        "experiment": options.experiment,
        "overrides": overrides,
        "threads": torch.get_num_threads(),
        "epochs": config.train.epochs,
        "epoch_seconds": round(seconds / config.train.epochs, 2),
        "share": round(total, 5),
        "share_of_main_thread": round(total - inside[SENDER] / seconds, 5),
        "shares": {name: round(value / seconds, 5) for name, value in sorted(inside.items())},
        "seconds_around": {name: round(value, 3) for name, value in sorted(around.items())},
        "determinism": determinism,
    }
    print(json.dumps({"benchmark": "cost_of_tracking", **figures, **conclusion}))
    sys.exit(exit_code(conclusion))


if __name__ == "__main__":
    main()
