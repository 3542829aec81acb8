"""Run a sweep: start its MLflow parent run, run the jobs, and save the summary however it ends."""

import json
import logging
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from captcha_exp import runs
from captcha_exp.config import MlflowConfig
from captcha_exp.errors import RunFailed
from captcha_exp.report.figures import try_to_plot
from captcha_exp.runs.info import running_fields
from captcha_exp.runtime.files import write_atomically
from captcha_exp.runtime.shutdown import TimeLimitReached, defer_signals
from captcha_exp.runtime.text import preview
from captcha_exp.sweep import page, record
from captcha_exp.sweep.figure import save_figure
from captcha_exp.sweep.planner import PlannedJob, record_skipped
from captcha_exp.sweep.record import DONE, Sweep
from captcha_exp.sweep.results import Attempts, collect_results, get_attempts
from captcha_exp.sweep.summary import SweepSummary
from captcha_exp.tracking import make_tracker
from captcha_exp.tracking.sync import finalize_run, sync_in_background
from captcha_exp.tracking.tracker import Sender

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
    rerun_disturbed: bool = False,
) -> SweepSummary:
    """Run every job that is not done yet, or whose speed was disturbed; then save and return the summary.

    `on_complete` gets the summary however the sweep ends.

    Raises:
        RunFailed: tracking.required is set and the store cannot be used, the launcher failed, or the summary
            cannot be written.
        TimeLimitReached: `max_minutes` have passed; the same command resumes the sweep.
    """
    if resumed is None:
        jobs, plans = [each.job for each in planned_jobs], [each.plan for each in planned_jobs]
        predicted = [None if plan is None else plan.to_json() for plan in plans]
        sweep = record.create_sweep(planned_jobs[0].config.name, jobs, predicted, parallelism)
    else:
        sweep = resumed
        sweep.update(**running_fields())
    is_saved, sender = True, None
    try:
        sweep.set_deadline(max_minutes)
        tracking = planned_jobs[0].config.tracking  # resolved; the same for all jobs
        if isinstance(tracking, MlflowConfig):
            sender = Sender(sweep, tracking)
        launched = _run_jobs(sweep, planned_jobs, launch, rerun_disturbed)
        if sweep.deadline is not None and _is_out_of_time(sweep, launched, sweep.deadline):
            raise TimeLimitReached(
                "train.max_minutes: time limit reached; progress is saved, run the same command to resume"
            )
        end = runs.RunEnd("FINISHED")
    except BaseException as exception:
        end = runs.RunEnd.of(exception)
        raise
    finally:
        with defer_signals():
            _finalize_stale_runs(sweep)
            summary = SweepSummary(collect_results(sweep), parallelism)
            if end.status == "FINISHED" and summary.has_failures:
                end = runs.RunEnd("FAILED")
            try:
                _write_summary_files(summary, sweep)
                sweep.close(*end)
                if sender is not None:
                    sender.finish()
                    sync_in_background()  # jobs that ended before the sweep was in MLflow
            except OSError as exception:  # a full disk
                logger.warning(f"{sweep.run_dir}: cannot write the summary: {exception}")
                is_saved = False
            on_complete(sweep, summary)
    again = [each for each in summary.results if each.number in launched and each.outcome == "finished"]
    if names := [each.name for each in again if each.error]:
        raise RunFailed(f"{preview(names)}: could not be trained again; the earlier results count")
    if not is_saved:
        option = f"--resume={shlex.quote(str(sweep.run_dir))}"
        raise RunFailed(f"{sweep.run_dir}: no summary; free disk space and write it with {option}")
    return summary


def _run_jobs(
    sweep: Sweep, planned_jobs: Sequence[PlannedJob], launch: Launcher, rerun_disturbed: bool
) -> dict[int, Attempts]:
    """Launch each job that is not done; record those that are not to be trained as skipped.

    Returns the numbers of the launched jobs, each with its attempts before.
    """
    logger.info(f"sweep {sweep.run_dir}, {len(planned_jobs)} jobs")
    results = [result for result in collect_results(sweep) if result.outcome in DONE]
    done = {result.number for result in results if not (rerun_disturbed and result.disturbed)}
    if rerun_disturbed:
        names = ", ".join(result.name for result in results if result.number not in done)
        logger.info(f"training again: {names}" if names else "no speed was disturbed")
    pending = [each for each in planned_jobs if each.job.number not in done]
    if done:
        logger.info(f"{len(done)} of {len(planned_jobs)} jobs are already done")
    for each in pending:
        if not each.should_train:
            job = each.job
            tracker = make_tracker(each.config, job.choices, job.name)
            with defer_signals():
                record_skipped(each, sweep.new_attempt(job), tracker)
    numbers = [each.job.number for each in pending if each.should_train]
    before = {number: get_attempts(sweep, number) for number in numbers}
    if numbers:
        launch(sweep.run_dir, numbers)
    return before


def _is_out_of_time(sweep: Sweep, launched: Mapping[int, Attempts], deadline: float) -> bool:
    """Return whether the time limit ended a launched job, or kept one from starting."""
    is_over = time.time() >= deadline
    after = {number: get_attempts(sweep, number) for number in launched}
    return any(
        (after[number].outcome == "killed" and after[number].stop_reason == "time limit")
        or (is_over and after[number] == before)
        for number, before in launched.items()
    )


def _write_summary_files(summary: SweepSummary, sweep: Sweep) -> None:
    """Write summary.json, .csv, .md, .png and .html, and metrics.jsonl for MLflow."""
    sweep_dir = sweep.run_dir
    rows = [runs.MetricsRow(step, runs.now_ms(), metrics) for step, metrics in summary.metrics_by_step()]
    texts = {
        "summary.json": json.dumps(summary.to_json(), indent=2, ensure_ascii=False) + "\n",
        "summary.csv": summary.to_csv(),
        "summary.md": summary.to_markdown(),
        "metrics.jsonl": "".join(row.to_line() for row in rows),
    }
    for name, text in texts.items():
        write_atomically(sweep_dir / name, text.encode("utf-8", "backslashreplace"))
    save_figure(summary, sweep_dir / "summary.png")
    try_to_plot(page.write_page, sweep, summary, sweep_dir / page.SWEEP_PAGE)


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
