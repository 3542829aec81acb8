"""Replay a trace with its workspaces through the model of the allocator, with or without a limit."""

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from captcha_exp.memory.allocator import MIB, CachingAllocator, Event, OutOfMemory, Usage, replay
from captcha_exp.memory.blocks import Block
from captcha_exp.memory.interval import Between
from captcha_exp.memory.trace import Phase, Trace
from captcha_exp.memory.workspaces import Workspaces

_CUBLAS, _CUDNN = -1, -2  # workspaces among the events, where tensors count from 1


Peaks: TypeAlias = Mapping[str, Usage]  # phase -> peak of each sum


class Plays:
    """Replay one trace; without a limit each workspace is replayed once."""

    def __init__(self, traced: Trace) -> None:
        self.traced = traced
        self._unlimited: dict[tuple[Workspaces, bool], Peaks] = {}

    def peaks(self, workspaces: Workspaces, limit_mib: float | None) -> Peaks | None:
        """Return the peaks as `play` does.

        A limit that is never met changes nothing; one below the tensors and workspaces cannot do.
        """
        key = workspaces, expandable_segments()
        if key not in self._unlimited:
            played = play(self.traced, workspaces)
            assert played is not None
            self._unlimited[key] = played
        peaks = self._unlimited[key]
        if limit_mib is None or max(usage.reserved_bytes for usage in peaks.values()) <= int(limit_mib * MIB):
            return peaks
        if max(usage.requested_bytes for usage in peaks.values()) > limit_mib * MIB:
            return None
        return play(self.traced, workspaces, limit_mib)


def play(traced: Trace, workspaces: Workspaces, limit_mib: float | None = None) -> Peaks | None:
    """Return the peaks of each phase; None if the memory does not suffice."""
    if limit_mib is not None and limit_mib <= 0:
        return None
    limit_bytes = None if limit_mib is None else int(limit_mib * MIB)
    allocator = CachingAllocator(limit_bytes, expandable_segments(), downward=workspaces.downward)
    live: dict[int, Block] = {}
    peaks = {}
    try:
        for phase in traced.phases:
            allocator.reset_peaks()
            peaks[phase.name] = replay(events_of(traced, phase, workspaces), allocator, live)
    except OutOfMemory:
        return None
    return peaks


def events_of(traced: Trace, phase: Phase, workspaces: Workspaces) -> list[Event]:
    """Return the events of a phase, with those of the workspaces."""
    found = []
    if phase.name == "epoch 1: step 1":
        found.append(Event(_CUBLAS, workspaces.cublas_bytes))
    begin, events = phase.begin, traced.events
    first = bisect_right(traced.convolutions, phase.begin, key=lambda each: each.place)
    for convolution in traced.convolutions[first:]:
        if convolution.place > phase.end:
            break
        found += events[begin : convolution.place]
        found += (Event(_CUDNN, workspaces.of(convolution)), Event(_CUDNN, None))
        begin = convolution.place
    found += events[begin : phase.end]
    return found


def expandable_segments() -> bool:
    """Return whether the environment enables this option of torch's allocator."""
    asked = (os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return any("expandable_segments:true" in text.replace(" ", "").lower() for text in asked)


def bounds_of(played: Sequence[Peaks], what: str) -> Between:
    """Return the bounds in MiB of the peaks over all plays."""
    found = [max(getattr(usage, what) for usage in peaks.values()) / MIB for peaks in played]
    return Between(min(found), max(found))
