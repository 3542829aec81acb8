"""The verdict of a sweep: groups, intervals, sentences, and what files, MLflow and a terminal get of it."""

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
    shorten_keys,
    truncate,
)
from captcha_exp.sweep.figure import save_figure
from captcha_exp.sweep.results import JobResult, Outcome
from captcha_exp.sweep.summary import SweepSummary

BATCH = "train.batch_size"
NOTHING: dict[str, Any] = {
    "measured_mib": None,
    "images_per_second": None,
    "val_accuracy": None,
    "seconds_to_best": None,
    "test_accuracy": None,
}


def row(number: int = 1, **others: Any) -> JobResult:
    """A finished point that fits."""
    values: dict[str, Any] = {
        "name": f"point {number}",
        "swept": {BATCH: "64"},
        "became": "finished",
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
        "run_dir": "outputs/sweep/1",
        "run_id": "a1",
        "weights_sha256": "0f",
    }
    return JobResult(number=number, **(values | others))


def at(size: int | str, speed: float | None, accuracy: float | None, /, **others: Any) -> JobResult:
    """A point of a sweep of the batch size; without a speed it did not fit."""
    swept = {BATCH: str(size)} | others.pop("also", {})
    if speed is None:
        others = {"became": "unfit", "fits": "does not fit"} | others
    values = NOTHING | {"images_per_second": speed, "val_accuracy": accuracy} | others
    return row(swept=swept, batch_size=None, **values)


def of(name: str, *accuracies: float, **others: Any) -> list[JobResult]:
    """Trainings of a model with some seeds."""
    return [
        row(swept={"model": name, "seed": str(seed)}, val_accuracy=accuracy, **others)
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
    """By MLflow's own rule; it takes no more characters than that."""
    _validate_metric_name(name)  # type: ignore[no-untyped-call]  # MLflow has no types
    assert len(name) <= MAX_ENTITY_KEY_LENGTH


# -- means and intervals -------------------------------------------------------------------------------------


def test_intervals_are_those_of_students_t() -> None:
    """Worked out with the table of t: 12.706 for two values, 4.303 for three."""
    two, three = estimate_mean([1.0, 3.0]), estimate_mean([1.0, 2.0, 6.0])
    assert (two.value, two.points) == (2.0, 2)
    assert two.half == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2), rel=1e-4)
    assert two.interval == pytest.approx((2 - 12.706, 2 + 12.706), rel=1e-4)
    assert (three.value, three.points) == (3.0, 3)
    assert three.half == pytest.approx(4.303 * math.sqrt(7) / math.sqrt(3), rel=1e-4)


def test_one_value_has_no_interval() -> None:
    assert estimate_mean([0.5], is_fraction=True) == (0.5, 1, None, None)


def test_the_interval_of_a_share_ends_at_0_and_1() -> None:
    assert estimate_mean([0.9, 1.0], is_fraction=True).interval == pytest.approx((0.3147, 1), abs=1e-4)
    assert estimate_mean([0.0, 0.1], is_fraction=True).interval == pytest.approx((0, 0.6853), abs=1e-4)
    assert estimate_mean([0.9, 1.0]).interval == pytest.approx((0.3147, 1.5853), abs=1e-4)


# -- groups --------------------------------------------------------------------------------------------------


def test_points_that_differ_in_seeds_alone_are_one_group() -> None:
    keys = [{key: str(n)} for key in SEEDS for n in range(2)]
    rows = [
        row(n, swept={"model": name} | key)
        for n, (name, key) in enumerate((m, k) for k in keys for m in "ab")
    ]
    groups = SweepSummary(rows).groups
    assert [(group.number, group.name, group.num_jobs) for group in groups] == [
        (1, "model=a", 6),
        (2, "model=b", 6),
    ]
    assert [row.number for row in groups[0].results] == [0, 2, 4, 6, 8, 10]


def test_a_group_has_the_means_of_its_finished_points() -> None:
    rows = [
        *of("a", 0.9, 0.8, images_per_second=100.0),
        row(swept={"model": "a", "seed": "7"}, became="killed", val_accuracy=0.1, images_per_second=None),
        row(swept={"model": "a", "seed": "8"}, val_accuracy=None, images_per_second=130.0),
    ]
    (group,) = SweepSummary(rows).groups
    assert group.num_jobs == 4
    assert group.outcome_counts == {"finished": 3, "killed": 1}
    assert group.metrics["val_accuracy"][:2] == pytest.approx((0.85, 2))
    assert group.metrics["images_per_second"][:2] == pytest.approx((110, 3))
    assert group.status == "3 finished, 1 killed"


def test_what_was_foretold_of_a_group_goes_from_least_to_most() -> None:
    rows = of("a", 0.9, 0.8)
    rows[1] = replace(rows[1], predicted_mib=MiBRange(800, 1100))
    assert SweepSummary(rows).groups[0].predicted_mib == (800, 1200)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({}, "fits"),
        ({"fits": "unsure"}, "unsure"),
        ({"became": "oom"}, "does not fit"),
        ({"became": "unfit", "fits": "unsure"}, "unsure"),
        ({"became": "unfit", "fits": "does not fit"}, "does not fit"),
        ({"became": "unfit", "fits": None}, "does not fit"),
        ({"became": "failed"}, "fits"),
        ({"budget_mib": None, "fits": None}, None),
        ({"device": "cuda", "fits": "unsure", "measured_mib": 3908.0}, "fits"),
        ({"device": "cuda:1", "fits": "fits", "measured_mib": 3909.0}, "does not fit"),
        ({"device": "cuda", "fits": "unsure", "measured_mib": None}, "unsure"),
        ({"device": "mps", "fits": "unsure", "measured_mib": 10.0}, "unsure"),
        ({"device": "cuda", "became": "failed", "fits": "unsure", "measured_mib": 10.0}, "unsure"),
        (
            {"device": "cuda", "fits": "unsure", "measured_mib": 95.0, "budget_mib": MiBRange(90, 100)},
            "unsure",
        ),
    ],
)
def test_what_a_card_showed_counts_before_what_was_foretold(
    others: dict[str, Any], expected: str | None
) -> None:
    assert effective_fits(row(**others)) == expected
    assert SweepSummary([row(**others)]).groups[0].fits == expected


def test_a_group_fits_if_all_its_points_do() -> None:
    rows = of("a", 0.9, 0.8, 0.7)
    assert SweepSummary(rows).groups[0].fits == "fits"
    for others, expected in (({"fits": "unsure"}, "unsure"), ({"became": "oom"}, "does not fit")):
        group = SweepSummary([*rows[:2], replace(rows[2], **others)]).groups[0]  # type: ignore[arg-type]  # of several types
        assert group.fits == expected
        assert not group.is_recommendable


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({}, "finished"),
        ({"micro_batch_size": 16}, "finished (split to 16)"),
        ({"micro_batch_size": 64}, "finished"),
        ({"became": "oom", "micro_batch_size": 16}, "oom (split to 16)"),
        ({"became": "unfit", "fits": "unsure"}, "unsure"),
        ({"became": "unfit", "fits": "does not fit"}, "does not fit"),
        ({"became": "failed"}, "FAILED"),
        ({"became": "not run"}, "not run"),
    ],
)
def test_a_status_is_a_word_or_two(others: dict[str, Any], words: str) -> None:
    assert format_status(row(**others)) == words


def test_keys_are_named_by_their_last_part_where_it_is_the_only_one() -> None:
    keys = ("seed", "data.seed", BATCH, "model.channels", "captcha.channels", "model")
    assert list(shorten_keys(keys).values()) == ["seed", "data.seed", "batch_size", *keys[3:]]


def test_long_values_lose_their_middle_and_odd_ones_their_breaks() -> None:
    assert truncate("0123456789", 10) == "0123456789"
    assert truncate("0123456789a", 10) == "0123…789a"
    assert truncate("a\nb\x1b[31m\udcff") == r"a\nb\x1b[31m\xff"


# -- sentences -----------------------------------------------------------------------------------------------


def test_the_smallest_batch_that_is_nearly_the_fastest_is_named() -> None:
    assert SweepSummary(FIVE).conclusions == (
        "batch_size=100 is the smallest that fits and comes within 5 % of the most pictures/s "
        "(2,310 of 2,380); its validation accuracy is 97.10%, the best is 98.10% (batch_size=50)",
    )


@pytest.mark.parametrize(("speed", "named"), [(95.0, 50), (94.99, 100)])
def test_nearly_the_fastest_is_95_percent(speed: float, named: int) -> None:
    rows = [at(100, 100.0, 0.9), at(25, 10.0, 0.9), at(50, speed, 0.9)]
    assert SweepSummary(rows).conclusions[0].startswith(f"batch_size={named} is the smallest that fits")


@pytest.mark.parametrize(
    "others", [{"became": "oom"}, {"fits": "unsure"}, {"became": "unfit", "fits": "unsure"}]
)
def test_a_batch_without_room_is_neither_named_nor_the_measure_of_speed(others: dict[str, Any]) -> None:
    said = SweepSummary([at(50, 100.0, 0.9), at(75, 101.0, 0.8), at(100, 1000.0, 0.7, **others)]).conclusions[
        0
    ]
    assert said.startswith(
        "batch_size=50 is the smallest that fits and comes within 5 % of the most pictures/s (100 of 101)"
    )


def test_the_best_accuracy_may_be_that_of_a_batch_without_room() -> None:
    said = SweepSummary([at(50, 100.0, 0.9), at(100, 90.0, 0.95, fits="does not fit")]).conclusions[0]
    assert said == (
        "batch_size=50 is the only one that fits (100 pictures/s); its validation accuracy is 90.00%, "
        "the best is 95.00% (batch_size=100, which does not fit)"
    )


def test_without_a_budget_what_finished_counts_as_fitting() -> None:
    unknown: dict[str, Any] = {"budget_mib": None, "fits": None, "predicted_mib": None}
    rows = [at(25, 10.0, 0.9, **unknown), at(50, 100.0, 0.9, **unknown), at(99, 101.0, 0.9, **unknown)]
    failed = at(100, 200.0, 0.99, became="failed", **unknown)
    assert SweepSummary([*rows, failed]).conclusions == (
        "batch_size=50 is the smallest that comes within 5 % of the most pictures/s (100 of 101); "
        "its validation accuracy is 90.00%, the best is 90.00% (batch_size=25)",
    )


def test_the_fastest_itself_and_the_best_itself() -> None:
    assert SweepSummary([at(25, 10.0, 0.9), at(50, 5.25, 0.8)]).conclusions == (
        "batch_size=25 is the smallest that fits and comes within 5 % of the most pictures/s (10, the most "
        "itself); its validation accuracy is 90.00%, the best",
    )


def test_that_only_one_fits_is_not_said_where_nobody_knows_what_does() -> None:
    unknown: dict[str, Any] = {"budget_mib": None, "fits": None}
    rows = [at(25, 10.0, 0.9, **unknown), at(50, 90.0, 0.8, became="killed", **unknown)]
    assert (
        SweepSummary(rows).conclusions[0].startswith("batch_size=25 is the smallest that comes within 5 % of")
    )


def test_one_batch_size() -> None:
    assert SweepSummary([at(25, 5.25, 0.9)]).conclusions == (
        "batch_size=25 fits and reaches 5.2 pictures/s; its validation accuracy is 90.00%, the best",
    )


def test_nothing_fits_but_something_finished() -> None:
    said = SweepSummary([at(50, 100.0, 0.9, fits="unsure"), at(100, None, None)]).conclusions
    assert said == (
        "no batch size fits; the best validation accuracy is 90.00% (batch_size=50, which may not fit)",
    )


def test_a_sentence_for_each_combination_of_what_else_was_swept() -> None:
    rows = [
        at(50, 10.0, 0.8, also={"model": "b"}),
        at(25, 10.0, 0.9, also={"model": "a"}),
        at(25, 10.0, 0.8, also={"model": "b"}),
        at(50, 90.0, 0.9, also={"model": "a"}),
        at(50, None, None, also={"model": "c"}),
    ]
    first, second, third = SweepSummary(rows).conclusions
    assert first.startswith("model=b: batch_size=25 is the smallest")  # as fast as 50
    assert first.endswith("its validation accuracy is 80.00%, the best")
    assert second.startswith("model=a: batch_size=50 is the smallest")
    assert second.endswith("the best is 90.00% (batch_size=25)")
    assert third == "model=c: nothing finished: 1 point, which does not fit"


def test_seeds_of_a_batch_size_give_an_interval() -> None:
    rows = [at(25, speed, share, also={"seed": str(share)}) for speed, share in ((10.0, 0.9), (12.0, 0.91))]
    assert SweepSummary(rows).conclusions == (
        "batch_size=25 fits and reaches 11 pictures/s; its validation accuracy is "
        "90.50% (mean of 2, 95 % interval 84.15% to 96.85%), the best",
    )


def test_the_best_group_and_whether_that_is_certain() -> None:
    far = SweepSummary([*of("a", 0.90, 0.91, 0.92), *of("b", 0.97, 0.98, 0.99)])
    assert far.conclusions == (
        "model=b has the best validation accuracy, 98.00% (mean of 3, 95 % interval 95.52% to 100.00%); "
        "next is model=a with 91.00% (mean of 3, 95 % interval 88.52% to 93.48%); "
        "the intervals do not overlap",
    )
    near = SweepSummary([*of("a", 0.90, 0.91, 0.92), *of("b", 0.91, 0.92, 0.93), *of("c", 0.1, 0.2)])
    assert near.conclusions[0].startswith("model=b has the best validation accuracy, 92.00% (mean of 3")
    assert "next is model=a with 91.00%" in near.conclusions[0]
    assert near.conclusions[0].endswith("the intervals overlap, so that the difference is not certain")


def test_without_seeds_nothing_is_said_of_certainty() -> None:
    assert SweepSummary([*of("a", 0.9), *of("b", 0.9), *of("c", 0.8)]).conclusions == (
        "model=a has the best validation accuracy, 90.00%; next is model=b with 90.00%",
    )


def test_the_best_group_may_have_no_room() -> None:
    assert SweepSummary([*of("a", 0.9, fits="unsure"), *of("b", 0.8)]).conclusions == (
        "model=a has the best validation accuracy, 90.00%, but it may not fit; next is model=b with 80.00%",
    )


def test_seeds_alone() -> None:
    rows = [row(swept={"seed": str(n)}, val_accuracy=share) for n, share in enumerate((0.9, 0.92))]
    assert SweepSummary(rows).conclusions == (
        "the validation accuracy is 91.00% (mean of 2, 95 % interval 78.29% to 100.00%)",
    )


def test_a_batch_size_that_is_found_out_is_a_name_as_any_other() -> None:
    verdict = SweepSummary([at("auto", 10.0, 0.9), at(25, 9.0, 0.8)])
    assert verdict.conclusions[0].startswith("batch_size=auto has the best validation accuracy")
    assert [step for step, _ in verdict.metrics_by_step()] == [0, 1, 2]


@pytest.mark.parametrize("size", ["0", "-1", "2.5", "1_", "٣", "64 ", ""])
def test_what_is_no_batch_size_is_a_name(size: str) -> None:
    assert SweepSummary([at(size, 10.0, 0.9)]).groups[0].batch_size is None


def test_a_batch_size_may_have_its_thousands_apart() -> None:
    assert SweepSummary([at("1_000", 10.0, 0.9)]).groups[0].batch_size == 1000


def test_where_nothing_finished_the_counts_are_told() -> None:
    kinds: list[Outcome] = ["oom", "unfit", "unfit", "failed", "killed", "not run", "not run"]
    verdict = SweepSummary([row(n, became=kind, **NOTHING) for n, kind in enumerate(kinds)], parallelism=2)
    assert verdict.conclusions == (
        "nothing finished: of 7 points 1 ran out of memory, 2 do not fit, 1 failed, 1 was killed "
        "and 2 were not run",
    )
    assert SweepSummary([]).conclusions == ("nothing finished: there are no points",)
    assert SweepSummary([row(became="failed")]).conclusions == ("nothing finished: 1 point, which failed",)


def test_points_that_shared_the_machine_are_told() -> None:
    assert SweepSummary(FIVE, parallelism=3).conclusions[1:] == (
        "3 points ran at a time: speeds are those of points that shared the machine",
    )
    assert len(SweepSummary(FIVE, parallelism=1).conclusions) == 1


@pytest.mark.parametrize("odd", [math.nan, math.inf, None])
def test_what_is_no_number_is_not_told(odd: float | None) -> None:
    accuracy = SweepSummary([at(25, 10.0, odd), at(50, 20.0, 0.5)])
    assert accuracy.conclusions[0].endswith("its validation accuracy is 50.00%, the best")
    speed = SweepSummary([at(25, odd or -1.0, 0.5, images_per_second=odd), at(50, 20.0, 0.4)])
    assert speed.conclusions[0].startswith("batch_size=50 is the smallest")
    nothing = SweepSummary([row(swept={"model": "a"}, val_accuracy=odd)])
    assert nothing.conclusions == ("there is no validation accuracy to compare: 1 point, which finished",)
    json.dumps(nothing.to_json(), allow_nan=False)


# -- failed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("became", "failed"),
    [
        ("finished", False),
        ("oom", False),
        ("unfit", False),
        ("failed", True),
        ("killed", True),
        ("not run", True),
    ],
)
def test_too_little_memory_is_a_result_and_an_error_is_none(became: Outcome, failed: bool) -> None:
    assert SweepSummary([row(), row(2, became=became)]).has_failures is failed


# -- MLflow --------------------------------------------------------------------------------------------------


def test_figures_stand_at_the_batch_size_and_the_counts_at_0() -> None:
    rows = [
        *FIVE,
        at(1600, None, None, became="oom"),
        at(3200, None, None, became="not run", predicted_mib=None),
    ]
    figures = dict(SweepSummary(rows).metrics_by_step())
    assert list(figures) == [0, 25, 50, 100, 200, 800, 1600, 3200]
    assert figures[0] == {
        "sweep/points": 7,
        "sweep/finished": 4,
        "sweep/oom": 1,
        "sweep/unfit": 1,
        "sweep/failed": 1,
    }
    assert figures[25] == {
        "sweep/val_accuracy": 0.979,
        "sweep/images_per_second": 1500,
        "sweep/predicted_mib": 1200,
    }
    assert figures[800] == {"sweep/predicted_mib": 1200}
    assert figures[3200] == {}


def test_all_figures_of_a_group() -> None:
    assert dict(SweepSummary(of("a", 0.5)).metrics_by_step())[1] == {
        "sweep/val_accuracy": 0.5,
        "sweep/test_accuracy": 0.96,
        "sweep/images_per_second": 1000,
        "sweep/seconds_to_best": 30,
        "sweep/measured_mib": 800,
        "sweep/predicted_mib": 1200,
    }


def test_what_else_was_swept_ends_the_name_of_a_metric() -> None:
    odd = ["compact", "ünïcode\n$", "ünïcode\n€", "../..", "x" * 400]
    rows = [at(25, 10.0, 0.5, also={"model": name, "train.schedule": "constant"}) for name in odd]
    (_, metrics) = SweepSummary(rows).metrics_by_step()[1]
    names = [name.removeprefix("sweep/val_accuracy/") for name in metrics if "val_accuracy" in name]
    assert names[0] == "model_compact schedule_constant"
    assert len(set(names)) == 5
    for name in metrics:
        check_metric_name(name)


# -- files ---------------------------------------------------------------------------------------------------


def test_a_line_of_csv_has_what_was_swept_and_every_value() -> None:
    hostile = {"captcha.alphabet": 'a,"b"\r\nc;é', BATCH: "64", "name": "x", "device": "y"}
    found = row(3, swept=hostile, error="one, two", run_id=None, budget_mib=None, val_accuracy=0.1 + 0.2)
    text = SweepSummary([found]).to_csv()
    (line,) = csv.DictReader(io.StringIO(text, newline=""))
    assert list(line)[:6] == [*hostile, "number", "point.name"]
    assert {key: line[key] for key in hostile} == hostile
    assert (line["point.name"], line["point.device"]) == ("point 3", "cpu")
    assert (line["predicted_least_mib"], line["predicted_most_mib"]) == ("900", "1200")
    assert (line["budget_least_mib"], line["budget_most_mib"], line["run_id"]) == ("", "", "")
    assert float(line["val_accuracy"]) == 0.1 + 0.2
    assert len(line) == len(hostile) + len(fields(JobResult)) - 1 + 2


def test_half_a_character_does_not_stop_the_writing() -> None:
    verdict = SweepSummary(
        [row(swept={"data.path": "/\udcff"}, name="\ud800", error="\udcff", became="failed")]
    )
    for text in (verdict.to_csv(), verdict.to_markdown(), json.dumps(verdict.to_json())):
        text.encode()


def test_markdown_shows_values_as_they_stand() -> None:
    rows = [
        row(swept={"a.x_y": "p|q`*<b>$[l](u)\n# h"}),
        row(2, swept={"a.x_y": "z"}, became="failed", error="a|b"),
    ]
    text = SweepSummary(rows).to_markdown()
    lines = text.splitlines()
    assert lines[0] == r"**sweep of a.x\_y: of 2 points 1 finished and 1 failed**"
    assert lines[2] == (
        r"| x\_y | predicted MiB | measured MiB (RAM) | fits | pictures/s | validation |"
        " seconds to it | status |"
    )
    assert lines[3] == "|" + " --- |" * 8
    assert lines[4].startswith(
        r"| p\|q\`\*&lt;b&gt;&#36;\[l\](u)\\n\# h | 900 to 1,200 | 800 | fits | 1,000 | 97.00% |"
    )
    assert lines[5].endswith(r"| FAILED: a\|b |")
    assert lines[7].startswith("- x\\_y=p\\|q")


def test_json_says_what_became_of_each_group() -> None:
    values = json.loads(json.dumps(SweepSummary(of("a", 0.9, 0.92)).to_json()))
    (group,) = values["groups"]
    assert group["points"] == [1, 1]
    assert group["predicted_mib"] == [900, 1200]
    assert group["figures"]["measured_mib"] == {"value": 800, "points": 2, "half": 0, "interval": [800, 800]}
    assert values["points"][0]["swept"] == {"model": "a", "seed": "0"}


# -- the terminal --------------------------------------------------------------------------------------------


def printed(verdict: SweepSummary, capsys: pytest.CaptureFixture[str]) -> list[str]:
    output.print_sweep(verdict)
    return capsys.readouterr().out.splitlines()


def test_the_table_has_a_line_for_each_group(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(SweepSummary([*of("a", 0.9, 0.92), *of("b", 0.8, became="oom")]), capsys)
    assert lines[0] == "sweep of model, seed: of 3 points 2 finished and 1 ran out of memory"
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert cells == [
        ["a", "2", "900 to 1,200", "800", "fits", "1,000", "91.00% ± 12.71%", "30", "2 finished"],
        ["b", "1", "900 to 1,200", "", "does not fit", "", "", "", "oom"],
    ]
    assert lines[-1].startswith("model=a has the best validation accuracy, 91.00%")


def test_a_card_and_a_machine_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(swept={"device": "a"}), row(2, swept={"device": "b"}, device="cuda")]
    assert any("measured MiB (RAM)" in line for line in printed(SweepSummary(rows[:1]), capsys))
    assert any("measured MiB (card)" in line for line in printed(SweepSummary(rows[1:]), capsys))
    lines = printed(SweepSummary(rows), capsys)
    assert ["800 (RAM)" in line for line in lines if line.startswith("│")] == [True, False]
    assert ["800 (card)" in line for line in lines if line.startswith("│")] == [False, True]


def test_what_failed_is_told_whole_and_wide_values_break_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    error = "RuntimeError: [/red] " + "and so on " * 40 + "until here"
    swept = {f"group.key_{n}": f"[bold]{'very ' * 20}{n}" for n in range(12)}
    lines = printed(
        SweepSummary([row(swept=swept, became="failed", name="[x]", error=error, folder="out/[y]")]), capsys
    )
    table = [line for line in lines if line[:1] in "┏┃┡│└"]
    assert len(table) == 5
    assert len({len(line) for line in table}) == 1
    assert "[bold]very very" in table[3]
    assert f"[x]: {error}, folder out/[y]" in lines


def test_a_narrow_terminal_keeps_the_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None, soft_wrap=True)
    monkeypatch.setattr(output, "console", lambda: out)
    output.print_sweep(SweepSummary([at(25, 10.0, 0.9, also={"data.path": "中" * 100 + "/x" * 50})]))
    text = out.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert {len(line) for line in text.splitlines() if line[:1] in "┏┡└"} == {80}


# -- the picture ---------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: figures.append(self))
    return figures


def dots(figure: Figure, panel: int) -> list[tuple[list[float], list[float]]]:
    """Of a panel's round marks, in the order they were drawn."""
    lines = figure.axes[panel].lines
    places = [np.asarray(line.get_data(), float).tolist() for line in lines if line.get_marker() == "o"]
    return [(x, y) for x, y in places]


def test_the_memory_of_a_machine_is_not_drawn_beside_a_cards(drawn: list[Figure], tmp_path: Path) -> None:
    for device, expected in (("cpu", []), ("cuda", [([25], [700.0])])):
        save_figure(
            SweepSummary([at(25, 10.0, 0.9, device=device, measured_mib=700.0)]), tmp_path / "sweep.png"
        )
        assert dots(drawn[-1], 0) == expected


def test_a_line_for_each_combination_against_the_batch_size(drawn: list[Figure], tmp_path: Path) -> None:
    rows = [at(size, size + 1.0, 0.9, also={"model": name}) for name in "ab" for size in (50, 25)]
    save_figure(SweepSummary(rows), tmp_path / "sweep.png")
    assert dots(drawn[0], 1) == [([25, 50], [26.0, 51.0])] * 2
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["model=a", "model=b"]
    assert drawn[0].axes[0].get_xlabel() == "batch size"


def test_without_batch_sizes_groups_stand_by_name(drawn: list[Figure], tmp_path: Path) -> None:
    save_figure(SweepSummary([*of("a", 0.9, 0.92), *of("b", 0.8)]), tmp_path / "sweep.png")
    accuracy = drawn[0].axes[2]
    assert [label.get_text() for label in accuracy.get_xticklabels()] == ["a", "b"]
    assert accuracy.get_xlabel() == "model"
    assert dots(drawn[0], 2) == [([0, 1], [pytest.approx(0.91), 0.8])]
    assert not drawn[0].legends


# -- whatever the points are ---------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FIGURE = st.none() | st.floats(0, 1e6) | st.sampled_from([math.nan, math.inf])
SHARE = st.none() | st.floats(0, 1) | st.just(math.nan)
INTERVAL = st.none() | st.tuples(st.floats(0, 1e5), st.floats(0, 1e5)).map(
    lambda pair: MiBRange(*sorted(pair))
)
ROW = st.builds(
    JobResult,
    number=st.integers(1, 99),
    name=TEXT,
    swept=st.fixed_dictionaries(
        {BATCH: st.sampled_from(["1", "25", "64"]) | TEXT},
        optional={"model": TEXT, "seed": st.sampled_from("12"), "device": TEXT},
    ),
    became=st.sampled_from(["finished", "finished", "oom", "unfit", "failed", "killed", "not run"]),
    error=st.none() | TEXT,
    attempts=st.integers(0, 9),
    batch_size=st.none() | st.integers(1, 999),
    micro_batch_size=st.none() | st.integers(1, 999),
    device=st.sampled_from(["cpu", "cuda", "cuda:1"]),
    budget_mib=INTERVAL,
    predicted_mib=INTERVAL,
    fits=st.sampled_from([None, "fits", "unsure", "does not fit"]),
    measured_mib=FIGURE,
    images_per_second=FIGURE,
    val_accuracy=SHARE,
    seconds_to_best=FIGURE,
    test_accuracy=SHARE,
    folder=st.none() | TEXT,
    run_id=st.none() | TEXT,
    weights_sha256=st.none() | TEXT,
)
ROWS = st.lists(ROW, max_size=8)


@settings(max_examples=60)
@given(ROWS)
def test_every_point_is_in_one_group(rows: list[JobResult]) -> None:
    verdict = SweepSummary(rows)
    members = [id(row) for group in verdict.groups for row in group.results]
    assert sorted(members) == sorted(map(id, verdict.results))
    for group in verdict.groups:
        for row in group.results:
            assert {key: value for key, value in row.swept.items() if key not in SEEDS} == group.swept


@settings(max_examples=60)
@given(ROWS)
def test_json_comes_back_as_it_went(rows: list[JobResult]) -> None:
    values = SweepSummary(rows).to_json()
    assert json.loads(json.dumps(values, allow_nan=False)) == values


@settings(max_examples=60)
@given(ROWS)
def test_csv_comes_back_as_it_went(rows: list[JobResult]) -> None:
    verdict = SweepSummary(rows)
    lines = list(csv.DictReader(io.StringIO(verdict.to_csv(), newline="")))
    assert len(lines) == len(rows)
    keys = {key for row in rows for key in row.swept}
    for row, line in zip(verdict.results, lines, strict=True):
        assert {key: line[key] for key in keys} == dict.fromkeys(keys, "") | dict(row.swept)
        for field in fields(JobResult):
            column = f"point.{field.name}" if field.name in keys else field.name
            value = getattr(row, field.name)
            if isinstance(value, float):
                assert float(line[column]) == value
            elif column in line and field.name != "swept":
                assert line[column] == ("" if value is None else str(value))


@settings(max_examples=100)
@given(ROWS, st.integers(1, 3))
def test_a_sentence_is_one_line_without_what_is_no_number(rows: list[JobResult], jobs: int) -> None:
    plain = [
        replace(row, swept={key: "v" if key == "model" else value for key, value in row.swept.items()})
        for row in rows
    ]
    plain = [replace(row, swept=dict(row.swept) | {BATCH: "25", "device": "d"}) for row in plain]
    for sentence in (*SweepSummary(rows, jobs).conclusions, *SweepSummary(plain, jobs).conclusions):
        assert sentence.isprintable()
    for sentence in SweepSummary(plain, jobs).conclusions:
        assert not re.search(r"\b(nan|none|inf)\b", sentence, re.IGNORECASE)


@settings(max_examples=60)
@given(ROWS)
def test_metrics_are_numbers_under_names_that_mlflow_takes(rows: list[JobResult]) -> None:
    figures = SweepSummary(rows).metrics_by_step()
    steps = [step for step, _ in figures]
    assert steps == sorted(set(steps))
    assert steps[0] == 0
    for name, value in ((name, value) for _, metrics in figures for name, value in metrics.items()):
        check_metric_name(name)
        assert math.isfinite(value)


@settings(max_examples=60)
@given(ROWS)
def test_markdown_has_a_line_for_each_group(rows: list[JobResult]) -> None:
    verdict = SweepSummary(rows)
    lines = verdict.to_markdown().split("\n")
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(verdict.groups)
    assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table}) == 1
    assert len(lines) == 1 + 1 + len(table) + 1 + len(verdict.conclusions)
