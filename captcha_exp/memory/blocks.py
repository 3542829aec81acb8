"""The free and allocated blocks of memory segments, which the allocator splits and merges.

Source: pytorch, c10/cuda/CUDACachingAllocator.cpp, Block and BlockPool.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import groupby

_EXPANDABLE_RANGE_BYTES = 2**60  # of addresses in an expandable range; torch reserves 9/8 of the GPU's memory


class Block:
    """A range of addresses in a segment."""

    __slots__ = ("address", "allocated", "mapped", "next", "pool", "prev", "requested_bytes", "size_bytes")

    def __init__(self, pool: "Pool", address: int, size_bytes: int, mapped: bool = True) -> None:
        self.pool = pool
        self.address = address
        self.size_bytes = size_bytes
        self.requested_bytes = 0  # of an allocated block: the size of the request
        self.allocated = False
        self.mapped = mapped  # False: a hole, addresses of an expandable range without memory
        self.prev: Block | None = None  # adjacent blocks in the segment
        self.next: Block | None = None

    def split(self, size_bytes: int) -> "Block":
        """Cut the block to this size and return the remainder, as a block above it."""
        remainder = Block(self.pool, self.address + size_bytes, self.size_bytes - size_bytes, self.mapped)
        remainder.prev, remainder.next = self, self.next
        if self.next is not None:
            self.next.prev = remainder
        self.next, self.size_bytes = remainder, size_bytes
        return remainder

    def merge_next(self, next_block: "Block") -> None:
        """Absorb the block above, so that a segment's lowest block stays the same object."""
        self.size_bytes += next_block.size_bytes
        self.next = next_block.next
        if self.next is not None:
            self.next.prev = self

    def expandable_bytes(self) -> int:
        """Return the size to which the block can grow."""
        hole = self.next
        return self.size_bytes + (hole.size_bytes if hole is not None and not hole.mapped else 0)


class Pool:
    """The segments of small or of large sizes, and their free blocks.

    An expandable pool is one unlimited segment, parts of which are mapped and the others are holes.
    """

    def __init__(
        self, page_bytes: int, min_remainder_bytes: int, address: int, expandable: bool, downward: bool
    ) -> None:
        self.page_bytes = page_bytes  # of an expandable pool
        self.min_remainder_bytes = min_remainder_bytes  # a smaller remainder is not split off
        self.downward = downward and not expandable
        self.next_address = address  # of the next segment: its end if downward, else its begin
        self.free_blocks: list[tuple[int, int, Block]] = []  # by size, then address
        self.first_blocks: dict[int, Block] = {}  # of each segment, by address
        if expandable:
            self.new_segment(_EXPANDABLE_RANGE_BYTES).mapped = False

    def new_segment(self, size_bytes: int, address: int | None = None) -> Block:
        """Return a new segment as one block, below or above all earlier ones unless its address is given."""
        if address is None:
            address = self.next_address - size_bytes if self.downward else self.next_address
        if self.downward:
            self.next_address = min(self.next_address, address)
        else:
            self.next_address = max(self.next_address, address + size_bytes)
        block = self.first_blocks[address] = Block(self, address, size_bytes)
        return block

    def add(self, block: Block) -> Block:
        """Add a free block, merged with its free neighbors, and return it. Source: try_merge_blocks."""
        after, before, free = block.next, block.prev, self.free_blocks
        if after is not None and after.mapped and not after.allocated:
            del free[bisect_left(free, (after.size_bytes, after.address))]
            block.merge_next(after)
        if before is not None and before.mapped and not before.allocated:
            del free[bisect_left(free, (before.size_bytes, before.address))]
            before.merge_next(block)
            block = before
        insort(free, (block.size_bytes, block.address, block))
        return block

    def remove(self, block: Block) -> None:
        """Remove a block from the free blocks."""
        del self.free_blocks[bisect_left(self.free_blocks, (block.size_bytes, block.address))]

    # -- expandable pools only --------------------------------------------------------------------------

    def best_fit_index(self, first_index: int) -> int:
        """Return the index of the best fit among the free blocks; `first_index` is the first that fits.

        A block counts with the size to which it can grow, so the last one is used only if nothing else fits.

        Source: get_free_block.
        """
        free = self.free_blocks
        while (
            first_index + 1 < len(free)
            and free[first_index + 1][2].expandable_bytes() < free[first_index][2].expandable_bytes()
        ):
            first_index += 1
        return first_index

    def find_expandable_block(self, size_bytes: int) -> Block:
        """Return the first block of the lowest run of free blocks and holes that is large enough.

        The last run always is. Source: find_expandable_block.
        """
        (lowest,) = self.first_blocks.values()
        runs = groupby(iter_blocks(lowest), lambda block: block.allocated)
        free_runs = (list(blocks) for allocated, blocks in runs if not allocated)
        return next(run[0] for run in free_runs if sum(block.size_bytes for block in run) >= size_bytes)

    def map_block(self, hole: Block, size_bytes: int) -> Block:
        """Map this many bytes of a hole, in whole pages; return their free block. Source: map_block."""
        if size_bytes < hole.size_bytes:
            hole.split(size_bytes)
        hole.mapped = True
        return self.add(hole)

    def unmap_block(self, block: Block) -> int:
        """Unmap the whole pages inside a free block and return their bytes. Source: unmap_block."""
        page, top = self.page_bytes, block.address + block.size_bytes
        begin, end = -(-block.address // page) * page, top // page * page
        if begin >= end:
            return 0
        self.remove(block)
        hole = block.split(begin - block.address) if begin > block.address else block
        above = hole.split(end - begin) if end < top else None
        hole.mapped = False
        if hole is not block:
            self.add(block)
        if above is not None:
            self.add(above)
        if hole.next is not None and not hole.next.mapped:
            hole.merge_next(hole.next)
        if hole.prev is not None and not hole.prev.mapped:
            hole.prev.merge_next(hole)
        return end - begin


def iter_blocks(block: Block | None) -> Iterator[Block]:
    """Yield the block and all blocks above it in its segment."""
    while block is not None:
        yield block
        block = block.next
