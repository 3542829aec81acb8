"""Traces against manual calculations and against torch's profiler for the same training on the CPU."""

import gc
import itertools
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import CPU, with_train
from support.profiling import (
    HEADS,
    PHASES,
    configured,
    network,
    profiled,
    real_peaks,
    run_for_real,
)
from torch import Tensor
from torch._C._profiler import _EventType
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from captcha_exp.config import Config, Precision
from captcha_exp.data.augment import NUM_PARAMS
from captcha_exp.data.dataset import Batch
from captcha_exp.memory import trace as module
from captcha_exp.memory.allocator import CachingAllocator, MemoryEvent, replay_events
from captcha_exp.memory.fake_device import DEVICE, HOST, Convolution, DeviceTensor, TensorRecorder
from captcha_exp.memory.plan import with_batch_size
from captcha_exp.memory.trace import Trace, trace
from captcha_exp.model.state import TrainState
from captcha_exp.model.step import Step, init_train_state, train_step

pytestmark = pytest.mark.usefixtures("one_thread")

MIB = 2**20
SPLIT_SIZES = {"train": 200, "validation": 80}


def on_device(config: Config, **values: Any) -> Config:
    return replace(config, device=replace(config.device, **values))


def peaks(traced: Trace) -> dict[str, int]:
    return {phase.name: phase.peak_bytes for phase in traced.phases}


# -- arithmetic -----------------------------------------------------------------------------------------


def resnet18_sizes() -> tuple[list[int], int]:
    """Return the parameter sizes of the article's network (He et al.), and the channels of all norms."""
    convolutions = [(3, 64, 3)]
    inputs = 64
    for width in (64, 128, 256, 512):
        convolutions += [(inputs, width, 3), *[(width, width, 3)] * 3]
        convolutions += [(inputs, width, 1)] if width != inputs else []
        inputs = width
    norms = [outputs for _, outputs, _ in convolutions]
    weights = [a * b * kernel * kernel for a, b, kernel in convolutions]
    return [*weights, *norms, *norms, 512 * 4 * 36, 4 * 36], sum(norms)


def test_the_articles_training_matches_a_manual_calculation() -> None:
    config = configured("experiment=article", "device.preload_limit_mib=0")

    traced = trace(config, 100, {"train": 300, "validation": 200})

    parameters, channels = resnet18_sizes()
    buffers_bytes = 2 * 4 * channels + 8 * 20  # mean and variance; step counts of 20 norms
    optimizer_bytes = 2 * 4 * sum(parameters) + 4 * len(parameters)  # Adam has a step count per parameter
    assert traced.state_bytes == 4 * sum(parameters) + buffers_bytes + optimizer_bytes
    assert traced.resident_bytes == 0
    assert traced.peak_bytes("epoch 1: step") / MIB == pytest.approx(736.8, rel=0.01)


@pytest.mark.parametrize(("kind", "copies"), [("adam", 2), ("adamw", 2), ("sgd", 1)])
def test_optimizer_state_is_a_multiple_of_the_weights(tiny: Config, kind: str, copies: int) -> None:
    traced = trace(with_train(tiny, optimizer=kind), 16, SPLIT_SIZES)

    model = init_train_state(tiny, CPU).model
    parameters = list(model.parameters())
    scalars = 4 * len(parameters) if kind != "sgd" else 0
    weights_bytes = (1 + copies) * sum(each.nbytes for each in parameters)
    assert traced.state_bytes == weights_bytes + sum(each.nbytes for each in model.buffers()) + scalars


def test_a_split_on_the_host_needs_only_its_batches_on_the_device(tiny: Config) -> None:
    """Otherwise it is on the device, together with the order of an epoch."""
    resident = trace(tiny, 16, SPLIT_SIZES)
    on_host = trace(on_device(tiny, preload_limit_mib=0), 16, SPLIT_SIZES)

    image_bytes = 16 * 32 * 3 + 2 * 8 + 8  # pixels, class IDs, index
    assert resident.resident_bytes == 280 * image_bytes
    assert on_host.resident_bytes == 0
    for number in (1, 2, 3):
        step = f"epoch 1: step {number}"
        assert peaks(resident)[step] - peaks(on_host)[step] == 280 * image_bytes + 200 * 8
    assert peaks(on_host)["validation split"] == 0


def test_all_steps_after_the_first_have_the_same_peak(tiny: Config) -> None:
    """The first step has no tensors of an earlier step."""
    peak = peaks(trace(with_train(tiny, epochs=9), 16, SPLIT_SIZES))

    scalars = 4 + 8 + 1 + 1 + 4  # loss, num_correct, finite, diverged; the optimizer's found_inf
    assert peak["epoch 1: step 2"] - peak["epoch 1: step 1"] == scalars
    assert peak["epoch 1: step 3"] == peak["epoch 1: step 2"]
    assert not any("epoch 2" in phase for phase in peak)  # it would be identical


def test_augmentation_adds_its_parameters(tiny: Config) -> None:
    """Warm-up starts with no augmentation. New parameters are allocated before the old ones are freed."""
    augmented = replace(tiny, augment=replace(tiny.augment, translate=0.1, warmup_fraction=0.5))
    params_bytes = sum(SPLIT_SIZES.values()) * NUM_PARAMS * 4

    plain, changed = (trace(with_train(config, epochs=9), 16, SPLIT_SIZES) for config in (tiny, augmented))

    assert peaks(changed)["epoch 1: step 3"] == peaks(plain)["epoch 1: step 3"]
    assert peaks(changed)["epoch 1: evaluation"] == peaks(plain)["epoch 1: evaluation"]
    assert peaks(changed)["epoch 2: evaluation"] - peaks(plain)["epoch 1: evaluation"] == params_bytes
    order = 200 * 8  # allocated after the old parameters are freed
    assert peaks(changed)["epoch 9: start"] - peaks(changed)["epoch 2: start"] == params_bytes - order


def test_only_fp16_has_a_loss_scale(tiny: Config) -> None:
    def state(precision: Precision) -> Counter[int | None]:
        traced = trace(on_device(tiny, precision=precision), 16, SPLIT_SIZES)
        phase = next(each for each in traced.phases if each.name == "state")
        return Counter(event.requested_bytes for event in traced.events[phase.begin : phase.end])

    assert state("fp16") - state("fp32") == Counter([4, 8])


@pytest.mark.parametrize("limit_mib", [0, 512])
def test_a_shortened_evaluation_has_the_peak_of_the_full_one(
    tiny: Config, limit_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on_device(with_train(tiny, eval_batch_size=8), preload_limit_mib=limit_mib)
    split_sizes = SPLIT_SIZES | {"test": 80}
    short = trace(config, 16, split_sizes)
    monkeypatch.setattr(module, "NUM_EVAL_BATCHES", 1000)
    full = trace(config, 16, split_sizes)

    assert len(full.events) > len(short.events)
    assert peaks(full) == peaks(short)


def test_an_epoch_has_no_more_batches_than_the_split(tiny: Config) -> None:
    traced = trace(with_train(tiny, epochs=1), 64, {"train": 100, "validation": 10})

    steps = [phase.name for phase in traced.phases if "step" in phase.name]
    assert steps == ["epoch 1: step 1", "epoch 1: step 2"]


# -- compared with real training ------------------------------------------------------------------------


def compare(config: Config, size: int, record: Any) -> None:
    config = with_train(with_batch_size(config, size), eval_batch_size=size, epochs=1)
    split_sizes = {"train": 2 * size, "validation": 2 * size}
    moments = run_for_real(config, split_sizes)
    traced = trace(config, size, split_sizes)
    raw, without = real_peaks(moments, True), real_peaks(moments, False)
    for phase in PHASES:
        predicted = traced.peak_bytes(phase)
        record(f"{phase} raw", f"{raw[phase] / predicted - 1:+.4f}")
        record(phase, f"{without[phase] / predicted - 1:+.4f}")
        assert without[phase] == pytest.approx(predicted, rel=0.02), phase
        # oneDNN reorders tensors of one layer, which is much relative to a small batch of a small network.
        forward_size = config.train.micro_batch_size or size
        # A CPU without bf16 instructions computes in fp32, with temporaries of twice the size.
        native = config.device.precision != "bf16" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if forward_size >= 32 and native and phase != "state":  # weight initialization has temporaries
            assert raw[phase] <= 1.05 * predicted, phase


NETWORKS = list(itertools.product(("compact", "resnet18"), HEADS, ("fp32", "bf16")))
QUICK_CASES = [
    *[(*case, size) for case in NETWORKS[:8] for size in (4, 32)],  # compact
    pytest.param("resnet18", "position", "fp32", 8, marks=pytest.mark.long),
    pytest.param("resnet18", "grouped_softmax", "bf16", 8, marks=pytest.mark.long),
]
ALL_CASES = [(*case, size) for case in NETWORKS for size in (4, 8, 16, 32)]


@pytest.mark.parametrize(("model", "head", "precision", "size"), QUICK_CASES)
def test_peaks_match_real_training(
    model: str, head: str, precision: str, size: int, record_property: Any
) -> None:
    compare(network(model, head, precision), size, record_property)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "head", "precision", "size"), ALL_CASES)
def test_peaks_match_real_training_for_all_sizes(
    model: str, head: str, precision: str, size: int, record_property: Any
) -> None:
    compare(network(model, head, precision), size, record_property)


SAVINGS = [
    (model, head, overrides, size)
    for (model, head), (overrides, size) in itertools.product(
        itertools.product(("compact", "resnet18"), HEADS),
        [
            (("train.activation_checkpointing=true",), 32),
            (("train.activation_checkpointing=true", "device.precision=bf16"), 16),
            (("train.micro_batch_size=8",), 24),
            (("train.micro_batch_size=32", "train.activation_checkpointing=true"), 64),
        ],
    )
]
OPTIMIZER_IMPLS = [
    (f"train.optimizer_impl={kernel}", f"train.optimizer={kind}")
    for kernel in ("fused", "foreach", "for_loop")
    for kind in ("adam", "sgd")
]


@pytest.mark.long
@pytest.mark.parametrize(("model", "head", "overrides", "size"), SAVINGS[:16])
def test_peaks_match_real_training_with_memory_savings(
    model: str, head: str, overrides: tuple[str, ...], size: int, record_property: Any
) -> None:
    compare(network(model, head, "fp32", *overrides), size, record_property)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "head", "overrides", "size"), SAVINGS[16:])
def test_peaks_match_a_larger_real_training_with_memory_savings(
    model: str, head: str, overrides: tuple[str, ...], size: int, record_property: Any
) -> None:
    compare(network(model, head, "fp32", *overrides), size, record_property)


@pytest.mark.parametrize(
    "overrides",
    [OPTIMIZER_IMPLS[0], *(pytest.param(each, marks=pytest.mark.long) for each in OPTIMIZER_IMPLS[1:])],
    ids=" ".join,
)
def test_peaks_match_real_training_for_each_optimizer_implementation(
    overrides: tuple[str, ...], record_property: Any
) -> None:
    """The batch is so small that the step of the optimizer is the peak."""
    compare(network("resnet18", "grouped_softmax", "fp32", *overrides), 2, record_property)


def test_peaks_match_real_training_with_augmentation(record_property: Any) -> None:
    compare(configured("augment=mild", "augment.warmup_fraction=0"), 32, record_property)


# -- torch's own fake tensors ---------------------------------------------------------------------------


class FakeRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """TensorRecorder implemented with torch's FakeTensorMode."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.events: list[MemoryEvent] = []
        self.phase_starts: list[tuple[str, int]] = []
        self.convolutions: list[Convolution] = []
        self.begin_phase = TensorRecorder.begin_phase.__get__(self)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._count = 0

    def __enter__(self) -> Any:
        self._fake.__enter__()
        return super().__enter__()  # type: ignore[no-untyped-call]  # torch has no types for it

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch has no types for it
        self._fake.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.native_batch_norm.default:  # real kernels return fp32; see test_fake_device
            result = (result[0], *(each.float() for each in result[1:]))
        for value in tree_leaves(result):
            if getattr(value, "fake_device", HOST) == DEVICE:
                self._record(value.untyped_storage())
        return result

    def _record(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._live:
            return
        number = self._count = self._count + 1
        events, live = self.events, self._live

        def on_free(_: object) -> None:
            del live[address]
            events.append(MemoryEvent(number, None))

        live[address] = weakref.ref(storage, on_free)
        events.append(MemoryEvent(number, storage.nbytes()))


@pytest.mark.parametrize(
    "overrides",
    [
        ("augment=mild",),
        *(
            pytest.param(overrides, marks=pytest.mark.long)
            for overrides in [
                ("device.precision=fp16", "augment=mild", "augment.warmup_fraction=0"),
                (
                    "captcha=alnum",
                    "model.head=grouped_softmax",
                    "train.optimizer=sgd",
                    "train.label_smoothing=0.1",
                ),
                ("model=resnet18", "train.epochs=2", "train.optimizer=adamw", "device.preload_limit_mib=0"),
                ("experiment=article", "device.precision=bf16"),
                ("experiment=article", "train.activation_checkpointing=true", "train.micro_batch_size=20"),
                (
                    "train.activation_checkpointing=true",
                    "device.precision=bf16",
                    "train.optimizer_impl=foreach",
                ),
                ("train.optimizer=adam", "train.optimizer_impl=for_loop", "train.micro_batch_size=48"),
            ]
        ),
    ],
    ids=" ".join,
)
def test_torchs_fake_tensors_give_the_same_trace(
    overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every event is equal, except that autocast frees its weights in the order of their addresses."""
    config, split_sizes = configured(*overrides), SPLIT_SIZES | {"test": 90}
    found = trace(config, 48, split_sizes)

    monkeypatch.setattr(module, "TensorRecorder", FakeRecorder)

    expected = trace(config, 48, split_sizes)
    assert in_order(found.events) == in_order(expected.events)
    assert replace(found, convolutions=[], events=[]) == replace(expected, events=[])


def in_order(events: list[MemoryEvent]) -> list[MemoryEvent]:
    """Sort consecutive deallocations by tensor ID."""
    runs = itertools.groupby(events, lambda event: event.requested_bytes is None)
    return [event for frees, run in runs for event in (sorted(run) if frees else run)]


# -- as a function of the batch -------------------------------------------------------------------------


def check_convex(config: Config, sizes: list[int]) -> None:
    config = with_train(config, epochs=1)
    split_sizes = {"train": 3 * sizes[-1], "validation": 2}
    steps = [trace(config, size, split_sizes).peak_bytes("step") for size in sizes]
    slopes = [
        (after - before) / (larger - smaller)
        for (before, after), (smaller, larger) in zip(
            itertools.pairwise(steps), itertools.pairwise(sizes), strict=True
        )
    ]
    assert all(slope > 0 for slope in slopes)
    assert all(flat <= steep for flat, steep in itertools.pairwise(slopes))


def test_the_peak_is_monotone_and_convex_in_the_batch(tiny: Config) -> None:
    check_convex(tiny, [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["article", "quickstart"])
def test_the_peak_is_monotone_and_convex_in_many_batches(name: str) -> None:
    config = configured(f"experiment={name}", "device.preload_limit_mib=0")
    check_convex(config, [*range(1, 21), *range(24, 104, 4)])


def test_an_extra_tensor_in_a_step_is_recorded_to_the_byte(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trace(tiny, 16, SPLIT_SIZES)

    def with_extra_tensor(state: TrainState, batch: Batch, config: Config) -> Step:
        extra = batch.images.new_empty(12345)
        step = train_step(state, batch, config)
        del extra
        return step

    monkeypatch.setattr(module, "train_step", with_extra_tensor)
    larger = trace(tiny, 16, SPLIT_SIZES)

    for phase in plain.phases:
        more = 12345 if "step" in phase.name else 0
        assert peaks(larger)[phase.name] == phase.peak_bytes + more


# -- side effects --------------------------------------------------------------------------------------


def test_a_trace_allocates_no_real_memory() -> None:
    config = configured("experiment=article")
    with profiled() as profile:
        traced = trace(config, 100, {"train": 50_000, "validation": 5_000})
    assert profile.profiler is not None
    pending = [profile.profiler.kineto_results.experimental_event_tree()]
    largest = 0
    while pending:
        for node in pending.pop():
            pending.append(node.children)
            if node.typed[0] == _EventType.Allocation:
                largest = max(largest, node.typed[1].alloc_size)
    assert traced.peak_bytes() > 900 * MIB
    assert largest < 4096


@pytest.mark.parametrize("collecting", [True, False])
def test_a_trace_is_repeatable_and_leaves_no_tensors(tiny: Config, collecting: bool) -> None:
    first = trace(tiny, 16, SPLIT_SIZES)
    rng_state = torch.get_rng_state()
    gc.collect()
    if not collecting:
        gc.disable()
    try:
        second = trace(tiny, 16, SPLIT_SIZES)
        leaked: list[Tensor] = [each for each in gc.get_objects() if type(each) is DeviceTensor]
    finally:
        gc.enable()
    assert second == first
    assert leaked == []
    assert torch.equal(torch.get_rng_state(), rng_state)


FIRST_TRACE = """
import gc, torch
from captcha_exp import compose, load
from captcha_exp.memory.fake_device import DeviceTensor, Convolution
from captcha_exp.memory.trace import trace
config = load(compose("device.name=cpu", "device.precision=fp32"))
gc.disable()
first = trace(config, 16, {"train": 200, "validation": 80})
assert not [each for each in gc.get_objects() if type(each) is DeviceTensor]
assert first == trace(config, 16, {"train": 200, "validation": 80})
"""


@pytest.mark.long
def test_the_first_trace_of_a_process_equals_later_ones() -> None:
    """Although torch imports many of its modules during it."""
    subprocess.run([sys.executable, "-c", FIRST_TRACE], check=True)


def test_deterministic_algorithms_can_be_traced(tiny: Config) -> None:
    first = trace(tiny, 16, SPLIT_SIZES)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert trace(tiny, 16, SPLIT_SIZES) == first
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("test", [{}, {"test": 50}])
def test_a_trace_can_be_replayed_on_the_allocator(tiny: Config, test: dict[str, int]) -> None:
    traced = trace(tiny, 16, SPLIT_SIZES | test)
    allocator = CachingAllocator()

    usage = replay_events(traced.events, allocator, {})

    assert usage.requested_bytes == traced.peak_bytes()
    assert allocator.usage.requested_bytes == 0  # everything is freed
    assert [phase.begin for phase in traced.phases[1:]] == [phase.end for phase in traced.phases[:-1]]
    assert (traced.phases[0].begin, traced.phases[-1].end) == (0, len(traced.events))
    assert ("test evaluation" in peaks(traced)) == bool(test)
