"""A model of torch's CUDA caching allocator: how many bytes it allocates and reserves, without a GPU.

A GPU needs more than the sum of the tensors: sizes are rounded, memory comes from the driver in
segments, and a free piece of a segment is of use only to who fits in. The rules are torch's.

Source: pytorch, torch 2.10 to 2.13, c10/cuda/CUDACachingAllocator.cpp (class DeviceCachingAllocator) and
c10/core/AllocatorConfig.h. The names at the rules below are the names there.

Left out, since no training of this project has it: further streams (so `active_bytes` is
`allocated_bytes`); the private pools of CUDA graphs and of MemPool; max_split_size_mb,
roundup_power2_divisions, large_segment_size_mb and garbage_collection_threshold, which are off unless
asked for. Left out, since it goes past the allocator: the CUDA context, what libraries take for
themselves, other programs; take that off the limit. Workspaces that torch allocates for cuBLAS and cuDNN
are events like tensors.

Unknown here are the addresses that the driver chooses, which matter between free blocks of equal size: the
lowest is taken. On an H200 most new segments lay below the earlier ones and some filled holes above them;
replayed with each below, the recorded events reserve what the GPU reserved, to the byte, and with each above
5.2 % less (tests/test_recorded_gpu.py). So downward is the default, and plans play both. The limit is what
the driver has, to the byte. A limit by `set_per_process_memory_fraction` is the same, but with expandable
segments torch holds it against the request and not the pages: it may be passed by less than a page, or be met
though free pages would do.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import NamedTuple

from captcha_exp.memory.blocks import Block, Pool

MIB = 2**20
MIN_BLOCK_BYTES = 512  # kMinBlockSize: sizes are multiples of it
SMALL_BYTES = 1 * MIB  # kSmallSize: the largest size of the small pool
SMALL_SEGMENT_BYTES = 2 * MIB  # kSmallBuffer: segments and pages of the small pool
MIN_LARGE_BYTES = 10 * MIB  # kMinLargeAlloc: the least size with a segment of its own
LARGE_SEGMENT_BYTES = 20 * MIB  # large_segment_size(), once kLargeBuffer: what smaller ones share; pages
ROUND_LARGE_BYTES = 2 * MIB  # kRoundLarge: segments of their own are multiples of it


class MemoryEvent(NamedTuple):
    """The memory of a tensor comes or goes."""

    tensor_id: int
    requested_bytes: int | None  # None: it is freed


class Usage(NamedTuple):
    """Sums of `torch.cuda.memory_stats`, under their names there."""

    requested_bytes: int  # what was asked for
    allocated_bytes: int  # what it took, in whole blocks: `torch.cuda.memory_allocated`
    reserved_bytes: int  # what the driver gave: `torch.cuda.memory_reserved`


class SimulatedOutOfMemoryError(Exception):
    """The driver has too little, even after it got back all that was wholly free."""

    def __init__(self, requested_bytes: int, tried_bytes: int, usage: Usage, limit_bytes: int) -> None:
        super().__init__(
            f"{requested_bytes} bytes need {tried_bytes} from the driver, which has given"
            f" {usage.reserved_bytes} ({usage.allocated_bytes} of them in use) of {limit_bytes}"
        )
        self.requested_bytes = requested_bytes
        self.tried_bytes = tried_bytes  # what torch's message says it tried to allocate
        self.usage = usage
        self.limit_bytes = limit_bytes


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
        """With what the driver has to give; `expandable` is torch's option expandable_segments.

        A new segment lies below all earlier ones of its pool if `downward`, else above them. `addresses` are
        those of the first segments, where they are known. Expandable segments use neither.
        """
        self.limit_bytes = limit_bytes
        self.expandable = expandable
        self._addresses = iter(addresses)
        # should_split. Addresses are far apart, and begin at a page of either size.
        least_rest = MIN_BLOCK_BYTES if expandable else SMALL_BYTES + 1
        small, large = LARGE_SEGMENT_BYTES << 40, LARGE_SEGMENT_BYTES << 41
        self._small = Pool(SMALL_SEGMENT_BYTES, MIN_BLOCK_BYTES, small, expandable, downward)
        self._large = Pool(LARGE_SEGMENT_BYTES, least_rest, large, expandable, downward)
        self._requested = self._allocated = self._reserved = 0
        self.num_device_alloc = 0  # as in torch.cuda.memory_stats: cudaMalloc, or mappings
        self.num_device_free = 0  # cudaFree, or unmappings
        self.num_alloc_retries = 0  # flushes of the cache, since the driver had too little
        self.num_ooms = 0
        self.reset_peaks()

    @property
    def usage(self) -> Usage:
        """What is in use now."""
        return Usage(self._requested, self._allocated, self._reserved)

    @property
    def peak(self) -> Usage:
        """The most of each since the last reset, maybe at different moments."""
        return Usage(self._max_requested, self._max_allocated, self._max_reserved)

    def reset_peaks(self) -> None:
        """Peaks begin again at what is in use now: `torch.cuda.reset_peak_memory_stats`."""
        self._max_requested, self._max_allocated, self._max_reserved = self.usage

    def segments(self) -> list[list[Block]]:
        """All reserved memory: runs of neighbouring blocks, by address. torch.cuda.memory_snapshot."""
        return self._small.mapped_runs() + self._large.mapped_runs()

    def allocate(self, requested_bytes: int) -> Block:
        """A block for so many bytes, good until it is freed, or OutOfMemory. Source: malloc.

        0 bytes are no block of any segment: torch does not ask the allocator for them.
        """
        if requested_bytes <= 0:
            if requested_bytes < 0:
                raise ValueError(f"{requested_bytes} bytes cannot be allocated")
            return Block(self._small, 0, 0)
        size = -(-requested_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES  # round_size
        pool = self._small if size <= SMALL_BYTES else self._large
        free = pool.free_blocks
        place = bisect_left(free, (size,))
        if place == len(free):
            block = self._allocate_from_driver(pool, size, requested_bytes)
        else:
            if self.expandable:
                place = pool.best_fit_index(place)
            block = free.pop(place)[2]
        if block.size_bytes - size >= pool.min_remainder_bytes:
            rest = block.split(size)
            insort(free, (rest.size_bytes, rest.address, rest))
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
        """Gives it back to its pool; the driver gets nothing. Source: free_block."""
        if not block.allocated:
            if block.size_bytes == 0:
                return
            raise ValueError(f"the block at {block.address} is not allocated")
        self._requested -= block.requested_bytes
        self._allocated -= block.size_bytes
        block.allocated = False
        block.requested_bytes = 0
        block.pool.add(block)

    def empty_cache(self) -> None:
        """Gives wholly free segments, or pages, back to the driver: `torch.cuda.empty_cache`.

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
                self.num_device_free += size > 0

    def _allocate_from_driver(self, pool: Pool, size: int, requested_bytes: int) -> Block:
        """A block with memory from the driver, for which the cache may have to go first. Source: malloc.

        torch does not search the pool again after the flush; nothing in it has grown.
        release_available_cached_blocks, which comes before it, does nothing without max_split_size_mb.
        """
        from_driver = self._expand_segment if self.expandable else self._new_segment
        block = from_driver(pool, size)
        if block is None:
            self.empty_cache()
            self.num_alloc_retries += 1
            block = from_driver(pool, size)
        if block is None:
            self.num_ooms += 1
            assert self.limit_bytes is not None
            raise SimulatedOutOfMemoryError(
                requested_bytes, segment_bytes(size), self.usage, self.limit_bytes
            )
        return block

    def _new_segment(self, pool: Pool, size: int) -> Block | None:
        """A whole segment that holds this size; None without memory. Source: alloc_block."""
        size = segment_bytes(size)
        return pool.new_segment(size, next(self._addresses, None)) if self._try_reserve(size) else None

    def _expand_segment(self, pool: Pool, size: int) -> Block | None:
        """The lowest place with room for this size, its holes mapped; None without memory.

        Pages that were mapped before the memory ended stay in the pool.

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
        """Whether the driver had so much."""
        if self.limit_bytes is not None and self._reserved + new_bytes > self.limit_bytes:
            return False
        self._reserved += new_bytes
        self._max_reserved = max(self._max_reserved, self._reserved)
        self.num_device_alloc += 1
        return True


def segment_bytes(size: int) -> int:
    """What the driver is asked for when no free block holds a size. Source: get_allocation_size."""
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MIN_LARGE_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


def replay_events(
    events: Iterable[MemoryEvent], allocator: CachingAllocator, live_blocks: dict[int, Block]
) -> Usage:
    """The peaks after a list of events. `live`, the tensors there are, is brought up to date.

    OutOfMemory comes where it would on a GPU.
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
