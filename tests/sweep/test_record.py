"""The points of a sweep before they run, and the folder that they run in."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Heard, training

from captcha_exp.config import Config
from captcha_exp.errors import UserError
from captcha_exp.memory.interval import Fits
from captcha_exp.runs import MetricsRow
from captcha_exp.runs import create_run as new_run
from captcha_exp.sweep.forecast import PlannedJob, plan_jobs
from captcha_exp.sweep.record import (
    Job,
    Sweep,
    create_sweep,
    find_sweep,
    has_same_jobs,
    is_running,
    list_sweeps,
)
from captcha_exp.sweep.results import collect_results


def point(tiny: Config, swept: Mapping[str, str] | None = None, number: int = 1) -> Job:
    return Job(number=number, swept=swept or {}, choices={"model": "compact"}, requested=tiny)


def made(points: list[Job]) -> Sweep:
    return create_sweep("some", points, {"foretold": [None] * len(points), "side_by_side": 1})


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
def test_a_point_is_named_by_what_was_swept(tiny: Config, swept: dict[str, str], name: str) -> None:
    assert point(tiny, swept).name == name


def test_each_attempt_has_a_folder_of_its_own_in_the_sweeps(tiny: Config, root: Path) -> None:
    odd = point(tiny, {"data.path": "'/a b/ü$[x]'"})
    sweep = made([odd, point(tiny, {"data.path": "'/a b/ö$[x]'"}, 2)])

    folders = [sweep.new_attempt(sweep.jobs[0]) for _ in range(3)]
    assert sweep.attempts(sweep.jobs[0]) == folders
    assert [folder.name for folder in folders] == ["1-path=_a_b_x_", "1-path=_a_b_x_-2", "1-path=_a_b_x_-3"]
    assert sweep.attempts(sweep.jobs[1]) == []
    assert sweep.new_attempt(sweep.jobs[1]).name == "2-path=_a_b_x_"


def test_a_sweep_is_read_as_it_was_written(tiny: Config, root: Path) -> None:
    points = [point(training(tiny, batch_size=n), {"train.batch_size": str(n)}, n) for n in (1, 2, 3)]
    sweep = made(points)
    again = Sweep(sweep.sweep_dir)

    assert again.jobs == points
    assert has_same_jobs(again, points)
    assert not has_same_jobs(again, points[:2])
    assert not has_same_jobs(again, [*points[:2], replace(points[2], requested=replace(tiny, seed=9))])
    assert is_running(again), "it is this process"


def test_a_sweep_is_found_by_its_folder_or_its_run(tiny: Config, root: Path) -> None:
    first, second = made([point(tiny)]), made([point(tiny)])
    first.update(mlflow={"run_id": "abc1"})
    second.update(mlflow={"run_id": "abd2"})

    assert [sweep.sweep_dir for sweep in list_sweeps()] == [first.sweep_dir, second.sweep_dir]
    assert find_sweep(str(first.sweep_dir)).sweep_dir == first.sweep_dir
    assert find_sweep(str(first.sweep_dir.relative_to(root))).sweep_dir == first.sweep_dir
    assert find_sweep("abd").sweep_dir == second.sweep_dir
    with pytest.raises(UserError, match=r"--resume=ab: begins the ids of 2 sweeps; give more of it"):
        find_sweep("ab")
    with pytest.raises(UserError, match=r"--resume=nothing: is no sweep: give its folder"):
        find_sweep("nothing")


@pytest.mark.parametrize("damage", ["{", "[]", '{"points": [{}]}'])
def test_a_damaged_record_is_one_line(tiny: Config, root: Path, damage: str) -> None:
    sweep = made([point(tiny)])
    (sweep.sweep_dir / "sweep.json").write_text(damage)

    with pytest.raises(UserError, match=r"sweep.json: cannot be read as the record of a sweep: ") as caught:
        Sweep(sweep.sweep_dir)
    assert len(caught.value.lines) == 1
    assert list_sweeps() == []


# -- foretold ------------------------------------------------------------------------------------------------


def test_a_point_whose_batch_size_is_measured_has_no_plan(tiny: Config, root: Path) -> None:
    measured = point(training(tiny, batch_size="auto"))
    known = point(training(tiny, batch_size=8), number=2)
    first, second = plan_jobs([measured, known], Heard())

    assert first.plan is None
    assert first.should_train
    assert second.plan is not None
    assert second.plan.batch_size == 8
    assert second.config.train.on_oom == "fail"


@pytest.mark.parametrize(
    ("fits", "device", "run_over_budget", "trained"),
    [
        ("fits", "cpu", False, True),
        (None, "cpu", False, True),
        ("unsure", "cpu", False, False),
        ("does not fit", "cpu", False, False),
        ("does not fit", "cpu", True, True),
        ("does not fit", "cuda:0", False, True),
    ],
)
def test_what_is_foretold_not_to_fit_is_trained_on_a_card_or_if_asked(
    tiny: Config, root: Path, fits: Fits | None, device: str, run_over_budget: bool, trained: bool
) -> None:
    (found,) = plan_jobs([point(tiny)], Heard())
    assert found.plan is not None
    config = replace(
        found.config,
        device=replace(found.config.device, name=device),
        sweep=replace(found.config.sweep, run_over_budget=run_over_budget),
    )

    changed: PlannedJob = replace(found, plan=replace(found.plan, fits=fits), config=config)
    assert changed.should_train is trained


# -- what became of them -------------------------------------------------------------------------------------


def test_the_last_attempt_counts(tiny: Config, root: Path) -> None:
    sweep = made([point(tiny), point(tiny, {"seed": "1"}, 2)])
    for status in ("FAILED", "FINISHED"):
        run = new_run(tiny, tiny, sweep.new_attempt(sweep.jobs[0]))
        for epoch, speed in enumerate((10.0, 100.0, 300.0), 1):
            metrics = {
                "speed/images_per_second": speed,
                "speed/epoch_seconds": 2.0,
                "val/accuracy": 0.5 + epoch % 2 / 4,
                "memory/process_peak_mib": 100.0 * epoch,
            }
            run.log_metrics(MetricsRow(epoch, epoch, metrics))
        run.update(result={"best_epoch": 1, "test_accuracy": 0.25, "weights_sha256": "ab"})
        run.close(status)
    first, second = collect_results(sweep)

    assert (first.became, first.attempts, second.became, second.attempts) == ("finished", 2, "not run", 0)
    assert first.images_per_second == 200, "the first epoch loads kernels"
    assert (first.val_accuracy, first.seconds_to_best, first.measured_mib) == (0.75, 2.0, 300.0)
    assert (first.test_accuracy, first.weights_sha256) == (0.25, "ab")
    assert first.folder is not None
    assert first.folder.endswith("-2")


@pytest.mark.parametrize(
    ("status", "facts", "became"),
    [
        ("FINISHED", {}, "finished"),
        ("FINISHED", {"oom": {"during": "training"}}, "oom"),
        ("FINISHED", {"unfit": {"remedies": []}}, "unfit"),
        ("FAILED", {"error": "no"}, "failed"),
        ("FAILED", {"oom": {"during": "training"}}, "failed"),
        ("KILLED", {}, "killed"),
        ("RUNNING", {}, "killed"),
    ],
)
def test_a_runs_record_says_what_became_of_a_point(
    tiny: Config, root: Path, status: str, facts: dict[str, object], became: str
) -> None:
    sweep = made([point(tiny)])
    run = new_run(tiny, tiny, sweep.new_attempt(sweep.jobs[0]))
    run.update(status=status, **facts)

    assert collect_results(sweep)[0].became == became
    assert json.loads((sweep.sweep_dir / "sweep.json").read_text())["points"][0]["name"] == "tiny"
