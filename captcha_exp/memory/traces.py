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

from captcha_exp.memory.allocator import Event
from captcha_exp.memory.fake_device import Convolution
from captcha_exp.memory.trace import FIRST_STEPS, Phase, Trace

MIN_BATCH = 2  # the strides of a single image are ambiguous
MAX_CALCULATED = 32  # traces kept: about 0.5 MB each
MIN_CHECKED = 64  # images: below it a straight line saves no trace


class Traces:
    """Return the trace of a batch size, from memory where possible."""

    def __init__(self, tracer: Callable[[int], Trace], train_images: int, in_parts: bool) -> None:
        """`tracer` traces one batch size; `in_parts`: a step has several micro-batches."""
        self._tracer = tracer
        self._known: dict[int, Trace] = {}
        self._most = 0 if in_parts else train_images // FIRST_STEPS
        self._line: _Line | None = None
        self._line_tried = False
        self._calculated: OrderedDict[int, Trace] = OrderedDict()  # the last ones that were used

    def at(self, batch_size: int) -> Trace:
        """Return the trace of the training itself."""
        if batch_size not in self._known:
            self._known[batch_size] = self._tracer(batch_size)
        return self._known[batch_size]

    def near(self, batch_size: int) -> Trace:
        """Return an equal trace, calculated from those of other batch sizes where that is exact."""
        if batch_size in self._known:
            return self._known[batch_size]
        if not MIN_BATCH <= batch_size <= self._most or not self.calculates():
            return self.at(batch_size)
        assert self._line is not None
        if batch_size not in self._calculated:
            self._calculated[batch_size] = self._line.at(batch_size)
            if len(self._calculated) > MAX_CALCULATED:
                self._calculated.popitem(last=False)
        self._calculated.move_to_end(batch_size)
        return self._calculated[batch_size]

    def calculates(self) -> bool:
        """Return whether `near` calculates instead of tracing, once three traces have been made."""
        if not self._line_tried:
            self._line_tried = True
            self._line = self._checked_line() if self._most >= MIN_CHECKED else None
        return self._line is not None

    def _checked_line(self) -> "_Line | None":
        """Return the line through the two ends if a trace between them lies on it."""
        inside = [size for size in self._known if MIN_BATCH < size < self._most]
        middle = inside[0] if inside else self._most // 3
        low, high = self.at(MIN_BATCH), self.at(self._most)
        if not _same_events(low, high):
            return None
        line = _Line.through(MIN_BATCH, low, self._most, high)
        return line if line is not None and line.at(middle) == self.at(middle) else None


class _Line:
    """Traces with the same events, whose bytes grow in a straight line."""

    def __init__(self, traced: Trace, events: list[tuple[int, int, int, int]], slopes: list[int], size: int):
        """`events` are those that grow: index, tensor, bytes at `size`, bytes for each image."""
        self._traced, self._events, self._slopes, self._size = traced, events, slopes, size
        self._deltas, self._growth = _deltas(traced.events, events)

    @classmethod
    def through(cls, size: int, low: Trace, other_size: int, high: Trace) -> "_Line | None":
        """Return the line through two traces with the same events; None if bytes are not whole numbers."""
        images = other_size - size
        growing, rests = [], 0
        for index, (one, other) in enumerate(zip(low.events, high.events, strict=True)):
            if one != other:
                assert one.requested_bytes is not None
                assert other.requested_bytes is not None
                slope, rest = divmod(other.requested_bytes - one.requested_bytes, images)
                growing.append((index, one.tensor, one.requested_bytes, slope))
                rests += rest
        slopes = []
        for before, after in zip(low.convolutions, high.convolutions, strict=True):
            slope, rest = divmod(after.fp32_bytes - before.fp32_bytes, images)
            slopes.append(slope)
            rests += rest
        return None if rests else cls(low, growing, slopes, size)

    def at(self, batch_size: int) -> Trace:
        """Return the trace of this batch size."""
        traced, more = self._traced, batch_size - self._size
        events = traced.events.copy()
        for index, tensor, requested_bytes, slope in self._events:
            events[index] = Event(tensor, requested_bytes + slope * more)
        return Trace(
            events,
            self._phases(more),
            [
                Convolution(each.place, each.fp32_bytes + slope * more)
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
        for name, begin, end, _ in self._traced.phases:
            peak = int(in_use[max(begin - 1, 0) : end].max(initial=0))
            found.append(Phase(name, begin, end, peak))
        return found


def _deltas(
    events: Sequence[Event], growing: Sequence[tuple[int, int, int, int]]
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


def _same_events(one: Trace, other: Trace) -> bool:
    """Return whether two traces differ in numbers of bytes alone."""
    return (
        _shape(one.events) == _shape(other.events)
        and [phase[:3] for phase in one.phases] == [phase[:3] for phase in other.phases]
        and [each.place for each in one.convolutions] == [each.place for each in other.convolutions]
        and one.parameters_bytes == other.parameters_bytes
        and one.buffers_bytes == other.buffers_bytes
        and one.optimizer_bytes == other.optimizer_bytes
        and one.resident_bytes == other.resident_bytes
    )


def _shape(events: Sequence[Event]) -> list[tuple[int, bool]]:
    """Return for each event its tensor and whether it is freed."""
    return [(event.tensor, event.requested_bytes is None) for event in events]
