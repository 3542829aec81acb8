"""Memory in one line of blocks after another, free or in use: what the allocator cuts and joins.

Source: pytorch, c10/cuda/CUDACachingAllocator.cpp, Block and BlockPool.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import groupby

_ENDLESS_BYTES = 2**60  # of addresses in an expandable range; torch reserves 9/8 of the GPU's memory


class Block:
    """A piece of a segment."""

    __slots__ = ("address", "after", "before", "live", "mapped", "pool", "requested_bytes", "size_bytes")

    def __init__(self, pool: "Pool", address: int, size_bytes: int, mapped: bool = True) -> None:
        self.pool = pool
        self.address = address
        self.size_bytes = size_bytes
        self.requested_bytes = 0  # for a live one what was asked for
        self.live = False
        self.mapped = mapped  # False: a hole, addresses of an expandable range without memory
        self.before: Block | None = None  # the neighbours in the segment
        self.after: Block | None = None

    def cut(self, size_bytes: int) -> "Block":
        """What it had above so many bytes, as a block of its own."""
        rest = Block(self.pool, self.address + size_bytes, self.size_bytes - size_bytes, self.mapped)
        rest.before, rest.after = self, self.after
        if self.after is not None:
            self.after.before = rest
        self.after, self.size_bytes = rest, size_bytes
        return rest

    def swallow(self, after: "Block") -> None:
        """The upper neighbour becomes part of it, so the lowest of a segment stays the same object."""
        self.size_bytes += after.size_bytes
        self.after = after.after
        if self.after is not None:
            self.after.before = self

    def reach_bytes(self) -> int:
        """How large it can grow."""
        hole = self.after
        return self.size_bytes + (hole.size_bytes if hole is not None and not hole.mapped else 0)


class Pool:
    """The segments of the small sizes, or of the large ones, and the free blocks in them.

    An expandable pool is one endless segment, which holds memory in some places and holes in the others.
    """

    def __init__(
        self, page_bytes: int, least_rest_bytes: int, address: int, expandable: bool, downward: bool
    ) -> None:
        self.page_bytes = page_bytes  # of an expandable one
        self.least_rest_bytes = least_rest_bytes  # a smaller rest is not cut off
        self.downward = downward and not expandable
        self.next_address = address  # of the next segment: its end if downward, else its begin
        self.free: list[tuple[int, int, Block]] = []  # by size, then address
        self.lowest: dict[int, Block] = {}  # of each segment, by address
        if expandable:
            self.new_segment(_ENDLESS_BYTES).mapped = False

    def new_segment(self, size_bytes: int, address: int | None = None) -> Block:
        """Return a new segment as one block, below or above all before it unless its address is known."""
        if address is None:
            address = self.next_address - size_bytes if self.downward else self.next_address
        if self.downward:
            self.next_address = min(self.next_address, address)
        else:
            self.next_address = max(self.next_address, address + size_bytes)
        block = self.lowest[address] = Block(self, address, size_bytes)
        return block

    def add(self, block: Block) -> Block:
        """The free block that it becomes with its free neighbours. Source: try_merge_blocks."""
        after, before, free = block.after, block.before, self.free
        if after is not None and after.mapped and not after.live:
            del free[bisect_left(free, (after.size_bytes, after.address))]
            block.swallow(after)
        if before is not None and before.mapped and not before.live:
            del free[bisect_left(free, (before.size_bytes, before.address))]
            before.swallow(block)
            block = before
        insort(free, (block.size_bytes, block.address, block))
        return block

    def remove(self, block: Block) -> None:
        """It is no longer free."""
        del self.free[bisect_left(self.free, (block.size_bytes, block.address))]

    def runs(self) -> list[list[Block]]:
        """All memory, in runs of neighbours."""
        found = []
        for _, lowest in sorted(self.lowest.items()):
            runs = groupby(_upwards(lowest), lambda block: block.mapped)
            found += [list(blocks) for mapped, blocks in runs if mapped]
        return found

    # -- expandable ones only ---------------------------------------------------------------------------

    def best_fit(self, place: int) -> int:
        """The place of the best fit in `free`, from the first that fits. A block counts as large as it
        can grow, so the end of the range is kept for what fits nowhere else. Source: get_free_block."""
        free = self.free
        while place + 1 < len(free) and free[place + 1][2].reach_bytes() < free[place][2].reach_bytes():
            place += 1
        return place

    def lowest_room(self, size_bytes: int) -> Block:
        """The first block of the lowest run of free blocks and holes with so much room; the last has it.
        Source: find_expandable_block."""
        (lowest,) = self.lowest.values()
        runs = groupby(_upwards(lowest), lambda block: block.live)
        rooms = (list(blocks) for live, blocks in runs if not live)
        return next(room[0] for room in rooms if sum(block.size_bytes for block in room) >= size_bytes)

    def map(self, hole: Block, size_bytes: int) -> Block:
        """The free block that so many bytes of a hole, in pages, become part of. Source: map_block."""
        if size_bytes < hole.size_bytes:
            hole.cut(size_bytes)
        hole.mapped = True
        return self.add(hole)

    def unmap(self, block: Block) -> int:
        """How many bytes, the whole pages inside a free block, become a hole. Source: unmap_block."""
        page, top = self.page_bytes, block.address + block.size_bytes
        begin, end = -(-block.address // page) * page, top // page * page
        if begin >= end:
            return 0
        self.remove(block)
        hole = block.cut(begin - block.address) if begin > block.address else block
        above = hole.cut(end - begin) if end < top else None
        hole.mapped = False
        if hole is not block:
            self.add(block)
        if above is not None:
            self.add(above)
        if hole.after is not None and not hole.after.mapped:
            hole.swallow(hole.after)
        if hole.before is not None and not hole.before.mapped:
            hole.before.swallow(hole)
        return end - begin


def _upwards(block: Block | None) -> Iterator[Block]:
    while block is not None:
        yield block
        block = block.after
