"""Replay a trace and its workspaces on the model of the allocator, with or without a limit."""

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from captcha_exp.memory.allocator import (
    MIB,
    CachingAllocator,
    MemoryEvent,
    SimulatedOutOfMemoryError,
    Usage,
    replay_events,
)
from captcha_exp.memory.blocks import Block
from captcha_exp.memory.interval import MiBRange
from captcha_exp.memory.trace import Phase, Trace
from captcha_exp.memory.workspaces import Workspaces

_CUBLAS_ID, _CUDNN_ID = -1, -2  # of workspaces; tensor IDs start at 1


PhasePeaks: TypeAlias = Mapping[str, Usage]  # phase -> peak of each sum


class TraceReplayer:
    """Replays one trace, and caches the peaks without a limit."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._unlimited: dict[tuple[Workspaces, bool], PhasePeaks] = {}

    def peaks(self, workspaces: Workspaces, limit_mib: float | None) -> PhasePeaks | None:
        """Return the peaks of each phase; None if the memory does not suffice.

        A limit that is never reached changes nothing; one below tensors and workspaces is never enough.
        """
        key = workspaces, uses_expandable_segments()
        if key not in self._unlimited:
            unlimited = replay_trace(self.trace, workspaces)
            assert unlimited is not None
            self._unlimited[key] = unlimited
        peaks = self._unlimited[key]
        if limit_mib is None or max(usage.reserved_bytes for usage in peaks.values()) <= int(limit_mib * MIB):
            return peaks
        if max(usage.requested_bytes for usage in peaks.values()) > limit_mib * MIB:
            return None
        return replay_trace(self.trace, workspaces, limit_mib)


def replay_trace(trace: Trace, workspaces: Workspaces, limit_mib: float | None = None) -> PhasePeaks | None:
    """Return the peaks of each phase; None if the memory does not suffice."""
    if limit_mib is not None and limit_mib <= 0:
        return None
    limit_bytes = None if limit_mib is None else int(limit_mib * MIB)
    allocator = CachingAllocator(limit_bytes, uses_expandable_segments(), downward=workspaces.downward)
    live: dict[int, Block] = {}
    peaks = {}
    try:
        for phase in trace.phases:
            allocator.reset_peaks()
            peaks[phase.name] = replay_events(phase_events(trace, phase, workspaces), allocator, live)
    except SimulatedOutOfMemoryError:
        return None
    return peaks


def phase_events(trace: Trace, phase: Phase, workspaces: Workspaces) -> list[MemoryEvent]:
    """Return the events of a phase, including those of the workspaces."""
    result = []
    if phase.name == "epoch 1: step 1":
        result.append(MemoryEvent(_CUBLAS_ID, workspaces.cublas_bytes))
    begin, events = phase.begin, trace.events
    first = bisect_right(trace.convolutions, phase.begin, key=lambda each: each.event_index)
    for convolution in trace.convolutions[first:]:
        if convolution.event_index > phase.end:
            break
        result += events[begin : convolution.event_index]
        result += (
            MemoryEvent(_CUDNN_ID, workspaces.conv_workspace_bytes(convolution)),
            MemoryEvent(_CUDNN_ID, None),
        )
        begin = convolution.event_index
    result += events[begin : phase.end]
    return result


def uses_expandable_segments() -> bool:
    """Return whether the environment enables this option of torch's allocator."""
    options = (os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return any("expandable_segments:true" in text.replace(" ", "").lower() for text in options)


def peak_range(replays: Sequence[PhasePeaks], field: str) -> MiBRange:
    """Return the range in MiB of the peaks over all replays."""
    values = [max(getattr(usage, field) for usage in peaks.values()) / MIB for peaks in replays]
    return MiBRange(min(values), max(values))
