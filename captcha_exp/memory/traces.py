"""Keep the traces of one config, so that no batch size is traced twice and several GPUs share them.

A trace does not depend on the GPU. Between two batch sizes whose traces have the same events, every number of
bytes is a straight line of the batch size: the batch is one factor of a tensor's size, or none. A trace in
between then needs no tracing. This is used only after a third trace has confirmed it to the byte; a
micro-batch, or a batch that fills fewer than the traced steps, is always traced.
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
MIN_INTERPOLATION_LIMIT = 64  # images: below it a straight line saves no trace


class TraceCache:
    """Return the trace of a batch size, from memory where possible."""

    def __init__(
        self, tracer: Callable[[int], Trace], num_train_images: int, uses_micro_batches: bool
    ) -> None:
        """`tracer` traces one batch size; `in_parts`: a step has several micro-batches."""
        self._tracer = tracer
        self._traced: dict[int, Trace] = {}
        self._max_interpolated_size = 0 if uses_micro_batches else num_train_images // NUM_FIRST_EPOCH_STEPS
        self._line_model: _LinearTraceModel | None = None
        self._is_line_checked = False
        self._interpolated: OrderedDict[int, Trace] = OrderedDict()  # the last ones that were used

    def trace(self, batch_size: int) -> Trace:
        """Return the trace of the training itself."""
        if batch_size not in self._traced:
            self._traced[batch_size] = self._tracer(batch_size)
        return self._traced[batch_size]

    def trace_or_interpolate(self, batch_size: int) -> Trace:
        """Return an equal trace, calculated from those of other batch sizes where that is exact."""
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
        """Return whether `near` calculates instead of tracing, once three traces have been made."""
        if not self._is_line_checked:
            self._is_line_checked = True
            self._line_model = (
                self._fit_and_check_line() if self._max_interpolated_size >= MIN_INTERPOLATION_LIMIT else None
            )
        return self._line_model is not None

    def _fit_and_check_line(self) -> "_LinearTraceModel | None":
        """Return the line through the two ends if a trace between them lies on it."""
        inside = [size for size in self._traced if MIN_BATCH_SIZE < size < self._max_interpolated_size]
        middle = inside[0] if inside else self._max_interpolated_size // 3
        low, high = self.trace(MIN_BATCH_SIZE), self.trace(self._max_interpolated_size)
        if not _have_same_events(low, high):
            return None
        line = _LinearTraceModel.fit(MIN_BATCH_SIZE, low, self._max_interpolated_size, high)
        return line if line is not None and line.predict(middle) == self.trace(middle) else None


class _LinearTraceModel:
    """Traces with the same events, whose bytes grow in a straight line."""

    def __init__(self, trace: Trace, events: list[tuple[int, int, int, int]], slopes: list[int], size: int):
        """`events` are those that grow: index, tensor, bytes at `size`, bytes for each image."""
        self._trace, self._events, self._slopes, self._size = trace, events, slopes, size
        self._deltas, self._growth = _deltas(trace.events, events)

    @classmethod
    def fit(cls, size: int, low: Trace, other_size: int, high: Trace) -> "_LinearTraceModel | None":
        """Return the line through two traces with the same events; None if bytes are not whole numbers."""
        images = other_size - size
        growing, rests = [], 0
        for index, (one, other) in enumerate(zip(low.events, high.events, strict=True)):
            if one != other:
                assert one.requested_bytes is not None
                assert other.requested_bytes is not None
                slope, rest = divmod(other.requested_bytes - one.requested_bytes, images)
                growing.append((index, one.tensor_id, one.requested_bytes, slope))
                rests += rest
        slopes = []
        for before, after in zip(low.convolutions, high.convolutions, strict=True):
            slope, rest = divmod(after.fp32_bytes - before.fp32_bytes, images)
            slopes.append(slope)
            rests += rest
        return None if rests else cls(low, growing, slopes, size)

    def predict(self, batch_size: int) -> Trace:
        """Return the trace of this batch size."""
        traced, more = self._trace, batch_size - self._size
        events = traced.events.copy()
        for index, tensor, requested_bytes, slope in self._events:
            events[index] = MemoryEvent(tensor, requested_bytes + slope * more)
        return Trace(
            events,
            self._phases(more),
            [
                Convolution(each.event_index, each.fp32_bytes + slope * more)
                for each, slope in zip(traced.convolutions, self._slopes, strict=True)
            ],
            traced.parameters_bytes,
            traced.buffers_bytes,
            traced.optimizer_bytes,
            traced.resident_bytes,
        )

    def _phases(self, more: int) -> list[Phase]:
        """Return the phases of a batch with this many images more; `phases_of` in one pass of NumPy."""
        in_use = np.cumsum(self._deltas + self._growth * more)
        found = []
        for name, begin, end, _ in self._trace.phases:
            peak = int(in_use[max(begin - 1, 0) : end].max(initial=0))
            found.append(Phase(name, begin, end, peak))
        return found


def _deltas(
    events: Sequence[MemoryEvent], growing: Sequence[tuple[int, int, int, int]]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the bytes (E,) that each event adds to the memory in use, and their growth (E,) per image."""
    deltas, growth = np.zeros(len(events), np.int64), np.zeros(len(events), np.int64)
    for index, _, _, slope in growing:
        growth[index] = slope
    begun: dict[int, int] = {}  # tensor -> event
    for index, (tensor, requested_bytes) in enumerate(events):
        if requested_bytes is None:
            begin = begun.pop(tensor)
            deltas[index], growth[index] = -deltas[begin], -growth[begin]
        else:
            begun[tensor] = index
            deltas[index] = requested_bytes
    return deltas, growth


def _have_same_events(one: Trace, other: Trace) -> bool:
    """Return whether two traces differ in numbers of bytes alone."""
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
    """Return for each event its tensor and whether it is freed."""
    return [(event.tensor_id, event.requested_bytes is None) for event in events]
