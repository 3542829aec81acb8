"""Real trainings on the CPU under torch's profiler, the reference for traced memory."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from conftest import CPU
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from captcha_exp import compose, load
from captcha_exp.config import Config
from captcha_exp.data.augment import Augmenter
from captcha_exp.data.dataset import Dataset
from captcha_exp.model.evaluate import evaluate
from captcha_exp.model.step import init_train_state
from captcha_exp.runtime.console import ProgressBar
from captcha_exp.runtime.shutdown import ShutdownHandler
from captcha_exp.training import sanity
from captcha_exp.training.checkpointer import Checkpointer
from captcha_exp.training.train import train_epoch

HEADS = ("position", "grouped_softmax", "end_class", "ctc")


def configured(*overrides: str) -> Config:
    return load(compose("device.name=cpu", "device.precision=fp32", *overrides))


def network(model: str, head: str, precision: str, *levers: str) -> Config:
    chosen = (f"model={model}", f"model.head={head}", f"device.precision={precision}")
    return configured("captcha=alnum", *chosen, *levers)


class Moment(NamedTuple):
    """An allocation (positive bytes) or deallocation seen by the profiler."""

    nanoseconds: int
    address: int
    size_bytes: int
    product: int | None  # the convolution or matrix product that contains it
    phase: str


def run_for_real(config: Config, split_sizes: Mapping[str, int]) -> list[Moment]:
    """Train the first epoch on noise; return the profiled allocations and deallocations."""
    captcha, count = config.captcha, sum(split_sizes.values())
    ends = itertools.accumulate(split_sizes.values())
    split_indices = {
        name: torch.arange(end - split_sizes[name], end) for name, end in zip(split_sizes, ends, strict=True)
    }
    shape = (count, captcha.height, captcha.width, captcha.channels)
    targets = torch.randint(0, len(captcha.alphabet), (count, captcha.length))
    data = Dataset(torch.randint(0, 256, shape, dtype=torch.uint8), targets, ["?"] * count, split_indices, {})
    with TemporaryDirectory() as folder, profiled() as profiler:
        splits = [data.split(name, CPU, config.device.preload_limit_mib) for name in split_sizes]
        with record_function("state"):
            state = init_train_state(config, CPU)
        augmenter = Augmenter(config, 1, count, CPU)
        checker = sanity.SanityChecker(splits[0], data.labels, config, lambda _: None)
        with record_function("step"):
            checkpointer = Checkpointer(Path(folder), config, checker, ShutdownHandler(None))
            train_epoch(state, splits[0], augmenter, config, checker, checkpointer, ProgressBar())
        with record_function("evaluation"):
            evaluate(state.model, splits[1], config)
    return moments_of(profiler, ONEDNN)


def profiled() -> profile:
    """Return a profiler of CPU memory; torch 2.11 warns without acc_events."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)


def moments_of(profiler: profile, products: tuple[str, ...]) -> list[Moment]:
    """Return all allocations and deallocations in order of time; `products` are operator names."""
    moments: list[Moment] = []

    def walk(node: Any, product: int | None, phase: str) -> None:
        kind, fields = node.typed
        if kind == _EventType.Allocation:
            moments.append(Moment(node.start_time_ns, fields.ptr, fields.alloc_size, product, phase))
        if product is None and node.name.startswith(products):
            product = node.id
        for child in node.children:
            walk(child, product, node.name if node.name in PHASES else phase)

    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    for root in profiler.profiler.kineto_results.experimental_event_tree():
        walk(root, None, "")
    return sorted(moments)


# Not aten::conv2d: it contains the 16-bit weights of autocast, which a GPU also keeps.
ONEDNN = ("aten::convolution", "aten::mkldnn_convolution", "aten::addmm")
PHASES = ("state", "step", "evaluation")


def real_peaks(moments: list[Moment], with_reorders: bool) -> dict[str, int]:
    """Return the peak bytes by phase, without blocks that oneDNN allocates and frees within one operator."""
    allocations: dict[int, int] = {}
    excluded: set[int] = set()
    pairs: dict[int, int] = {}
    for number, moment in enumerate(moments):
        if moment.size_bytes > 0:
            allocations[moment.address] = number
        elif moment.address in allocations:  # else it was allocated before profiling
            first = allocations.pop(moment.address)
            pairs[number] = first
            if moment.product is not None and moment.product == moments[first].product:
                excluded |= {first, number}
    current, peaks = 0, dict.fromkeys(PHASES, 0)
    for number, moment in enumerate(moments):
        if (moment.size_bytes > 0 or number in pairs) and (with_reorders or number not in excluded):
            current += moment.size_bytes
        if moment.phase in PHASES:
            peaks[moment.phase] = max(peaks[moment.phase], current)
    return peaks
