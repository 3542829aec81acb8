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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from captcha_exp.config import Config, Precision, flatten
from captcha_exp.memory.plan import Plan, Planner, with_batch_size
from captcha_exp.runtime.console import progress_bar

# micro-batches per step that are tried
MICRO_BATCH_COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)
RECOMPUTE_TIME_FACTOR = 4 / 3  # a backward pass costs two forward passes; recomputation adds one
MICRO_BATCH_OVERHEAD = 0.01  # of a step, for each further micro-batch: small ones underuse a GPU
MIN_SPEED = 0.01  # of 16 bits relative to fp32, because a GPU's file may have 0
TRANSFER_OVERHEAD = 0.01  # of a step, for transferring its images from the host


@dataclass(frozen=True)
class Advice:
    """One combination of settings with which the requested batch fits."""

    overrides: tuple[str, ...]  # to add to the command; none: the config fits unchanged
    plan: Plan
    relative_time: float  # estimated time of a step; 1 is the unchanged config
    notes: tuple[str, ...]  # other consequences of the overrides

    def to_json(self) -> dict[str, Any]:
        """Return values that `json` can write."""
        return {
            "overrides": list(self.overrides),
            "relative_time": self.relative_time,
            "notes": list(self.notes),
            "plan": self.plan.to_json(),
        }


def advise(config: Config, split_sizes: Mapping[str, int], total_mib: float | None) -> list[Advice]:
    """Return the combinations with which train.batch_size fits the budget, the fastest first.

    A combination is left out if a subset of its overrides is as fast. Each one uses the smallest number of
    micro-batches that fits. The unchanged config comes first, if it fits.
    """
    base = with_batch_size(config, int(config.train.batch_size))
    variants = list(_variants(base))
    found: list[Advice] = []
    if not _could_fit(variants[-1], split_sizes, total_mib):  # the one with every saving
        return found
    with progress_bar("planning", len(variants)) as bar:
        for variant in variants:
            found += _with_fewest_micro_batches(variant, base, split_sizes, total_mib)
            bar.advance(1)
    found.sort(
        key=lambda each: (
            each.overrides != (),
            round(each.relative_time, 3),
            len(each.overrides),
            each.overrides,
        )
    )
    return [each for each in found if not any(_dominates(other, each) for other in found)]


def _variants(config: Config) -> Iterator[Config]:
    """Yield the config with each combination of the settings that are switched on or off."""
    resident = {config.device.preload_limit_mib, 0}
    checkpointing = {config.train.activation_checkpointing, True}
    for limit, recompute, precision in itertools.product(
        sorted(resident, reverse=True), sorted(checkpointing), _precisions(config)
    ):
        device = replace(config.device, preload_limit_mib=limit, precision=precision)
        yield replace(config, device=device, train=replace(config.train, activation_checkpointing=recompute))


def _precisions(config: Config) -> list[Precision]:
    """Return the precision of the config and, for fp32, the faster 16-bit precision of the GPU."""
    speeds = {half: _speed(config, half) for half in ("bf16", "fp16")}
    faster: Precision = "fp16" if speeds["fp16"] > speeds["bf16"] else "bf16"
    own: Precision = "fp32" if config.device.precision == "auto" else config.device.precision
    return [own] if own != "fp32" else [own, faster]


def _with_fewest_micro_batches(
    variant: Config, base: Config, split_sizes: Mapping[str, int], total_mib: float | None
) -> Iterator[Advice]:
    """Yield the variant with the fewest micro-batches that fit; nothing if no number of them fits."""
    batch = int(variant.train.batch_size)
    largest = variant.train.micro_batch_size or batch
    sizes = sorted({min(largest, -(-batch // passes)) for passes in MICRO_BATCH_COUNTS}, reverse=True)

    @functools.cache
    def planned(number: int) -> tuple[Config, Plan]:
        return _with_fitting_eval_batch(
            _with_micro_batch_size(variant, sizes[number]), split_sizes, total_mib
        )

    def fits(number: int) -> bool:
        return planned(number)[1].fits == "fits"

    if not _could_fit(variant, split_sizes, total_mib):
        return
    fewest = 0 if fits(0) else bisect_left(range(len(sizes)), True, lo=1, key=fits)
    if fewest < len(sizes):
        chosen, plan = planned(fewest)
        yield Advice(_overrides(chosen, base), plan, relative_time(chosen, base), _notes(chosen, base))


def _could_fit(variant: Config, split_sizes: Mapping[str, int], total_mib: float | None) -> bool:
    """Return whether the smallest micro-batch would fit on its own: a quick check before the slow search."""
    micro = with_batch_size(variant, -(-int(variant.train.batch_size) // MICRO_BATCH_COUNTS[-1]))
    smallest = replace(micro, train=replace(micro.train, micro_batch_size=None, eval_batch_size=1))
    return Planner(smallest, split_sizes, total_mib).plan_for(int(smallest.train.batch_size)).fits == "fits"


def _with_micro_batch_size(config: Config, size: int) -> Config:
    micro = None if size >= int(config.train.batch_size) else size
    return replace(config, train=replace(config.train, micro_batch_size=micro))


def _with_fitting_eval_batch(
    config: Config, split_sizes: Mapping[str, int], total_mib: float | None
) -> tuple[Config, Plan]:
    """Return the config and its plan, with eval_batch_size halved while the evaluation does not fit."""
    plan = Planner(config, split_sizes, total_mib).plan_for(int(config.train.batch_size))
    while plan.fits != "fits" and plan.is_evaluation_peak:
        size = config.train.eval_batch_size // 2
        if size == 0:
            break
        config = replace(config, train=replace(config.train, eval_batch_size=size))
        plan = Planner(config, split_sizes, total_mib).plan_for(int(config.train.batch_size))
    return config, plan


def _overrides(config: Config, base: Config) -> tuple[str, ...]:
    """Return the overrides that turn `base` into `config`."""
    base_values = flatten(base)
    return tuple(f"{key}={value}" for key, value in flatten(config).items() if value != base_values[key])


def relative_time(config: Config, base: Config) -> float:
    """Return the estimated time of a step of `config`, relative to a step of `base`."""
    return _step_time(config) / _step_time(base)


def _step_time(config: Config) -> float:
    """Return the time of a step, relative to fp32 in one pass with all images on the device."""
    half = config.device.precision in ("bf16", "fp16")
    time = 1 / _speed(config, str(config.device.precision)) if half else 1.0
    time *= RECOMPUTE_TIME_FACTOR if config.train.activation_checkpointing else 1.0
    passes = -(
        -int(config.train.batch_size) // (config.train.micro_batch_size or int(config.train.batch_size))
    )
    return time * (1 + MICRO_BATCH_OVERHEAD * (passes - 1)) + TRANSFER_OVERHEAD * (
        config.device.preload_limit_mib == 0
    )


def _speed(config: Config, precision: str) -> float:
    """Return the speed relative to fp32: the geometric mean of the bounds in the GPU's file."""
    known = config.gpu.fp16_speedup if precision == "fp16" else config.gpu.bf16_speedup
    return math.sqrt(max(known.min, MIN_SPEED) * max(known.max, MIN_SPEED))


def _notes(config: Config, base: Config) -> tuple[str, ...]:
    notes = []
    if config.device.precision != base.device.precision:
        known = config.gpu.fp16_speedup if config.device.precision == "fp16" else config.gpu.bf16_speedup
        speed = f"{known.min:g} to {known.max:g} times as fast as fp32 on this GPU"
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
