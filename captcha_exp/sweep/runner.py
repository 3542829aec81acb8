"""Run a sweep: start its MLflow parent run, run the jobs, and save the summary however it ends."""

import json
import logging
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captcha_exp import runs
from captcha_exp.config import MlflowConfig, flatten
from captcha_exp.errors import RunFailed
from captcha_exp.runtime.files import write_atomically
from captcha_exp.runtime.shutdown import STOPPED, StopReason, TimeLimitReached, defer_signals, stop_reason
from captcha_exp.sweep import record
from captcha_exp.sweep.figure import save_figure
from captcha_exp.sweep.forecast import PlannedJob, record_skipped
from captcha_exp.sweep.record import DONE, Sweep
from captcha_exp.sweep.results import collect_results
from captcha_exp.sweep.summary import SweepSummary
from captcha_exp.tracking import make_tracker
from captcha_exp.tracking.sync import finalize_run

if TYPE_CHECKING:
    from captcha_exp.tracking.parent_run import SweepParentRun

logger = logging.getLogger(__name__)

EXIT_TIMEOUT_SECONDS = 5.0  # for the processes of a stopped launcher to exit

Launcher = Callable[[Path, Sequence[int]], None]
"""runs the jobs with these numbers of the sweep in this directory, and returns when all have ended"""


def run_sweep(
    planned_jobs: Sequence[PlannedJob],
    launch: Launcher,
    parallelism: int,
    on_complete: Callable[[Sweep, SweepSummary], None],
    resumed: Sweep | None = None,
    max_minutes: float | None = None,
) -> SweepSummary:
    """Run every job that is not done yet, then save and return the summary.

    `on_complete` gets the summary however the sweep ends.

    Raises:
        RunFailed: the MLflow store cannot be opened, the launcher failed, or the summary cannot be written.
        TimeLimitReached: `max_minutes` have passed; the same command resumes the sweep.
    """
    if resumed is None:
        jobs, predicted = [each.job for each in planned_jobs], [each.to_json() for each in planned_jobs]
        sweep = record.create_sweep(planned_jobs[0].config.name, jobs, predicted, parallelism)
    else:
        sweep = resumed
        sweep.reopen()
    status: runs.Status = "FAILED"
    error: str | None = None
    reason: StopReason | None = None
    parent = None
    try:
        sweep.set_deadline(max_minutes)
        parent = _start_parent_run(sweep, planned_jobs)
        _run_jobs(sweep, planned_jobs, launch)
        if sweep.deadline is not None and _is_out_of_time(sweep, sweep.deadline):
            raise TimeLimitReached(
                "train.max_minutes: time limit reached; progress is saved, run the same command to resume"
            )
        status = "FINISHED"
    except STOPPED as interruption:
        status, reason = "KILLED", stop_reason(interruption)
        raise
    except Exception as exception:
        error = f"{type(exception).__name__}: {exception}"
        raise
    finally:
        with defer_signals():
            _finalize_stale_runs(sweep)
            summary = SweepSummary(collect_results(sweep), parallelism)
            status = "FAILED" if status == "FINISHED" and summary.has_failures else status
            is_saved = _save_summary(summary, sweep, (status, error, reason), parent)
            on_complete(sweep, summary)
    if not is_saved:
        option = f"--resume={shlex.quote(str(sweep.run_dir))}"
        raise RunFailed(f"{sweep.run_dir}: no summary; free disk space and write it with {option}")
    return summary


def _save_summary(
    summary: SweepSummary,
    sweep: Sweep,
    final: tuple[runs.Status, str | None, StopReason | None],
    parent: "SweepParentRun | None",
) -> bool:
    """Save the summary in the sweep directory and in MLflow; return False on a write error."""
    try:
        _write_summary_files(summary, sweep.run_dir)
        sweep.close(*final)
        if parent is not None and parent.finish(sweep, summary.metrics_by_step(), summary.to_markdown()):
            sweep.update_mlflow(closed=True)
    except OSError as exception:  # a full disk
        logger.warning(f"{sweep.run_dir}: cannot write the summary: {exception}")
        return False
    return True


def _run_jobs(sweep: Sweep, planned_jobs: Sequence[PlannedJob], launch: Launcher) -> None:
    """Launch each job that is not done; record those that are not to be trained as skipped."""
    logger.info(f"sweep {sweep.run_dir}, {len(planned_jobs)} jobs")
    done = {result.number for result in collect_results(sweep) if result.outcome in DONE}
    pending = [each for each in planned_jobs if each.job.number not in done]
    if done:
        logger.info(f"{len(done)} of {len(planned_jobs)} jobs are already done")
    for each in pending:
        if not each.should_train:
            job = each.job
            tracker = make_tracker(each.config, job.choices, job.name, sweep.info.run_id)
            with defer_signals():
                record_skipped(each, sweep.new_attempt(job), tracker)
    if numbers := [each.job.number for each in pending if each.should_train]:
        launch(sweep.run_dir, numbers)


def _is_out_of_time(sweep: Sweep, deadline: float) -> bool:
    """Return whether the time limit ended a job or kept one from starting."""
    is_over = time.time() >= deadline
    return any(
        result.stop_reason == "time limit"
        if result.outcome == "killed"
        else is_over and result.outcome == "not run"
        for result in collect_results(sweep)
    )


def _write_summary_files(summary: SweepSummary, sweep_dir: Path) -> None:
    """Write summary.json, .csv, .md and .png."""
    texts = {
        "json": json.dumps(summary.to_json(), indent=2, ensure_ascii=False) + "\n",
        "csv": summary.to_csv(),
        "md": summary.to_markdown(),
    }
    for suffix, text in texts.items():
        write_atomically(sweep_dir / f"summary.{suffix}", text.encode("utf-8", "backslashreplace"))
    save_figure(summary, sweep_dir / "summary.png")


def _finalize_stale_runs(sweep: Sweep) -> None:
    """Close the runs whose processes a stopped launcher killed before they could close them."""
    deadline = time.monotonic() + EXIT_TIMEOUT_SECONDS
    for job in sweep.jobs:
        for run_dir in sweep.attempts(job):
            while _is_running(run_dir) and time.monotonic() < deadline:
                time.sleep(0.05)
            finalize_run(run_dir, None)


def _is_running(run_dir: Path) -> bool:
    """Return whether a live process is writing to this run directory."""
    run = runs.StaleRun.load(runs.RunInfo, run_dir)
    return run is not None and run.info.has_live_process()


# -- in MLflow -----------------------------------------------------------------------------------------------


def _start_parent_run(sweep: Sweep, planned_jobs: Sequence[PlannedJob]) -> "SweepParentRun | None":
    tracking = planned_jobs[0].config.tracking  # resolved; the same for all jobs
    if not isinstance(tracking, MlflowConfig):
        return None
    from captcha_exp.tracking.parent_run import SweepParentRun

    parent = SweepParentRun(tracking)
    known = sweep.info.run_id
    if known is None or not parent.resume(known):
        sweep.update(mlflow=parent.mlflow_ref)  # before the run exists: no run without a reference to it
        parent.start(sweep, _params(planned_jobs))
    sweep.update(mlflow=parent.mlflow_ref)
    return parent


def _params(planned_jobs: Sequence[PlannedJob]) -> dict[str, str]:
    """Return every config key with its value, or with all its values if the jobs differ in it."""
    configs = [flatten(planned_job.config) for planned_job in planned_jobs]
    keys = dict.fromkeys(key for config in configs for key in config)
    return {key: ", ".join(dict.fromkeys(config[key] for config in configs if key in config)) for key in keys}
