"""Derive the bounds in a GPU's file from the measurements of `gpu_probe`.

Nothing here uses a GPU, so tests can cover any GPU with made-up measurements.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter

from captcha_exp.config import Bounds, GpuSpec, Precision
from captcha_exp.memory.interval import MiBRange

FIRST_TRAINING_STAGE = 2  # index of the first stage that every training reaches: a convolution in fp32
CONTEXT_MARGIN_MIB = 64  # added to a measured context, for kernels that only training loads


@dataclass(frozen=True)
class MemoryStage:
    """The memory of the GPU after an operation ran for the first time."""

    after: str
    used_mib: float  # by all processes
    reserved_mib: float  # by torch's allocator in this one
    process_mib: float | None  # of this process, by NVML; None if NVML does not report it

    @property
    def non_allocator_mib(self) -> float:
        """Return the memory in use outside this process's allocator, other processes included."""
        return max(0.0, self.used_mib - self.reserved_mib)


@dataclass(frozen=True)
class ConvWorkspace:
    """The largest workspace of a network's convolutions."""

    network: str
    precision: Precision
    batch_size: int
    mib: float

    def __str__(self) -> str:
        return f"{self.mib:.0f} ({self.network}, {self.precision}, batch size {self.batch_size})"


@dataclass(frozen=True)
class TimingRound:
    """Seconds of one training step of a network, in each precision in turn."""

    network: str
    batch_size: int
    seconds: Mapping[Precision, float]


@dataclass(frozen=True)
class GpuMeasurements:
    """All measurements of a GPU."""

    name: str
    totals_mib: tuple[float, ...]  # as torch reports it, in both of its ways
    free_before_mib: float | None  # before this process used CUDA, by NVML
    stages: tuple[MemoryStage, ...]  # in order
    cublas_mib: float  # workspaces of the forward and of the backward thread
    cublas_config: str  # CUBLAS_WORKSPACE_CONFIG
    transients: tuple[ConvWorkspace, ...]
    deterministic: bool  # whether the convolutions were
    rounds: tuple[TimingRound, ...]
    compute_capability: str | None = None


def build_gpu_spec(measurements: GpuMeasurements, fallback: GpuSpec) -> GpuSpec:
    """Return the figures of the GPU; those that were not measured keep the bounds of `fallback`."""
    total = min(measurements.totals_mib)
    before = MiBRange(0, measurements.stages[0].non_allocator_mib)  # in use by other processes at the start
    if measurements.free_before_mib is not None:
        used_mib = max(0.0, total - measurements.free_before_mib)
        before = MiBRange(used_mib, used_mib)
    during = [s.used_mib - s.process_mib for s in measurements.stages if s.process_mib is not None]
    others_mib = [*before, *(max(0.0, mib) for mib in during)]
    others_source = "used by other programs before and during the measurements, by NVML if it reports that"
    total_source = "reported by torch, from cudaMemGetInfo and from the device properties"
    cublas_source = (
        f"measured, {measurements.cublas_mib:.1f} for the forward and the backward thread with "
        f"CUBLAS_WORKSPACE_CONFIG={measurements.cublas_config}; less if it is not set"
    )
    return GpuSpec(
        name=measurements.name,
        compute_capability=measurements.compute_capability,
        total_mib=_mib_bounds(total, max(measurements.totals_mib), total_source),
        other_processes_mib=_mib_bounds(min(others_mib), max(others_mib), others_source),
        context_mib=_context_bounds(measurements, before),
        cublas_workspace_mib=_mib_bounds(0, measurements.cublas_mib, cublas_source),
        cudnn_workspace_mib=_cudnn_bounds(measurements, fallback.cudnn_workspace_mib),
        fp16_speedup=_speed_bounds(measurements.rounds, "fp16", fallback.fp16_speedup),
        bf16_speedup=_speed_bounds(measurements.rounds, "bf16", fallback.bf16_speedup),
    )


def _mib_bounds(min_mib: float, max_mib: float, source: str) -> Bounds:
    """Return bounds in whole float, rounded outwards."""
    return Bounds(min=float(math.floor(min_mib)), max=float(math.ceil(max_mib)), source=source)


def _context_bounds(measurements: GpuMeasurements, before: MiBRange) -> Bounds:
    """Return the context from the smallest that can train to the largest measured one, with a margin."""
    contexts = [_context_range(stage, before) for stage in measurements.stages]
    steps = ", ".join(
        f"{context} after {stage.after}" for stage, context in zip(measurements.stages, contexts, strict=True)
    )
    is_by_nvml = all(stage.process_mib is not None for stage in measurements.stages)
    by = "by NVML for the process" if is_by_nvml else "as the increase of the memory in use on the GPU"
    return _mib_bounds(
        min(context.min for context in contexts[FIRST_TRAINING_STAGE:]),
        max(context.max for context in contexts) + CONTEXT_MARGIN_MIB,
        f"measured {by}, {steps}; max includes {CONTEXT_MARGIN_MIB} for kernels loaded later",
    )


def _context_range(stage: MemoryStage, before: MiBRange) -> MiBRange:
    """Return the memory of the process outside torch's allocator."""
    if stage.process_mib is not None:
        low = high = stage.process_mib - stage.reserved_mib
    else:
        low, high = (stage.non_allocator_mib - others for others in (before.max, before.min))
    return MiBRange(max(0.0, low), max(0.0, high))


def _cudnn_bounds(measurements: GpuMeasurements, fallback: Bounds) -> Bounds:
    """Return the largest workspace per batch: its minimum and maximum over all batches.

    If the largest measured batch of a network has the largest workspace, a larger batch may need more: the
    maximum is then at least that of `fallback`.
    """
    by_network: dict[tuple[str, Precision], list[ConvWorkspace]] = {}
    workspaces = sorted(measurements.transients, key=attrgetter("mib"))
    for each in workspaces:
        by_network.setdefault((each.network, each.precision), []).append(each)
    if not by_network:
        return _unmeasured_bounds(fallback)
    smallest, largest = workspaces[0], workspaces[-1]
    sizes = {each.batch_size for each in workspaces}
    source = (
        f"measured, {smallest} to {largest}; forward and backward, batch sizes "
        f"{min(sizes)} to {max(sizes)}, train.deterministic={str(measurements.deterministic).lower()}"
    )
    max_mib = largest.mib
    if max_mib < fallback.max and any(map(_grows, by_network.values())):
        max_mib = fallback.max
        source += f"; still growing at the largest batch size, so max is not measured: {fallback.source}"
    return _mib_bounds(smallest.mib, max_mib, source)


def _grows(workspaces: Iterable[ConvWorkspace]) -> bool:
    """Return whether the largest batch of a network and precision has a larger workspace than the others."""
    *others, largest = sorted(workspaces, key=attrgetter("batch_size"))
    return bool(others) and largest.mib > max(each.mib for each in others)


def _speed_bounds(rounds: Iterable[TimingRound], precision: Precision, fallback: Bounds) -> Bounds:
    """Return the speed relative to fp32, from the slowest to the fastest round of all networks."""
    by_network: dict[str, list[float]] = {}
    for each in rounds:
        if precision in each.seconds:
            ratio = each.seconds["fp32"] / each.seconds[precision]
            by_network.setdefault(f"{each.network}, batch size {each.batch_size}", []).append(ratio)
    if not by_network:
        return _unmeasured_bounds(fallback)
    ranges = (f"{min(each):.2f} to {max(each):.2f} ({name})" for name, each in by_network.items())
    return Bounds(
        min=math.floor(min(map(min, by_network.values())) * 100) / 100,
        max=math.ceil(max(map(max, by_network.values())) * 100) / 100,
        source=f"measured in training steps, {'; '.join(ranges)}",
    )


def _unmeasured_bounds(fallback: Bounds) -> Bounds:
    return replace(fallback, source=f"not measured, because it failed or was disturbed; {fallback.source}")
