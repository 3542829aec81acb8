"""Test the summary of a sweep: groups, intervals, conclusions, and output to files, MLflow and terminal."""

import csv
import io
import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, _validate_metric_name
from rich.console import Console

from captcha_exp.cli import output
from captcha_exp.memory.interval import MiBRange
from captcha_exp.sweep.aggregate import (
    SEEDS,
    effective_fits,
    estimate_mean,
    format_status,
    truncate,
)
from captcha_exp.sweep.figure import save_figure
from captcha_exp.sweep.record import shorten_keys
from captcha_exp.sweep.results import JobResult, Outcome
from captcha_exp.sweep.summary import SweepSummary
from captcha_exp.sweep.tables import build_table

BATCH = "train.batch_size"
NO_METRICS: dict[str, Any] = {
    "measured_mib": None,
    "images_per_second": None,
    "val_accuracy": None,
    "seconds_to_best": None,
    "test_accuracy": None,
}


def make_result(number: int = 1, **others: Any) -> JobResult:
    """Return the result of a finished job that fits."""
    values: dict[str, Any] = {
        "name": f"job {number}",
        "swept": {BATCH: "64"},
        "outcome": "finished",
        "error": None,
        "attempts": 1,
        "batch_size": 64,
        "micro_batch_size": None,
        "device": "cpu",
        "budget_mib": MiBRange(3908, 3908),
        "predicted_mib": MiBRange(900, 1200),
        "fits": "fits",
        "measured_mib": 800.0,
        "images_per_second": 1000.0,
        "val_accuracy": 0.97,
        "seconds_to_best": 30.0,
        "test_accuracy": 0.96,
        "stop_reason": None,
        "run_dir": "outputs/sweep/1",
        "run_id": "a1",
        "weights_sha256": "0f",
    }
    return JobResult(number=number, **(values | others))


def at(size: int | str, speed: float | None, accuracy: float | None, /, **others: Any) -> JobResult:
    """Return a result of a sweep of the batch size; without a speed it did not fit."""
    swept = {BATCH: str(size)} | others.pop("also", {})
    if speed is None:
        others = {"outcome": "skipped", "fits": "does not fit"} | others
    values = NO_METRICS | {"images_per_second": speed, "val_accuracy": accuracy} | others
    return make_result(swept=swept, batch_size=None, **values)


def of(name: str, *accuracies: float, **others: Any) -> list[JobResult]:
    """Return results of a model with a seed per accuracy."""
    return [
        make_result(swept={"model": name, "seed": str(seed)}, val_accuracy=accuracy, **others)
        for seed, accuracy in enumerate(accuracies)
    ]


FIVE = [
    at(25, 1500, 0.979),
    at(50, 2000, 0.981),
    at(100, 2310, 0.971),
    at(200, 2380, 0.96),
    at(800, None, None),
]


def check_metric_name(name: str) -> None:
    """Check a name by MLflow's own rules."""
    _validate_metric_name(name)  # type: ignore[no-untyped-call]  # MLflow has no types
    assert len(name) <= MAX_ENTITY_KEY_LENGTH


# -- means and intervals -------------------------------------------------------------------------------------


def test_intervals_are_those_of_students_t() -> None:
    """Expected values from the t table: 12.706 for two values, 4.303 for three."""
    two, three = estimate_mean([1.0, 3.0]), estimate_mean([1.0, 2.0, 6.0])
    assert (two.value, two.num_jobs) == (2.0, 2)
    assert two.half_width == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2), rel=1e-4)
    assert two.interval == pytest.approx((2 - 12.706, 2 + 12.706), rel=1e-4)
    assert (three.value, three.num_jobs) == (3.0, 3)
    assert three.half_width == pytest.approx(4.303 * math.sqrt(7) / math.sqrt(3), rel=1e-4)


def test_one_value_has_no_interval() -> None:
    assert estimate_mean([0.5], is_fraction=True) == (0.5, 1, None, None)


def test_the_interval_of_a_fraction_is_clipped_to_0_and_1() -> None:
    assert estimate_mean([0.9, 1.0], is_fraction=True).interval == pytest.approx((0.3147, 1), abs=1e-4)
    assert estimate_mean([0.0, 0.1], is_fraction=True).interval == pytest.approx((0, 0.6853), abs=1e-4)
    assert estimate_mean([0.9, 1.0]).interval == pytest.approx((0.3147, 1.5853), abs=1e-4)


# -- groups --------------------------------------------------------------------------------------------------


def test_jobs_that_differ_only_in_seeds_form_one_group() -> None:
    keys = [{key: str(n)} for key in SEEDS for n in range(2)]
    results = [
        make_result(n, swept={"model": name} | key)
        for n, (name, key) in enumerate((m, k) for k in keys for m in "ab")
    ]
    groups = SweepSummary(results).groups
    assert [(group.number, group.name, len(group.results)) for group in groups] == [
        (1, "model=a", 6),
        (2, "model=b", 6),
    ]
    assert [result.number for result in groups[0].results] == [0, 2, 4, 6, 8, 10]


def test_a_group_averages_its_finished_jobs() -> None:
    results = [
        *of("a", 0.9, 0.8, images_per_second=100.0),
        make_result(
            swept={"model": "a", "seed": "7"}, outcome="killed", val_accuracy=0.1, images_per_second=None
        ),
        make_result(swept={"model": "a", "seed": "8"}, val_accuracy=None, images_per_second=130.0),
    ]
    (group,) = SweepSummary(results).groups
    assert len(group.results) == 4
    assert group.outcome_counts == {"finished": 3, "killed": 1}
    assert group.metrics["val_accuracy"][:2] == pytest.approx((0.85, 2))
    assert group.metrics["images_per_second"][:2] == pytest.approx((110, 3))
    assert group.status == "3 finished, 1 killed"


def test_the_predicted_range_of_a_group_covers_all_its_jobs() -> None:
    results = of("a", 0.9, 0.8)
    results[1] = replace(results[1], predicted_mib=MiBRange(800, 1100))
    assert SweepSummary(results).groups[0].predicted_mib == (800, 1200)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({}, "fits"),
        ({"fits": "unsure"}, "unsure"),
        ({"outcome": "oom"}, "does not fit"),
        ({"outcome": "skipped", "fits": "unsure"}, "unsure"),
        ({"outcome": "skipped", "fits": "does not fit"}, "does not fit"),
        ({"outcome": "skipped", "fits": None}, "does not fit"),
        ({"outcome": "failed"}, "fits"),
        ({"budget_mib": None, "fits": None}, None),
        ({"device": "cuda", "fits": "unsure", "measured_mib": 3908.0}, "fits"),
        ({"device": "cuda:1", "fits": "fits", "measured_mib": 3909.0}, "does not fit"),
        ({"device": "cuda", "fits": "unsure", "measured_mib": None}, "unsure"),
        ({"device": "mps", "fits": "unsure", "measured_mib": 10.0}, "unsure"),
        ({"device": "cuda", "outcome": "failed", "fits": "unsure", "measured_mib": 10.0}, "unsure"),
        (
            {"device": "cuda", "fits": "unsure", "measured_mib": 95.0, "budget_mib": MiBRange(90, 100)},
            "unsure",
        ),
    ],
)
def test_measured_gpu_memory_overrides_the_prediction(others: dict[str, Any], expected: str | None) -> None:
    assert effective_fits(make_result(**others)) == expected
    assert SweepSummary([make_result(**others)]).groups[0].fits == expected


def test_a_group_fits_if_all_its_jobs_fit() -> None:
    results = of("a", 0.9, 0.8, 0.7)
    assert SweepSummary(results).groups[0].fits == "fits"
    for others, expected in (({"fits": "unsure"}, "unsure"), ({"outcome": "oom"}, "does not fit")):
        group = SweepSummary([*results[:2], replace(results[2], **others)]).groups[0]  # type: ignore[arg-type]  # of several types
        assert group.fits == expected
        assert not group.is_recommendable


@pytest.mark.parametrize(
    ("others", "status"),
    [
        ({}, "finished"),
        ({"micro_batch_size": 16}, "finished (split to 16)"),
        ({"micro_batch_size": 64}, "finished"),
        ({"outcome": "oom", "micro_batch_size": 16}, "oom (split to 16)"),
        ({"outcome": "skipped", "fits": "unsure"}, "unsure"),
        ({"outcome": "skipped", "fits": "does not fit"}, "does not fit"),
        ({"outcome": "failed"}, "FAILED"),
        ({"outcome": "not run"}, "not run"),
    ],
)
def test_format_status(others: dict[str, Any], status: str) -> None:
    assert format_status(make_result(**others)) == status


def test_keys_are_shortened_to_their_last_part_if_unique() -> None:
    keys = ("seed", "data.seed", BATCH, "model.channels", "captcha.channels", "model")
    assert list(shorten_keys(keys).values()) == ["seed", "data.seed", "batch_size", *keys[3:]]


def test_truncate_shortens_long_values_and_escapes_control_characters() -> None:
    assert truncate("0123456789", 10) == "0123456789"
    assert truncate("0123456789a", 10) == "0123…789a"
    assert truncate("a\nb\x1b[31m\udcff") == r"a\nb\x1b[31m\xff"


# -- conclusions ---------------------------------------------------------------------------------------------


def test_the_smallest_nearly_fastest_batch_size_is_recommended() -> None:
    assert SweepSummary(FIVE).conclusions == (
        "batch_size=100 is the smallest that fits and reaches 95 % of the highest speed "
        "(2,310 of 2,380 images/s); its validation accuracy is 97.10%, the best is 98.10% (batch_size=50)",
    )


@pytest.mark.parametrize(("speed", "recommended"), [(95.0, 50), (94.99, 100)])
def test_nearly_the_fastest_means_95_percent(speed: float, recommended: int) -> None:
    results = [at(100, 100.0, 0.9), at(25, 10.0, 0.9), at(50, speed, 0.9)]
    assert (
        SweepSummary(results).conclusions[0].startswith(f"batch_size={recommended} is the smallest that fits")
    )


@pytest.mark.parametrize(
    "others", [{"outcome": "oom"}, {"fits": "unsure"}, {"outcome": "skipped", "fits": "unsure"}]
)
def test_a_batch_size_that_does_not_fit_is_ignored_in_the_recommendation(others: dict[str, Any]) -> None:
    results = [at(50, 100.0, 0.9), at(75, 101.0, 0.8), at(100, 1000.0, 0.7, **others)]
    (conclusion,) = SweepSummary(results).conclusions
    assert conclusion.startswith(
        "batch_size=50 is the smallest that fits and reaches 95 % of the highest speed (100 of 101 "
    )


def test_the_best_accuracy_may_be_that_of_a_batch_size_that_does_not_fit() -> None:
    results = [at(50, 100.0, 0.9), at(100, 90.0, 0.95, fits="does not fit")]
    assert SweepSummary(results).conclusions[0] == (
        "batch_size=50 is the only one that fits (100 images/s); its validation accuracy is 90.00%, "
        "the best is 95.00% (batch_size=100, which does not fit)"
    )


def test_without_a_budget_a_finished_job_counts_as_fitting() -> None:
    unknown: dict[str, Any] = {"budget_mib": None, "fits": None, "predicted_mib": None}
    results = [at(25, 10.0, 0.9, **unknown), at(50, 100.0, 0.9, **unknown), at(99, 101.0, 0.9, **unknown)]
    failed = at(100, 200.0, 0.99, outcome="failed", **unknown)
    assert SweepSummary([*results, failed]).conclusions == (
        "batch_size=50 is the smallest that reaches 95 % of the highest speed (100 of 101 images/s); "
        "its validation accuracy is 90.00%, the best is 90.00% (batch_size=25)",
    )


def test_the_recommended_batch_size_may_be_the_fastest_and_the_best() -> None:
    assert SweepSummary([at(25, 10.0, 0.9), at(50, 5.25, 0.8)]).conclusions == (
        "batch_size=25 is the smallest that fits and reaches 95 % of the highest speed (10 images/s, the "
        "highest); its validation accuracy is 90.00%, the best",
    )


def test_without_a_budget_no_batch_size_is_called_the_only_one_that_fits() -> None:
    unknown: dict[str, Any] = {"budget_mib": None, "fits": None}
    results = [at(25, 10.0, 0.9, **unknown), at(50, 90.0, 0.8, outcome="killed", **unknown)]
    (conclusion,) = SweepSummary(results).conclusions
    assert conclusion.startswith("batch_size=25 is the smallest that reaches 95 % of the highest speed")


def test_one_batch_size() -> None:
    assert SweepSummary([at(25, 5.25, 0.9)]).conclusions == (
        "batch_size=25 fits and reaches 5.2 images/s; its validation accuracy is 90.00%, the best",
    )


def test_finished_jobs_of_which_none_fits() -> None:
    results = [at(50, 100.0, 0.9, fits="unsure"), at(100, None, None)]
    assert SweepSummary(results).conclusions == (
        "no batch size fits; the best validation accuracy is 90.00% (batch_size=50, which may not fit)",
    )


def test_a_conclusion_for_each_combination_of_the_other_swept_keys() -> None:
    results = [
        at(50, 10.0, 0.8, also={"model": "b"}),
        at(25, 10.0, 0.9, also={"model": "a"}),
        at(25, 10.0, 0.8, also={"model": "b"}),
        at(50, 90.0, 0.9, also={"model": "a"}),
        at(50, None, None, also={"model": "c"}),
    ]
    first, second, third = SweepSummary(results).conclusions
    assert first.startswith("model=b: batch_size=25 is the smallest")  # as fast as 50
    assert first.endswith("its validation accuracy is 80.00%, the best")
    assert second.startswith("model=a: batch_size=50 is the smallest")
    assert second.endswith("the best is 90.00% (batch_size=25)")
    assert third == (
        "model=c: no job finished: 1 job (1 skipped); without a CUDA GPU, sweep.run_over_budget=true trains "
        "them, and gpu=NAME narrows the prediction"
    )


def test_several_seeds_per_batch_size_give_an_interval() -> None:
    results = [
        at(25, speed, share, also={"seed": str(share)}) for speed, share in ((10.0, 0.9), (12.0, 0.91))
    ]
    assert SweepSummary(results).conclusions == (
        "batch_size=25 fits and reaches 11 images/s; its validation accuracy is "
        "90.50% (mean of 2, 95 % interval 84.15% to 96.85%), the best",
    )


# -- disturbed speeds ----------------------------------------------------------------------------------------

REMEDY = "; the same command with --rerun-disturbed trains these jobs again"
DISTURBED = "speeds disturbed by other processes, which took cores that the training asked for: "


def test_a_disturbed_speed_recommends_no_batch_size() -> None:
    """The jobs of a sweep during whose last three jobs another process was busy."""
    speeds = {32: 2009.0, 64: 998.0, 128: 1133.0, 256: 1269.0}
    results = [
        at(size, speed, 0.9 + number / 100, name=f"batch_size={size}", disturbed=size > 32)
        for number, (size, speed) in enumerate(speeds.items())
    ]
    summary = SweepSummary(results)
    assert summary.conclusions == (
        "no batch size is recommended, because speeds were disturbed; "
        "the best validation accuracy is 93.00% (batch_size=256)",
        f"{DISTURBED}batch_size=64, batch_size=128, batch_size=256{REMEDY}",
    )
    assert [row["images/s"] for row in build_table(summary.groups)] == [
        "2,009",
        *("998 (disturbed)", "1,133 (disturbed)", "1,269 (disturbed)"),
    ]
    assert [group["disturbed"] for group in summary.to_json()["groups"]] == [False, True, True, True]
    assert [row["disturbed"] for row in csv.DictReader(io.StringIO(summary.to_csv()))][1] == "True"


def test_the_only_batch_size_that_fits_is_named_without_its_disturbed_speed() -> None:
    conclusions = SweepSummary([at(50, 10.0, 0.9, disturbed=True), at(100, None, None)]).conclusions
    assert conclusions[0] == (
        "batch_size=50 is the only one that fits; the best validation accuracy is 90.00% (batch_size=50)"
    )


def test_a_disturbed_speed_of_a_batch_size_that_does_not_fit_is_only_named() -> None:
    conclusions = SweepSummary(
        [at(25, 10.0, 0.9), at(50, 9.0, 0.9), at(100, 8.0, 0.9, fits="unsure", disturbed=True)]
    ).conclusions
    assert conclusions[0].startswith("batch_size=25 is the smallest that fits and reaches 95 %")
    assert conclusions[1:] == (f"{DISTURBED}job 1{REMEDY}",)


def test_the_speed_over_seeds_is_that_of_the_undisturbed_jobs() -> None:
    results = [
        at(25, 10.0, 0.9, also={"seed": "1"}, disturbed=True),
        at(25, 30.0, 0.8, also={"seed": "2"}),
        at(25, 99.0, 0.8, also={"seed": "3"}, outcome="killed"),
    ]
    summary = SweepSummary(results)
    assert summary.groups[0].metrics["images_per_second"] == (30.0, 1, None, None)
    assert summary.groups[0].metrics["val_accuracy"].num_jobs == 2
    assert summary.conclusions[0].startswith("batch_size=25 fits and reaches 30 images/s")


def test_disturbed_jobs_of_a_sweep_of_other_keys_are_named_up_to_ten() -> None:
    results = [
        make_result(n, swept={"model": str(n)}, name=f"model={n}", disturbed=True) for n in range(1, 13)
    ]
    conclusions = SweepSummary(results).conclusions
    assert conclusions[0].startswith("model=1 has the best validation accuracy")
    assert conclusions[1].startswith(f"{DISTURBED}model=1, model=2, ")
    assert conclusions[1].endswith(f"model=10 and 2 more{REMEDY}")


def test_overlap_of_the_intervals_of_the_two_best_groups() -> None:
    far = SweepSummary([*of("a", 0.90, 0.91, 0.92), *of("b", 0.97, 0.98, 0.99)])
    assert far.conclusions == (
        "model=b has the best validation accuracy, 98.00% (mean of 3, 95 % interval 95.52% to 100.00%); "
        "next is model=a with 91.00% (mean of 3, 95 % interval 88.52% to 93.48%); "
        "the intervals do not overlap",
    )
    near = SweepSummary([*of("a", 0.90, 0.91, 0.92), *of("b", 0.91, 0.92, 0.93), *of("c", 0.1, 0.2)])
    assert near.conclusions[0].startswith("model=b has the best validation accuracy, 92.00% (mean of 3")
    assert "next is model=a with 91.00%" in near.conclusions[0]
    assert near.conclusions[0].endswith("the intervals overlap: the difference is not certain")


def test_without_seeds_no_intervals_are_compared() -> None:
    assert SweepSummary([*of("a", 0.9), *of("b", 0.9), *of("c", 0.8)]).conclusions == (
        "model=a has the best validation accuracy, 90.00%; next is model=b with 90.00%",
    )


def test_the_best_group_may_not_fit() -> None:
    assert SweepSummary([*of("a", 0.9, fits="unsure"), *of("b", 0.8)]).conclusions == (
        "model=a has the best validation accuracy, 90.00%, but it may not fit; next is model=b with 80.00%",
    )


def test_a_sweep_of_seeds_only() -> None:
    results = [make_result(swept={"seed": str(n)}, val_accuracy=share) for n, share in enumerate((0.9, 0.92))]
    assert SweepSummary(results).conclusions == (
        "the validation accuracy is 91.00% (mean of 2, 95 % interval 78.29% to 100.00%)",
    )


def test_an_automatic_batch_size_is_treated_as_a_name() -> None:
    summary = SweepSummary([at("auto", 10.0, 0.9), at(25, 9.0, 0.8)])
    assert summary.conclusions[0].startswith("batch_size=auto has the best validation accuracy")
    assert [step for step, _ in summary.metrics_by_step()] == [0, 1, 2]


@pytest.mark.parametrize("size", ["0", "-1", "2.5", "1_", "٣", "64 ", ""])
def test_an_invalid_batch_size_is_treated_as_a_name(size: str) -> None:
    assert SweepSummary([at(size, 10.0, 0.9)]).groups[0].batch_size is None


def test_a_batch_size_may_have_underscores() -> None:
    assert SweepSummary([at("1_000", 10.0, 0.9)]).groups[0].batch_size == 1000


def test_if_no_job_finished_the_outcomes_are_counted() -> None:
    kinds: list[Outcome] = ["oom", "skipped", "skipped", "failed", "killed", "not run", "not run"]
    summary = SweepSummary(
        [make_result(n, outcome=kind, **NO_METRICS) for n, kind in enumerate(kinds)], parallelism=2
    )
    assert summary.conclusions == (
        "no job finished: 7 jobs (1 out of memory, 2 skipped, 1 failed, 1 killed, 2 not run)",
    )
    assert SweepSummary([make_result(outcome="failed")]).conclusions == ("no job finished: 1 job (1 failed)",)


def test_parallel_jobs_add_a_caveat_about_speed() -> None:
    assert SweepSummary(FIVE, parallelism=3).conclusions[1:] == (
        "3 jobs ran in parallel: speeds were measured on a shared machine",
    )
    assert len(SweepSummary(FIVE, parallelism=1).conclusions) == 1


@pytest.mark.parametrize("missing", [math.nan, math.inf, None])
def test_a_non_finite_metric_counts_as_missing(missing: float | None) -> None:
    accuracy = SweepSummary([at(25, 10.0, missing), at(50, 20.0, 0.5)])
    assert accuracy.conclusions[0].endswith("its validation accuracy is 50.00%, the best")
    speed = SweepSummary([at(25, missing or -1.0, 0.5, images_per_second=missing), at(50, 20.0, 0.4)])
    assert speed.conclusions[0].startswith("batch_size=50 is the smallest")
    none = SweepSummary([make_result(swept={"model": "a"}, val_accuracy=missing)])
    assert none.conclusions == ("no validation accuracy to compare: 1 job (1 finished)",)
    json.dumps(none.to_json(), allow_nan=False)


# -- failures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "is_failure"),
    [
        ("finished", False),
        ("oom", False),
        ("skipped", False),
        ("failed", True),
        ("killed", True),
        ("not run", True),
    ],
)
def test_running_out_of_memory_is_not_a_failure(outcome: Outcome, is_failure: bool) -> None:
    assert SweepSummary([make_result(), make_result(2, outcome=outcome)]).has_failures is is_failure


# -- MLflow --------------------------------------------------------------------------------------------------


def test_metrics_are_logged_at_the_batch_size_and_counts_at_step_0() -> None:
    results = [
        *FIVE,
        at(1600, None, None, outcome="oom"),
        at(3200, None, None, outcome="not run", predicted_mib=None),
    ]
    metrics = dict(SweepSummary(results).metrics_by_step())
    assert list(metrics) == [0, 25, 50, 100, 200, 800, 1600, 3200]
    assert metrics[0] == {
        "sweep/jobs": 7,
        "sweep/finished": 4,
        "sweep/oom": 1,
        "sweep/skipped": 1,
        "sweep/failed": 1,
    }
    assert metrics[25] == {
        "sweep/val_accuracy": 0.979,
        "sweep/images_per_second": 1500,
        "sweep/predicted_mib": 1200,
    }
    assert metrics[800] == {"sweep/predicted_mib": 1200}
    assert metrics[3200] == {}


def test_all_metrics_of_a_group() -> None:
    assert dict(SweepSummary(of("a", 0.5)).metrics_by_step())[1] == {
        "sweep/val_accuracy": 0.5,
        "sweep/test_accuracy": 0.96,
        "sweep/images_per_second": 1000,
        "sweep/seconds_to_best": 30,
        "sweep/measured_mib": 800,
        "sweep/predicted_mib": 1200,
    }


def test_the_other_swept_keys_are_a_suffix_of_the_metric_name() -> None:
    models = ["compact", "ünïcode\n$", "ünïcode\n€", "../..", "x" * 400]
    results = [at(25, 10.0, 0.5, also={"model": name, "train.schedule": "constant"}) for name in models]
    (_, metrics) = SweepSummary(results).metrics_by_step()[1]
    names = [name.removeprefix("sweep/val_accuracy/") for name in metrics if "val_accuracy" in name]
    assert names[0] == "model_compact schedule_constant"
    assert len(set(names)) == 5
    for name in metrics:
        check_metric_name(name)


# -- files ---------------------------------------------------------------------------------------------------


def test_a_csv_row_has_the_swept_keys_and_every_value() -> None:
    hostile = {"captcha.alphabet": 'a,"b"\r\nc;é', BATCH: "64", "name": "x", "device": "y"}
    result = make_result(
        3, swept=hostile, error="one, two", run_id=None, budget_mib=None, val_accuracy=0.1 + 0.2
    )
    text = SweepSummary([result]).to_csv()
    (line,) = csv.DictReader(io.StringIO(text, newline=""))
    assert list(line)[:6] == [*hostile, "number", "job.name"]
    assert {key: line[key] for key in hostile} == hostile
    assert (line["job.name"], line["job.device"]) == ("job 3", "cpu")
    assert (line["predicted_min_mib"], line["predicted_max_mib"]) == ("900", "1200")
    assert (line["budget_min_mib"], line["budget_max_mib"], line["run_id"]) == ("", "", "")
    assert float(line["val_accuracy"]) == 0.1 + 0.2
    assert len(line) == len(hostile) + len(fields(JobResult)) - 1 + 2


def test_lone_surrogates_can_be_written() -> None:
    summary = SweepSummary(
        [make_result(swept={"data.path": "/\udcff"}, name="\ud800", error="\udcff", outcome="failed")]
    )
    for text in (summary.to_csv(), summary.to_markdown(), json.dumps(summary.to_json())):
        text.encode()


def test_markdown_escapes_values() -> None:
    results = [
        make_result(swept={"a.x_y": "p|q`*<b>$[l](u)\n# h"}),
        make_result(2, swept={"a.x_y": "z"}, outcome="failed", error="a|b"),
    ]
    text = SweepSummary(results).to_markdown()
    lines = text.splitlines()
    assert lines[0] == r"**sweep over a.x\_y: 2 jobs (1 finished, 1 failed)**"
    assert lines[2] == (
        r"| x\_y | predicted MiB | measured MiB (RAM) | fits | images/s | validation |"
        " seconds to best | status |"
    )
    assert lines[3] == "|" + " --- |" * 8
    assert lines[4].startswith(
        r"| p\|q\`\*&lt;b&gt;&#36;\[l\](u)\\n\# h | 900 to 1,200 | 800 | fits | 1,000 | 97.00% |"
    )
    assert lines[5].endswith(r"| FAILED: a\|b |")
    assert lines[7].startswith("- x\\_y=p\\|q")


def test_json_of_the_groups() -> None:
    values = json.loads(json.dumps(SweepSummary(of("a", 0.9, 0.92)).to_json()))
    (group,) = values["groups"]
    assert group["jobs"] == [1, 1]
    assert group["predicted_mib"] == [900, 1200]
    assert group["metrics"]["measured_mib"] == {
        "value": 800,
        "num_jobs": 2,
        "half_width": 0,
        "interval": [800, 800],
    }
    assert values["jobs"][0]["swept"] == {"model": "a", "seed": "0"}


# -- the terminal --------------------------------------------------------------------------------------------


def print_lines(summary: SweepSummary, capsys: pytest.CaptureFixture[str]) -> list[str]:
    output.print_sweep(summary)
    return capsys.readouterr().out.splitlines()


def test_the_table_has_a_row_for_each_group(capsys: pytest.CaptureFixture[str]) -> None:
    lines = print_lines(SweepSummary([*of("a", 0.9, 0.92), *of("b", 0.8, outcome="oom")]), capsys)
    assert lines[0] == "sweep over model, seed: 3 jobs (2 finished, 1 out of memory)"
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert cells == [
        ["a", "2", "900 to 1,200", "800", "fits", "1,000", "91.00% ± 12.71%", "30", "2 finished"],
        ["b", "1", "900 to 1,200", "", "does not fit", "", "", "", "oom"],
    ]
    assert lines[-1].startswith("model=a has the best validation accuracy, 91.00%")


def test_gpu_memory_and_ram_are_distinguished(capsys: pytest.CaptureFixture[str]) -> None:
    results = [make_result(swept={"device": "a"}), make_result(2, swept={"device": "b"}, device="cuda")]
    assert any("measured MiB (RAM)" in line for line in print_lines(SweepSummary(results[:1]), capsys))
    assert any("measured MiB (GPU)" in line for line in print_lines(SweepSummary(results[1:]), capsys))
    lines = print_lines(SweepSummary(results), capsys)
    assert ["800 (RAM)" in line for line in lines if line.startswith("│")] == [True, False]
    assert ["800 (GPU)" in line for line in lines if line.startswith("│")] == [False, True]


def test_errors_are_printed_in_full_and_wide_values_do_not_break_the_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = "RuntimeError: [/red] " + "more text " * 40 + "end"
    swept = {f"group.key_{n}": f"[bold]{'very ' * 20}{n}" for n in range(12)}
    lines = print_lines(
        SweepSummary(
            [make_result(swept=swept, outcome="failed", name="[x]", error=error, run_dir="out/[y]")]
        ),
        capsys,
    )
    table = [line for line in lines if line[:1] in "┏┃┡│└"]
    assert len(table) == 5
    assert len({len(line) for line in table}) == 1
    assert "[bold]very very" in table[3]
    assert f"[x]: {error}, run directory out/[y]" in lines


def test_the_table_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None, soft_wrap=True)
    monkeypatch.setattr(output, "get_console", lambda: out)
    output.print_sweep(SweepSummary([at(25, 10.0, 0.9, also={"data.path": "中" * 100 + "/x" * 50})]))
    text = out.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert {len(line) for line in text.splitlines() if line[:1] in "┏┡└"} == {80}


# -- the figure ----------------------------------------------------------------------------------------------


@pytest.fixture
def saved_figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    monkeypatch.setattr("captcha_exp.report.figures._save_figure", lambda figure, _: figures.append(figure))
    return figures


def marker_data(figure: Figure, panel: int) -> list[tuple[list[float], list[float]]]:
    """Return (x, y) of each line with round markers in a panel."""
    lines = figure.axes[panel].lines
    data = [np.asarray(line.get_data(), float).tolist() for line in lines if line.get_marker() == "o"]
    return [(x, y) for x, y in data]


def test_ram_is_not_plotted_with_gpu_memory(saved_figures: list[Figure], tmp_path: Path) -> None:
    for device, expected in (("cpu", []), ("cuda", [([25], [700.0])])):
        save_figure(
            SweepSummary([at(25, 10.0, 0.9, device=device, measured_mib=700.0)]), tmp_path / "sweep.png"
        )
        assert marker_data(saved_figures[-1], 0) == expected


def test_a_line_for_each_combination_against_the_batch_size(
    saved_figures: list[Figure], tmp_path: Path
) -> None:
    results = [at(size, size + 1.0, 0.9, also={"model": name}) for name in "ab" for size in (50, 25)]
    save_figure(SweepSummary(results), tmp_path / "sweep.png")
    assert marker_data(saved_figures[0], 1) == [([25, 50], [26.0, 51.0])] * 2
    assert [text.get_text() for text in saved_figures[0].legends[0].get_texts()] == ["model=a", "model=b"]
    assert saved_figures[0].axes[0].get_xlabel() == "batch size"


def test_without_batch_sizes_groups_are_plotted_by_name(saved_figures: list[Figure], tmp_path: Path) -> None:
    save_figure(SweepSummary([*of("a", 0.9, 0.92), *of("b", 0.8)]), tmp_path / "sweep.png")
    accuracy = saved_figures[0].axes[2]
    assert [label.get_text() for label in accuracy.get_xticklabels()] == ["a", "b"]
    assert accuracy.get_xlabel() == "model"
    assert marker_data(saved_figures[0], 2) == [([0, 1], [pytest.approx(0.91), 0.8])]
    assert not saved_figures[0].legends


# -- properties ----------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
METRIC = st.none() | st.floats(0, 1e6) | st.sampled_from([math.nan, math.inf])
FRACTION = st.none() | st.floats(0, 1) | st.just(math.nan)
INTERVAL = st.none() | st.tuples(st.floats(0, 1e5), st.floats(0, 1e5)).map(
    lambda pair: MiBRange(*sorted(pair))
)
RESULT = st.builds(
    JobResult,
    number=st.integers(1, 99),
    name=TEXT,
    swept=st.fixed_dictionaries(
        {BATCH: st.sampled_from(["1", "25", "64"]) | TEXT},
        optional={"model": TEXT, "seed": st.sampled_from("12"), "device": TEXT},
    ),
    outcome=st.sampled_from(["finished", "finished", "oom", "skipped", "failed", "killed", "not run"]),
    error=st.none() | TEXT,
    attempts=st.integers(0, 9),
    batch_size=st.none() | st.integers(1, 999),
    micro_batch_size=st.none() | st.integers(1, 999),
    device=st.sampled_from(["cpu", "cuda", "cuda:1"]),
    budget_mib=INTERVAL,
    predicted_mib=INTERVAL,
    fits=st.sampled_from([None, "fits", "unsure", "does not fit"]),
    measured_mib=METRIC,
    images_per_second=METRIC,
    val_accuracy=FRACTION,
    seconds_to_best=METRIC,
    test_accuracy=FRACTION,
    run_dir=st.none() | TEXT,
    run_id=st.none() | TEXT,
    weights_sha256=st.none() | TEXT,
)
RESULTS = st.lists(RESULT, min_size=1, max_size=8)


@settings(max_examples=60)
@given(RESULTS)
def test_every_job_is_in_one_group(results: list[JobResult]) -> None:
    summary = SweepSummary(results)
    members = [id(result) for group in summary.groups for result in group.results]
    assert sorted(members) == sorted(map(id, summary.results))
    for group in summary.groups:
        for result in group.results:
            assert {key: value for key, value in result.swept.items() if key not in SEEDS} == group.swept


@settings(max_examples=60)
@given(RESULTS)
def test_json_round_trip(results: list[JobResult]) -> None:
    text = json.dumps(SweepSummary(results).to_json(), allow_nan=False)
    assert json.dumps(json.loads(text)) == text


@settings(max_examples=60)
@given(RESULTS)
def test_csv_round_trip(results: list[JobResult]) -> None:
    summary = SweepSummary(results)
    lines = list(csv.DictReader(io.StringIO(summary.to_csv(), newline="")))
    assert len(lines) == len(results)
    keys = {key for result in results for key in result.swept}
    for result, line in zip(summary.results, lines, strict=True):
        assert {key: line[key] for key in keys} == dict.fromkeys(keys, "") | dict(result.swept)
        for field in fields(JobResult):
            column = f"job.{field.name}" if field.name in keys else field.name
            value = getattr(result, field.name)
            if isinstance(value, float):
                assert float(line[column]) == value
            elif column in line and field.name != "swept":
                assert line[column] == ("" if value is None else str(value))


@settings(max_examples=100)
@given(RESULTS, st.integers(1, 3))
def test_a_conclusion_is_one_line_without_non_finite_numbers(
    results: list[JobResult], parallelism: int
) -> None:
    plain = [
        replace(result, swept={key: "v" if key == "model" else value for key, value in result.swept.items()})
        for result in results
    ]
    plain = [replace(result, swept=dict(result.swept) | {BATCH: "25", "device": "d"}) for result in plain]
    conclusions = SweepSummary(plain, parallelism).conclusions
    for line in (*SweepSummary(results, parallelism).conclusions, *conclusions):
        assert line.isprintable()
    for line in conclusions:
        assert not re.search(r"\b(nan|none|inf)\b", line, re.IGNORECASE)


@settings(max_examples=60)
@given(RESULTS)
def test_metrics_are_finite_and_have_valid_mlflow_names(results: list[JobResult]) -> None:
    metrics_by_step = SweepSummary(results).metrics_by_step()
    steps = [step for step, _ in metrics_by_step]
    assert steps == sorted(set(steps))
    assert steps[0] == 0
    for name, value in ((name, value) for _, metrics in metrics_by_step for name, value in metrics.items()):
        check_metric_name(name)
        assert math.isfinite(value)


@settings(max_examples=60)
@given(RESULTS)
def test_markdown_has_a_row_for_each_group(results: list[JobResult]) -> None:
    summary = SweepSummary(results)
    lines = summary.to_markdown().split("\n")
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(summary.groups)
    assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table}) == 1
    assert len(lines) == 1 + 1 + len(table) + 1 + len(summary.conclusions) + 1
    assert lines[-1] == ""
