"""A sweep from its first point to its verdict.

Its parent stands in MLflow before the first point starts, and the verdict is made however the sweep ends.
"""

import json
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captcha_exp import runs
from captcha_exp.config import MlflowConfig, flatten
from captcha_exp.errors import RunFailed
from captcha_exp.runtime.console import Display
from captcha_exp.runtime.files import write_atomically
from captcha_exp.runtime.shutdown import TimeLimitReached, defer_signals
from captcha_exp.sweep import record as recorded
from captcha_exp.sweep.figure import save_figure
from captcha_exp.sweep.forecast import PlannedJob, record_skipped
from captcha_exp.sweep.record import DONE, Sweep
from captcha_exp.sweep.results import collect_results, is_running, outcome_of
from captcha_exp.sweep.summary import SweepSummary
from captcha_exp.tracking import finalize_run, make_tracker

if TYPE_CHECKING:
    from captcha_exp.tracking import SweepParentRun

EXIT_TIMEOUT_SECONDS = 5.0  # for the processes of a launcher that was stopped; they end with it

Launcher = Callable[[Path, Sequence[int]], None]
"""runs the points with these numbers of the sweep in this folder, and comes back when they have ended"""


def run_sweep(
    planned_jobs: Sequence[PlannedJob],
    launch: Launcher,
    parallelism: int,
    display: Display,
    on_complete: Callable[[Sweep, SweepSummary], None],
    resumed: Sweep | None = None,
    max_minutes: float | None = None,
) -> SweepSummary:
    """The verdict, after every point that was not settled yet has had its run; it is told however that ends.

    Raises:
        RunFailed: MLflow's store cannot be opened, or the launcher itself fails.
        TimeIsUp: so many minutes have passed; what is left of the points, the same command goes on with.
    """
    if resumed is None:
        about = {"foretold": [each.to_json() for each in planned_jobs], "side_by_side": parallelism}
        sweep = recorded.create_sweep(planned_jobs[0].config.name, [each.job for each in planned_jobs], about)
    else:
        sweep = resumed
        sweep.reopen()
    status: runs.Status = "FAILED"
    error: str | None = None
    parent = None
    try:
        sweep.set_deadline(max_minutes)
        parent = _start_parent_run(sweep, planned_jobs, display)
        _run_jobs(sweep, planned_jobs, launch, display)
        if sweep.deadline is not None and _is_out_of_time(sweep, sweep.deadline):
            raise TimeLimitReached(
                "train.max_minutes: the time is up; what the points have reached is saved, and the "
                "same command goes on"
            )
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit, TimeLimitReached) as interruption:
        status, error = "KILLED", type(interruption).__name__
        raise
    except Exception as exception:
        error = f"{type(exception).__name__}: {exception}"
        raise
    finally:
        with defer_signals():
            _finalize_stale_runs(sweep, display)
            verdict = SweepSummary(collect_results(sweep), parallelism)
            status = "FAILED" if status == "FINISHED" and verdict.has_failures else status
            is_written = _save_summary(verdict, sweep, status, error, parent, display)
            on_complete(sweep, verdict)
    if not is_written:
        again = f"--resume={shlex.quote(str(sweep.sweep_dir))}"
        raise RunFailed(f"{sweep.sweep_dir}: does not have the verdict; make room, and {again} writes it")
    return verdict


def _save_summary(
    verdict: SweepSummary,
    sweep: Sweep,
    status: runs.Status,
    error: str | None,
    parent: "SweepParentRun | None",
    display: Display,
) -> bool:
    """Whether the sweep's folder has the verdict; MLflow gets it, too."""
    try:
        _write_summary_files(verdict, sweep.sweep_dir)
        sweep.close(status, error)
        if parent is not None and parent.finish(
            sweep.sweep_dir, sweep.state, verdict.metrics_by_step(), verdict.to_markdown()
        ):
            sweep.update(mlflow={**sweep.state["mlflow"], "closed": True})
    except OSError as trouble:  # a full disk
        display.warn(f"the verdict cannot be written: {trouble}")
        return False
    return True


def _run_jobs(sweep: Sweep, found: Sequence[PlannedJob], launch: Launcher, display: Display) -> None:
    """Each point that is not settled: recorded where it is not to be trained, else launched."""
    display.info(f"sweep {sweep.sweep_dir}, {len(found)} points")
    open_points = [each for each in found if _last_outcome(sweep, each) not in DONE]
    if settled := len(found) - len(open_points):
        display.info(f"{settled} of them are settled already")
    for each in open_points:
        if not each.should_train:
            point, parent = each.job, (sweep.state["mlflow"] or {}).get("run_id")
            tracker = make_tracker(each.config, display, point.choices, point.name, parent)
            with defer_signals():
                record_skipped(each, sweep.new_attempt(point), tracker, display)
    if numbers := [each.job.number for each in open_points if each.should_train]:
        launch(sweep.sweep_dir, numbers)


def _is_out_of_time(sweep: Sweep, until: float) -> bool:
    """Whether the time ended a point, or kept one from being begun."""
    over = time.time() >= until
    return any(
        row.error == TimeLimitReached.__name__ if row.became == "killed" else over and row.became == "not run"
        for row in collect_results(sweep)
    )


def _last_outcome(sweep: Sweep, each: PlannedJob) -> str:
    attempts = sweep.attempts(each.job)
    return outcome_of(attempts[-1] if attempts else None)


def _write_summary_files(verdict: SweepSummary, folder: Path) -> None:
    """summary.json, .csv, .md and .png."""
    texts = {
        "json": json.dumps(verdict.to_json(), indent=2, ensure_ascii=False) + "\n",
        "csv": verdict.to_csv(),
        "md": verdict.to_markdown(),
    }
    for ending, text in texts.items():
        write_atomically(folder / f"verdict.{ending}", text.encode("utf-8", "backslashreplace"))
    save_figure(verdict, folder / "summary.png")


def _finalize_stale_runs(sweep: Sweep, display: Display) -> None:
    """A launcher that was stopped may have ended the processes of points with no time for a last word."""
    deadline = time.monotonic() + EXIT_TIMEOUT_SECONDS
    for point in sweep.jobs:
        for folder in sweep.attempts(point):
            while is_running(folder) and time.monotonic() < deadline:
                time.sleep(0.05)
            finalize_run(folder, "KILLED", "interrupted", display)


# -- in MLflow -----------------------------------------------------------------------------------------------


def _start_parent_run(sweep: Sweep, found: Sequence[PlannedJob], display: Display) -> "SweepParentRun | None":
    tracking = found[0].config.tracking  # resolved; the same for all points
    if not isinstance(tracking, MlflowConfig):
        return None
    from captcha_exp.tracking import SweepParentRun

    parent = SweepParentRun(tracking, display)
    known = (sweep.state["mlflow"] or {}).get("run_id")
    if known is None or not parent.resume(known):
        sweep.update(
            mlflow=parent.mlflow_ref
        )  # before there is a run, so that none stays that no folder knows of
        parent.start(sweep.sweep_dir, sweep.state, _params(found))
    sweep.update(mlflow=parent.mlflow_ref)
    return parent


def _params(found: Sequence[PlannedJob]) -> dict[str, str]:
    """Every leaf of the configs; what the points do not have in common, with all its values."""
    each = [flatten(foretold.config) for foretold in found]
    keys = dict.fromkeys(key for one in each for key in one)
    return {key: ", ".join(dict.fromkeys(one[key] for one in each if key in one)) for key in keys}
