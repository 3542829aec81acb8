"""Cache the traces of one config by batch size, and share them between several GPUs.

A trace does not depend on the GPU. If the traces of two batch sizes have the same events, every size between
them is a linear function of the batch size, because the batch size occurs at most once in the shape of a
tensor. Traces in between are then interpolated, once a third trace has confirmed the line to the byte. A step
with micro-batches, or a batch so large that an epoch has fewer steps than are traced, is always traced.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from captcha_exp.memory.allocator import MemoryEvent
from captcha_exp.memory.fake_device import Convolution
from captcha_exp.memory.trace import NUM_FIRST_EPOCH_STEPS, Phase, Trace

MIN_BATCH_SIZE = 2  # the strides of a single image are ambiguous
MAX_INTERPOLATED = 32  # traces kept: about 0.5 MB each
MIN_INTERPOLATION_LIMIT = 64  # images: below it interpolation saves no trace


class TraceCache:
    """Cache of the traces of one config."""

    def __init__(
        self, tracer: Callable[[int], Trace], num_train_images: int, uses_micro_batches: bool
    ) -> None:
        """`tracer` traces one batch size; `uses_micro_batches`: a step may have several micro-batches."""
        self._tracer = tracer
        self._traced: dict[int, Trace] = {}
        self._max_interpolated_size = 0 if uses_micro_batches else num_train_images // NUM_FIRST_EPOCH_STEPS
        self._line_model: _LinearTraceModel | None = None
        self._is_line_checked = False
        self._interpolated: OrderedDict[int, Trace] = OrderedDict()  # the most recently used

    def trace(self, batch_size: int) -> Trace:
        """Return the trace of a batch size."""
        if batch_size not in self._traced:
            self._traced[batch_size] = self._tracer(batch_size)
        return self._traced[batch_size]

    def trace_or_interpolate(self, batch_size: int) -> Trace:
        """Return the same trace, interpolated from those of other batch sizes if that is exact."""
        if batch_size in self._traced:
            return self._traced[batch_size]
        if not MIN_BATCH_SIZE <= batch_size <= self._max_interpolated_size or not self.can_interpolate():
            return self.trace(batch_size)
        assert self._line_model is not None
        if batch_size not in self._interpolated:
            self._interpolated[batch_size] = self._line_model.predict(batch_size)
            if len(self._interpolated) > MAX_INTERPOLATED:
                self._interpolated.popitem(last=False)
        self._interpolated.move_to_end(batch_size)
        return self._interpolated[batch_size]

    def can_interpolate(self) -> bool:
        """Return whether `trace_or_interpolate` can interpolate; the first call makes three traces."""
        if not self._is_line_checked:
            self._is_line_checked = True
            self._line_model = (
                self._fit_and_check_line() if self._max_interpolated_size >= MIN_INTERPOLATION_LIMIT else None
            )
        return self._line_model is not None

    def _fit_and_check_line(self) -> "_LinearTraceModel | None":
        """Return the line through the two ends if a trace between them confirms it."""
        inside = [size for size in self._traced if MIN_BATCH_SIZE < size < self._max_interpolated_size]
        middle = inside[0] if inside else self._max_interpolated_size // 3
        low, high = self.trace(MIN_BATCH_SIZE), self.trace(self._max_interpolated_size)
        if not _have_same_events(low, high):
            return None
        line = _LinearTraceModel.fit(MIN_BATCH_SIZE, low, self._max_interpolated_size, high)
        return line if line is not None and line.predict(middle) == self.trace(middle) else None


class _LinearTraceModel:
    """Traces with the same events, whose sizes are linear in the batch size."""

    def __init__(self, trace: Trace, events: list[tuple[int, int, int, int]], slopes: list[int], size: int):
        """`events` are those that grow: index, tensor ID, bytes at `size`, bytes per image."""
        self._trace, self._events, self._slopes, self._size = trace, events, slopes, size
        self._deltas, self._growth = _deltas(trace.events, events)

    @classmethod
    def fit(cls, size: int, low: Trace, other_size: int, high: Trace) -> "_LinearTraceModel | None":
        """Return the line through two traces with the same events; None if a slope is not an integer."""
        images = other_size - size
        growing, remainders = [], 0
        for index, (one, other) in enumerate(zip(low.events, high.events, strict=True)):
            if one != other:
                assert one.requested_bytes is not None
                assert other.requested_bytes is not None
                slope, remainder = divmod(other.requested_bytes - one.requested_bytes, images)
                growing.append((index, one.tensor_id, one.requested_bytes, slope))
                remainders += remainder
        slopes = []
        for small, large in zip(low.convolutions, high.convolutions, strict=True):
            slope, remainder = divmod(large.fp32_bytes - small.fp32_bytes, images)
            slopes.append(slope)
            remainders += remainder
        return None if remainders else cls(low, growing, slopes, size)

    def predict(self, batch_size: int) -> Trace:
        """Return the trace of this batch size."""
        traced, extra = self._trace, batch_size - self._size
        events = traced.events.copy()
        for index, tensor, requested_bytes, slope in self._events:
            events[index] = MemoryEvent(tensor, requested_bytes + slope * extra)
        return Trace(
            events,
            self._phases(extra),
            [
                Convolution(each.event_index, each.fp32_bytes + slope * extra)
                for each, slope in zip(traced.convolutions, self._slopes, strict=True)
            ],
            traced.parameters_bytes,
            traced.buffers_bytes,
            traced.optimizer_bytes,
            traced.resident_bytes,
        )

    def _phases(self, extra: int) -> list[Phase]:
        """Return the phases for this many additional images; a vectorized `compute_phases`."""
        in_use = np.cumsum(self._deltas + self._growth * extra)
        phases = []
        for name, begin, end, _ in self._trace.phases:
            peak = int(in_use[max(begin - 1, 0) : end].max(initial=0))
            phases.append(Phase(name, begin, end, peak))
        return phases


def _deltas(
    events: Sequence[MemoryEvent], growing: Sequence[tuple[int, int, int, int]]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the bytes (E,) that each event adds to the memory in use, and their growth (E,) per image."""
    deltas, growth = np.zeros(len(events), np.int64), np.zeros(len(events), np.int64)
    for index, _, _, slope in growing:
        growth[index] = slope
    allocated_at: dict[int, int] = {}  # tensor ID -> event index
    for index, (tensor, requested_bytes) in enumerate(events):
        if requested_bytes is None:
            begin = allocated_at.pop(tensor)
            deltas[index], growth[index] = -deltas[begin], -growth[begin]
        else:
            allocated_at[tensor] = index
            deltas[index] = requested_bytes
    return deltas, growth


def _have_same_events(one: Trace, other: Trace) -> bool:
    """Return whether two traces differ in sizes only."""
    return (
        _event_pattern(one.events) == _event_pattern(other.events)
        and [phase[:3] for phase in one.phases] == [phase[:3] for phase in other.phases]
        and [each.event_index for each in one.convolutions]
        == [each.event_index for each in other.convolutions]
        and one.parameters_bytes == other.parameters_bytes
        and one.buffers_bytes == other.buffers_bytes
        and one.optimizer_bytes == other.optimizer_bytes
        and one.resident_bytes == other.resident_bytes
    )


def _event_pattern(events: Sequence[MemoryEvent]) -> list[tuple[int, bool]]:
    """Return the tensor ID of each event and whether it is a deallocation."""
    return [(event.tensor_id, event.requested_bytes is None) for event in events]
