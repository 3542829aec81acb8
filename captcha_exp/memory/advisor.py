"""Suggest settings with which a batch fits a GPU: combinations of memory savings, the fastest first.

Compared are 16-bit precision, activation checkpointing, micro-batches, smaller evaluation batches, and images
that are transferred batch by batch. Another optimizer would save memory, too, but change the training.

The time of a step is an estimate from the GPU's file and the number of forward passes; it is used only to
order the suggestions.
"""

import functools
import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field, with_config

from captcha_exp.config import Bounds, Config, GpuSpec, Precision, flatten
from captcha_exp.config.gpu import STRICT
from captcha_exp.memory.interval import described
from captcha_exp.memory.plan import Plan, Planner, with_batch_size
from captcha_exp.runtime.console import progress_bar

# micro-batches per step that are tried
MICRO_BATCH_COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)
RECOMPUTE_TIME_FACTOR = 4 / 3  # a backward pass costs two forward passes; recomputation adds one
MICRO_BATCH_OVERHEAD = 0.01  # of a step, for each further micro-batch: small ones underuse a GPU
MIN_SPEED = 0.01  # of 16 bits relative to fp32, because a GPU's file may have 0
TRANSFER_OVERHEAD = 0.01  # of a step, for transferring its images from the host


@with_config(STRICT)
@dataclass(frozen=True)
class Advice:
    """One combination of settings with which the requested batch fits."""

    overrides: Annotated[
        tuple[str, ...], described("overrides to add to the command; none: it fits without them")
    ]
    plan: Annotated[Plan, described("the plan with these overrides")]
    relative_time: Annotated[float, Field(gt=0), described("estimated time of a step; 1: without changes")]
    notes: Annotated[tuple[str, ...], described("side effects")]


def advise(config: Config, split_sizes: Mapping[str, int], total_mib: float | None) -> list[Advice]:
    """Return the combinations with which train.batch_size fits the budget, the fastest first.

    A combination is left out if a subset of its overrides is as fast. Each one uses the smallest number of
    micro-batches that fits. The unchanged config comes first, if it fits.
    """

    def plan(changed: Config) -> Plan:
        return Planner(changed, split_sizes, total_mib).plan_for(int(changed.train.batch_size))

    base = with_batch_size(config, int(config.train.batch_size))
    variants = list(_variants(base))
    found: list[Advice] = []
    if not _could_fit(variants[-1], plan):  # the one with every saving
        return found
    with progress_bar("planning", len(variants)) as bar:
        for variant in variants:
            if advice := _with_fewest_micro_batches(variant, base, plan):
                found.append(advice)
            bar.advance(1)
    found.sort(key=_order)
    return [each for each in found if not any(_dominates(other, each) for other in found)]


def _order(advice: Advice) -> tuple[bool, float, int, tuple[str, ...]]:
    """Return the sort key of a combination: the unchanged config, then the fastest, then the simplest."""
    overrides = advice.overrides
    return overrides != (), round(advice.relative_time, 3), len(overrides), overrides


def _variants(config: Config) -> Iterator[Config]:
    """Yield the config with each combination of the settings that are switched on or off.

    For fp32, these include the faster 16-bit precision of the GPU.
    """
    precisions: list[Precision] = ["fp32" if config.device.precision == "auto" else config.device.precision]
    if precisions == ["fp32"]:
        precisions.append("fp16" if _speed(config.gpu, "fp16") > _speed(config.gpu, "bf16") else "bf16")
    limits = sorted({config.device.preload_limit_mib, 0}, reverse=True)
    checkpointing = sorted({config.train.activation_checkpointing, True})
    for limit, recompute, precision in itertools.product(limits, checkpointing, precisions):
        device = replace(config.device, preload_limit_mib=limit, precision=precision)
        yield replace(config, device=device, train=replace(config.train, activation_checkpointing=recompute))


def _with_fewest_micro_batches(
    variant: Config, base: Config, plan: Callable[[Config], Plan]
) -> Advice | None:
    """Return the variant with the fewest micro-batches that fit; None if no number of them fits."""
    if not _could_fit(variant, plan):
        return None
    batch = int(variant.train.batch_size)
    largest = variant.train.micro_batch_size or batch
    sizes = sorted({min(largest, -(-batch // passes)) for passes in MICRO_BATCH_COUNTS}, reverse=True)

    @functools.cache
    def planned(number: int) -> tuple[Config, Plan]:
        micro = None if sizes[number] >= batch else sizes[number]
        config = replace(variant, train=replace(variant.train, micro_batch_size=micro))
        return _with_fitting_eval_batch(config, plan)

    def fits(number: int) -> bool:
        return planned(number)[1].fits == "fits"

    fewest = 0 if fits(0) else bisect_left(range(len(sizes)), True, lo=1, key=fits)
    if fewest == len(sizes):
        return None
    chosen, chosen_plan = planned(fewest)
    return Advice(_overrides(chosen, base), chosen_plan, relative_time(chosen, base), _notes(chosen, base))


def _could_fit(variant: Config, plan: Callable[[Config], Plan]) -> bool:
    """Return whether the smallest micro-batch would fit on its own: a quick check before the slow search."""
    micro = with_batch_size(variant, -(-int(variant.train.batch_size) // MICRO_BATCH_COUNTS[-1]))
    smallest = replace(micro, train=replace(micro.train, micro_batch_size=None, eval_batch_size=1))
    return plan(smallest).fits == "fits"


def _with_fitting_eval_batch(config: Config, plan: Callable[[Config], Plan]) -> tuple[Config, Plan]:
    """Return the config and its plan, with eval_batch_size halved while the evaluation does not fit."""
    planned = plan(config)
    while planned.fits != "fits" and planned.is_evaluation_peak and config.train.eval_batch_size > 1:
        halved = config.train.eval_batch_size // 2
        config = replace(config, train=replace(config.train, eval_batch_size=halved))
        planned = plan(config)
    return config, planned


def _overrides(config: Config, base: Config) -> tuple[str, ...]:
    """Return the overrides that turn `base` into `config`."""
    base_values = flatten(base)
    return tuple(f"{key}={value}" for key, value in flatten(config).items() if value != base_values[key])


def relative_time(config: Config, base: Config) -> float:
    """Return the estimated time of a step of `config`, relative to a step of `base`."""
    return _step_time(config) / _step_time(base)


def _step_time(config: Config) -> float:
    """Return the time of a step, relative to fp32 in one pass with all images on the device."""
    precision, train = config.device.precision, config.train
    time = 1 / _speed(config.gpu, precision) if precision in ("bf16", "fp16") else 1.0
    time *= RECOMPUTE_TIME_FACTOR if train.activation_checkpointing else 1.0
    passes = -(-int(train.batch_size) // (train.micro_batch_size or int(train.batch_size)))
    transfer = TRANSFER_OVERHEAD if config.device.preload_limit_mib == 0 else 0.0
    return time * (1 + MICRO_BATCH_OVERHEAD * (passes - 1)) + transfer


def speedup(gpu: GpuSpec, precision: str) -> Bounds:
    """Return the speed of training in 16 bits relative to fp32, from the GPU's file."""
    return gpu.fp16_speedup if precision == "fp16" else gpu.bf16_speedup


def _speed(gpu: GpuSpec, precision: str) -> float:
    """Return the speed relative to fp32: the geometric mean of the bounds."""
    bounds = speedup(gpu, precision)
    return math.sqrt(max(bounds.min, MIN_SPEED) * max(bounds.max, MIN_SPEED))


def _notes(config: Config, base: Config) -> tuple[str, ...]:
    notes = []
    if config.device.precision != base.device.precision:
        bounds = speedup(config.gpu, config.device.precision)
        speed = f"{bounds.min:g} to {bounds.max:g} times as fast as fp32 on this GPU"
        notes.append(f"{config.device.precision} is less precise, and {speed}")
    if config.train.activation_checkpointing != base.train.activation_checkpointing:
        notes.append("a third more computation, identical results")
    if (micro := config.train.micro_batch_size) != base.train.micro_batch_size:
        notes.append(f"batch norm statistics are computed over {micro:,} images")
    return tuple(notes)


def _dominates(other: Advice, each: Advice) -> bool:
    """Return whether the other has a subset of these overrides and is as fast."""
    is_subset = set(other.overrides) < set(each.overrides)
    return is_subset and other.relative_time <= each.relative_time
