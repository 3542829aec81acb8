"""Traces that are calculated, against the traces of the training itself."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from conftest import training

from captcha_exp import compose, load
from captcha_exp.config import Config
from captcha_exp.memory import plan as module
from captcha_exp.memory.allocator import MemoryEvent
from captcha_exp.memory.fake_device import Convolution
from captcha_exp.memory.interval import MiBRange
from captcha_exp.memory.plan import Plan, Planner, PlannerCache, with_batch_size
from captcha_exp.memory.replay import replay_trace
from captcha_exp.memory.trace import Phase, Trace, trace
from captcha_exp.memory.traces import TraceCache
from captcha_exp.memory.workspaces import workspace_scenarios

pytestmark = pytest.mark.usefixtures("one_thread")

PICTURES = {"train": 300, "validation": 20, "test": 20}
WORDS = (
    "device.name=cpu",
    "tracking=none",
    "captcha.width=32",
    "captcha.height=16",
    "model.channels=[4,8,8]",
)


@pytest.fixture(scope="module")
def small() -> Config:
    return load(compose(*WORDS))


# -- the line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("device.precision=bf16",),
        ("augment=none",),
        ("experiment=article", "data.count=300"),
        ("train.eval_batch_size=7",),
    ],
    ids=" ".join,
)
def test_a_calculated_trace_equals_the_real_one(words: Sequence[str]) -> None:
    """Event by event, for sizes at the ends, inside, and outside, where it is traced."""
    config = load(compose("device.name=cpu", "tracking=none", *words))
    traces = PlannerCache(config, PICTURES).traces
    for size in (1, 2, 3, 17, 64, 99, 100, 101, 150, 299, 300):
        assert traces.trace_or_interpolate(size) == trace(config, size, PICTURES)
    assert sorted(traces._traced) == [1, 2, 33, 100, 101, 150, 299, 300]


def test_micro_batches_are_traced(small: Config) -> None:
    config = training(small, micro_batch_size=10)
    traces = PlannerCache(config, PICTURES).traces
    for size in (9, 10, 11, 25):
        assert traces.trace_or_interpolate(size) == trace(with_batch_size(config, size), size, PICTURES)
    assert sorted(traces._traced) == [9, 10, 11, 25]


def made_up(size_of: Callable[[int], int], more_events: Callable[[int], int] = lambda _: 0) -> TraceCache:
    """Traces of one tensor, and maybe some of no size."""

    def tracer(batch: int) -> Trace:
        events = [MemoryEvent(1, size_of(batch)), MemoryEvent(1, None)]
        events += [MemoryEvent(2 + number, 0) for number in range(more_events(batch))]
        phases = [Phase("epoch 1: step 1", 0, len(events), size_of(batch))]
        return Trace(events, phases, [Convolution(1, batch)], 0, 0, 0, 0)

    return TraceCache(tracer, 900, uses_micro_batches=False)


def test_a_third_trace_that_is_off_the_line_has_all_of_them_traced() -> None:
    """A kink inside: both ends alone would not show it."""

    def kinked(batch: int) -> int:
        return 1000 * batch + (298 - batch) % 298 * (batch - 2) // 8

    traces = made_up(kinked)
    assert [traces.trace_or_interpolate(size).events[0].requested_bytes for size in (50, 120, 250)] == [
        kinked(size) for size in (50, 120, 250)
    ]
    assert {50, 120, 250} <= set(traces._traced)


@pytest.mark.parametrize("number", [lambda batch: batch // 2, lambda batch: int(batch > 100)])
def test_traces_with_other_events_are_no_line(number: Callable[[int], int]) -> None:
    traces = made_up(lambda batch: 8 * batch, number)
    assert len(traces.trace_or_interpolate(40).events) == 2 + number(40)
    assert 40 in traces._traced


def test_a_known_size_confirms_the_line() -> None:
    traces = made_up(lambda batch: 8 * batch + 3)
    traces.trace(100)
    assert traces.trace_or_interpolate(40).events[0].requested_bytes == 323
    assert sorted(traces._traced) == [2, 100, 300]


# -- one answer, however it is found -------------------------------------------------------------------------


def plainly(config: Config, size: int, budget: MiBRange) -> str:
    """The verdict as the module's header defines it: every limit played, nothing kept."""
    traced = trace(with_batch_size(config, size), size, PICTURES)
    context = config.gpu.context_mib
    tight = (budget.min - context.max) / (1 + module.ERROR_MARGIN)
    wide = (budget.max - context.min) / (1 - module.ERROR_MARGIN)
    workspaces = workspace_scenarios(config.gpu)
    if all(replay_trace(traced, each, tight) is not None for each in workspaces):
        return "fits"
    tried = (replay_trace(traced, each, limit) for each in workspaces for limit in (tight, wide))
    return "unsure" if any(found is not None for found in tried) else "does not fit"


def searched(config: Config, budget: MiBRange, guess: int) -> int:
    """The search for the largest batch as it was before traces were shared: every size is traced."""
    low, high = 0, PICTURES["train"] + 1
    batch = min(max(guess, 1), PICTURES["train"])
    stride = batch // 32 + 1
    while high - low > 1:
        batch = min(max(batch, low + 1), high - 1)
        low, high = (batch, high) if plainly(config, batch, budget) == "fits" else (low, batch)
        if low == 0 or high > PICTURES["train"]:
            batch = low + stride if high > PICTURES["train"] else high - stride
            stride *= 2
        else:
            batch = (low + high) // 2
    return low


@pytest.mark.parametrize("expandable", [False, True])
def test_planners_that_share_traces_answer_as_each_alone(
    small: Config, monkeypatch: pytest.MonkeyPatch, expandable: bool
) -> None:
    """Several cards and budgets: verdicts, figures and largest batches."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", f"expandable_segments:{expandable}")
    shared = PlannerCache(small, PICTURES)
    seen = set()
    for card in ("generic", "gtx1650"):
        carded = load(compose(*WORDS, f"gpu={card}", "gpu.cudnn_workspace_mib.max=40"))
        for room in (60, 860, 890, 2000) if card == "generic" else (70, 330, 380, 420):
            config = replace(carded, device=replace(carded.device, vram_budget_mib=room))
            planner = Planner(config, PICTURES, cache=shared)
            assert planner.budget_mib is not None
            largest = planner.max_batch_size()
            assert largest == searched(config, planner.budget_mib, planner._guess_max_batch_size())
            for size in (1, 40, 300):
                plan = planner.plan_for(size)
                assert plan == Planner(config, PICTURES).plan_for(size)
                assert plan.fits == plainly(config, size, planner.budget_mib)
                seen.add(plan.fits)
            alone = Planner(config, PICTURES).max_batch_plan()
            assert (alone.batch_size if alone else 0) == largest
    assert seen == {"fits", "unsure", "does not fit"}


def test_a_size_is_traced_once_for_all_cards(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(config: Config, size: int, pictures: Any) -> Trace:
        sizes.append(size)
        return trace(config, size, pictures)

    monkeypatch.setattr(module, "trace", counted)
    shared = PlannerCache(small, PICTURES)
    plans: list[Plan] = []
    for room in (860, 900, 1000):
        planner = Planner(
            replace(small, device=replace(small.device, vram_budget_mib=room)), PICTURES, None, shared
        )
        plans.append(planner.plan_for(40))
        planner.max_batch_size()
    assert sorted(sizes) == sorted(set(sizes))
    assert len(sizes) <= 6
    assert {plan.batch_size for plan in plans} == {40}
