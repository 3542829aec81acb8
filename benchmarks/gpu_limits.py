"""The parts of gpu_session about limits: the largest batch within a budget, and the workspaces of cuDNN.

Each function is one part and runs in its own process.
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
    STREAMED,
    Case,
    ProcessMeter,
    allocated_mib,
    clear,
    limit_memory,
    make_config,
    noise_dataset,
    oom_reason,
    peak_memory,
    reserved_mib,
    reset_peaks,
    run_epoch,
    step_seconds,
)
from gpu_predictions import LARGEST_SPLIT_SIZES, SplitSizes

from captcha_exp.config import Config
from captcha_exp.memory import replay
from captcha_exp.memory.allocator import CachingAllocator, replay_events
from captcha_exp.memory.trace import trace
from captcha_exp.model.step import init_train_state, train_step
from captcha_exp.runtime import device as devices

# -- workspaces ----------------------------------------------------------------------------------------------


def workspaces(cap: str, batch: int, steps: int, device: str) -> dict[str, Any]:
    """Measure workspaces and seconds of steps, with the CUDNN_CONV_WSCAP_DBG of this process's environment.

    cuDNN chooses its engines by heuristics with train.deterministic, and by benchmarking without it.
    """
    torch_device = torch.device(device)
    cases: dict[str, Any] = {}
    for network in NETWORKS:
        for deterministic in ("true", "false"):
            override = f"train.deterministic={deterministic}"
            config = make_config(Case(network, "fp32", batch), device, override)
            devices.setup_device(config)
            name = f"{network}-{'deterministic' if deterministic == 'true' else 'tried'}"
            cases[name] = _beyond_tensors(config, steps, torch_device)
            clear(torch_device)
    return {"cap": cap, "environment": os.environ.get("CUDNN_CONV_WSCAP_DBG"), "batch": batch, "cases": cases}


def _beyond_tensors(config: Config, steps: int, device: torch.device) -> dict[str, Any]:
    """Return predicted (tensors only) and measured peaks of three steps; time later ones."""
    size = int(config.train.batch_size)
    split_sizes = {"train": 3 * size, "validation": 1}
    predictions = _tensor_peaks(config, split_sizes)
    measurements, seconds = _three_steps(config, split_sizes, steps, device)
    gc.collect()
    kept = allocated_mib(device)  # all tensors are freed: the rest is cuBLAS workspace
    rows = []
    for predicted, measured in zip(predictions, measurements, strict=True):
        row: dict[str, Any] = {"predicted": predicted, "measured": measured}
        if kept is not None:
            for key in ("requested_mib", "allocated_mib"):
                row[f"beyond_{key}"] = measured[key] - predicted[key] - kept
        rows.append(row)
    return {"kept_mib": kept, "steps": rows, "step_seconds": seconds}


def _tensor_peaks(config: Config, split_sizes: SplitSizes) -> list[dict[str, float]]:
    """Return the peaks of the first steps predicted by trace and allocator model, without workspaces."""
    traced = trace(config, int(config.train.batch_size), split_sizes)
    allocator, found = CachingAllocator(expandable=replay.uses_expandable_segments()), []
    live: dict[int, Any] = {}
    for phase in traced.phases:
        allocator.reset_peaks()
        usage = replay_events(traced.events[phase.begin : phase.end], allocator, live)
        if phase.name.startswith("epoch 1: step"):
            requested, allocated = usage.requested_bytes / MIB, usage.allocated_bytes / MIB
            found.append({"requested_mib": requested, "allocated_mib": allocated})
    return found


def _three_steps(
    config: Config, split_sizes: SplitSizes, steps: int, device: torch.device
) -> tuple[list[dict[str, Any]], float]:
    """Return the peaks of each of the first three steps and the median seconds of `steps` more."""
    data, found = noise_dataset(config, split_sizes), []
    limit = config.device.preload_limit_mib
    training, validation = (data.split(name, device, limit) for name in ("train", "validation"))
    state = init_train_state(config, device)
    batches = training.batches(int(config.train.batch_size), training.epoch_order(config.seed, 1))
    state.model.train()
    for _ in range(3):
        reset_peaks(device)
        batch = next(batches)
        _kept = train_step(state, batch, config)  # freed in the next iteration
        found.append(peak_memory(device))
    assert len(validation) == split_sizes["validation"]  # keeps it on the device until here, as in a training
    return found, step_seconds(lambda: train_step(state, batch, config), steps, device)


# -- the largest batch ---------------------------------------------------------------------------------------


def largest(
    program: str, budget_mib: int, first: int, max_batch: int, tries: int, device: str
) -> dict[str, Any]:
    """Find the largest batch that runs within a budget and the smallest that does not.

    `program` is "article", its loop, or one of our variants with its network. All tries share a process; the
    memory that torch has reserved before each is recorded.
    """
    torch_device = torch.device(device)
    meter = ProcessMeter(torch_device)
    run = _article_run if program == "article" else functools.partial(_our_run, program)
    rows: list[dict[str, Any]] = []
    run(first, torch_device)  # loads the kernels, to know the size of the context
    context_mib = meter.measure()["context_mib"]
    clear(torch_device)
    if context_mib is not None:
        limit_memory(budget_mib, context_mib)

    def runs(batch: int) -> bool:
        reserved_before, began = reserved_mib(torch_device), time.perf_counter()
        reset_peaks(torch_device)
        reason = oom_reason(lambda: run(batch, torch_device), torch_device)
        row = {
            "batch": batch,
            "ran": reason is None,
            "reserved_before_mib": reserved_before,
            "reason": reason,
        }
        rows.append(
            row
            | {
                "reserved_mib": peak_memory(torch_device)["reserved_mib"],
                "seconds": time.perf_counter() - began,
            }
        )
        return reason is None

    largest, rejected = search(runs, first, max_batch, tries)
    after = meter.measure()["context_mib"]  # grows if larger batches load other kernels
    figures = {
        "program": program,
        "budget_mib": budget_mib,
        "largest": largest,
        "rejected": rejected,
        "tries": rows,
    }
    return figures | {"context_mib": context_mib, "context_after_mib": after}


def search(
    runs: Callable[[int], bool], first: int, max_batch: int, tries: int
) -> tuple[int | None, int | None]:
    """Return the largest batch that runs and the smallest that does not, by doubling and bisection."""
    largest: int | None = None
    rejected: int | None = None
    batch = first
    for _ in range(tries):
        if runs(batch):
            largest = batch
        else:
            rejected = batch
        if largest is None:
            batch //= 2
        elif rejected is None:
            batch = min(2 * batch, max_batch)
        else:
            batch = (largest + rejected) // 2
        if batch in (0, largest, rejected):
            break
    return largest, rejected


def _article_run(batch: int, device: torch.device) -> None:
    """Run three steps of the article's loop and its evaluation of the 100 images of a shard."""
    import article_loop as loop

    images = torch.rand(batch, 3, loop.HEIGHT, loop.WIDTH)
    labels = F.one_hot(torch.zeros(batch, loop.LENGTH, dtype=torch.int64), len(loop.ALPHABET))
    batches = [(images, labels.flatten(1).float())]
    network = loop.init_network(device)
    optimizer = torch.optim.Adam(network.parameters())
    loop.train_steps(network, optimizer, batches * 3, device)
    loop.evaluate(network, [(part[:100], label[:100]) for part, label in batches], device)


def _our_run(variant: str, batch: int, device: torch.device) -> None:
    """Run an epoch of three of our steps and an evaluation."""
    name: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    config = make_config(Case("resnet18", variant, batch), name, STREAMED)
    devices.setup_device(config)
    validation = LARGEST_SPLIT_SIZES["validation"] if name == "cuda" else 2
    run_epoch(config, noise_dataset(config, {"train": 3 * batch, "validation": validation}), device)
