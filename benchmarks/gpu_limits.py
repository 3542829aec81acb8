"""The parts of gpu_session about limits: the largest batch in a budget, and the workspaces of cuDNN.

Each function is the work of one part and runs in a process of its own.
"""

import functools
import gc
import os
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from gpu_cases import (
    MIB,
    NETWORKS,
    SENT,
    Case,
    ProcessMeter,
    allocated_mib,
    attempt,
    clear,
    config_of,
    epoch,
    hold,
    noise,
    peaks,
    reserved_mib,
    start,
    step_seconds,
)
from gpu_predictions import LARGEST_PICTURES, Pictures

from captcha_exp.config import Config
from captcha_exp.memory import replay as plays
from captcha_exp.memory.allocator import CachingAllocator, replay_events
from captcha_exp.memory.trace import trace
from captcha_exp.model.step import init_train_state, train_step
from captcha_exp.runtime import device as devices

# -- workspaces ----------------------------------------------------------------------------------------------


def workspaces(cap: str, batch: int, steps: int, device: str) -> dict[str, Any]:
    """What a step takes beyond its tensors, and its seconds, with CUDNN_CONV_WSCAP_DBG as the process has it.

    With train.deterministic cuDNN's engines are chosen by rule, without it by trial.
    """
    place = torch.device(device)
    cases: dict[str, Any] = {}
    for network in NETWORKS:
        for deterministic in ("true", "false"):
            more = f"train.deterministic={deterministic}"
            config = config_of(Case(network, "fp32", batch), device, more)
            devices.setup_device(config)
            name = f"{network}-{'deterministic' if deterministic == 'true' else 'tried'}"
            cases[name] = _beyond_tensors(config, steps, place)
            clear(place)
    return {"cap": cap, "seen": os.environ.get("CUDNN_CONV_WSCAP_DBG"), "batch": batch, "cases": cases}


def _beyond_tensors(config: Config, steps: int, device: torch.device) -> dict[str, Any]:
    """The peaks of three steps, foretold for tensors alone and measured; the median seconds of later ones."""
    size = int(config.train.batch_size)
    pictures = {"train": 3 * size, "validation": 1}
    said = _tensors_alone(config, pictures)
    found, seconds = _three_steps(config, pictures, steps, device)
    gc.collect()
    kept = allocated_mib(device)  # all tensors are gone: what is left belongs to cuBLAS
    rows = []
    for foretold, measured in zip(said, found, strict=True):
        row: dict[str, Any] = {"foretold": foretold, "measured": measured}
        if kept is not None:
            for what in ("requested_mib", "allocated_mib"):
                row[f"beyond_{what}"] = measured[what] - foretold[what] - kept
        rows.append(row)
    return {"kept_mib": kept, "steps": rows, "step_seconds": seconds}


def _tensors_alone(config: Config, pictures: Pictures) -> list[dict[str, float]]:
    """The peaks of the first steps that the trace and the model of the allocator give, without workspaces."""
    traced = trace(config, int(config.train.batch_size), pictures)
    allocator, found = CachingAllocator(expandable=plays.uses_expandable_segments()), []
    live: dict[int, Any] = {}
    for phase in traced.phases:
        allocator.reset_peaks()
        usage = replay_events(traced.events[phase.begin : phase.end], allocator, live)
        if phase.name.startswith("epoch 1: step"):
            requested, allocated = usage.requested_bytes / MIB, usage.allocated_bytes / MIB
            found.append({"requested_mib": requested, "allocated_mib": allocated})
    return found


def _three_steps(
    config: Config, pictures: Pictures, steps: int, device: torch.device
) -> tuple[list[dict[str, Any]], float]:
    """The peaks of each of the first three steps; the median seconds of `steps` more."""
    data, found = noise(config, pictures), []
    limit = config.device.preload_limit_mib
    training, validation = (data.split(name, device, limit) for name in ("train", "validation"))
    state = init_train_state(config, device)
    batches = training.batches(int(config.train.batch_size), training.permutation(config.seed, 1))
    state.model.train()
    for _ in range(3):
        start(device)
        batch = next(batches)
        _kept = train_step(state, batch, config)  # lives until the next one
        found.append(peaks(device))
    assert len(validation) == pictures["validation"]  # it lives on the device until here, as in a training
    return found, step_seconds(lambda: train_step(state, batch, config), steps, device)


# -- the largest batch ---------------------------------------------------------------------------------------


def largest(who: str, budget_mib: int, first: int, most: int, tries: int, device: str) -> dict[str, Any]:
    """The largest batch that runs within a budget, and the smallest that does not, as far as was looked.

    `who` is "article", its loop, or a variant of ours with its network. All tries are in one process; what
    torch still holds when one begins stands beside it.
    """
    place = torch.device(device)
    meter = ProcessMeter(place)
    run = _article_run if who == "article" else functools.partial(_our_run, who)
    seen: list[dict[str, Any]] = []
    run(first, place)  # loads the kernels, so that the context is known
    context_mib = meter.now()["context_mib"]
    clear(place)
    if context_mib is not None:
        hold(budget_mib, context_mib)

    def runs(batch: int) -> bool:
        left, began = reserved_mib(place), time.perf_counter()
        start(place)
        reason = attempt(lambda: run(batch, place), place)
        row = {"batch": batch, "ran": reason is None, "left_mib": left, "reason": reason}
        seen.append(
            row | {"reserved_mib": peaks(place)["reserved_mib"], "seconds": time.perf_counter() - began}
        )
        return reason is None

    found, refused = search(runs, first, most, tries)
    after = meter.now()["context_mib"]  # more than before, if larger batches loaded other kernels
    figures = {"who": who, "budget_mib": budget_mib, "largest": found, "rejected": refused, "tries": seen}
    return figures | {"context_mib": context_mib, "context_after_mib": after}


def search(runs: Callable[[int], bool], first: int, most: int, tries: int) -> tuple[int | None, int | None]:
    """The largest that ran and the smallest that did not, by doubling or halving, then by bisection."""
    good: int | None = None
    bad: int | None = None
    batch = first
    for _ in range(tries):
        if runs(batch):
            good = batch
        else:
            bad = batch
        if good is None:
            batch //= 2
        elif bad is None:
            batch = min(2 * batch, most)
        else:
            batch = (good + bad) // 2
        if batch in (0, good, bad):
            break
    return good, bad


def _article_run(batch: int, device: torch.device) -> None:
    """Three steps of the article's loop, and its evaluation of the 100 pictures of a shard."""
    import article_loop as loop

    pictures = torch.rand(batch, 3, loop.HEIGHT, loop.WIDTH)
    codes = F.one_hot(torch.zeros(batch, loop.LENGTH, dtype=torch.int64), len(loop.ALPHABET))
    given = [(pictures, codes.flatten(1).float())]
    network = loop.fresh(device)
    optimizer = torch.optim.Adam(network.parameters())
    loop.steps(network, optimizer, given * 3, device)
    loop.examine(network, [(part[:100], code[:100]) for part, code in given], device)


def _our_run(variant: str, batch: int, device: torch.device) -> None:
    """An epoch of three steps and an evaluation of ours."""
    name: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    config = config_of(Case("resnet18", variant, batch), name, SENT)
    devices.setup_device(config)
    validation = LARGEST_PICTURES["validation"] if name == "cuda" else 2
    epoch(config, noise(config, {"train": 3 * batch, "validation": validation}), device)
