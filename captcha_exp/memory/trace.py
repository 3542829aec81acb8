"""What a training allocates on its device, in order, without the device: the project's own code on fake
tensors, which have shapes and no numbers.

What runs is what a training runs: Dataset.split, Changes, train_step, evaluate.read, keep_if_better. Host and
device are told apart as `meta` and `cpu`: what is made without a device stays on the host, as it would, and
what is sent to the device is seen. Each new storage there is an event; another comes when the last reference
to it is gone. That is reference counting, in torch and in Python, and no collector of garbage has a part in
it. A fake `cuda` tensor would end the process where torch has no CUDA in it.

An epoch is shortened to its first steps and an evaluation to its first batches and the last, since the others
do the same; what the batches between leave on the device is one event.

Not seen, since no tensor of a dispatched operator holds it:
- what an operator takes and gives back inside itself: workspaces of cuDNN and cuBLAS, sums of a reduction
- the CUDA context and its kernels, pinned memory of the host, other processes
- where CUDA's operators keep other tensors than the CPU's: cuDNN's reserve of a batch norm; lists of autocast,
  which differ in operators on small tensors alone here (CUDA's softmax is in fp32, the CPU's in 16 bits)
- scalars of the progress bar, and what watch.Guard reads; a message of a broken step

Source: torch, torch/_subclasses/fake_tensor.py; torch/utils/_python_dispatch.py.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from captcha_exp import models
from captcha_exp.augment import Changes
from captcha_exp.checkpoint import TrainState
from captcha_exp.config import Config
from captcha_exp.dataset import SPLITS, Dataset, Split
from captcha_exp.evaluate import read
from captcha_exp.memory.allocator import Event
from captcha_exp.models import Recogniser
from captcha_exp.step import state_of, train_step

HOST, DEVICE = torch.device("meta"), torch.device("cpu")
FIRST_STEPS, STEPS = 3, 1  # of the first epoch, in which the optimiser's state is made, and of a later one
READ_BATCHES = 2  # of an evaluation, and a smaller last one


class Phase(NamedTuple):
    """A stretch of the events: events[begin:end]."""

    name: str
    begin: int
    end: int
    peak_bytes: int  # the most that was requested at one time


@dataclass(frozen=True)
class Trace:
    """What a training asks of the device's allocator."""

    events: list[Event]
    phases: list[Phase]  # one after another, all events
    parameters_bytes: int
    buffers_bytes: int
    optimizer_bytes: int  # its state, from the first step on
    resident_bytes: int  # of splits that live on the device

    def peak_bytes(self, phase: str = "") -> int:
        """The most that was requested at one time in phases whose name has this in it."""
        return max(each.peak_bytes for each in self.phases if phase in each.name)


def trace(config: Config, batch_size: int, pictures: Mapping[str, int]) -> Trace:
    """The trace of a resolved config with this batch size, for so many pictures of each split.

    The device is whatever a CUDA device would be asked for; `device.name` plays no part. Without "test" among
    the pictures the test after the training is left out.
    """
    config = replace(config, train=replace(config.train, batch_size=batch_size))
    recorder = _Recorder()
    sizes = _on_fake_tensors(config, pictures, recorder)
    return Trace(recorder.events, _phases(recorder.events, recorder.marks), **sizes)


def _on_fake_tensors(config: Config, pictures: Mapping[str, int], recorder: "_Recorder") -> dict[str, int]:
    """`_training`; with its end everything that it made is gone, and seen to go."""
    with torch.device(HOST):
        model = models.build(config.model, config.captcha)
    # torch.tensor gives a plain tensor even here; it becomes a fake one as it is used.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(HOST), recorder:
        return _training(model, config, pictures, recorder.begin)


def _training(
    model: Recogniser, config: Config, pictures: Mapping[str, int], begin: Callable[[str], None]
) -> dict[str, int]:
    """`train` and `fit`, shortened; bytes of parameters, buffers, optimiser and resident splits."""
    data = _dataset(config, pictures)
    splits: list[Split] = []

    def split(name: str) -> Split:
        begin(f"{name} split")
        splits.append(data.split(name, DEVICE, config.device.resident_limit_mib))
        return splits[-1]

    training, validation = split("train"), split("validation")
    begin("state")
    state = state_of(_placed(model), config, DEVICE)
    for epoch in sorted({1, min(2, config.train.epochs), config.train.epochs}):  # a ramp ends in the last
        begin(f"epoch {epoch}: start")
        change = Changes(config, epoch, len(data.images), DEVICE)
        _epoch(state, training, training.shuffled(config.seed, epoch), change, config, epoch, begin)
        if epoch > 2:
            break  # what comes after it is as in the second one
        begin(f"epoch {epoch}: evaluation")
        _evaluation(state.model, validation, config)
        begin(f"epoch {epoch}: best weights")
        state.keep_if_better(float(epoch), 0.0)
    del change
    if "test" in pictures:
        test = split("test")
        begin("test evaluation")
        _evaluation(state.model, test, config)
    begin("end")
    return {
        "parameters_bytes": _bytes(state.model.parameters()),
        "buffers_bytes": _bytes(state.model.buffers()),
        "optimizer_bytes": _bytes(x for values in state.optimizer.state.values() for x in values.values()),
        "resident_bytes": _bytes(x for side in splits for x in (side.images, side.targets, side.rows)),
    }


def _dataset(config: Config, pictures: Mapping[str, int]) -> Dataset:
    """So many pictures on the host."""
    captcha, count = config.captcha, sum(pictures.values())
    images = torch.empty(count, captcha.height, captcha.width, captcha.channels, dtype=torch.uint8)
    targets = torch.empty(count, captcha.length, dtype=torch.int64)
    members = {name: torch.empty(pictures[name], dtype=torch.int64) for name in SPLITS if name in pictures}
    return Dataset(images, targets, [], members, {})


def _placed(model: Recogniser) -> Recogniser:
    """As from `models.place`, of which torch does the second line on no fake parameter."""
    model.to(DEVICE)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim == 4:
                laid_out = weight.detach().to(memory_format=torch.channels_last)
                module.register_parameter(name, nn.Parameter(laid_out))
    return model


def _epoch(
    state: TrainState,
    training: Split,
    order: Tensor,
    change: Changes,
    config: Config,
    epoch: int,
    begin: Callable[[str], None],
) -> None:
    """The first steps of `train_epoch`. As there, a batch goes when the next one has come."""
    size = config.train.batch_size
    batches = training.batches(size, order)
    state.model.train()
    steps = min(FIRST_STEPS if epoch == 1 else STEPS, -(-len(training) // size))
    for number in range(1, steps + 1):
        begin(f"epoch {epoch}: step {number}")
        batch = next(batches)
        step = train_step(state, change(batch), config)  # noqa: F841 - it lives until the next one is there


def _evaluation(model: Recogniser, split: Split, config: Config) -> None:
    """The first batches of `evaluate` and the last."""
    size, count = config.train.evaluation_batch_size, len(split)
    left_out = max(0, count // size - READ_BATCHES) * size
    # Of each picture stay class ids and how sure they are; of one that was sent, what was sent but the pixels.
    length = config.captcha.length
    stays = (8 + 4) * length + (0 if split.rows.device == DEVICE else 8 * length + 8)
    between = torch.empty(left_out * stays, dtype=torch.uint8, device=DEVICE)
    found = read(
        model, Split(split.images[left_out:], split.targets[left_out:], split.rows[left_out:], DEVICE), config
    )
    with torch.inference_mode():
        for parts in (found.predicted, found.targets, found.confidences, found.rows):
            torch.cat(parts)
    del between


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of those on the device."""
    return sum(tensor.nbytes for tensor in tensors if tensor.device == DEVICE)


class _Recorder(TorchDispatchMode):
    """Sees storages of the device come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.marks: list[tuple[str, int]] = []  # where phases begin
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._count = 0

    def begin(self, phase: str) -> None:
        """A phase begins, and the one before it ends."""
        self.marks.append((phase, len(self.events)))

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self._see(value)
            elif isinstance(value, list | tuple):
                for each in value:
                    self._see(each)
        return result

    def _see(self, tensor: Tensor) -> None:
        if getattr(tensor, "fake_device", HOST) != DEVICE:  # quicker than `device`, which is an operator
            return
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._live:
            return
        number = self._count = self._count + 1
        events, live = self.events, self._live

        def gone(_: object) -> None:
            del live[place]
            events.append(Event(number, None))

        live[place] = weakref.ref(storage, gone)
        events.append(Event(number, storage.nbytes()))


def _phases(events: Sequence[Event], marks: Sequence[tuple[str, int]]) -> list[Phase]:
    """The phases that begin at these marks. What is there at the beginning counts to the peak."""
    phases, sizes, now = [], dict[int, int](), 0
    for (name, begin), (_, end) in pairwise([*marks, ("", len(events))]):
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
