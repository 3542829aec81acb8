"""Plans checked by hand on short traces, by brute force on a small config, and for consistency."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from conftest import with_train
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
    with_batch_size,
)
from captcha_exp.memory.replay import CONV_WORKSPACE_FACTOR, uses_expandable_segments
from captcha_exp.memory.trace import Phase, Trace

pytestmark = pytest.mark.usefixtures("one_thread", "no_expandable_segments")

SPLIT_SIZES = {"train": 40, "validation": 20, "test": 20}
CONTEXT = (100.0, 140.0)


@pytest.fixture
def no_expandable_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


def bounds_of(low: float, high: float) -> Bounds:
    return Bounds(min=low, max=high, source="a test")


def with_gpu(config: Config, **values: Any) -> Config:
    """Return the config with a GPU without workspaces whose context is 100 to 140 MiB, or these values."""
    defaults = {
        "context_mib": bounds_of(*CONTEXT),
        "cublas_workspace_mib": bounds_of(0, 0),
        "cudnn_workspace_mib": bounds_of(0, 0),
    }
    return replace(config, gpu=replace(config.gpu, **(defaults | values)))


def with_budget(config: Config, budget_mib: int | None) -> Config:
    return replace(config, device=replace(config.device, vram_budget_mib=budget_mib))


def budget_of(config: Config, total_mib: float | None = None) -> MiBRange | None:
    return module.memory_budget(config.gpu, config.device.vram_budget_mib, total_mib)


def mib(value: float) -> int:
    return int(value * MIB)


# 4 MiB of images, 12 of weights, then 50 of activations in a step and 30 in an evaluation.
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
TRACE = Trace(EVENTS, PHASES, [Convolution(3, mib(6))], mib(12), mib(4))
RESERVED = 20 + 50  # a segment that images and weights share, and one of the activations


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Trace], None]:
    """Make every plan use this trace; the fixture is a function that changes it."""

    def use_trace(trace: Trace) -> None:
        monkeypatch.setattr(module, "trace", lambda *_: trace)

    use_trace(TRACE)
    return use_trace


def make_plan(config: Config, budget_mib: int | None = None) -> Plan:
    return Planner(with_budget(config, budget_mib), SPLIT_SIZES).plan_for(16)


# -- by hand -------------------------------------------------------------------------------------------------


def test_a_plan_matches_a_manual_calculation(tiny: Config, traced: Callable[[Trace], None]) -> None:
    plan = make_plan(with_gpu(tiny))
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
def test_the_verdict_changes_at_the_predicted_bounds(
    tiny: Config, traced: Callable[[Trace], None], budget_mib: int, verdict: str
) -> None:
    plan = make_plan(with_gpu(tiny), budget_mib)
    assert plan.fits == verdict
    assert plan.budget_mib == MiBRange(budget_mib, budget_mib)
    assert (plan.process_mib.max <= budget_mib) == (verdict == "fits")


def test_the_cache_is_flushed_at_the_limit(tiny: Config, traced: Callable[[Trace], None]) -> None:
    """The cached blocks of a step are returned for an evaluation that needs larger ones."""
    events = [MemoryEvent(1, mib(50)), MemoryEvent(1, None), MemoryEvent(2, mib(60)), MemoryEvent(2, None)]
    phases = [Phase("epoch 1: step 1", 0, 2, mib(50)), Phase("epoch 1: evaluation", 2, 4, mib(60))]
    traced(Trace(events, phases, [Convolution(1, 0)], mib(12), 0))
    config = with_gpu(tiny, context_mib=bounds_of(100, 100))
    assert make_plan(config).reserved_mib == (110, 110)
    tight = make_plan(config, 162)  # 100 + 60 * 1.02 = 161.2
    assert (tight.fits, tight.reserved_mib) == ("fits", (60, 60))
    assert make_plan(config, 161).fits == "unsure"


def test_the_cublas_workspace_stays_and_cudnn_workspaces_are_transient(
    tiny: Config, traced: Callable[[Trace], None]
) -> None:
    cublas, cudnn = bounds_of(0, 32), bounds_of(0, 16)
    plan = make_plan(with_gpu(tiny, cublas_workspace_mib=cublas, cudnn_workspace_mib=cudnn))
    assert plan.workspace_mib == MiBRange(0, 48)
    # in addition to the 66 of the step; the evaluation has no convolution here
    assert plan.training.allocated_mib == MiBRange(66, 66 + 32 + 16)
    assert plan.evaluation.allocated_mib == MiBRange(46, 46 + 32)


def test_a_cudnn_workspace_is_bounded_by_the_tensors_of_the_convolution(
    tiny: Config, traced: Callable[[Trace], None]
) -> None:
    plan = make_plan(with_gpu(tiny, cudnn_workspace_mib=bounds_of(0, 1000)))
    assert plan.workspace_mib == MiBRange(0, CONV_WORKSPACE_FACTOR * 6)
    assert plan.training.allocated_mib == MiBRange(66, 66 + CONV_WORKSPACE_FACTOR * 6)


@pytest.mark.parametrize(("event_index", "kind"), [(4, "training"), (5, "evaluation"), (6, "evaluation")])
def test_a_convolution_at_the_end_of_a_phase_belongs_to_it(
    tiny: Config, traced: Callable[[Trace], None], event_index: int, kind: str
) -> None:
    """Its index is after the events that allocated its results."""
    traced(replace(TRACE, convolutions=[Convolution(event_index, mib(100))]))
    plan = make_plan(with_gpu(tiny, cudnn_workspace_mib=bounds_of(0, 300)))
    peaks = {"training": plan.training, "evaluation": plan.evaluation}
    assert [name for name, peak in peaks.items() if peak.allocated_mib.max > 300] == [kind]


def test_bounds_and_verdict_cover_both_orders_of_segments(
    tiny: Config, traced: Callable[[Trace], None]
) -> None:
    """The fifth tensor fits into a free block of either segment, and the lower one is used.

    If that is the first segment, the sixth tensor does not fit into the rest of it.
    """
    sizes = {1: 9, 2: 9, 3: 9, 4: 9, 5: 9, 6: 19}  # MiB; two to a segment of 20
    order = [1, 2, 3, 4, -1, -3, 5, -2, 6]
    events = [MemoryEvent(abs(each), mib(sizes[each]) if each > 0 else None) for each in order]
    end = len(events)
    phases = [Phase("epoch 1: step 1", 0, end, mib(37)), Phase("epoch 1: evaluation", end, end, mib(37))]
    traced(Trace(events, phases, [Convolution(1, 0)], 0, 0))
    config = with_gpu(tiny, context_mib=bounds_of(100, 100))
    assert make_plan(config).reserved_mib == (40, 60)
    verdicts = [make_plan(config, 100 + extra).fits for extra in (39, 45, 62)]  # 60 * 1.02 = 61.2
    assert verdicts == ["does not fit", "unsure", "fits"]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_expandable_segments_follow_the_environment(
    tiny: Config, traced: Callable[[Trace], None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert not uses_expandable_segments()
    default = make_plan(with_gpu(tiny)).reserved_mib
    monkeypatch.setenv(name, "backend:native, expandable_segments: True")
    assert uses_expandable_segments()
    assert make_plan(with_gpu(tiny)).reserved_mib == (80, 80) != default  # 66 MiB in pages of 20
    monkeypatch.setenv(name, "expandable_segments:False")
    assert not uses_expandable_segments()


# -- properties ----------------------------------------------------------------------------------------------

sizes = st.floats(0, 600)
bounds = st.tuples(sizes, sizes).map(sorted)


@pytest.fixture(scope="module")
def small() -> Config:
    words = ("captcha.width=32", "captcha.height=16", "model.channels=[4,8,8]", "tracking=none")
    return load(compose("device.name=cpu", *words))


@given(context=bounds, more=sizes, cublas=bounds, cudnn=bounds, budget=st.integers(1, 2000))
@settings(max_examples=60, deadline=None)
def test_ranges_are_ordered_and_a_batch_that_fits_is_within_the_budget(
    small: Config, context: list[float], more: float, cublas: list[float], cudnn: list[float], budget: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "trace", lambda *_: TRACE)
        workspaces: dict[str, Any] = {
            "cublas_workspace_mib": bounds_of(*cublas),
            "cudnn_workspace_mib": bounds_of(*cudnn),
        }
        config = with_gpu(small, context_mib=bounds_of(*context), **workspaces)
        unlimited, plan = make_plan(config), make_plan(config, budget)
        for each in (unlimited, plan):
            for mib_range in (each.workspace_mib, each.reserved_mib, each.process_mib):
                assert mib_range.min <= mib_range.max
            for peak in (each.training, each.evaluation):
                assert peak.allocated_mib.min <= peak.allocated_mib.max
                assert peak.reserved_mib.min <= peak.reserved_mib.max
        if plan.fits == "fits":
            assert plan.process_mib.max <= budget + 1e-6
        if unlimited.process_mib.max <= budget:
            assert plan.fits == "fits"
        larger = make_plan(
            with_gpu(small, context_mib=bounds_of(context[0] + more, context[1] + more), **workspaces)
        )
        assert larger.process_mib.min >= unlimited.process_mib.min
        assert larger.process_mib.max >= unlimited.process_mib.max


def test_a_larger_budget_never_worsens_the_verdict(tiny: Config) -> None:
    """For this project's training; the allocator in general gives no such guarantee."""
    order = ["does not fit", "unsure", "fits"]
    workspace = bounds_of(0, 20)
    config = with_gpu(tiny, cublas_workspace_mib=workspace, cudnn_workspace_mib=workspace)
    verdicts = [Planner(with_budget(config, mib), SPLIT_SIZES).plan_for(40).fits for mib in range(90, 230, 5)]
    assert set(verdicts) == set(order)
    assert verdicts == sorted(verdicts, key=lambda verdict: order.index(str(verdict)))


# -- the budget ----------------------------------------------------------------------------------------------


def test_a_configured_budget_is_used(tiny: Config) -> None:
    config = with_budget(
        with_gpu(tiny, total_mib=bounds_of(4000, 4100), other_processes_mib=bounds_of(5, 50)), 3000
    )
    assert budget_of(config) == budget_of(config, 8000.0) == (3000, 3000)


def test_a_budget_above_the_size_of_the_gpu_is_ignored(tiny: Config) -> None:
    """Otherwise a batch would fit into memory that does not exist."""
    sized = with_gpu(tiny, total_mib=bounds_of(4000, 4100), other_processes_mib=bounds_of(5, 50))
    assert budget_of(with_budget(sized, 4100)) == (4100, 4100)
    assert budget_of(with_budget(sized, 4101)) == (3950, 4095)
    unsized = with_gpu(tiny, total_mib=None, other_processes_mib=bounds_of(5, 50))
    assert budget_of(with_budget(unsized, 9000), 8000.0) == (7950, 7995)
    assert budget_of(with_budget(unsized, 9000)) == (9000, 9000)


def test_the_default_budget_is_the_memory_that_other_processes_leave(tiny: Config) -> None:
    config = with_gpu(tiny, total_mib=bounds_of(4000, 4100), other_processes_mib=bounds_of(5, 50))
    assert budget_of(config) == budget_of(config, 8000.0) == (3950, 4095)
    assert budget_of(with_gpu(tiny, total_mib=bounds_of(10, 20), other_processes_mib=bounds_of(15, 50))) == (
        0,
        5,
    )


def test_a_gpu_file_without_a_size_uses_that_of_the_device(tiny: Config) -> None:
    config = with_gpu(tiny, total_mib=None, other_processes_mib=bounds_of(5, 50))
    assert budget_of(config, 8000.0) == (7950, 7995)
    assert budget_of(config) is None


# -- batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("micro", "batch", "expected"), [(None, 8, None), (4, 8, 4), (8, 8, None), (9, 8, None)]
)
def test_a_micro_batch_is_smaller_than_the_batch_or_none(
    tiny: Config, micro: int | None, batch: int, expected: int | None
) -> None:
    config = with_batch_size(with_train(tiny, batch_size=64, micro_batch_size=micro), batch)
    assert (config.train.batch_size, config.train.micro_batch_size) == (batch, expected)


def test_micro_batches_reduce_activations(tiny: Config) -> None:
    whole = Planner(tiny, SPLIT_SIZES).plan_for(40)
    parts = Planner(with_train(tiny, micro_batch_size=10), SPLIT_SIZES).plan_for(40)
    assert parts.activations_mib < 0.5 * whole.activations_mib
    assert parts.state_mib == whole.state_mib


def test_the_tensors_of_the_article_have_the_known_size() -> None:
    config = load(compose("experiment=article", "device.name=cpu", "device.precision=fp32"))
    split_sizes = {"train": 80_000, "validation": 10_000, "test": 10_000}
    assert Planner(config, split_sizes).plan_for(100).tensors_mib == pytest.approx(736.8, rel=0.01)


# -- the maximum batch ---------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("micro", [None, 16])
def test_the_maximum_batch_fits_and_the_next_larger_does_not(tiny: Config, micro: int | None) -> None:
    """Compared with the verdict of every size, on a GPU of which only the context is uncertain."""
    config = with_gpu(load(compose("device.name=cpu", "tracking=none")))
    planner = Planner(config, {"train": 40, "validation": 2})
    budget = int(planner.plan_for(20).process_mib.max)
    config = with_budget(with_train(config, micro_batch_size=micro), budget)
    planner = Planner(config, {"train": 40, "validation": 2})

    largest = planner.max_batch_plan()

    verdicts = {size: planner.plan_for(size).fits for size in range(1, 41)}
    assert largest is not None
    assert largest == planner.plan_for(largest.batch_size)
    assert verdicts[largest.batch_size] == "fits"
    assert largest.batch_size == 40 or verdicts[largest.batch_size + 1] != "fits"
    if micro is None:
        assert largest.batch_size == max(size for size, fits in verdicts.items() if fits == "fits")
        assert largest.batch_size < 40


def test_the_maximum_batch_has_a_limited_number_of_micro_batches(tiny: Config) -> None:
    """Each micro-batch is traced, and their number hardly changes memory: a full search takes minutes."""
    config = with_train(with_budget(with_gpu(tiny), 100_000), micro_batch_size=2)
    planner = Planner(config, {"train": 10_000, "validation": 2})

    assert planner.max_batch_size() == planner.batch_size_limit == 2 * MAX_MICRO_BATCHES


@pytest.mark.parametrize(("limit", "num_images"), [(1, 1000), (3, 1000), (700, 1000), (1000, 1000), (5, 7)])
def test_the_search_tries_few_batch_sizes(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, limit: int, num_images: int
) -> None:
    """Also if the first guess is far too low, as with micro-batches."""
    tried: list[int] = []

    def fits(self: Planner, workspaces: object, size: int) -> bool:
        tried.append(size)
        return size <= limit

    monkeypatch.setattr(Planner, "_fits", fits)
    monkeypatch.setattr(Planner, "_guess_max_batch_size", lambda _: 1)
    assert Planner(with_budget(tiny, 1000), {"train": num_images}).max_batch_size() == limit
    assert len(set(tried)) <= 30
    assert all(1 <= size <= max(num_images, 2 * min(32, num_images)) for size in tried)


def test_a_negative_guess_does_not_cause_a_linear_search(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = set[int]()

    def fits(self: Planner, workspaces: object, size: int) -> bool:
        tried.add(size)
        return size <= 700

    monkeypatch.setattr(Planner, "_fits", fits)
    monkeypatch.setattr(Planner, "_guess_max_batch_size", lambda _: -1_000_000)
    assert Planner(with_budget(tiny, 1000), {"train": 1000}).max_batch_size() == 700
    assert len(tried) <= 25


def test_the_maximum_batch_may_be_everything_nothing_or_unknown(tiny: Config) -> None:
    everything = Planner(with_budget(tiny, 10_000), SPLIT_SIZES).max_batch_plan()
    assert everything is not None
    assert everything.batch_size == 40
    assert Planner(with_budget(tiny, 10), SPLIT_SIZES).max_batch_plan() is None
    assert Planner(tiny, SPLIT_SIZES).max_batch_plan() is None


def test_unsure_is_treated_as_does_not_fit(tiny: Config, traced: Callable[[Trace], None]) -> None:
    assert Planner(with_budget(with_gpu(tiny), 211), SPLIT_SIZES).max_batch_plan() is None
    fits = Planner(with_budget(with_gpu(tiny), 212), SPLIT_SIZES).max_batch_plan()
    assert fits is not None
    assert fits.batch_size == 40


# -- output -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("measured", "error"), [(100, 0), (80, 0), (120, 0), (50, 0.6), (160, -0.25)])
def test_an_error_is_relative_to_the_measured_value(measured: float, error: float) -> None:
    assert MiBRange(80, 120).relative_error(measured) == pytest.approx(error)


def test_prediction_errors_are_metrics(tiny: Config, traced: Callable[[Trace], None]) -> None:
    """The highest peak of all epochs counts; an error above 0 means that the prediction was too high."""
    plan = make_plan(with_gpu(tiny))
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


def test_without_a_gpu_there_are_no_prediction_errors(tiny: Config, traced: Callable[[Trace], None]) -> None:
    found = make_plan(with_gpu(tiny)).prediction_error_metrics([{"memory/process_peak_mib": 1.0}])
    assert set(found) == {"memory/predicted_peak_min_mib", "memory/predicted_peak_mib"}


def test_a_plan_is_described_in_one_line(tiny: Config, traced: Callable[[Trace], None]) -> None:
    start = "predicted 169 to 211 MiB on a GPU (tensors 62 MiB)"
    assert make_plan(with_gpu(tiny)).describe("a GPU") == start
    assert make_plan(with_gpu(tiny), 3000).describe("a GPU") == f"{start}, budget 3,000 MiB: fits"
    config = with_gpu(tiny, total_mib=bounds_of(300, 400), other_processes_mib=bounds_of(0, 100))
    assert make_plan(config).describe("a GPU") == f"{start}, budget 200 to 400 MiB: unsure"


def test_a_plan_can_be_written_as_json(tiny: Config, traced: Callable[[Trace], None]) -> None:
    plan = make_plan(with_gpu(tiny), 212)
    values = json.loads(json.dumps(plan.to_json()))
    assert set(values) == set(Plan.__dataclass_fields__)
    assert values["fits"] == "fits"
    assert values["training"] == {"allocated_mib": [66, 66], "reserved_mib": [RESERVED, RESERVED]}
    assert values["process_mib"] == pytest.approx(
        [100 + (1 - ERROR_MARGIN) * RESERVED, 140 + (1 + ERROR_MARGIN) * RESERVED]
    )
    assert values["budget_mib"] == [212, 212]
    assert json.loads(json.dumps(make_plan(with_gpu(tiny)).to_json()))["budget_mib"] is None
