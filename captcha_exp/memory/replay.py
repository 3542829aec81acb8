"""Replay a trace on the model of the allocator, for each scenario of what a trace does not show.

These are the workspaces of cuBLAS and cuDNN and the addresses of new segments. The GPU's file has bounds for
the workspaces, which the libraries request from torch's allocator, like tensors.
"""

import os
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from captcha_exp.config import Bounds, GpuSpec
from captcha_exp.memory.allocator import (
    MIB,
    CachingAllocator,
    SimulatedOutOfMemoryError,
    Usage,
    replay_events,
)
from captcha_exp.memory.blocks import Block
from captcha_exp.memory.fake_device import Convolution
from captcha_exp.memory.interval import MiBRange
from captcha_exp.memory.trace import Trace

CONV_WORKSPACE_FACTOR = 4  # times the tensors of a convolution: above Winograd's transforms, an estimate
WORKSPACE_FRACTIONS = (0.0, 0.25, 0.5, 1.0)  # between minimum and maximum, each replayed downward

PhasePeaks: TypeAlias = Mapping[str, Usage]  # phase -> peak of each sum


class Scenario(NamedTuple):
    """Workspaces that libraries request from torch's allocator, and how it places its segments."""

    cublas_bytes: int  # from the first step on
    cudnn_bytes: int  # at most, while a convolution runs
    expandable: bool  # this and the next as in CachingAllocator
    downward: bool = True

    def conv_workspace_bytes(self, convolution: Convolution) -> int:
        """Return the workspace of this convolution."""
        return min(self.cudnn_bytes, CONV_WORKSPACE_FACTOR * convolution.fp32_bytes)

    def max_workspace_mib(self, trace: Trace) -> float:
        """Return the maximum MiB in use at one time."""
        return (self.cublas_bytes + max(map(self.conv_workspace_bytes, trace.convolutions), default=0)) / MIB


def list_scenarios(gpu: GpuSpec) -> list[Scenario]:
    """Return the scenarios to replay, from the smallest to the largest; these two also with segments upward.

    The reserved memory is not monotonic in the workspace, and depends on the order of the segments.
    """
    expandable = uses_expandable_segments()

    def interpolate(bounds: Bounds, fraction: float) -> int:
        return int((bounds.min + fraction * (bounds.max - bounds.min)) * MIB)

    cublas, cudnn = gpu.cublas_workspace_mib, gpu.cudnn_workspace_mib
    scenarios = [
        Scenario(interpolate(cublas, fraction), interpolate(cudnn, fraction), expandable)
        for fraction in WORKSPACE_FRACTIONS
    ]
    smallest, largest = (each._replace(downward=False) for each in (scenarios[0], scenarios[-1]))
    return [smallest, *scenarios[:-1], largest, scenarios[-1]]


def uses_expandable_segments() -> bool:
    """Return whether the environment enables this option of torch's allocator."""
    options = (os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return any("expandable_segments:true" in text.replace(" ", "").lower() for text in options)


def replay_trace(trace: Trace, scenario: Scenario, limit_mib: float | None = None) -> PhasePeaks | None:
    """Return the peaks of each phase; None if the memory does not suffice."""
    limit_bytes = None if limit_mib is None else int(limit_mib * MIB)
    allocator = CachingAllocator(limit_bytes, scenario.expandable, downward=scenario.downward)
    live: dict[int, Block] = {}
    convolutions = deque(trace.convolutions)
    peaks = {}
    try:
        for phase in trace.phases:
            allocator.reset_peaks()
            if phase.name == "epoch 1: step 1":
                allocator.allocate(scenario.cublas_bytes)
            begin = phase.begin
            while convolutions and convolutions[0].event_index <= phase.end:
                convolution = convolutions.popleft()
                replay_events(trace.events[begin : convolution.event_index], allocator, live)
                allocator.free(allocator.allocate(scenario.conv_workspace_bytes(convolution)))
                begin = convolution.event_index
            peaks[phase.name] = replay_events(trace.events[begin : phase.end], allocator, live)
    except SimulatedOutOfMemoryError:
        return None
    return peaks


def peak_range(replays: Sequence[PhasePeaks], field: str) -> MiBRange:
    """Return the range in MiB of the peaks over all replays; 0 without phases."""
    values = [max((getattr(usage, field) for usage in peaks.values()), default=0) / MIB for peaks in replays]
    return MiBRange(min(values), max(values))
