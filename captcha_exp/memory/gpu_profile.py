"""What a card is, from what was read on it (`calibrate`), as its card file says it.

Nothing here touches a card, so that cards which nobody has can be played in a test.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from captcha_exp.config import Bounds, GpuSpec, Precision
from captcha_exp.errors import UserError

CONTEXT_MARGIN_MIB = 64  # on top of a measured context: kernels that a training loads and no try here did
# Limits of readings from a file; a dataclass made in code is not checked.
STRICT_JSON = with_config(ConfigDict(extra="forbid", strict=True))
MiB = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
NonEmptyStr = Annotated[str, Field(min_length=1)]


@STRICT_JSON
@dataclass(frozen=True)
class MemoryStage:
    """The memory of the card after something was done for the first time."""

    after: NonEmptyStr
    used_mib: MiB  # by all processes
    reserved_mib: MiB  # by torch's allocator in this one
    process_mib: MiB | None  # this one's, by NVML; None where NVML does not know it

    @property
    def non_allocator_mib(self) -> float:
        """What is in use beside this process's allocator, by whomever."""
        return max(0.0, self.used_mib - self.reserved_mib)


@STRICT_JSON
@dataclass(frozen=True)
class ConvWorkspace:
    """The most that a convolution of a network took beside its tensors."""

    network: NonEmptyStr
    precision: Precision
    batch_size: Count
    mib: MiB

    def __str__(self) -> str:
        return f"{self.mib:.0f} ({self.network}, {self.precision}, batch of {self.batch_size})"


@STRICT_JSON
@dataclass(frozen=True)
class TimingRound:
    """Seconds of one training step of a network, in each precision in turn."""

    network: NonEmptyStr
    batch_size: Count
    seconds: Mapping[Precision, Seconds]


@STRICT_JSON
@dataclass(frozen=True)
class GpuMeasurements:
    """All that was read on a card."""

    name: NonEmptyStr
    totals_mib: Annotated[tuple[MiB, ...], Field(min_length=1)]  # as torch tells it, in each of its ways
    free_before_mib: MiB | None  # before this process came, by NVML
    stages: Annotated[tuple[MemoryStage, ...], Field(min_length=1)]  # in order
    smallest: Count  # the stage at which every training has arrived
    cublas_mib: MiB  # kept by the workspaces of the forward and of the backward thread
    cublas_config: str  # CUBLAS_WORKSPACE_CONFIG
    transients: tuple[ConvWorkspace, ...]
    deterministic: bool  # whether the convolutions had to be
    rounds: tuple[TimingRound, ...]
    compute_capability: Annotated[str, Field(pattern=r"^[1-9][0-9]?\.[0-9]$")] | None = None


def measurements_to_json(measurements: GpuMeasurements) -> dict[str, Any]:
    """Return the readings as values that `json` can write; `readings_from_json` reads them back."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(measurements), allow_nan=False))
    return values


def measurements_from_json(values: Any) -> GpuMeasurements:
    """Return the readings that `readings_to_json` wrote.

    Raises:
        UserError: a key is unknown or missing, or a value has the wrong type, is not finite or is out of
            range; the line names the first such key. Measure the GPU again, or correct the file.
    """
    try:  # as JSON, because strict validation of Python values would refuse a list for a tuple
        readings = TypeAdapter(GpuMeasurements).validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"])) or "the whole"
        raise UserError(f"readings of a GPU: {key}: {first['msg'].lower()}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"readings of a GPU: not JSON values: {error}") from None
    if readings.smallest >= len(readings.stages):
        raise UserError(
            f"readings of a GPU: smallest: must be below the number of stages, {len(readings.stages)}"
        )
    for number, each in enumerate(readings.rounds):
        if "fp32" not in each.seconds:
            raise UserError(f"readings of a GPU: rounds.{number}.seconds: must have fp32")
    return readings


def build_gpu_spec(measurements: GpuMeasurements, fallback: GpuSpec) -> GpuSpec:
    """The card. What could not be measured keeps the bounds of the card known before."""
    total = min(measurements.totals_mib)
    others = _others_bounds(measurements, total)
    return GpuSpec(
        name=measurements.name,
        compute_capability=measurements.compute_capability,
        total_mib=_mib_bounds(
            total, max(measurements.totals_mib), "torch reports it, by cudaMemGetInfo and by the properties"
        ),
        other_processes_mib=others,
        context_mib=_context_bounds(measurements, total),
        cublas_workspace_mib=_mib_bounds(
            0,
            measurements.cublas_mib,
            f"measured, {measurements.cublas_mib:.1f} for the forward and the backward thread with "
            f"CUBLAS_WORKSPACE_CONFIG={measurements.cublas_config}; less where it is not set",
        ),
        cudnn_workspace_mib=_cudnn_bounds(measurements, fallback.cudnn_workspace_mib),
        fp16_speedup=_speed_bounds(measurements.rounds, "fp16", fallback.fp16_speedup),
        bf16_speedup=_speed_bounds(measurements.rounds, "bf16", fallback.bf16_speedup),
    )


def _mib_bounds(min_mib: float, max_mib: float, source: str) -> Bounds:
    """In whole MiB, rounded outwards."""
    return Bounds(min=float(math.floor(min_mib)), max=float(math.ceil(max_mib)), source=source)


def _others_bounds(measurements: GpuMeasurements, total: float) -> Bounds:
    """What other processes held: before this one, and beside it."""
    seen = [max(0.0, s.used_mib - s.process_mib) for s in measurements.stages if s.process_mib is not None]
    if measurements.free_before_mib is not None:
        seen.append(max(0.0, total - measurements.free_before_mib))
    if seen:
        return _mib_bounds(min(seen), max(seen), "measured by NVML, what other programs held at that time")
    source = "NVML tells nothing here; at most what was in use after this process's own start"
    return _mib_bounds(0, measurements.stages[0].non_allocator_mib, source)


def _context_bounds(measurements: GpuMeasurements, total: float) -> Bounds:
    """From the smallest that trains to the largest that was seen, and a margin."""
    bounds = [_context_range(stage, measurements, total) for stage in measurements.stages]
    steps = ", ".join(
        (f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}") + f" after {stage.after}"
        for stage, (low, high) in zip(measurements.stages, bounds, strict=True)
    )
    by = (
        "by NVML's figure for the process"
        if all(stage.process_mib is not None for stage in measurements.stages)
        else "by what is in use on the card and was not before"
    )
    return _mib_bounds(
        min(low for low, _ in bounds[measurements.smallest :]),
        max(high for _, high in bounds) + CONTEXT_MARGIN_MIB,
        f"measured {by}, {steps}; most has {CONTEXT_MARGIN_MIB} on top for kernels loaded later",
    )


def _context_range(stage: MemoryStage, measurements: GpuMeasurements, total: float) -> tuple[float, float]:
    """MiB of the process beside torch's allocator: the least and the most that it can be."""
    if stage.process_mib is not None:
        exact = max(0.0, stage.process_mib - stage.reserved_mib)
        return exact, exact
    if measurements.free_before_mib is not None:
        exact = max(0.0, stage.non_allocator_mib - max(0.0, total - measurements.free_before_mib))
        return exact, exact
    # Of what was in use after its own start all may be others', or nothing.
    return max(
        0.0, stage.non_allocator_mib - measurements.stages[0].non_allocator_mib
    ), stage.non_allocator_mib


def _cudnn_bounds(measurements: GpuMeasurements, fallback: Bounds) -> Bounds:
    """From the batch whose hungriest convolution takes least to the one whose takes most.

    Where the largest batch of a network takes the most, a larger one may take more: then the most is at least
    that of the fallback.
    """
    groups: dict[tuple[str, Precision, int], ConvWorkspace] = {}
    for each in measurements.transients:
        group = (each.network, each.precision, each.batch_size)
        groups[group] = max(groups.get(group, each), each, key=lambda transient: transient.mib)
    if not groups:
        return _unmeasured_bounds(fallback)
    worst = sorted(groups.values(), key=lambda transient: transient.mib)
    sizes = sorted({each.batch_size for each in worst})
    source = (
        f"measured, {worst[0]} to {worst[-1]}; forward and backward, batches of "
        f"{sizes[0]} to {sizes[-1]}, train.deterministic={str(measurements.deterministic).lower()}"
    )
    max_mib = worst[-1].mib
    if max_mib < fallback.max and _grows(groups.values()):
        max_mib = fallback.max
        source += f"; it grows to the largest batch tried, so max is not measured: {fallback.source}"
    return _mib_bounds(worst[0].mib, max_mib, source)


def _grows(found: Iterable[ConvWorkspace]) -> bool:
    """Return whether the largest batch of a network in a precision took more than each smaller one."""
    of_network: dict[tuple[str, Precision], list[ConvWorkspace]] = {}
    for each in found:
        of_network.setdefault((each.network, each.precision), []).append(each)
    for several in of_network.values():
        *smaller, largest = sorted(several, key=lambda transient: transient.batch_size)
        if smaller and largest.mib > max(each.mib for each in smaller):
            return True
    return False


def _speed_bounds(rounds: Iterable[TimingRound], precision: Precision, fallback: Bounds) -> Bounds:
    """Times as fast as fp32: the slowest round to the fastest, of all networks."""
    of_network: dict[str, list[float]] = {}
    for each in rounds:
        if precision in each.seconds:
            ratio = each.seconds["fp32"] / each.seconds[precision]
            of_network.setdefault(f"{each.network}, batch of {each.batch_size}", []).append(ratio)
    if not of_network:
        return _unmeasured_bounds(fallback)
    ratios = [ratio for several in of_network.values() for ratio in several]
    seen = "; ".join(f"{min(some):.2f} to {max(some):.2f} ({name})" for name, some in of_network.items())
    return Bounds(
        min=math.floor(min(ratios) * 100) / 100,
        max=math.ceil(max(ratios) * 100) / 100,
        source=f"measured in training steps, {seen}",
    )


def _unmeasured_bounds(fallback: Bounds) -> Bounds:
    source = f"not measured, it fails here; {fallback.source}"
    return Bounds(min=fallback.min, max=fallback.max, source=source)
