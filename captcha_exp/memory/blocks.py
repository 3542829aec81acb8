"""Memory in one line of blocks after another, free or in use: what the allocator cuts and joins.

Source: pytorch, c10/cuda/CUDACachingAllocator.cpp, Block and BlockPool.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import groupby

_EXPANDABLE_RANGE_BYTES = 2**60  # of addresses in an expandable range; torch reserves 9/8 of the GPU's memory


class Block:
    """A piece of a segment."""

    __slots__ = ("address", "allocated", "mapped", "next", "pool", "prev", "requested_bytes", "size_bytes")

    def __init__(self, pool: "Pool", address: int, size_bytes: int, mapped: bool = True) -> None:
        self.pool = pool
        self.address = address
        self.size_bytes = size_bytes
        self.requested_bytes = 0  # for a live one what was asked for
        self.allocated = False
        self.mapped = mapped  # False: a hole, addresses of an expandable range without memory
        self.prev: Block | None = None  # the neighbours in the segment
        self.next: Block | None = None

    def split(self, size_bytes: int) -> "Block":
        """What it had above so many bytes, as a block of its own."""
        rest = Block(self.pool, self.address + size_bytes, self.size_bytes - size_bytes, self.mapped)
        rest.prev, rest.next = self, self.next
        if self.next is not None:
            self.next.prev = rest
        self.next, self.size_bytes = rest, size_bytes
        return rest

    def merge_next(self, next_block: "Block") -> None:
        """The upper neighbour becomes part of it, so the lowest of a segment stays the same object."""
        self.size_bytes += next_block.size_bytes
        self.next = next_block.next
        if self.next is not None:
            self.next.prev = self

    def expandable_bytes(self) -> int:
        """How large it can grow."""
        hole = self.next
        return self.size_bytes + (hole.size_bytes if hole is not None and not hole.mapped else 0)


class Pool:
    """The segments of the small sizes, or of the large ones, and the free blocks in them.

    An expandable pool is one endless segment, which holds memory in some places and holes in the others.
    """

    def __init__(
        self, page_bytes: int, min_remainder_bytes: int, address: int, expandable: bool, downward: bool
    ) -> None:
        self.page_bytes = page_bytes  # of an expandable one
        self.min_remainder_bytes = min_remainder_bytes  # a smaller rest is not cut off
        self.downward = downward and not expandable
        self.next_address = address  # of the next segment: its end if downward, else its begin
        self.free_blocks: list[tuple[int, int, Block]] = []  # by size, then address
        self.first_blocks: dict[int, Block] = {}  # of each segment, by address
        if expandable:
            self.new_segment(_EXPANDABLE_RANGE_BYTES).mapped = False

    def new_segment(self, size_bytes: int, address: int | None = None) -> Block:
        """Return a new segment as one block, below or above all before it unless its address is known."""
        if address is None:
            address = self.next_address - size_bytes if self.downward else self.next_address
        if self.downward:
            self.next_address = min(self.next_address, address)
        else:
            self.next_address = max(self.next_address, address + size_bytes)
        block = self.first_blocks[address] = Block(self, address, size_bytes)
        return block

    def add(self, block: Block) -> Block:
        """The free block that it becomes with its free neighbours. Source: try_merge_blocks."""
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
        """It is no longer free."""
        del self.free_blocks[bisect_left(self.free_blocks, (block.size_bytes, block.address))]

    def mapped_runs(self) -> list[list[Block]]:
        """All memory, in runs of neighbours."""
        found = []
        for _, lowest in sorted(self.first_blocks.items()):
            runs = groupby(_iter_blocks(lowest), lambda block: block.mapped)
            found += [list(blocks) for mapped, blocks in runs if mapped]
        return found

    # -- expandable ones only ---------------------------------------------------------------------------

    def best_fit_index(self, first_index: int) -> int:
        """The place of the best fit in `free`, from the first that fits. A block counts as large as it
        can grow, so the end of the range is kept for what fits nowhere else. Source: get_free_block."""
        free = self.free_blocks
        while (
            first_index + 1 < len(free)
            and free[first_index + 1][2].expandable_bytes() < free[first_index][2].expandable_bytes()
        ):
            first_index += 1
        return first_index

    def find_expandable_block(self, size_bytes: int) -> Block:
        """The first block of the lowest run of free blocks and holes with so much room; the last has it.
        Source: find_expandable_block."""
        (lowest,) = self.first_blocks.values()
        runs = groupby(_iter_blocks(lowest), lambda block: block.allocated)
        rooms = (list(blocks) for live, blocks in runs if not live)
        return next(room[0] for room in rooms if sum(block.size_bytes for block in room) >= size_bytes)

    def map_block(self, hole: Block, size_bytes: int) -> Block:
        """The free block that so many bytes of a hole, in pages, become part of. Source: map_block."""
        if size_bytes < hole.size_bytes:
            hole.split(size_bytes)
        hole.mapped = True
        return self.add(hole)

    def unmap_block(self, block: Block) -> int:
        """How many bytes, the whole pages inside a free block, become a hole. Source: unmap_block."""
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


def _iter_blocks(block: Block | None) -> Iterator[Block]:
    while block is not None:
        yield block
        block = block.next
