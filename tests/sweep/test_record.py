"""Test the record of a sweep, the planning of its jobs and the collection of their results."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import mlflow_ref, out_of_memory, result_summary, with_train

from captcha_exp.config import Config
from captcha_exp.errors import DamagedFile, UserError
from captcha_exp.memory.interval import Fits, MiBRange
from captcha_exp.runs import MetricsRow, create_run
from captcha_exp.runs.info import Skipped
from captcha_exp.sweep.planner import PlannedJob, plan_jobs
from captcha_exp.sweep.record import (
    Job,
    Sweep,
    create_sweep,
    find_sweep,
    has_same_jobs,
    list_sweeps,
)
from captcha_exp.sweep.results import collect_results


def make_job(tiny: Config, swept: Mapping[str, str] | None = None, number: int = 1) -> Job:
    return Job(number=number, swept=swept or {}, choices={"model": "compact"}, requested=tiny)


def make_sweep(jobs: list[Job]) -> Sweep:
    return create_sweep("some", jobs, [None] * len(jobs), 1)


@pytest.mark.parametrize(
    ("swept", "name"),
    [
        ({"train.batch_size": "64"}, "batch_size=64"),
        ({"train.batch_size": "64", "seed": "1"}, "batch_size=64 seed=1"),
        ({"captcha.width": "56", "data.width": "160"}, "captcha.width=56 data.width=160"),
        (
            {"captcha.width": "56", "data.width": "160", "seed": "1"},
            "captcha.width=56 data.width=160 seed=1",
        ),
        ({"model": "compact"}, "model=compact"),
        ({}, "tiny"),
    ],
)
def test_a_job_is_named_by_its_swept_overrides(tiny: Config, swept: dict[str, str], name: str) -> None:
    assert make_job(tiny, swept).name == name


def test_each_attempt_has_its_own_run_directory(tiny: Config, root: Path) -> None:
    first = make_job(tiny, {"data.path": "'/a b/ü$[x]'"})
    sweep = make_sweep([first, make_job(tiny, {"data.path": "'/a b/ö$[x]'"}, 2)])

    run_dirs = [sweep.new_attempt(sweep.jobs[0]) for _ in range(3)]
    assert sweep.attempts(sweep.jobs[0]) == run_dirs
    assert [run_dir.name for run_dir in run_dirs] == [
        "1-path=_a_b_x_",
        "1-path=_a_b_x_-2",
        "1-path=_a_b_x_-3",
    ]
    assert sweep.attempts(sweep.jobs[1]) == []
    assert sweep.new_attempt(sweep.jobs[1]).name == "2-path=_a_b_x_"


def test_a_sweep_survives_a_round_trip_through_its_directory(tiny: Config, root: Path) -> None:
    jobs = [make_job(with_train(tiny, batch_size=n), {"train.batch_size": str(n)}, n) for n in (1, 2, 3)]
    loaded = Sweep(make_sweep(jobs).run_dir)

    assert loaded.jobs == jobs
    assert has_same_jobs(loaded, jobs)
    assert not has_same_jobs(loaded, jobs[:2])
    assert not has_same_jobs(loaded, [*jobs[:2], replace(jobs[2], requested=replace(tiny, seed=9))])
    assert loaded.info.has_live_process(), "in this process"


def test_find_sweep_by_directory_or_run_id(tiny: Config, root: Path) -> None:
    first, second = make_sweep([make_job(tiny)]), make_sweep([make_job(tiny)])
    first.update(mlflow=mlflow_ref("abc1"))
    second.update(mlflow=mlflow_ref("abd2"))

    assert [sweep.run_dir for sweep in list_sweeps()] == [first.run_dir, second.run_dir]
    assert find_sweep(str(first.run_dir)).run_dir == first.run_dir
    assert find_sweep(str(first.run_dir.relative_to(root))).run_dir == first.run_dir
    assert find_sweep("abd").run_dir == second.run_dir
    with pytest.raises(UserError, match=r"--resume=ab: matches 2 sweeps; give more of the run ID"):
        find_sweep("ab")
    with pytest.raises(UserError, match=r"--resume=nothing: not a sweep; give a directory"):
        find_sweep("nothing")


@pytest.mark.parametrize("damage", ["{", "[]", "[" * 100_000, '{"format": 2, "status": "KILLED"}'])
def test_a_damaged_record_is_a_one_line_error(tiny: Config, root: Path, damage: str) -> None:
    sweep = make_sweep([make_job(tiny)])
    (sweep.run_dir / "sweep.json").write_text(damage)

    with pytest.raises(
        UserError, match=r"sweep.json: (cannot be read|is not a valid sweep.json): "
    ) as caught:
        Sweep(sweep.run_dir)
    assert len(caught.value.lines) == 1
    assert list_sweeps() == []


# -- planning ------------------------------------------------------------------------------------------------


def test_a_job_with_automatic_batch_size_has_no_plan(tiny: Config, root: Path) -> None:
    automatic = make_job(with_train(tiny, batch_size="auto"))
    fixed = make_job(with_train(tiny, batch_size=8), number=2)
    first, second = plan_jobs([automatic, fixed])

    assert first.plan is None
    assert first.should_train
    assert second.plan is not None
    assert second.plan.batch_size == 8
    assert second.config.train.on_oom == "fail"


@pytest.mark.parametrize(
    ("fits", "device", "run_over_budget", "should_train"),
    [
        ("fits", "cpu", False, True),
        (None, "cpu", False, True),
        ("unsure", "cpu", False, False),
        ("does not fit", "cpu", False, False),
        ("does not fit", "cpu", True, True),
        ("does not fit", "cuda:0", False, True),
    ],
)
def test_a_job_over_budget_is_trained_only_on_cuda_or_on_request(
    tiny: Config, root: Path, fits: Fits | None, device: str, run_over_budget: bool, should_train: bool
) -> None:
    (planned,) = plan_jobs([make_job(tiny)])
    assert planned.plan is not None
    config = replace(
        planned.config,
        device=replace(planned.config.device, name=device),
        sweep=replace(planned.config.sweep, run_over_budget=run_over_budget),
    )

    changed: PlannedJob = replace(planned, plan=replace(planned.plan, fits=fits), config=config)
    assert changed.should_train is should_train


# -- results -------------------------------------------------------------------------------------------------


def test_the_result_is_that_of_the_latest_attempt(tiny: Config, root: Path) -> None:
    sweep = make_sweep([make_job(tiny), make_job(tiny, {"seed": "1"}, 2)])
    for status in ("FAILED", "FINISHED"):
        run = create_run(tiny, tiny, sweep.new_attempt(sweep.jobs[0]))
        for epoch, speed in enumerate((10.0, 100.0, 300.0), 1):
            metrics = {
                "speed/images_per_second": speed,
                "speed/disturbed": float(status == "FAILED" or epoch == 2),
                "speed/epoch_seconds": 2.0,
                "val/accuracy": 0.5 + epoch % 2 / 4,
                "memory/process_peak_mib": 100.0 * epoch,
            }
            run.log_metrics(MetricsRow(epoch, epoch, metrics))
        run.update(result=result_summary(best_epoch=1, test_accuracy=0.25, weights_sha256="ab"))
        run.close(status)
    first, second = collect_results(sweep)

    assert (first.outcome, first.attempts, second.outcome, second.attempts) == ("finished", 2, "not run", 0)
    assert (first.images_per_second, first.disturbed) == (300, False), "the second epoch was disturbed"
    assert (first.val_accuracy, first.seconds_to_best, first.measured_mib) == (0.75, 2.0, 300.0)
    assert (first.test_accuracy, first.weights_sha256) == (0.25, "ab")
    assert first.run_dir is not None
    assert first.run_dir.endswith("-2")


@pytest.mark.parametrize(
    ("name", "outcome"), [("memory.json", "failed"), ("config.yaml", "failed"), ("run.json", "failed")]
)
@pytest.mark.parametrize("damage", [b"{", b"[1]", b"\xff"])
def test_a_damaged_file_of_one_job_does_not_end_the_sweep(
    tiny: Config, root: Path, caplog: pytest.LogCaptureFixture, name: str, outcome: str, damage: bytes
) -> None:
    sweep = make_sweep([make_job(tiny), make_job(tiny, {"seed": "1"}, 2)])
    for job in sweep.jobs:
        run = create_run(tiny, tiny, sweep.new_attempt(job))
        run.write_json("memory.json", {"process_mib": [1.0, 2.0], "budget_mib": None, "fits": None})
        run.close("FINISHED")
    path = sweep.attempts(sweep.jobs[0])[0] / name
    path.write_bytes(damage)
    first, second = collect_results(sweep)
    assert (first.outcome, second.outcome) == (outcome, "finished")
    assert second.predicted_mib == MiBRange(1.0, 2.0)
    assert str(path) in (first.error or caplog.text)


@pytest.mark.parametrize(
    ("status", "fields", "outcome"),
    [
        ("FINISHED", {}, "finished"),
        ("FINISHED", {"oom": out_of_memory()}, "oom"),
        ("FINISHED", {"skipped": Skipped(remedies=[])}, "skipped"),
        ("FAILED", {"error": "no"}, "failed"),
        ("FAILED", {"oom": out_of_memory()}, "failed"),
        ("KILLED", {"stop_reason": "time limit"}, "killed"),
        ("RUNNING", {}, "killed"),
    ],
)
def test_the_outcome_follows_from_the_run_record(
    tiny: Config, root: Path, status: str, fields: dict[str, object], outcome: str
) -> None:
    sweep = make_sweep([make_job(tiny)])
    run = create_run(tiny, tiny, sweep.new_attempt(sweep.jobs[0]))
    run.update(status=status, **fields)

    (result,) = collect_results(sweep)
    assert result.outcome == outcome
    assert (result.error, result.stop_reason) == (fields.get("error"), fields.get("stop_reason"))
    assert json.loads((sweep.run_dir / "sweep.json").read_text())["jobs"][0]["name"] == "tiny"


@pytest.mark.parametrize("damage", ["edited", "missing", "a pipe"])
def test_the_config_of_a_job_is_verified(tiny: Config, damage: str) -> None:
    sweep = make_sweep([make_job(tiny), make_job(tiny, number=2)])
    path = sweep.run_dir / "jobs" / "2.yaml"
    text = path.read_text()
    path.unlink()
    if damage == "edited":
        path.write_text(text.replace("seed: 0", "seed: 1"))
    elif damage == "a pipe":
        os.mkfifo(path)
    with pytest.raises(DamagedFile, match=r"2.yaml: (was edited|cannot be read: ).*--resume=never"):
        Sweep(sweep.run_dir)
    assert list_sweeps() == []


def test_the_jobs_of_a_record_are_numbered(tiny: Config) -> None:
    sweep = make_sweep([make_job(tiny), make_job(tiny, number=2)])
    sweep.update(jobs=sweep.info.jobs[::-1])
    with pytest.raises(DamagedFile, match=r"not numbered from 1"):
        Sweep(sweep.run_dir)
