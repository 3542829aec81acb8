"""A model of torch's CUDA caching allocator: how many bytes it allocates and reserves, without a GPU.

A GPU needs more than the sum of the tensors: sizes are rounded, memory comes from the driver in segments, and
a free block of a segment can only hold what fits into it. The rules are torch's.

Source: pytorch, torch 2.10 to 2.13, c10/cuda/CUDACachingAllocator.cpp (class DeviceCachingAllocator) and
c10/core/AllocatorConfig.h. The names in the comments below are those of that source.

Not modeled, because no training of this project uses it: further streams (so `active_bytes` is
`allocated_bytes`); the private pools of CUDA graphs and of MemPool; max_split_size_mb,
roundup_power2_divisions, large_segment_size_mb and garbage_collection_threshold, which are off by default.
Not modeled, because it bypasses the allocator: the CUDA context, memory that libraries allocate themselves,
other programs; subtract these from the limit. Workspaces that torch allocates for cuBLAS and cuDNN are events
like tensors.

The addresses that the driver chooses are unknown. They matter between free blocks of equal size, of which the
lowest is used. On an H200 most new segments were below the earlier ones and some filled holes above them.
Replayed with each segment below, the recorded events reserve what the GPU reserved, to the byte; with each
above, 5.2 % less (tests/benchmarks/test_recorded_gpu.py). So downward is the default, and plans replay both.
The limit is the memory of the driver, to the byte. `set_per_process_memory_fraction` sets the same limit, but
with expandable segments torch compares it with the request instead of the pages: it may be exceeded by less
than a page, or be reached although free pages would suffice.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import NamedTuple

from captcha_exp.memory.blocks import Block, Pool

MIB = 2**20
MIN_BLOCK_BYTES = 512  # kMinBlockSize: sizes are multiples of it
SMALL_BYTES = 1 * MIB  # kSmallSize: the largest size of the small pool
SMALL_SEGMENT_BYTES = 2 * MIB  # kSmallBuffer: segments and pages of the small pool
MIN_LARGE_BYTES = 10 * MIB  # kMinLargeAlloc: the smallest size with a segment of its own
LARGE_SEGMENT_BYTES = 20 * MIB  # large_segment_size(), once kLargeBuffer: shared segments; pages
ROUND_LARGE_BYTES = 2 * MIB  # kRoundLarge: segments of their own are multiples of it


class MemoryEvent(NamedTuple):
    """An allocation or a deallocation."""

    tensor_id: int
    requested_bytes: int | None  # None: freed


class Usage(NamedTuple):
    """Sums of `torch.cuda.memory_stats`, with the same names."""

    requested_bytes: int  # the sizes of the requests
    allocated_bytes: int  # the blocks of the requests: `torch.cuda.memory_allocated`
    reserved_bytes: int  # segments from the driver: `torch.cuda.memory_reserved`


class SimulatedOutOfMemoryError(Exception):
    """The driver has too little memory, even after all free segments were returned to it."""


class CachingAllocator:
    """The allocator of one GPU, for one stream."""

    def __init__(
        self,
        limit_bytes: int | None = None,
        expandable: bool = False,
        *,
        downward: bool = True,
        addresses: Iterable[int] = (),
    ) -> None:
        """Create an allocator with the memory of the driver; `expandable` is torch's expandable_segments.

        A new segment is placed below all earlier ones of its pool if `downward`, else above them. `addresses`
        are those of the first segments, if known. Expandable segments use neither.
        """
        self.limit_bytes = limit_bytes
        self.expandable = expandable
        self._addresses = iter(addresses)
        # should_split. Addresses are far apart, and begin at a page of either size.
        min_remainder = MIN_BLOCK_BYTES if expandable else SMALL_BYTES + 1
        small, large = LARGE_SEGMENT_BYTES << 40, LARGE_SEGMENT_BYTES << 41
        self._small = Pool(SMALL_SEGMENT_BYTES, MIN_BLOCK_BYTES, small, expandable, downward)
        self._large = Pool(LARGE_SEGMENT_BYTES, min_remainder, large, expandable, downward)
        self._requested = self._allocated = self._reserved = 0
        self.num_alloc_retries = 0  # flushes of the cache because the driver had too little
        self.reset_peaks()

    @property
    def usage(self) -> Usage:
        """Return the current usage."""
        return Usage(self._requested, self._allocated, self._reserved)

    @property
    def peak(self) -> Usage:
        """Return the maximum of each sum since the last reset, maybe at different moments."""
        return Usage(self._max_requested, self._max_allocated, self._max_reserved)

    def reset_peaks(self) -> None:
        """Reset the peaks to the current usage, as `torch.cuda.reset_peak_memory_stats`."""
        self._max_requested, self._max_allocated, self._max_reserved = self.usage

    def allocate(self, requested_bytes: int) -> Block:
        """Return a block that holds this many bytes. Source: malloc.

        A block of 0 bytes is in no segment, because torch does not request it from the allocator.

        Raises:
            SimulatedOutOfMemoryError: the limit is reached.
        """
        if requested_bytes == 0:
            return Block(self._small, 0, 0)
        size = -(-requested_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES  # round_size
        pool = self._small if size <= SMALL_BYTES else self._large
        free = pool.free_blocks
        index = bisect_left(free, (size,))
        if index == len(free):
            block = self._allocate_from_driver(pool, size)
        else:
            if self.expandable:
                index = pool.best_fit_index(index)
            block = free.pop(index)[2]
        if block.size_bytes - size >= pool.min_remainder_bytes:
            remainder = block.split(size)
            insort(free, (remainder.size_bytes, remainder.address, remainder))
        block.allocated = True
        block.requested_bytes = requested_bytes
        self._requested += requested_bytes
        self._allocated += block.size_bytes
        if self._requested > self._max_requested:
            self._max_requested = self._requested
        if self._allocated > self._max_allocated:
            self._max_allocated = self._allocated
        return block

    def free(self, block: Block) -> None:
        """Return a block to its pool, not to the driver. Source: free_block."""
        if block.size_bytes == 0:
            return
        self._requested -= block.requested_bytes
        self._allocated -= block.size_bytes
        block.allocated = False
        block.requested_bytes = 0
        block.pool.add(block)

    def empty_cache(self) -> None:
        """Return free segments, or free pages, to the driver, as `torch.cuda.empty_cache`.

        Source: release_cached_blocks, release_blocks.
        """
        for pool in (self._large, self._small):
            for size, address, block in pool.free_blocks.copy():
                if self.expandable:
                    size = pool.unmap_block(block)
                elif block.prev is None and block.next is None:
                    pool.remove(block)
                    del pool.first_blocks[address]
                else:
                    continue
                self._reserved -= size

    def _allocate_from_driver(self, pool: Pool, size: int) -> Block:
        """Return a block with memory from the driver, after a flush of the cache if needed. Source: malloc.

        torch does not search the pool again after the flush, in which no free block has grown.
        release_available_cached_blocks, called before it, does nothing without max_split_size_mb.
        """
        from_driver = self._expand_segment if self.expandable else self._new_segment
        block = from_driver(pool, size)
        if block is None:
            self.empty_cache()
            self.num_alloc_retries += 1
            block = from_driver(pool, size)
        if block is None:
            needed = f"{segment_bytes(size)} bytes from the driver"
            raise SimulatedOutOfMemoryError(f"{needed}; {self._reserved} of {self.limit_bytes} are reserved")
        return block

    def _new_segment(self, pool: Pool, size: int) -> Block | None:
        """Return a new segment for this size; None if out of memory. Source: alloc_block."""
        size = segment_bytes(size)
        return pool.new_segment(size, next(self._addresses, None)) if self._try_reserve(size) else None

    def _expand_segment(self, pool: Pool, size: int) -> Block | None:
        """Return the lowest range with space for this size, its holes mapped; None if out of memory.

        Pages that were mapped before the driver ran out of memory stay in the pool.

        Source: try_allocate_expandable_block.
        """
        block = pool.find_expandable_block(size)
        while not block.mapped or block.size_bytes < size:
            hole, missing = (block.next, size - block.size_bytes) if block.mapped else (block, size)
            assert hole is not None
            pages_bytes = -(-min(missing, hole.size_bytes) // pool.page_bytes) * pool.page_bytes
            if not self._try_reserve(pages_bytes):
                return None
            block = pool.map_block(hole, pages_bytes)
        pool.remove(block)
        return block

    def _try_reserve(self, new_bytes: int) -> bool:
        """Reserve memory of the driver; return whether it had enough."""
        if self.limit_bytes is not None and self._reserved + new_bytes > self.limit_bytes:
            return False
        self._reserved += new_bytes
        self._max_reserved = max(self._max_reserved, self._reserved)
        return True


def segment_bytes(size: int) -> int:
    """Return the bytes to request from the driver if no free block fits. Source: get_allocation_size."""
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MIN_LARGE_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


def replay_events(
    events: Iterable[MemoryEvent], allocator: CachingAllocator, live_blocks: dict[int, Block]
) -> Usage:
    """Replay events and return the peaks. `live_blocks`, the block of each live tensor, is updated.

    Raises:
        SimulatedOutOfMemoryError: the limit is reached, at the event where a GPU would run out of memory.
    """
    allocate, free, pop = allocator.allocate, allocator.free, live_blocks.pop
    for tensor, requested_bytes in events:
        if requested_bytes is None:
            free(pop(tensor))
        elif tensor in live_blocks:
            raise ValueError(f"tensor {tensor} is allocated twice")
        else:
            live_blocks[tensor] = allocate(requested_bytes)
    return allocator.peak
