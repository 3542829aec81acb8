"""Recording of a training, first in its run directory, then by its `Tracker`."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from captcha_exp.config import Config, flatten_mapping
from captcha_exp.data.dataset import Dataset
from captcha_exp.errors import UserError
from captcha_exp.memory.plan import Plan
from captcha_exp.model.evaluate import Evaluation
from captcha_exp.model.state import TrainState
from captcha_exp.runs import MetricsRow, Run, RunEnd, list_checkpoints, now_ms, training_speed
from captcha_exp.runs.fields import changed_values, to_short_text
from captcha_exp.runs.info import ResultSummary
from captcha_exp.runs.source_code import write_source_info
from captcha_exp.runtime.shutdown import defer_signals
from captcha_exp.training import oom

logger = logging.getLogger(__name__)

NUMERICS_KEYS = {"python", "packages", "code_sha256", "device", "variables"}
"""groups of environment.json that can affect the numbers of a training"""


OnResult: TypeAlias = Callable[[Path, ResultSummary], object]
"""called with the directory of a run and its results before the figures are drawn; test.json is complete"""


class Tracker(Protocol):
    """Where a run is reported to in addition to its run directory."""

    def start(self, run: Run, config: Config) -> None: ...

    def log_metrics(self, row: MetricsRow) -> None: ...

    def finish(self) -> None: ...


class NullTracker:
    """A tracker that reports nothing: the run directory is the only record."""

    def start(self, run: Run, config: Config) -> None:
        pass

    def log_metrics(self, row: MetricsRow) -> None:
        pass

    def finish(self) -> None:
        pass


@dataclass(frozen=True)
class RunRecorder:
    """A run with its tracker."""

    run: Run
    tracker: Tracker
    on_result: OnResult | None = None

    def log_metrics(self, row: MetricsRow) -> None:
        """Log a row of metrics; one that was logged before an interruption is not logged again."""
        if self.run.log_metrics(row):
            self.tracker.log_metrics(row)

    def warn(self, message: str) -> None:
        """Log a warning, and add it to the record of the run."""
        logger.warning(message)
        self.run.add_warning(message)


@dataclass(frozen=True)
class TrainResult:
    """The result of a training."""

    run_dir: Path
    config: Config
    test: Evaluation
    best_epoch: int
    weights_sha256: str
    seconds: float
    process_peak_mib: float


@contextlib.contextmanager
def record_outcome(recorder: RunRecorder, config: Config) -> Iterator[None]:
    """Record how the run ends, in the run directory first, then by the tracker."""
    run = recorder.run
    try:
        recorder.tracker.start(run, config)
        yield
        end = RunEnd("FINISHED")
    except BaseException as exception:
        end = RunEnd.of(exception)
        if isinstance(exception, oom.TrainingOutOfMemoryError):
            end = RunEnd("FINISHED" if exception.is_result else "FAILED", str(exception))
        elif end.status == "KILLED":
            # A resumed reproduction would finish the run but give no verdict.
            hint = "; run the same command again to resume" if run.info.lineage.reproduces is None else ""
            kept = " and keeps its checkpoint" if list_checkpoints(run.checkpoint_dir) else ""
            logger.info(f"Interrupted: {run.run_dir} is marked KILLED{kept}{hint}")
        raise
    finally:
        with defer_signals():
            run.close(*end)
        recorder.tracker.finish()  # a signal may interrupt it: what is not sent is sent later


def record_test_results(
    result: TrainResult, data: Dataset, plan: Plan, state: TrainState, recorder: RunRecorder
) -> None:
    """Record the test results and the summary of the run, and draw the figures of its report in between."""
    run, test = recorder.run, result.test
    low, high = test.accuracy_interval
    metrics = test.metrics("test") | {"test/accuracy_low": low, "test/accuracy_high": high}
    metrics |= plan.prediction_error_metrics([row.metrics for row in run.metrics_rows()])
    recorder.log_metrics(MetricsRow(state.epoch, now_ms(), metrics))
    run.write_json("test.json", test.to_json(data))
    speed = training_speed(run.metrics_rows())
    summary = ResultSummary(
        epochs=state.epoch,
        best_epoch=state.best_epoch,
        val_accuracy=state.best_accuracy,
        test_accuracy=test.accuracy,
        weights_sha256=result.weights_sha256,
        seconds=result.seconds,
        process_peak_mib=result.process_peak_mib,
        speed_disturbed=speed is not None and speed.is_disturbed,
    )
    if recorder.on_result is not None:
        recorder.on_result(run.run_dir, summary)
    from captcha_exp.report import dataset_page, figures, run_page  # matplotlib, which no step needs

    if data.manifest["files"]:
        page = run.report_dir / "dataset.html"
        figures.try_to_plot(dataset_page.write_page, data, (), page, warn=recorder.warn)
    for name, plot, *arguments in (
        ("curves", figures.plot_curves, run.metrics_rows()),
        ("confusion", figures.plot_confusion_matrix, test, data.alphabet),
        ("misreads", figures.plot_misreads, test, data),
        ("images", figures.plot_samples, data.images[:30].numpy(), data.labels[:30]),
    ):
        figures.try_to_plot(plot, *arguments, run.report_dir / f"{name}.png", warn=recorder.warn)
    run.update(result=summary)
    page = run.report_dir.parent / run_page.RUN_PAGE
    figures.try_to_plot(run_page.write_page, run, test, data, page, warn=recorder.warn)


def check_dataset_unchanged(manifest: Mapping[str, Any], run: Run) -> None:
    """Check that a resumed run has the same images as when it started.

    Raises:
        UserError: they differ; restore the images or start a new run.
    """
    if not (run.run_dir / "dataset.json").exists():
        return
    before = run.read_json("dataset.json")
    for key in ("images_sha256", "labels_sha256", "splits"):
        if before.get(key) != manifest[key]:
            raise UserError(
                f"{run.run_dir}: the images have changed since the run started ({key} of dataset.json "
                "differs); restore them, or start a new run with --resume=never"
            )


def record_environment(environment: Mapping[str, Any], recorder: RunRecorder) -> None:
    """Write environment.json; for a resumed run, record and report its changes since the start."""
    run = recorder.run
    path = run.run_dir / "environment.json"
    if not path.exists():
        write_source_info(run)
        run.write_json(path.name, environment)
        return
    then, now = flatten_mapping(run.read_json(path.name)), flatten_mapping(environment)
    differing = changed_values(then, now, missing=None)
    if changed := {key: pair for key, pair in differing.items() if key.partition(".")[0] in NUMERICS_KEYS}:
        *earlier, current = run.info.resumed
        run.update(resumed=[*earlier, current.model_copy(update={"changed": changed})])
        changes = ", ".join(
            f"{key} {to_short_text(old)} -> {to_short_text(new)}" for key, (old, new) in changed.items()
        )
        recorder.warn(
            f"the environment has changed since the run started: {changes}; the result may differ from that "
            "of an uninterrupted run"
        )
