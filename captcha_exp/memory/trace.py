"""Record the memory that training allocates on its device, in order, without the device.

The training code itself runs (Dataset.split, Augmenter, train_step, predict_split), on tensors that have
shapes but no values (`fake_device`). The host is `meta` and the device is `cpu`, because tensors on `cuda`
crash a torch without CUDA. A tensor created without a device stays on the host and is not recorded; one that
is moved to the device is. Each new storage on the device is an event, and so is its deallocation when
reference counting frees it; the garbage collector is disabled. 16-bit precision is the CPU's autocast.

Epochs are cut to their first steps and evaluations to their last batches: the others allocate the same, and
tensors that they leave on the device are one event.

Not recorded, because it is in no tensor of a dispatched operator:
- memory that an operator allocates and frees internally: workspaces of cuDNN, cuBLAS and reductions
- the CUDA context and its kernels, pinned memory of the host, other processes
- tensors that only CUDA operators save: cuDNN's reserve for a batch norm; a softmax under autocast, which is
  fp32 on CUDA and 16 bits here, on small tensors only
- scalars of the progress bar and of training.sanity.SanityChecker
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from captcha_exp.memory.fake_device import DEVICE, HOST, Convolution, TensorRecorder
from captcha_exp.memory.torch_patches import allow_device_step_counts, disable_gc
from captcha_exp.model import networks
from captcha_exp.model.evaluate import predict_split
from captcha_exp.model.networks import Recognizer
from captcha_exp.model.state import TrainState
from captcha_exp.model.step import make_train_state, train_step
from captcha_exp.runtime.compiler import without_compiler

NUM_FIRST_EPOCH_STEPS, NUM_LATER_EPOCH_STEPS = 3, 1  # of the first epoch, and of a later one
NUM_EVAL_BATCHES = 2  # full batches of an evaluation


class Phase(NamedTuple):
    """A range of the events: events[begin:end]."""

    name: str
    begin: int
    end: int
    peak_bytes: int  # maximum of the bytes in use


@dataclass(frozen=True)
class Trace:
    """The requests of a training run to the device's allocator."""

    events: list[MemoryEvent]
    phases: list[Phase]  # consecutive; they cover all events
    convolutions: list[Convolution]
    state_bytes: int  # parameters, buffers and the optimizer's state
    resident_bytes: int  # of splits that stay on the device during training

    def peak_bytes(self, phase: str = "") -> int:
        """Return the maximum of the bytes in use over the phases whose name contains `phase`."""
        return max(each.peak_bytes for each in self.phases if phase in each.name)


def trace(config: Config, batch_size: int, split_sizes: Mapping[str, int]) -> Trace:
    """Return the trace of a resolved config with this batch size and these numbers of images per split.

    `device.name` is ignored. Without a "test" split the run has no evaluation after training.
    """
    config = replace(config, train=replace(config.train, batch_size=batch_size))
    recorder = TensorRecorder()
    with disable_gc(), without_compiler(), torch.device(HOST):
        model = networks.build(config.model, config.captcha)
        with allow_device_step_counts(), recorder:
            state_bytes, resident_bytes = _run_training(model, config, split_sizes, recorder.begin_phase)
        del model  # before the phases are computed, as its deallocations are events, too
    return make_trace(recorder, state_bytes, resident_bytes)


def make_trace(recorder: TensorRecorder, state_bytes: int, resident_bytes: int) -> Trace:
    """Return the trace of a recorder."""
    phases = compute_phases(recorder.events, recorder.phase_starts)
    return Trace(recorder.events, phases, recorder.convolutions, state_bytes, resident_bytes)


def _run_training(
    model: Recognizer, config: Config, split_sizes: Mapping[str, int], begin_phase: Callable[[str], None]
) -> tuple[int, int]:
    """Run a shortened training; return the bytes of the state and of the resident splits."""
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
    # Later epochs differ only in their augmentation parameters, and the warm-up has ended by the last one.
    for epoch in [1] if is_off(config.augment) else sorted({1, min(2, last), last}):
        begin_phase(f"epoch {epoch}: start")
        augmenter = Augmenter(config, epoch, len(data.images), DEVICE)
        _run_epoch(state, training, augmenter, config, epoch, begin_phase)
        begin_phase(f"epoch {epoch}: evaluation")
        _run_evaluation(state.model, validation, config)
    del augmenter
    resident_bytes = _device_bytes(x for each in splits for x in (each.images, each.targets, each.indices))
    if "test" in split_sizes:
        test = split("test")
        begin_phase("test evaluation")
        _run_evaluation(state.model, test, config)
    begin_phase("end")
    return state_bytes(state.model, state.optimizer), resident_bytes


def _make_dataset(config: Config, split_sizes: Mapping[str, int]) -> Dataset:
    """Return a dataset of these sizes on the host."""
    captcha, count = config.captcha, sum(split_sizes.values())
    images = torch.empty(count, captcha.height, captcha.width, captcha.channels, dtype=torch.uint8)
    targets = torch.empty(count, captcha.length, dtype=torch.int64)
    split_indices = {name: torch.empty(size, dtype=torch.int64) for name, size in split_sizes.items()}
    return Dataset(images, targets, [], split_indices, {})


def _to_device(model: Recognizer) -> Recognizer:
    """Do what `networks.to_device` does, whose memory format change fails for parameters without values."""
    model.to(DEVICE)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim == 4:
                converted = weight.detach().to(memory_format=torch.channels_last)
                module.register_parameter(name, nn.Parameter(converted))
    return model


def _run_epoch(
    state: TrainState,
    training: Split,
    augmenter: Augmenter,
    config: Config,
    epoch: int,
    begin_phase: Callable[[str], None],
) -> None:
    """Run the first steps of `train_epoch`. As there, a batch is freed after the next one is allocated."""
    size = int(config.train.batch_size)
    batches = training.batches(size, training.epoch_order(config.seed, epoch))
    state.model.train()
    steps = min(NUM_FIRST_EPOCH_STEPS if epoch == 1 else NUM_LATER_EPOCH_STEPS, -(-len(training) // size))
    for number in range(1, steps + 1):
        begin_phase(f"epoch {epoch}: step {number}")
        batch = next(batches)
        step = train_step(state, augmenter(batch), config)  # noqa: F841 - lives until the next step


def _run_evaluation(model: Recognizer, split: Split, config: Config) -> None:
    """Run the last batches of `evaluate`."""
    size, count = config.train.eval_batch_size, len(split)
    skipped = max(0, count // size - NUM_EVAL_BATCHES) * size
    # An image leaves its class IDs and confidences, of characters and of the text; one that was transferred,
    # also its targets and index.
    length = config.captcha.length
    image_bytes = (8 + 4) * length + 4 + (0 if split.indices.device == DEVICE else 8 * length + 8)
    skipped_results = torch.empty(skipped * image_bytes, dtype=torch.uint8, device=DEVICE)
    images, targets, indices = (x[skipped:] for x in (split.images, split.targets, split.indices))
    predictions = predict_split(model, Split(images, targets, indices, DEVICE), config)
    with torch.inference_mode():
        for parts in predictions[1:]:  # all but the loss have a tensor per batch
            torch.cat(parts)
    del skipped_results


def state_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """Return the bytes of the state that is on the device."""
    optimizer_state = (value for values in optimizer.state.values() for value in values.values())
    return _device_bytes([*model.parameters(), *model.buffers(), *optimizer_state])


def _device_bytes(values: Iterable[Any]) -> int:
    """Return the bytes of the tensors that are on the device."""
    return sum(each.nbytes for each in values if isinstance(each, Tensor) and each.device == DEVICE)


def compute_phases(events: Sequence[MemoryEvent], phase_starts: Sequence[tuple[str, int]]) -> list[Phase]:
    """Return the phases with these starts. Tensors that exist at the start count towards the peak."""
    phases, sizes, in_use = [], dict[int, int](), 0
    for (name, begin), (_, end) in pairwise([*phase_starts, ("", len(events))]):
        peak = in_use
        for tensor, requested_bytes in events[begin:end]:
            if requested_bytes is None:
                in_use -= sizes.pop(tensor)
            else:
                sizes[tensor] = requested_bytes
                in_use += requested_bytes
                peak = max(peak, in_use)
        phases.append(Phase(name, begin, end, peak))
    return phases
