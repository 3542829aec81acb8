"""Ways to make a batch fit a card: combinations of what spares memory, the cheapest in time first.

What is compared: 16 bits instead of 32, blocks whose activations are computed twice, a batch in parts,
evaluations in smaller batches, pictures that are sent batch by batch. Another optimiser would spare memory
too, but it would learn something else.

How long a step takes is estimated, from the card's file and from how often the network is passed through; the
order is what counts.
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
from captcha_exp.runtime.console import Display

MICRO_BATCH_COUNTS = (
    1,
    2,
    3,
    4,
    5,
    6,
    8,
    10,
    12,
    16,
    20,
    24,
    32,
    48,
    64,
    96,
    128,
)  # parts of a batch that are tried
RECOMPUTE_TIME_FACTOR = 4 / 3  # a backward pass is the work of two forward passes; then there is one more
MICRO_BATCH_OVERHEAD = 0.01  # of a step: smaller parts keep a card less busy
MIN_SPEED = 0.01  # of 16 bits, times as fast as fp32: a card's file may say 0
TRANSFER_OVERHEAD = 0.01  # of a step: pictures that come from the host


@dataclass(frozen=True)
class Advice:
    """One combination with which the wanted batch fits."""

    overrides: tuple[str, ...]  # to be added to the command; none: it fits as it stands
    plan: Plan
    relative_time: float  # estimated, of a step; 1 is the config as it stands
    notes: tuple[str, ...]  # what else it changes

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "overrides": list(self.overrides),
            "relative_time": self.relative_time,
            "notes": list(self.notes),
            "plan": self.plan.to_json(),
        }


def advise(
    config: Config, split_sizes: Mapping[str, int], total_mib: float | None, display: Display
) -> list[Advice]:
    """Every combination with which train.batch_size fits the budget, unless it costs more than one with less.

    Each takes as few parts of the batch as will do. The config as it stands comes first, if it fits.
    """
    base = with_batch_size(config, int(config.train.batch_size))
    variants = list(_variants(base))
    found: list[Advice] = []
    if not _could_fit(variants[-1], split_sizes, total_mib):  # it has all that spares memory
        return found
    with display.progress_bar("planning", len(variants)) as bar:
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
    """The config with each combination of what is on or off."""
    resident = {config.device.preload_limit_mib, 0}
    checkpointing = {config.train.activation_checkpointing, True}
    for limit, recompute, precision in itertools.product(
        sorted(resident, reverse=True), sorted(checkpointing), _precisions(config)
    ):
        device = replace(config.device, preload_limit_mib=limit, precision=precision)
        yield replace(config, device=device, train=replace(config.train, activation_checkpointing=recompute))


def _precisions(config: Config) -> list[Precision]:
    """That of the config, and the one of 16 bits that should be faster on the card."""
    speeds = {half: _speed(config, half) for half in ("bf16", "fp16")}
    faster: Precision = "fp16" if speeds["fp16"] > speeds["bf16"] else "bf16"
    own: Precision = "fp32" if config.device.precision == "auto" else config.device.precision
    return [own] if own != "fp32" else [own, faster]


def _with_fewest_micro_batches(
    variant: Config, base: Config, split_sizes: Mapping[str, int], total_mib: float | None
) -> Iterator[Advice]:
    """The variant with its batch in as few parts as will do; nothing where no number of parts does."""
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
    """Whether the least of all parts would fit if it were the whole batch: that is told at once, where a
    search through the parts takes long."""
    part = with_batch_size(variant, -(-int(variant.train.batch_size) // MICRO_BATCH_COUNTS[-1]))
    least = replace(part, train=replace(part.train, micro_batch_size=None, eval_batch_size=1))
    return Planner(least, split_sizes, total_mib).plan_for(int(least.train.batch_size)).fits == "fits"


def _with_micro_batch_size(config: Config, size: int) -> Config:
    micro = None if size >= int(config.train.batch_size) else size
    return replace(config, train=replace(config.train, micro_batch_size=micro))


def _with_fitting_eval_batch(
    config: Config, split_sizes: Mapping[str, int], total_mib: float | None
) -> tuple[Config, Plan]:
    """The config and its plan, with an evaluation no larger than needed if it is what stands in the way."""
    plan = Planner(config, split_sizes, total_mib).plan_for(int(config.train.batch_size))
    while plan.fits != "fits" and plan.is_evaluation_peak:
        size = config.train.eval_batch_size // 2
        if size == 0:
            break
        config = replace(config, train=replace(config.train, eval_batch_size=size))
        plan = Planner(config, split_sizes, total_mib).plan_for(int(config.train.batch_size))
    return config, plan


def _overrides(config: Config, base: Config) -> tuple[str, ...]:
    """What has to be written to make the one of the other."""
    before = flatten(base)
    return tuple(f"{key}={value}" for key, value in flatten(config).items() if value != before[key])


def relative_time(config: Config, base: Config) -> float:
    """How long a step of the one is estimated to take, in steps of the other."""
    return _step_time(config) / _step_time(base)


def _step_time(config: Config) -> float:
    """Of a step, in steps of fp32 in one pass with all pictures on the device."""
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
    """Times as fast as fp32: the middle of what the card's file says, of a ratio the geometric one."""
    known = config.gpu.fp16_speedup if precision == "fp16" else config.gpu.bf16_speedup
    return math.sqrt(max(known.min, MIN_SPEED) * max(known.max, MIN_SPEED))


def _notes(config: Config, base: Config) -> tuple[str, ...]:
    notes = []
    if config.device.precision != base.device.precision:
        known = config.gpu.fp16_speedup if config.device.precision == "fp16" else config.gpu.bf16_speedup
        pace = f"{known.min:g} to {known.max:g} times as fast on this card"
        notes.append(f"{config.device.precision} rounds, and is {pace}")
    if config.train.activation_checkpointing != base.train.activation_checkpointing:
        notes.append("a third more work, the same numbers")
    if (micro := config.train.micro_batch_size) != base.train.micro_batch_size:
        notes.append(f"batch norms see {micro:,} pictures at a time")
    return tuple(notes)


def _dominates(other: Advice, each: Advice) -> bool:
    """Whether the other does with a part of the same, and takes no longer."""
    less = set(other.overrides) < set(each.overrides)
    return less and other.relative_time <= each.relative_time
