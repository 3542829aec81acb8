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
from captcha_exp.runs.fields import flatten, read_flat_environment
from captcha_exp.runs.source_code import write_source_info
from captcha_exp.runtime.console import Display
from captcha_exp.runtime.shutdown import TimeLimitReached, defer_signals
from captcha_exp.training import oom

NUMERICS_KEYS = {"python", "packages", "code_sha256", "device", "variables"}
"""groups of environment.json of which a training's numbers may depend"""


class Tracker(Protocol):
    """Where a run is reported to, beside its own folder."""

    def start(self, run: Run, config: Config) -> None: ...

    def log_inputs(self, manifest: Mapping[str, Any], environment: Mapping[str, Any]) -> None: ...

    def log_metrics(self, row: MetricsRow) -> None: ...

    def finish(self, run: Run, status: Status) -> None: ...


class NullTracker:
    """The run's folder is the only record."""

    def start(self, run: Run, config: Config) -> None:
        pass

    def log_inputs(self, manifest: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        pass

    def log_metrics(self, row: MetricsRow) -> None:
        pass

    def finish(self, run: Run, status: Status) -> None:
        pass


@dataclass(frozen=True)
class RunRecorder:
    """A run, the tracker that hears of it, and the person who watches."""

    run: Run
    tracker: Tracker
    display: Display

    def log_metrics(self, row: MetricsRow) -> None:
        """One row of metrics; what was done again after an interruption is there already."""
        if self.run.log_metrics(row):
            self.tracker.log_metrics(row)

    def warn(self, message: str) -> None:
        """To the person, and into the record."""
        self.display.warn(message)
        if message not in self.run.state["warnings"]:
            self.run.update(warnings=[*self.run.state["warnings"], message])


@dataclass(frozen=True)
class TrainResult:
    """What a training leaves behind."""

    run_dir: Path
    config: Config
    test: Evaluation
    best_epoch: int
    weights_sha256: str
    seconds: float
    process_peak_mib: float


@contextlib.contextmanager
def record_outcome(recorder: RunRecorder, config: Config) -> Iterator[None]:
    """However it ends, the record says so: in the folder first, then at the tracker."""
    run, display = recorder.run, recorder.display
    status: Status = "FAILED"
    error: str | None = None
    try:
        recorder.tracker.start(run, config)
        yield
        status = "FINISHED"
    except oom.TrainingOutOfMemoryError as short:
        status, error = ("FINISHED" if short.is_result else "FAILED"), str(short)
        raise
    except (KeyboardInterrupt, SystemExit, TimeLimitReached) as interruption:
        status, error = "KILLED", type(interruption).__name__
        # Who reproduces a run would get its end and no verdict.
        again = "" if "reproduces" in run.state.get("lineage", ()) else "; the same command goes on"
        display.info(f"interrupted: {run.run_dir} keeps what was reached, as KILLED{again}")
        raise
    except BaseException as exception:
        error = f"{type(exception).__name__}: {exception}"
        raise
    finally:
        with defer_signals():
            run.close(status, error)
            recorder.tracker.finish(run, status)


def record_test_results(
    result: TrainResult, data: Dataset, plan: Plan, state: TrainState, recorder: RunRecorder
) -> None:
    """What is known at the end, and the pictures of the report, in the run's folder and at the tracker."""
    run, tested, alphabet = recorder.run, result.test, data.alphabet
    low, high = tested.accuracy_interval
    metrics = tested.metrics("test") | {"test/accuracy_low": low, "test/accuracy_high": high}
    metrics |= plan.prediction_error_metrics([row.metrics for row in run.metrics_rows()])
    recorder.log_metrics(MetricsRow(state.epoch, now_ms(), metrics))
    run.write_json("test.json", tested.to_json(data))
    figures.plot_curves(run.metrics_rows(), run.report_dir / "curves.png")
    figures.plot_confusion_matrix(tested, alphabet, run.report_dir / "confusion.png")
    figures.plot_misreads(tested, data, run.report_dir / "errors.png")
    figures.plot_samples(data.images[:30].numpy(), data.labels[:30], run.report_dir / "pictures.png")
    run.update(
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


def check_dataset_unchanged(manifest: Mapping[str, Any], run: Run) -> None:
    """Nothing, for a run that begins, or that goes on with the pictures that it began with.

    Raises:
        UserError: they are others now.
    """
    path = run.run_dir / "dataset.json"
    if not path.exists():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for key in ("images_sha256", "labels_sha256", "splits"):
        if before[key] != manifest[key]:
            raise UserError(
                f"{run.run_dir}: began with other pictures than there are now ({key} of dataset.json is "
                "another); bring those back, or start anew with --resume=never"
            )


def record_environment(environment: Mapping[str, Any], recorder: RunRecorder) -> None:
    """environment.json; of a run that goes on, what is not as it was when it began."""
    run = recorder.run
    path = run.run_dir / "environment.json"
    if not path.exists():
        write_source_info(run, recorder.warn)
        run.write_json(path.name, environment)
        return
    then, now = read_flat_environment(run.run_dir), flatten(environment)
    watched = [key for key in dict.fromkeys((*then, *now)) if key.partition(".")[0] in NUMERICS_KEYS]
    changed = {key: [then.get(key), now.get(key)] for key in watched if then.get(key) != now.get(key)}
    if changed:
        *before, this_time = run.state["resumed"]
        run.update(resumed=[*before, {**this_time, "changed": changed}])
        words = ", ".join(f"{key} {_shorten(old)} -> {_shorten(new)}" for key, (old, new) in changed.items())
        recorder.warn(
            f"not as it was when the run began: {words}; the result may not be that of a run that was not "
            "interrupted"
        )


def _shorten(value: object) -> str:
    """A value on a line; of a SHA-256, the beginning."""
    return str(value)[:12] if isinstance(value, str) and len(value) == 64 else str(value)
