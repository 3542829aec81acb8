"""What became of each point of a sweep, as the table of its verdict has it."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from captcha_exp.config import load
from captcha_exp.memory.interval import Fits, MiBRange
from captcha_exp.runs import MetricsRow, read_metrics_rows
from captcha_exp.runtime.process import is_alive
from captcha_exp.sweep.record import Job, Sweep

Outcome: TypeAlias = Literal["finished", "oom", "unfit", "failed", "killed", "not run"]
"""oom: too little memory; unfit: foretold not to fit, and so not trained; both are results"""


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """One point of a sweep: what it was, and what its last attempt came to."""

    number: int
    """from 1, in the order of the grid"""
    name: str
    """by what was swept, as in batch_size=64 seed=1"""
    swept: Mapping[str, str]
    """full key -> value as typed, in the order of the command; a conf group (model) is a key as any other"""
    became: Outcome
    error: str | None
    """one line, where it failed"""
    attempts: int
    batch_size: int | None
    """pictures in a step; None while it is auto and has not been found out"""
    micro_batch_size: int | None
    """of the last attempt, where a batch was split"""
    device: str
    """cpu, cuda ..."""
    budget_mib: MiBRange | None
    """what there is of a card; None: nobody says"""
    predicted_mib: MiBRange | None
    """of the whole process on the card"""
    fits: Fits | None
    measured_mib: float | None
    """peak of the process: of the card on CUDA, else of the machine's memory, which is another thing"""
    images_per_second: float | None
    """in training: the median of the epochs, without the first where there are more"""
    val_accuracy: float | None
    """of the best epoch; whole labels"""
    seconds_to_best: float | None
    """from the start of the first epoch to the end of the best"""
    test_accuracy: float | None
    folder: str | None
    run_id: str | None
    """of MLflow"""
    weights_sha256: str | None


def collect_results(sweep: Sweep) -> list[JobResult]:
    """A row for each point, by the last of its attempts."""
    return [_collect_result(sweep, point) for point in sweep.jobs]


def outcome_of(run_dir: Path | None) -> Outcome:
    """What the run in this folder came to."""
    if run_dir is None or not (run_dir / "run.json").is_file():
        return "not run"
    state = _read_state(run_dir)
    match state["status"]:
        case "FINISHED":
            return "oom" if state.get("oom") else "unfit" if state.get("unfit") else "finished"
        case "FAILED":
            return "failed"
        case _:
            return "killed"


def is_running(run_dir: Path) -> bool:
    """Whether a living process writes into this folder of a run."""
    state = _read_state(run_dir) if (run_dir / "run.json").is_file() else {"status": None}
    return state["status"] == "RUNNING" and is_alive(state)


def _collect_result(sweep: Sweep, job: Job) -> JobResult:
    attempts = sweep.attempts(job)
    folder = attempts[-1] if attempts else None
    what = outcome_of(folder)
    foretold = sweep.state["foretold"][job.number - 1]
    state: Mapping[str, Any] = {}
    metrics: list[MetricsRow] = []
    config = job.requested
    if folder is not None and what != "not run":
        state, metrics = _read_state(folder), read_metrics_rows(folder)[0]
        if (folder / "config.yaml").is_file():  # not, if it was killed before
            config = load(folder / "config.yaml")
        if (folder / "memory.json").is_file():
            foretold = json.loads((folder / "memory.json").read_text(encoding="utf-8"))
    result = state.get("result") or {}
    size, micro = config.train.batch_size, config.train.micro_batch_size
    return JobResult(
        number=job.number,
        name=job.name,
        swept=job.swept,
        became=what,
        error=state.get("error"),
        attempts=len(attempts),
        batch_size=None if size == "auto" else size,
        micro_batch_size=micro,
        device=config.device.name,
        budget_mib=_parse_range(foretold, "budget_mib"),
        predicted_mib=_parse_range(foretold, "process_mib"),
        fits=None if foretold is None else foretold["fits"],
        measured_mib=max(_values(metrics, "memory/process_peak_mib"), default=None),
        images_per_second=_median_speed(metrics),
        val_accuracy=max(_values(metrics, "val/accuracy"), default=None),
        seconds_to_best=_seconds_to_epoch(metrics, result.get("best_epoch")),
        test_accuracy=result.get("test_accuracy"),
        folder=None if folder is None else str(folder),
        run_id=(state.get("mlflow") or {}).get("run_id"),
        weights_sha256=result.get("weights_sha256"),
    )


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {"status": "FAILED", "error": f"{path}: cannot be read as the record of a run"}
    return state


def _parse_range(foretold: Mapping[str, Any] | None, key: str) -> MiBRange | None:
    return None if foretold is None or foretold[key] is None else MiBRange(*foretold[key])


def _values(metrics: Sequence[MetricsRow], key: str) -> list[float]:
    return [row.metrics[key] for row in metrics if key in row.metrics]


def _median_speed(metrics: Sequence[MetricsRow]) -> float | None:
    speeds = _values(metrics, "speed/images_per_second")
    return statistics.median(speeds[1:] or speeds) if speeds else None


def _seconds_to_epoch(metrics: Sequence[MetricsRow], best_epoch: int | None) -> float | None:
    if best_epoch is None:
        return None
    return sum(r.metrics.get("speed/epoch_seconds", 0.0) for r in metrics if r.step <= best_epoch)
