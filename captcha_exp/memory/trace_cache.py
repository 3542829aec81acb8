"""Cache the traces of one config by batch size, and share them between several GPUs.

A trace does not depend on the GPU. If the traces of two batch sizes have the same events, every size between
them is a linear function of the batch size, because the batch size occurs at most once in the shape of a
tensor. Traces in between are then interpolated, once a third trace has confirmed the line to the byte. A step
with micro-batches, or a batch so large that an epoch has fewer steps than are traced, is always traced.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, lru_cache

from captcha_exp.memory.allocator import MemoryEvent
from captcha_exp.memory.trace import NUM_FIRST_EPOCH_STEPS, Trace, compute_phases

MIN_BATCH_SIZE = 2  # the strides of a single image are ambiguous
MAX_INTERPOLATED = 32  # traces kept: about 1 MB each
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
        self._interpolate = lru_cache(MAX_INTERPOLATED)(self._interpolate_between_ends)

    def trace(self, batch_size: int) -> Trace:
        """Return the trace of a batch size."""
        if batch_size not in self._traced:
            self._traced[batch_size] = self._tracer(batch_size)
        return self._traced[batch_size]

    def trace_or_interpolate(self, batch_size: int) -> Trace:
        """Return the same trace, interpolated from those of other batch sizes if that is exact."""
        is_inside = MIN_BATCH_SIZE <= batch_size <= self._max_interpolated_size
        if batch_size in self._traced or not is_inside or not self.can_interpolate:
            return self.trace(batch_size)
        return self._interpolate(batch_size)

    @cached_property
    def can_interpolate(self) -> bool:
        """Whether `trace_or_interpolate` can interpolate; the first access makes three traces."""
        largest = self._max_interpolated_size
        if largest < MIN_INTERPOLATION_LIMIT:
            return False
        middle = next((size for size in self._traced if MIN_BATCH_SIZE < size < largest), largest // 3)
        ends = self.trace(MIN_BATCH_SIZE), self.trace(largest)
        one, other = ([(tensor, size is None) for tensor, size in each.events] for each in ends)
        if one != other or len(ends[0].convolutions) != len(ends[1].convolutions):
            return False
        return all(self._interpolate_between_ends(size) == self.trace(size) for size in (largest, middle))

    def _interpolate_between_ends(self, batch_size: int) -> Trace:
        """Return the trace on the line through those of the smallest and the largest size."""
        low, high = self.trace(MIN_BATCH_SIZE), self.trace(self._max_interpolated_size)
        images, extra = self._max_interpolated_size - MIN_BATCH_SIZE, batch_size - MIN_BATCH_SIZE

        def interpolate(small: int, large: int) -> int:
            return small + (large - small) // images * extra

        events = [  # the size of an event that grows is not None
            one if one == other else MemoryEvent(one.tensor_id, interpolate(one[1] or 0, other[1] or 0))
            for one, other in zip(low.events, high.events, strict=True)
        ]
        convolutions = [
            one._replace(fp32_bytes=interpolate(one.fp32_bytes, other.fp32_bytes))
            for one, other in zip(low.convolutions, high.convolutions, strict=True)
        ]
        phases = compute_phases(events, [(phase.name, phase.begin) for phase in low.phases])
        return replace(low, events=events, phases=phases, convolutions=convolutions)
