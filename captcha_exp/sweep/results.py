"""Collect the result of each job of a sweep from its latest run."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from captcha_exp.errors import UserError
from captcha_exp.memory.interval import Fits, MiBRange
from captcha_exp.runs import MetricsRow, RunInfo, load, training_speed
from captcha_exp.runs.content import PlannedMemory
from captcha_exp.runtime.shutdown import StopReason
from captcha_exp.sweep.record import Job, Sweep

logger = logging.getLogger(__name__)

Outcome: TypeAlias = Literal["finished", "oom", "skipped", "failed", "killed", "not run"]
"""oom: out of memory; skipped: not predicted to fit, and so not trained; both count as results"""


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """Settings and result of one job, from the attempt that counts."""

    number: int
    """from 1, in the order of the grid"""
    name: str
    """the swept overrides, as in batch_size=64 seed=1"""
    swept: Mapping[str, str]
    """full key -> value as typed, in the order of the command; includes config groups such as model"""
    outcome: Outcome
    error: str | None
    """one line, if the job failed, or a later attempt has no result"""
    stop_reason: StopReason | None
    """why it was killed"""
    attempts: int
    batch_size: int | None
    """images per step; None for auto until it has been measured"""
    micro_batch_size: int | None
    """of that attempt, if batches were split"""
    device: str
    """cpu, cuda, ..."""
    budget_mib: MiBRange | None
    """GPU memory available; None if unknown"""
    predicted_mib: MiBRange | None
    """GPU memory of the whole process"""
    fits: Fits | None
    measured_mib: float | None
    """peak memory of the process: GPU memory on CUDA, else RAM, which the prediction does not cover"""
    images_per_second: float | None
    """training speed, as in `training_speed`"""
    disturbed: bool = False
    """whether other processes took the cores during the whole training: its speed proves nothing"""
    val_accuracy: float | None
    """exact match, best epoch"""
    seconds_to_best: float | None
    """from the start of the first epoch to the end of the best"""
    test_accuracy: float | None
    run_dir: str | None
    run_id: str | None
    """MLflow run ID"""
    weights_sha256: str | None


def collect_results(sweep: Sweep) -> list[JobResult]:
    """Return the result of each job from the attempt that counts."""
    return [_collect_result(sweep, job) for job in sweep.jobs]


def _collect_result(sweep: Sweep, job: Job) -> JobResult:
    attempts = sweep.attempts(job)
    run_dir = _attempt_that_counts(attempts)
    outcome: Outcome = "not run"
    error: str | None = None
    info: RunInfo | None = None
    config, plan = job.requested, sweep.info.predicted[job.number - 1]
    metrics: list[MetricsRow] = []
    if run_dir is not None and (run_dir / RunInfo.filename).is_file():
        try:
            run = load(run_dir)
            info = run.info
            outcome, error = _outcome_of(info), info.error
            metrics = run.metrics_rows()
            if (run_dir / "config.yaml").is_file():  # it can be missing only if it was deleted
                config = run.config()
            if (run_dir / "memory.json").is_file():
                plan = PlannedMemory.model_validate(run.read_json("memory.json"))
        except UserError as damage:
            outcome, error = "failed", str(damage)
    if run_dir is not None and run_dir != attempts[-1]:
        reason = _why_without_result(attempts[-1])
        error = f"trained again without a result ({reason}); its earlier one counts"
    result = None if info is None else info.result
    speed = training_speed(metrics)
    size, micro = config.train.batch_size, config.train.micro_batch_size
    return JobResult(
        number=job.number,
        name=job.name,
        swept=job.swept,
        outcome=outcome,
        error=error,
        stop_reason=None if info is None else info.stop_reason,
        attempts=len(attempts),
        batch_size=None if size == "auto" else size,
        micro_batch_size=micro,
        device=config.device.name,
        budget_mib=None if plan is None or plan.budget_mib is None else MiBRange(*plan.budget_mib),
        predicted_mib=None if plan is None else MiBRange(*plan.process_mib),
        fits=None if plan is None else plan.fits,
        measured_mib=max(_values(metrics, "memory/process_peak_mib"), default=None),
        images_per_second=None if speed is None else speed.images_per_second,
        disturbed=speed is not None and speed.is_disturbed,
        val_accuracy=max(_values(metrics, "val/accuracy"), default=None),
        seconds_to_best=None if result is None else _seconds_to_epoch(metrics, result.best_epoch),
        test_accuracy=None if result is None else result.test_accuracy,
        run_dir=None if run_dir is None else str(run_dir),
        run_id=None if info is None else info.run_id,
        weights_sha256=None if result is None else result.weights_sha256,
    )


def _attempt_that_counts(attempts: Sequence[Path]) -> Path | None:
    """Return the last attempt that finished training, else the last one; None without attempts."""
    for run_dir in reversed(attempts if len(attempts) > 1 else []):
        with contextlib.suppress(UserError):
            if _outcome_of(RunInfo.load(run_dir)) == "finished":
                return run_dir
    return attempts[-1] if attempts else None


def _why_without_result(run_dir: Path) -> str:
    """Return in a few words why an attempt has no result."""
    try:
        info = RunInfo.load(run_dir)
    except UserError as damage:
        return str(damage)
    return info.error or info.stop_reason or _outcome_of(info)


class Attempts(NamedTuple):
    """The attempts of a job so far."""

    number: int
    outcome: Outcome
    """of the last one"""
    stop_reason: StopReason | None
    """why it was killed"""


def get_attempts(sweep: Sweep, number: int) -> Attempts:
    """Return the attempts of a job."""
    attempts = sweep.attempts(sweep.jobs[number - 1])
    if not attempts:
        return Attempts(0, "not run", None)
    try:
        info = RunInfo.load(attempts[-1])
    except UserError:
        return Attempts(len(attempts), "failed", None)
    return Attempts(len(attempts), _outcome_of(info), info.stop_reason)


def _outcome_of(info: RunInfo) -> Outcome:
    if info.status == "FINISHED":
        return "oom" if info.oom else "skipped" if info.skipped else "finished"
    return "failed" if info.status == "FAILED" else "killed"


def _values(metrics: Sequence[MetricsRow], key: str) -> list[float]:
    return [row.metrics[key] for row in metrics if key in row.metrics]


def _seconds_to_epoch(metrics: Sequence[MetricsRow], best_epoch: int) -> float:
    return sum(row.metrics.get("speed/epoch_seconds", 0.0) for row in metrics if row.step <= best_epoch)
