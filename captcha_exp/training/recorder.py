"""How a training is recorded: in the run's folder first, then at the `Tracker` that it talks to."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from captcha_exp.config import Config
from captcha_exp.data.dataset import Dataset
from captcha_exp.errors import UserError
from captcha_exp.memory.plan import Plan
from captcha_exp.model.evaluate import Evaluation
from captcha_exp.model.state import TrainState
from captcha_exp.report import figures
from captcha_exp.runs import MetricsRow, Run, Status, now_ms
from captcha_exp.runs.fields import environment_leaves, flat
from captcha_exp.runs.source_code import write_code
from captcha_exp.runtime.console import Display
from captcha_exp.runtime.shutdown import TimeIsUp, undisturbed
from captcha_exp.training import oom

COMPUTES = {"python", "packages", "code_sha256", "device", "variables"}
"""groups of environment.json of which a training's numbers may depend"""


class Tracker(Protocol):
    """Where a run is reported to, beside its own folder."""

    def start(self, run: Run, config: Config) -> None: ...

    def describe(self, manifest: Mapping[str, Any], environment: Mapping[str, Any]) -> None: ...

    def log(self, row: MetricsRow) -> None: ...

    def finish(self, run: Run, status: Status) -> None: ...


class NoTracker:
    """The run's folder is the only record."""

    def start(self, run: Run, config: Config) -> None:
        pass

    def describe(self, manifest: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        pass

    def log(self, row: MetricsRow) -> None:
        pass

    def finish(self, run: Run, status: Status) -> None:
        pass


@dataclass(frozen=True)
class Recording:
    """A run, the tracker that hears of it, and the person who watches."""

    run: Run
    tracker: Tracker
    display: Display

    def log(self, row: MetricsRow) -> None:
        """One row of metrics; what was done again after an interruption is there already."""
        if self.run.log(row):
            self.tracker.log(row)

    def tell(self, trouble: str) -> None:
        """To the person, and into the record."""
        self.display.warn(trouble)
        if trouble not in self.run.state["warnings"]:
            self.run.note(warnings=[*self.run.state["warnings"], trouble])


@dataclass(frozen=True)
class Result:
    """What a training leaves behind."""

    folder: Path
    config: Config
    test: Evaluation
    best_epoch: int
    weights_sha256: str
    seconds: float
    process_peak_mib: float


@contextlib.contextmanager
def recorded(recording: Recording, config: Config) -> Iterator[None]:
    """However it ends, the record says so: in the folder first, then at the tracker."""
    run, display = recording.run, recording.display
    status: Status = "FAILED"
    error: str | None = None
    try:
        recording.tracker.start(run, config)
        yield
        status = "FINISHED"
    except oom.OutOfMemory as short:
        status, error = ("FINISHED" if short.is_result else "FAILED"), str(short)
        raise
    except (KeyboardInterrupt, SystemExit, TimeIsUp) as interruption:
        status, error = "KILLED", type(interruption).__name__
        # Who reproduces a run would get its end and no verdict.
        again = "" if "reproduces" in run.state.get("links", ()) else "; the same command goes on"
        display.line(f"interrupted: {run.folder} keeps what was reached, as KILLED{again}")
        raise
    except BaseException as exception:
        error = f"{type(exception).__name__}: {exception}"
        raise
    finally:
        with undisturbed():
            run.close(status, error)
            recording.tracker.finish(run, status)


def record_test(
    result: Result, data: Dataset, planned: Plan, state: TrainState, recording: Recording
) -> None:
    """What is known at the end, and the pictures of the report, in the run's folder and at the tracker."""
    run, tested, alphabet = recording.run, result.test, data.alphabet
    low, high = tested.interval
    metrics = tested.metrics("test") | {"test/accuracy_low": low, "test/accuracy_high": high}
    metrics |= planned.beside([row.metrics for row in run.rows()])
    recording.log(MetricsRow(state.epoch, now_ms(), metrics))
    run.write_json("test.json", tested.summary(data))
    figures.curves(run.rows(), run.report / "curves.png")
    figures.confusion(tested, alphabet, run.report / "confusion.png")
    figures.errors(tested, data, run.report / "errors.png")
    figures.samples(data.images[:30].numpy(), data.labels[:30], run.report / "pictures.png")
    run.note(
        result={
            "epochs": state.epoch,
            "best_epoch": state.best_epoch,
            "val_accuracy": state.best_accuracy,
            "test_accuracy": tested.accuracy,
            "weights_sha256": result.weights_sha256,
            "seconds": result.seconds,
            "process_peak_mib": result.process_peak_mib,
        }
    )


def check_same_pictures(manifest: Mapping[str, Any], run: Run) -> None:
    """Nothing, for a run that begins, or that goes on with the pictures that it began with.

    Raises:
        UserError: they are others now.
    """
    path = run.folder / "dataset.json"
    if not path.exists():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for key in ("images_sha256", "labels_sha256", "splits"):
        if before[key] != manifest[key]:
            raise UserError(
                f"{run.folder}: began with other pictures than there are now ({key} of dataset.json is "
                "another); bring those back, or start anew with --resume=never"
            )


def record_machine(ran_on: Mapping[str, Any], recording: Recording) -> None:
    """environment.json; of a run that goes on, what is not as it was when it began."""
    run = recording.run
    path = run.folder / "environment.json"
    if not path.exists():
        write_code(run, recording.tell)
        run.write_json(path.name, ran_on)
        return
    then, now = environment_leaves(run.folder), flat(ran_on)
    watched = [key for key in dict.fromkeys((*then, *now)) if key.partition(".")[0] in COMPUTES]
    changed = {key: [then.get(key), now.get(key)] for key in watched if then.get(key) != now.get(key)}
    if changed:
        *before, this_time = run.state["resumed"]
        run.note(resumed=[*before, {**this_time, "changed": changed}])
        words = ", ".join(f"{key} {_short(old)} -> {_short(new)}" for key, (old, new) in changed.items())
        recording.tell(
            f"not as it was when the run began: {words}; the result may not be that of a run that was not "
            "interrupted"
        )


def _short(value: object) -> str:
    """A value on a line; of a SHA-256, the beginning."""
    return str(value)[:12] if isinstance(value, str) and len(value) == 64 else str(value)
