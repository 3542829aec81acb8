"""Plans: by hand on traces of a few events, by brute force on a small config, and against themselves."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from conftest import training
from hypothesis import given, settings
from hypothesis import strategies as st

from captcha_exp import compose, load
from captcha_exp.config import Bounds, Config
from captcha_exp.memory import plan as module
from captcha_exp.memory.allocator import MIB, MemoryEvent
from captcha_exp.memory.fake_device import Convolution
from captcha_exp.memory.interval import MiBRange
from captcha_exp.memory.plan import (
    ERROR_MARGIN,
    MAX_MICRO_BATCHES,
    Peak,
    Plan,
    Planner,
    memory_budget,
    with_batch_size,
)
from captcha_exp.memory.replay import uses_expandable_segments
from captcha_exp.memory.trace import Phase, Trace
from captcha_exp.memory.workspaces import CONV_WORKSPACE_FACTOR

pytestmark = pytest.mark.usefixtures("one_thread", "no_expandable_segments")

PICTURES = {"train": 40, "validation": 20, "test": 20}
CONTEXT = (100.0, 140.0)


@pytest.fixture
def no_expandable_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


def interval(least: float, most: float) -> Bounds:
    return Bounds(min=least, max=most, source="a test")


def carded(config: Config, **values: Any) -> Config:
    """On a card without workspaces whose context is 100 to 140 MiB, but for these values."""
    plain = {
        "context_mib": interval(*CONTEXT),
        "cublas_workspace_mib": interval(0, 0),
        "cudnn_workspace_mib": interval(0, 0),
    }
    return replace(config, gpu=replace(config.gpu, **(plain | values)))


def budgeted(config: Config, budget_mib: int | None) -> Config:
    return replace(config, device=replace(config.device, vram_budget_mib=budget_mib))


def mib(value: float) -> int:
    return int(value * MIB)


# 12 MiB of weights, then 50 MiB of activations beside them in a step, 30 in an evaluation; 4 are pictures.
EVENTS = [
    MemoryEvent(1, mib(4)),
    MemoryEvent(2, mib(12)),
    MemoryEvent(3, mib(50)),
    MemoryEvent(3, None),
    MemoryEvent(4, mib(30)),
    MemoryEvent(4, None),
    MemoryEvent(2, None),
    MemoryEvent(1, None),
]
PHASES = [
    Phase("train split", 0, 1, mib(4)),
    Phase("state", 1, 2, mib(16)),
    Phase("epoch 1: step 1", 2, 4, mib(66)),
    Phase("epoch 1: evaluation", 4, 6, mib(46)),
    Phase("end", 6, 8, mib(16)),
]
TRACE = Trace(EVENTS, PHASES, [Convolution(3, mib(6))], mib(4), mib(1), mib(7), mib(4))
RESERVED = 20 + 50  # a segment that pictures and weights share, one of the activations


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Trace], None]:
    """Every plan is one of this trace."""

    def of(trace: Trace) -> None:
        monkeypatch.setattr(module, "trace", lambda *_: trace)

    of(TRACE)
    return of


def planned(config: Config, budget_mib: int | None = None) -> Plan:
    return Planner(budgeted(config, budget_mib), PICTURES).plan_for(16)


# -- by hand -------------------------------------------------------------------------------------------------


def test_a_plan_of_figures_worked_out_by_hand(tiny: Config, traced: Callable[[Trace], None]) -> None:
    plan = planned(carded(tiny))
    assert plan.batch_size == 16
    assert (plan.tensors_mib, plan.state_mib, plan.activations_mib, plan.images_mib) == (62, 12, 50, 4)
    assert plan.workspace_mib == MiBRange(0, 0)
    assert plan.training == Peak(MiBRange(66, 66), MiBRange(RESERVED, RESERVED))
    assert plan.evaluation == Peak(MiBRange(46, 46), MiBRange(RESERVED, RESERVED))
    assert plan.reserved_mib == MiBRange(RESERVED, RESERVED)
    assert plan.process_mib == pytest.approx((100 + 0.98 * RESERVED, 140 + 1.02 * RESERVED))
    assert (plan.budget_mib, plan.fits) == (None, None)


@pytest.mark.parametrize(
    ("budget_mib", "verdict"),
    # 140 + 70 * 1.02 = 211.4 at most, 100 + 70 * 0.98 = 168.6 at least
    [(212, "fits"), (211, "unsure"), (169, "unsure"), (168, "does not fit"), (100, "does not fit")],
)
def test_the_verdict_turns_just_below_what_is_needed(
    tiny: Config, traced: Callable[[Trace], None], budget_mib: int, verdict: str
) -> None:
    plan = planned(carded(tiny), budget_mib)
    assert plan.fits == verdict
    assert plan.budget_mib == MiBRange(budget_mib, budget_mib)
    assert (plan.process_mib.max <= budget_mib) == (verdict == "fits")


def test_at_a_limit_the_cache_goes_before_a_run_does(tiny: Config, traced: Callable[[Trace], None]) -> None:
    """What a step left in the cache is given back for an evaluation that wants larger blocks."""
    events = [MemoryEvent(1, mib(50)), MemoryEvent(1, None), MemoryEvent(2, mib(60)), MemoryEvent(2, None)]
    phases = [Phase("epoch 1: step 1", 0, 2, mib(50)), Phase("epoch 1: evaluation", 2, 4, mib(60))]
    traced(Trace(events, phases, [Convolution(1, 0)], mib(4), mib(1), mib(7), 0))
    config = carded(tiny, context_mib=interval(100, 100))
    assert planned(config).reserved_mib == (110, 110)
    tight = planned(config, 162)  # 100 + 60 * 1.02 = 161.2
    assert (tight.fits, tight.reserved_mib) == ("fits", (60, 60))
    assert planned(config, 161).fits == "unsure"


def test_cublas_stays_and_cudnn_comes_and_goes(tiny: Config, traced: Callable[[Trace], None]) -> None:
    cublas, cudnn = interval(0, 32), interval(0, 16)
    plan = planned(carded(tiny, cublas_workspace_mib=cublas, cudnn_workspace_mib=cudnn))
    assert plan.workspace_mib == MiBRange(0, 48)
    # beside the 66 of the step; the evaluation has no convolution here
    assert plan.training.allocated_mib == MiBRange(66, 66 + 32 + 16)
    assert plan.evaluation.allocated_mib == MiBRange(46, 46 + 32)


def test_a_cudnn_workspace_is_no_more_than_so_many_times_the_convolution(
    tiny: Config, traced: Callable[[Trace], None]
) -> None:
    plan = planned(carded(tiny, cudnn_workspace_mib=interval(0, 1000)))
    assert plan.workspace_mib == MiBRange(0, CONV_WORKSPACE_FACTOR * 6)
    assert plan.training.allocated_mib == MiBRange(66, 66 + CONV_WORKSPACE_FACTOR * 6)


@pytest.mark.parametrize(("place", "kinds"), [(4, "training"), (5, "evaluation"), (6, "evaluation")])
def test_a_convolution_at_the_end_of_a_phase_belongs_to_it(
    tiny: Config, traced: Callable[[Trace], None], place: int, kinds: str
) -> None:
    """Its place is behind the events that gave its results."""
    traced(replace(TRACE, convolutions=[Convolution(place, mib(100))]))
    plan = planned(carded(tiny, cudnn_workspace_mib=interval(0, 300)))
    peaks = {"training": plan.training, "evaluation": plan.evaluation}
    assert [name for name, peak in peaks.items() if peak.allocated_mib.max > 300] == [kinds]


def test_bounds_and_verdict_hold_wherever_the_driver_puts_a_new_segment(
    tiny: Config, traced: Callable[[Trace], None]
) -> None:
    """The fifth tensor fits into a free block of either segment, and the lower one is taken.

    If that is the first segment, the sixth tensor finds no room in what is left of it.
    """
    sizes = {1: 9, 2: 9, 3: 9, 4: 9, 5: 9, 6: 19}  # MiB; two to a segment of 20
    order = [1, 2, 3, 4, -1, -3, 5, -2, 6]
    events = [MemoryEvent(abs(each), mib(sizes[each]) if each > 0 else None) for each in order]
    end = len(events)
    phases = [Phase("epoch 1: step 1", 0, end, mib(37)), Phase("epoch 1: evaluation", end, end, mib(37))]
    traced(Trace(events, phases, [Convolution(1, 0)], 0, 0, 0, 0))
    config = carded(tiny, context_mib=interval(100, 100))
    assert planned(config).reserved_mib == (40, 60)
    verdicts = [planned(config, 100 + room).fits for room in (39, 45, 62)]  # 60 * 1.02 = 61.2
    assert verdicts == ["does not fit", "unsure", "fits"]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_expandable_segments_are_those_of_the_environment(
    tiny: Config, traced: Callable[[Trace], None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert not uses_expandable_segments()
    plain = planned(carded(tiny)).reserved_mib
    monkeypatch.setenv(name, "backend:native, expandable_segments: True")
    assert uses_expandable_segments()
    assert planned(carded(tiny)).reserved_mib == (80, 80) != plain  # 66 MiB in pages of 20
    monkeypatch.setenv(name, "expandable_segments:False")
    assert not uses_expandable_segments()


# -- properties ----------------------------------------------------------------------------------------------

sizes = st.floats(0, 600)
bounds = st.tuples(sizes, sizes).map(sorted)


@pytest.fixture(scope="module")
def small() -> Config:
    words = ("captcha.width=32", "captcha.height=16", "model.channels=[4,8,8]", "tracking=none")
    return load(compose("device.name=cpu", *words))


@given(context=bounds, more=sizes, cublas=bounds, cudnn=bounds, room=st.integers(1, 2000))
@settings(max_examples=60, deadline=None)
def test_intervals_are_ordered_and_what_fits_stays_within_the_budget(
    small: Config, context: list[float], more: float, cublas: list[float], cudnn: list[float], room: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "trace", lambda *_: TRACE)
        card: dict[str, Any] = {
            "cublas_workspace_mib": interval(*cublas),
            "cudnn_workspace_mib": interval(*cudnn),
        }
        config = carded(small, context_mib=interval(*context), **card)
        free, plan = planned(config), planned(config, room)
        for each in (free, plan):
            for between in (each.workspace_mib, each.reserved_mib, each.process_mib):
                assert between.min <= between.max
            for peak in (each.training, each.evaluation):
                assert peak.allocated_mib.min <= peak.allocated_mib.max
                assert peak.reserved_mib.min <= peak.reserved_mib.max
        if plan.fits == "fits":
            assert plan.process_mib.max <= room + 1e-6
        if free.process_mib.max <= room:
            assert plan.fits == "fits"
        larger = planned(carded(small, context_mib=interval(context[0] + more, context[1] + more), **card))
        assert larger.process_mib.min >= free.process_mib.min
        assert larger.process_mib.max >= free.process_mib.max


def test_more_room_never_makes_the_verdict_worse(tiny: Config) -> None:
    """On a training of this project; the allocator alone promises no such thing."""
    order = ["does not fit", "unsure", "fits"]
    spaces = interval(0, 20)
    config = carded(tiny, cublas_workspace_mib=spaces, cudnn_workspace_mib=spaces)
    found = [Planner(budgeted(config, room), PICTURES).plan_for(40).fits for room in range(90, 230, 5)]
    assert set(found) == set(order)
    assert found == sorted(found, key=lambda verdict: order.index(str(verdict)))


# -- the budget ----------------------------------------------------------------------------------------------


def test_a_budget_that_is_written_holds(tiny: Config) -> None:
    config = budgeted(carded(tiny, total_mib=interval(4000, 4100), other_processes_mib=interval(5, 50)), 3000)
    assert memory_budget(config) == memory_budget(config, 8000.0) == (3000, 3000)


def test_a_budget_of_more_than_the_card_has_is_none(tiny: Config) -> None:
    """A batch is not to fit by memory that is not there."""
    card = carded(tiny, total_mib=interval(4000, 4100), other_processes_mib=interval(5, 50))
    assert memory_budget(budgeted(card, 4100)) == (4100, 4100)
    assert memory_budget(budgeted(card, 4101)) == (3950, 4095)
    here = carded(tiny, total_mib=None, other_processes_mib=interval(5, 50))
    assert memory_budget(budgeted(here, 9000), 8000.0) == (7950, 7995)
    assert memory_budget(budgeted(here, 9000)) == (9000, 9000)


def test_else_it_is_what_others_leave_of_the_card(tiny: Config) -> None:
    config = carded(tiny, total_mib=interval(4000, 4100), other_processes_mib=interval(5, 50))
    assert memory_budget(config) == memory_budget(config, 8000.0) == (3950, 4095)
    assert memory_budget(carded(tiny, total_mib=interval(10, 20), other_processes_mib=interval(15, 50))) == (
        0,
        5,
    )


def test_a_card_without_a_size_has_that_of_the_device_that_is_here(tiny: Config) -> None:
    config = carded(tiny, total_mib=None, other_processes_mib=interval(5, 50))
    assert memory_budget(config, 8000.0) == (7950, 7995)
    assert memory_budget(config) is None


# -- batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("micro", "batch", "left"), [(None, 8, None), (4, 8, 4), (8, 8, None), (9, 8, None)])
def test_a_micro_batch_is_a_part_of_the_batch_or_none(
    tiny: Config, micro: int | None, batch: int, left: int | None
) -> None:
    config = with_batch_size(training(tiny, batch_size=64, micro_batch_size=micro), batch)
    assert (config.train.batch_size, config.train.micro_batch_size) == (batch, left)


def test_micro_batches_spare_activations(tiny: Config) -> None:
    whole = Planner(tiny, PICTURES).plan_for(40)
    parts = Planner(training(tiny, micro_batch_size=10), PICTURES).plan_for(40)
    assert parts.activations_mib < 0.5 * whole.activations_mib
    assert parts.state_mib == whole.state_mib


def test_the_articles_batch_has_the_tensors_that_were_known_before() -> None:
    config = load(compose("experiment=article", "device.name=cpu", "device.precision=fp32"))
    pictures = {"train": 80_000, "validation": 10_000, "test": 10_000}
    assert Planner(config, pictures).plan_for(100).tensors_mib == pytest.approx(736.8, rel=0.01)


# -- the largest ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [None, 16])
def test_the_largest_fits_and_one_more_does_not(tiny: Config, micro: int | None) -> None:
    """By all sizes, on a card whose context is all that is unknown."""
    config = carded(load(compose("device.name=cpu", "tracking=none")))
    planner = Planner(config, {"train": 40, "validation": 2})
    room = int(planner.plan_for(20).process_mib.max)
    config = budgeted(training(config, micro_batch_size=micro), room)
    planner = Planner(config, {"train": 40, "validation": 2})

    largest = planner.max_batch_plan()

    few = len(planner._plans)
    verdicts = {size: planner.plan_for(size).fits for size in range(1, 41)}
    assert largest is not None
    assert largest == planner.plan_for(largest.batch_size)
    assert verdicts[largest.batch_size] == "fits"
    assert largest.batch_size == 40 or verdicts[largest.batch_size + 1] != "fits"
    if micro is None:
        assert largest.batch_size == max(size for size, fits in verdicts.items() if fits == "fits")
        assert largest.batch_size < 40
        assert few <= 12


def test_the_largest_is_searched_up_to_so_many_micro_batches(tiny: Config) -> None:
    """Each pass is traced, and memory hardly grows with their number: the search would take minutes."""
    config = training(budgeted(carded(tiny), 100_000), micro_batch_size=2)
    planner = Planner(config, {"train": 10_000, "validation": 2})

    assert planner.max_batch_size() == planner.batch_size_limit == 2 * MAX_MICRO_BATCHES


@pytest.mark.parametrize(("most", "everything"), [(1, 1000), (3, 1000), (700, 1000), (1000, 1000), (5, 7)])
def test_few_plans_are_made_on_the_way_to_the_largest(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, most: int, everything: int
) -> None:
    """Also where the first guess is far below what fits, as with parts of a batch."""
    made: list[int] = []

    def fits(self: Planner, workspaces: object, size: int) -> bool:
        made.append(size)
        return size <= most

    monkeypatch.setattr(Planner, "_fits", fits)
    monkeypatch.setattr(Planner, "_guess_max_batch_size", lambda _: 1)
    assert Planner(budgeted(tiny, 1000), {"train": everything}).max_batch_size() == most
    assert len(set(made)) <= 30
    assert all(1 <= size <= max(everything, 2 * min(32, everything)) for size in made)


def test_a_guess_below_nothing_is_no_walk_from_one_size_to_the_next(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = set[int]()

    def fits(self: Planner, workspaces: object, size: int) -> bool:
        made.add(size)
        return size <= 700

    monkeypatch.setattr(Planner, "_fits", fits)
    monkeypatch.setattr(Planner, "_guess_max_batch_size", lambda _: -1_000_000)
    assert Planner(budgeted(tiny, 1000), {"train": 1000}).max_batch_size() == 700
    assert len(made) <= 25


def test_everything_nothing_and_no_answer(tiny: Config) -> None:
    everything = Planner(budgeted(tiny, 10_000), PICTURES).max_batch_plan()
    assert everything is not None
    assert everything.batch_size == 40
    assert Planner(budgeted(tiny, 10), PICTURES).max_batch_plan() is None
    assert Planner(tiny, PICTURES).max_batch_plan() is None


def test_unsure_counts_as_no(tiny: Config, traced: Callable[[Trace], None]) -> None:
    assert Planner(budgeted(carded(tiny), 211), PICTURES).max_batch_plan() is None
    fits = Planner(budgeted(carded(tiny), 212), PICTURES).max_batch_plan()
    assert fits is not None
    assert fits.batch_size == 40


# -- what is told --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("measured", "error"), [(100, 0), (80, 0), (120, 0), (50, 0.6), (160, -0.25)])
def test_an_error_is_a_share_of_what_was_measured_outside_the_bounds(measured: float, error: float) -> None:
    assert MiBRange(80, 120).relative_error(measured) == pytest.approx(error)


def test_what_was_measured_stands_beside_what_was_foretold(
    tiny: Config, traced: Callable[[Trace], None]
) -> None:
    """By the worst epoch; an error above 0 says that too much was foretold."""
    plan = planned(carded(tiny))
    rows = [
        {
            "memory/train_peak_allocated_mib": 33.0,
            "memory/train_peak_reserved_mib": float(RESERVED),
            "memory/eval_peak_allocated_mib": 92.0,
            "memory/eval_peak_reserved_mib": float(RESERVED),
            "memory/process_peak_mib": process,
        }
        for process in (100.0, 200.0)
    ]
    rows[0]["memory/train_peak_allocated_mib"] = 1.0
    assert plan.prediction_error_metrics([*rows, {"test/accuracy": 1.0}]) == {
        "memory/predicted_peak_min_mib": plan.process_mib.min,
        "memory/predicted_peak_mib": plan.process_mib.max,
        "memory/train_peak_allocated_error": 1.0,
        "memory/train_peak_reserved_error": 0.0,
        "memory/eval_peak_allocated_error": -0.5,
        "memory/eval_peak_reserved_error": 0.0,
        "memory/process_peak_error": 0.0,
    }


def test_without_a_card_nothing_was_measured_that_was_foretold(
    tiny: Config, traced: Callable[[Trace], None]
) -> None:
    found = planned(carded(tiny)).prediction_error_metrics([{"memory/process_peak_mib": 1.0}])
    assert set(found) == {"memory/predicted_peak_min_mib", "memory/predicted_peak_mib"}


def test_a_plan_is_told_in_a_line(tiny: Config, traced: Callable[[Trace], None]) -> None:
    begin = "a batch of 16 has 62 MiB of tensors and takes 169 to 211"
    assert planned(carded(tiny)).describe("a card") == f"{begin} MiB on a card"
    assert planned(carded(tiny), 3000).describe("a card") == f"{begin} of 3,000 MiB on a card: fits"
    config = carded(tiny, total_mib=interval(300, 400), other_processes_mib=interval(0, 100))
    assert planned(config).describe("a card") == f"{begin} of 200 to 400 MiB on a card: unsure"


def test_a_plan_is_plain_json(tiny: Config, traced: Callable[[Trace], None]) -> None:
    plan = planned(carded(tiny), 212)
    values = json.loads(json.dumps(plan.to_json()))
    assert set(values) == set(Plan.__dataclass_fields__)
    assert values["fits"] == "fits"
    assert values["training"] == {"allocated_mib": [66, 66], "reserved_mib": [RESERVED, RESERVED]}
    assert values["process_mib"] == pytest.approx(
        [100 + (1 - ERROR_MARGIN) * RESERVED, 140 + (1 + ERROR_MARGIN) * RESERVED]
    )
    assert values["budget_mib"] == [212, 212]
    assert json.loads(json.dumps(planned(carded(tiny)).to_json()))["budget_mib"] is None
