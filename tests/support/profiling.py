"""Train for real on the CPU under torch's profiler: the reference for what a trace predicts."""

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
from captcha_exp.runtime.console import NullDisplay
from captcha_exp.runtime.shutdown import ShutdownHandler
from captcha_exp.training import sanity
from captcha_exp.training.train import Checkpointer, train_epoch

HEADS = ("position", "grouped_softmax")


def configured(*overrides: str) -> Config:
    return load(compose("device.name=cpu", "device.precision=fp32", *overrides))


def network(model: str, head: str, precision: str, *levers: str) -> Config:
    chosen = (f"model={model}", f"model.head={head}", f"device.precision={precision}")
    return configured("captcha=alnum", *chosen, *levers)


class Moment(NamedTuple):
    """The profiler saw memory come (bytes above 0) or go."""

    nanoseconds: int
    address: int
    size_bytes: int
    product: int | None  # the convolution or matrix product inside which it happened
    phase: str


def run_for_real(config: Config, pictures: Mapping[str, int]) -> list[Moment]:
    """The first epoch of a training on noise, as the profiler sees it."""
    captcha, count = config.captcha, sum(pictures.values())
    ends = itertools.accumulate(pictures.values())
    members = {
        name: torch.arange(end - pictures[name], end) for name, end in zip(pictures, ends, strict=True)
    }
    shape = (count, captcha.height, captcha.width, captcha.channels)
    targets = torch.randint(0, len(captcha.alphabet), (count, captcha.length))
    data = Dataset(torch.randint(0, 256, shape, dtype=torch.uint8), targets, ["?"] * count, members, {})
    with TemporaryDirectory() as folder, profiled() as seen:
        sides = [data.split(name, CPU, config.device.preload_limit_mib) for name in pictures]
        with record_function("state"):
            state = init_train_state(config, CPU)
        change = Augmenter(config, 1, count, CPU)
        guard = sanity.SanityChecker(sides[0], data.labels, config, lambda _: None)
        with record_function("step"), NullDisplay().progress_bar("", 1) as bar:
            keeper = Checkpointer(Path(folder), config, guard, ShutdownHandler(None), NullDisplay())
            train_epoch(state, sides[0], change, config, guard, keeper, bar)
        with record_function("evaluation"):
            evaluate(state.model, sides[1], config)
    return moments_of(seen, ONEDNN)


def profiled() -> profile:
    """Return the profiler of the CPU's memory; torch 2.11 warns unless it is told to keep all events."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)


def moments_of(seen: profile, products: tuple[str, ...]) -> list[Moment]:
    """Return all that the profiler saw come and go, by time; `products` are names of operators."""
    moments: list[Moment] = []

    def walk(node: Any, product: int | None, phase: str) -> None:
        kind, fields = node.typed
        if kind == _EventType.Allocation:
            moments.append(Moment(node.start_time_ns, fields.ptr, fields.alloc_size, product, phase))
        if product is None and node.name.startswith(products):
            product = node.id
        for child in node.children:
            walk(child, product, node.name if node.name in PHASES else phase)

    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    for root in seen.profiler.kineto_results.experimental_event_tree():
        walk(root, None, "")
    return sorted(moments)


# Not aten::conv2d: inside it autocast makes the weights of 16 bits, which a card holds too.
ONEDNN = ("aten::convolution", "aten::mkldnn_convolution", "aten::addmm")
PHASES = ("state", "step", "evaluation")


def real_peaks(moments: list[Moment], with_reorders: bool) -> dict[str, int]:
    """Bytes at most, by phase; without what oneDNN takes and gives back inside one operator."""
    came: dict[int, int] = {}
    left_out: set[int] = set()
    pairs: dict[int, int] = {}
    for number, moment in enumerate(moments):
        if moment.size_bytes > 0:
            came[moment.address] = number
        elif moment.address in came:  # else it is older than the profile
            first = came.pop(moment.address)
            pairs[number] = first
            if moment.product is not None and moment.product == moments[first].product:
                left_out |= {first, number}
    now, most = 0, dict.fromkeys(PHASES, 0)
    for number, moment in enumerate(moments):
        if (moment.size_bytes > 0 or number in pairs) and (with_reorders or number not in left_out):
            now += moment.size_bytes
        if moment.phase in PHASES:
            most[moment.phase] = max(most[moment.phase], now)
    return most
