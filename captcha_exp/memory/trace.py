"""What a training allocates on its device, in order, without the device: the project's own code on tensors
which have shapes and no numbers (`recorder`).

What runs is what a training runs: Dataset.split, Changes, train_step, evaluate.read.
Host and device are `meta` and `cpu` (tensors said to be on `cuda` end a process whose torch has no CUDA):
what is made without a device stays on the host, what is sent is seen. New memory on the device is an
event; another comes when the last reference to it goes, by reference counting, without the collector of
garbage. A precision of 16 bits is the CPU's autocast.

Epochs are cut to their first steps, evaluations to their last batches: the others do the same, and what
they leave on the device is one event.

Not seen, since no tensor of a dispatched operator holds it:
- what an operator takes and gives back inside itself: workspaces of cuDNN, cuBLAS and reductions
- the CUDA context and its kernels, pinned memory of the host, other processes
- tensors that only CUDA's operators keep: what cuDNN reserves for a batch norm; a softmax under
  autocast, which is fp32 there and has 16 bits here, on small tensors alone
- scalars of the progress bar and of watch.Guard
"""

import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from captcha_exp.config import Config
from captcha_exp.data.augment import Augmenter, is_off
from captcha_exp.data.dataset import Dataset, Split
from captcha_exp.memory.allocator import MemoryEvent
from captcha_exp.memory.compiler import without_compiler
from captcha_exp.memory.fake_device import DEVICE, HOST, Convolution, TensorRecorder
from captcha_exp.model import networks
from captcha_exp.model.evaluate import predict_split
from captcha_exp.model.networks import Recognizer
from captcha_exp.model.state import TrainState
from captcha_exp.model.step import make_train_state, train_step

NUM_FIRST_EPOCH_STEPS, NUM_LATER_EPOCH_STEPS = 3, 1  # of the first epoch, and of a later one
NUM_EVAL_BATCHES = 2  # whole ones of an evaluation


class Phase(NamedTuple):
    """A stretch of the events: events[begin:end]."""

    name: str
    begin: int
    end: int
    peak_bytes: int  # the most that was requested at one time


@dataclass(frozen=True)
class Trace:
    """What a training asks of the device's allocator."""

    events: list[MemoryEvent]
    phases: list[Phase]  # one after another, all events
    convolutions: list[Convolution]
    parameters_bytes: int
    buffers_bytes: int
    optimizer_bytes: int  # its state, from the first step on
    resident_bytes: int  # of splits that live on the device while it trains

    def peak_bytes(self, phase: str = "") -> int:
        """The most that was requested at one time in phases whose name has this in it."""
        return max(each.peak_bytes for each in self.phases if phase in each.name)


def trace(config: Config, batch_size: int, split_sizes: Mapping[str, int]) -> Trace:
    """The trace of a resolved config with this batch size, for so many pictures of each split.

    `device.name` plays no part. Without "test" among the pictures there is no test after the training.
    """
    config = replace(config, train=replace(config.train, batch_size=batch_size))
    recorder = TensorRecorder()
    with disable_gc():
        sizes = _run_recorded(config, split_sizes, recorder)
    phases = compute_phases(recorder.events, recorder.phase_starts)
    return Trace(recorder.events, phases, recorder.convolutions, **sizes)


@contextmanager
def disable_gc() -> Iterator[None]:
    """Where nothing waits for the collector, it would walk over all that torch has imported for nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with without_compiler():
            yield
    finally:
        if was_enabled:
            gc.enable()


def _run_recorded(config: Config, split_sizes: Mapping[str, int], recorder: TensorRecorder) -> dict[str, int]:
    """`_training`; with its end everything that it made is gone, and seen to go."""
    with torch.device(HOST):
        model = networks.build(config.model, config.captcha)
    with torch.device(HOST), allow_device_step_counts(), recorder:
        return _run_training(model, config, split_sizes, recorder.begin_phase)


@contextmanager
def allow_device_step_counts() -> Iterator[None]:
    """Let torch's optimizers count steps on the device or on the host, which are not CUDA and CPU here.

    Each module of torch.optim imports the list of devices that may count steps, which lacks the CPU. And
    torch groups the tensors of a multi-tensor step only if each is on its parameter's device or the CPU.
    """
    name = "_get_capturable_supported_devices"
    modules = [each for path, each in sorted(sys.modules.items()) if path.startswith("torch.optim.")]
    plain = {each: getattr(each, name) for each in modules if hasattr(each, name)}
    grouped = Optimizer.__dict__["_group_tensors_by_device_and_dtype"]
    for each in plain:
        setattr(each, name, lambda *_, **__: [DEVICE.type])
    Optimizer._group_tensors_by_device_and_dtype = staticmethod(_group_tensors)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Optimizer._group_tensors_by_device_and_dtype = grouped  # type: ignore[method-assign]
        for each, function in plain.items():
            setattr(each, name, function)


def _group_tensors(tensors: list[list[Any]], with_indices: bool = False) -> dict[Any, Any]:
    """Return the lists of tensors, by device and dtype of the first list's, and the indices if asked.

    Source: torch/csrc/Module.cpp and aten/src/ATen/native/ForeachUtils.h, without their checks of devices.
    """
    groups: dict[Any, tuple[list[list[Any]], list[int]]] = {}
    for index, first in enumerate(tensors[0]):
        lists, indices = groups.setdefault((first.device, first.dtype), ([[] for _ in tensors], []))
        for group, values in zip(lists, tensors, strict=True):
            if values:
                group.append(values[index])
        if with_indices:
            indices.append(index)
    return groups


def _run_training(
    model: Recognizer, config: Config, split_sizes: Mapping[str, int], begin_phase: Callable[[str], None]
) -> dict[str, int]:
    """`train` and `fit`, shortened; bytes of parameters, buffers, optimiser and resident splits."""
    data = _make_dataset(config, split_sizes)
    splits: list[Split] = []

    def split(name: str) -> Split:
        begin_phase(f"{name} split")
        splits.append(data.split(name, DEVICE, config.device.preload_limit_mib))
        return splits[-1]

    training, validation = split("train"), split("validation")
    begin_phase("state")
    state = make_train_state(_to_device(model), config, DEVICE, on_gpu=True)
    last = config.train.epochs
    # A later epoch differs by its table of changes alone, and by the last one a ramp has ended.
    for epoch in [1] if is_off(config.augment) else sorted({1, min(2, last), last}):
        begin_phase(f"epoch {epoch}: start")
        change = Augmenter(config, epoch, len(data.images), DEVICE)
        _run_epoch(
            state, training, training.permutation(config.seed, epoch), change, config, epoch, begin_phase
        )
        begin_phase(f"epoch {epoch}: evaluation")
        _run_evaluation(state.model, validation, config)
    del change
    resident_bytes = _device_bytes(x for side in splits for x in (side.images, side.targets, side.indices))
    if "test" in split_sizes:
        test = split("test")
        begin_phase("test evaluation")
        _run_evaluation(state.model, test, config)
    begin_phase("end")
    kept = [value for values in state.optimizer.state.values() for value in values.values()]
    return {
        "parameters_bytes": _device_bytes(state.model.parameters()),
        "buffers_bytes": _device_bytes(state.model.buffers()),
        "optimizer_bytes": _device_bytes(kept),
        "resident_bytes": resident_bytes,
    }


def _make_dataset(config: Config, split_sizes: Mapping[str, int]) -> Dataset:
    """So many pictures on the host."""
    captcha, count = config.captcha, sum(split_sizes.values())
    images = torch.empty(count, captcha.height, captcha.width, captcha.channels, dtype=torch.uint8)
    targets = torch.empty(count, captcha.length, dtype=torch.int64)
    members = {name: torch.empty(size, dtype=torch.int64) for name, size in split_sizes.items()}
    return Dataset(images, targets, [], members, {})


def _to_device(model: Recognizer) -> Recognizer:
    """As from `models.place`, of which torch does the second line on no parameter without numbers."""
    model.to(DEVICE)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim == 4:
                laid_out = weight.detach().to(memory_format=torch.channels_last)
                module.register_parameter(name, nn.Parameter(laid_out))
    return model


def _run_epoch(
    state: TrainState,
    training: Split,
    order: Tensor,
    augmenter: Augmenter,
    config: Config,
    epoch: int,
    begin_phase: Callable[[str], None],
) -> None:
    """The first steps of `train_epoch`. As there, a batch goes when the next one has come."""
    size = int(config.train.batch_size)
    batches = training.batches(size, order)
    state.model.train()
    steps = min(NUM_FIRST_EPOCH_STEPS if epoch == 1 else NUM_LATER_EPOCH_STEPS, -(-len(training) // size))
    for number in range(1, steps + 1):
        begin_phase(f"epoch {epoch}: step {number}")
        batch = next(batches)
        step = train_step(state, augmenter(batch), config)  # noqa: F841 - lives until the next one


def _run_evaluation(model: Recognizer, split: Split, config: Config) -> None:
    """The last batches of `evaluate`."""
    size, count = config.train.eval_batch_size, len(split)
    left_out = max(0, count // size - NUM_EVAL_BATCHES) * size
    # Of a picture stay class ids and how sure they are; of one that was sent, targets and row too.
    length = config.captcha.length
    stays = (8 + 4) * length + (0 if split.indices.device == DEVICE else 8 * length + 8)
    between = torch.empty(left_out * stays, dtype=torch.uint8, device=DEVICE)
    images, targets, rows = (x[left_out:] for x in (split.images, split.targets, split.indices))
    found = predict_split(model, Split(images, targets, rows, DEVICE), config)
    with torch.inference_mode():
        for parts in (found.predicted, found.targets, found.confidences, found.indices):
            torch.cat(parts)
    del between


def _device_bytes(tensors: Iterable[Tensor]) -> int:
    """Of those on the device."""
    return sum(tensor.nbytes for tensor in tensors if tensor.device == DEVICE)


def compute_phases(events: Sequence[MemoryEvent], phase_starts: Sequence[tuple[str, int]]) -> list[Phase]:
    """The phases that begin at these marks. What is there at the beginning counts to the peak."""
    phases, sizes, now = [], dict[int, int](), 0
    for (name, begin), (_, end) in pairwise([*phase_starts, ("", len(events))]):
        peak = now
        for tensor, requested_bytes in events[begin:end]:
            if requested_bytes is None:
                now -= sizes.pop(tensor)
            else:
                sizes[tensor] = requested_bytes
                now += requested_bytes
                peak = max(peak, now)
        phases.append(Phase(name, begin, end, peak))
    return phases
