"""Interpolated traces, compared with traces of the training itself."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from conftest import with_train

from captcha_exp import compose, load
from captcha_exp.config import Config
from captcha_exp.memory import plan as module
from captcha_exp.memory.allocator import MemoryEvent
from captcha_exp.memory.fake_device import Convolution
from captcha_exp.memory.interval import MiBRange
from captcha_exp.memory.plan import Plan, Planner, PlannerCache, with_batch_size
from captcha_exp.memory.replay import list_scenarios, replay_trace
from captcha_exp.memory.trace import Phase, Trace, trace
from captcha_exp.memory.trace_cache import TraceCache

pytestmark = pytest.mark.usefixtures("one_thread")

SPLIT_SIZES = {"train": 300, "validation": 20, "test": 20}
OVERRIDES = (
    "device.name=cpu",
    "tracking=none",
    "captcha.width=32",
    "captcha.height=16",
    "model.channels=[4,8,8]",
)


@pytest.fixture(scope="module")
def small() -> Config:
    return load(compose(*OVERRIDES))


# -- interpolation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        pytest.param(("device.precision=bf16",), marks=pytest.mark.long),
        pytest.param(("augment=none",), marks=pytest.mark.long),
        pytest.param(("experiment=article", "data.count=300"), marks=pytest.mark.long),
        pytest.param(("train.eval_batch_size=7",), marks=pytest.mark.long),
    ],
    ids=" ".join,
)
def test_an_interpolated_trace_equals_the_real_one(overrides: Sequence[str]) -> None:
    """Event by event, for sizes at the ends, inside, and outside, where sizes are traced."""
    config = load(compose("device.name=cpu", "tracking=none", *overrides))
    traces = PlannerCache(config, SPLIT_SIZES).traces
    for size in (1, 2, 3, 17, 64, 99, 100, 101, 150, 299, 300):
        assert traces.trace_or_interpolate(size) == trace(config, size, SPLIT_SIZES)
    assert sorted(traces._traced) == [1, 2, 33, 100, 101, 150, 299, 300]


def test_micro_batches_are_not_interpolated(small: Config) -> None:
    config = with_train(small, micro_batch_size=10)
    traces = PlannerCache(config, SPLIT_SIZES).traces
    for size in (9, 10, 11, 25):
        assert traces.trace_or_interpolate(size) == trace(with_batch_size(config, size), size, SPLIT_SIZES)
    assert sorted(traces._traced) == [9, 10, 11, 25]


def make_cache(size_of: Callable[[int], int], more_events: Callable[[int], int] = lambda _: 0) -> TraceCache:
    """Return a cache of made-up traces of one tensor, and maybe some tensors of size 0."""

    def tracer(batch: int) -> Trace:
        events = [MemoryEvent(1, size_of(batch)), MemoryEvent(1, None)]
        events += [MemoryEvent(2 + number, 0) for number in range(more_events(batch))]
        phases = [Phase("epoch 1: step 1", 0, len(events), size_of(batch))]
        return Trace(events, phases, [Convolution(1, batch)], 0, 0)

    return TraceCache(tracer, 900, uses_micro_batches=False)


def test_sizes_are_traced_if_a_third_trace_is_off_the_line() -> None:
    """The two ends alone would not show the nonlinearity between them."""

    def nonlinear_bytes(batch: int) -> int:
        return 1000 * batch + (298 - batch) % 298 * (batch - 2) // 8

    traces = make_cache(nonlinear_bytes)
    assert [traces.trace_or_interpolate(size).events[0].requested_bytes for size in (50, 120, 250)] == [
        nonlinear_bytes(size) for size in (50, 120, 250)
    ]
    assert {50, 120, 250} <= set(traces._traced)


@pytest.mark.parametrize("number", [lambda batch: batch // 2, lambda batch: int(batch > 100)])
def test_traces_with_different_events_are_not_interpolated(number: Callable[[int], int]) -> None:
    traces = make_cache(lambda batch: 8 * batch, number)
    assert len(traces.trace_or_interpolate(40).events) == 2 + number(40)
    assert 40 in traces._traced


def test_a_cached_trace_confirms_the_line() -> None:
    traces = make_cache(lambda batch: 8 * batch + 3)
    traces.trace(100)
    assert traces.trace_or_interpolate(40).events[0].requested_bytes == 323
    assert sorted(traces._traced) == [2, 100, 300]


# -- results do not depend on the cache ----------------------------------------------------------------------


def plain_verdict(config: Config, size: int, budget: MiBRange) -> str:
    """Return the verdict by its definition: every limit is replayed, nothing is cached."""
    traced = trace(with_batch_size(config, size), size, SPLIT_SIZES)
    context = config.gpu.context_mib
    tight = (budget.min - context.max) / (1 + module.ERROR_MARGIN)
    wide = (budget.max - context.min) / (1 - module.ERROR_MARGIN)
    scenarios = list_scenarios(config.gpu)
    if all(replay_trace(traced, each, tight) is not None for each in scenarios):
        return "fits"
    results = (replay_trace(traced, each, limit) for each in scenarios for limit in (tight, wide))
    return "unsure" if any(result is not None for result in results) else "does not fit"


def plain_max_batch_size(config: Config, budget: MiBRange, guess: int) -> int:
    """Search for the maximum batch size without interpolation: every size is traced."""
    low, high = 0, SPLIT_SIZES["train"] + 1
    batch = min(max(guess, 1), SPLIT_SIZES["train"])
    stride = batch // 32 + 1
    while high - low > 1:
        batch = min(max(batch, low + 1), high - 1)
        low, high = (batch, high) if plain_verdict(config, batch, budget) == "fits" else (low, batch)
        if low == 0 or high > SPLIT_SIZES["train"]:
            batch = low + stride if high > SPLIT_SIZES["train"] else high - stride
            stride *= 2
        else:
            batch = (low + high) // 2
    return low


@pytest.mark.long
@pytest.mark.parametrize("expandable", [False, True])
def test_planners_with_a_shared_cache_give_the_same_results(
    small: Config, monkeypatch: pytest.MonkeyPatch, expandable: bool
) -> None:
    """Verdicts, figures and maximum batch sizes for several GPUs and budgets."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", f"expandable_segments:{expandable}")
    shared = PlannerCache(small, SPLIT_SIZES)
    verdicts = set()
    for gpu in ("generic", "gtx1650"):
        base = load(compose(*OVERRIDES, f"gpu={gpu}", "gpu.cudnn_workspace_mib.max=40"))
        for budget in (60, 860, 890, 2000) if gpu == "generic" else (70, 330, 380, 420):
            config = replace(base, device=replace(base.device, vram_budget_mib=budget))
            planner = Planner(config, SPLIT_SIZES, cache=shared)
            assert planner.budget_mib is not None
            largest = planner.max_batch_size()
            assert largest == plain_max_batch_size(
                config, planner.budget_mib, planner._guess_max_batch_size()
            )
            for size in (1, 40, 300):
                plan = planner.plan_for(size)
                assert plan == Planner(config, SPLIT_SIZES).plan_for(size)
                assert plan.fits == plain_verdict(config, size, planner.budget_mib)
                verdicts.add(plan.fits)
            alone = Planner(config, SPLIT_SIZES).max_batch_plan()
            assert (alone.batch_size if alone else 0) == largest
    assert verdicts == {"fits", "unsure", "does not fit"}


def test_a_size_is_traced_once_for_all_gpus(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counting_trace(config: Config, size: int, split_sizes: Any) -> Trace:
        sizes.append(size)
        return trace(config, size, split_sizes)

    monkeypatch.setattr(module, "trace", counting_trace)
    shared = PlannerCache(small, SPLIT_SIZES)
    plans: list[Plan] = []
    for budget in (860, 900, 1000):
        planner = Planner(
            replace(small, device=replace(small.device, vram_budget_mib=budget)), SPLIT_SIZES, None, shared
        )
        plans.append(planner.plan_for(40))
        planner.max_batch_size()
    assert sorted(sizes) == sorted(set(sizes))
    assert len(sizes) <= 6
    assert {plan.batch_size for plan in plans} == {40}
