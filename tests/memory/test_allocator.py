"""Torch's rules checked by hand, figures measured on GPUs, and a slow allocator without blocks.

The slow allocator only keeps the intervals in use; everything between them is free.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captcha_exp.memory.allocator import (
    MIB,
    CachingAllocator,
    MemoryEvent,
    SimulatedOutOfMemoryError,
    Usage,
    replay_events,
)
from captcha_exp.memory.blocks import Block, iter_blocks

KIB = 2**10
SMALL, LARGE = 20 * MIB << 40, 20 * MIB << 41  # the first addresses of the pools
MIDDLE = (SMALL + LARGE) // 2

BOTH_KINDS = pytest.mark.parametrize("expandable", [False, True])


def mib(allocator: CachingAllocator) -> tuple[float, float]:
    """Return allocated and reserved memory in MiB."""
    return allocator.usage.allocated_bytes / MIB, allocator.usage.reserved_bytes / MIB


def segments_of(allocator: CachingAllocator) -> list[list[Block]]:
    """Return all reserved memory as runs of adjacent blocks, by address."""
    found = []
    for pool in (allocator._small, allocator._large):
        for _, lowest in sorted(pool.first_blocks.items()):
            runs = groupby(iter_blocks(lowest), lambda block: block.mapped)
            found += [list(blocks) for mapped, blocks in runs if mapped]
    return found


def shape(allocator: CachingAllocator) -> list[list[tuple[float, bool]]]:
    """Return the blocks of each segment as (MiB, allocated)."""
    return [[(b.size_bytes / MIB, b.allocated) for b in segment] for segment in segments_of(allocator)]


# -- sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requested", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),  # kMinBlockSize in a segment of kSmallBuffer
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (311 * 411 * 4, 511_488, 2 * MIB),  # 511284 = 998.6 * 512; torch's test_memory_snapshot
        (1 * MIB, 1 * MIB, 2 * MIB),  # kSmallSize is still small
        (1 * MIB - 511, 1 * MIB, 2 * MIB),
        (1 * MIB + 1, 1 * MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB, 10 * MIB),  # the rounded size is not below kMinLargeAlloc
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),  # kRoundLarge: 12 - 10 - 0.0005 > 1, so it is split
        (11 * MIB - 1, 12 * MIB, 12 * MIB),  # 12 - 11 is not above 1: all 12 are allocated
        (11 * MIB + 512, 12 * MIB, 12 * MIB),
        (20 * MIB, 20 * MIB, 20 * MIB),
        (21 * 4 * MIB, 84 * MIB, 84 * MIB),  # torch's test_allocator_settings: the size of the request
    ],
)
def test_one_tensor(requested: int, allocated: int, reserved: int) -> None:
    allocator = CachingAllocator()

    block = allocator.allocate(requested)

    assert allocator.usage == allocator.peak == Usage(requested, allocated, reserved)
    assert (block.requested_bytes, block.size_bytes) == (requested, allocated)
    assert len(segments_of(allocator)) == 1


@pytest.mark.parametrize(
    ("requested", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (1 * MIB, 1 * MIB, 2 * MIB),
        (1 * MIB + 1, 1 * MIB + 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 20 * MIB),  # large memory comes in pages of 20 MiB, whatever the size
        (20 * MIB, 20 * MIB, 20 * MIB),
        (20 * MIB + 1, 20 * MIB + 512, 40 * MIB),
        (59 * MIB + 1, 59 * MIB + 512, 60 * MIB),  # the remainder is split off even below 1 MiB
        (60 * MIB - 1, 60 * MIB, 60 * MIB),
    ],
)
def test_one_tensor_in_expandable_segments(requested: int, allocated: int, reserved: int) -> None:
    allocator = CachingAllocator(expandable=True)

    allocator.allocate(requested)

    assert allocator.usage == Usage(requested, allocated, reserved)
    assert len(segments_of(allocator)) == 1


@BOTH_KINDS
def test_requests_of_zero_bytes_are_not_counted(expandable: bool) -> None:
    allocator = CachingAllocator(limit_bytes=0, expandable=expandable)
    allocator.free(allocator.allocate(0))

    assert allocator.peak == Usage(0, 0, 0)


# -- pools and segments ---------------------------------------------------------------------------------


def test_two_tensors_of_1_mib_share_a_segment() -> None:
    """Torch's test_mempool_with_allocator: 1, 1 and 2 segments."""
    allocator = CachingAllocator()
    num_segments = []
    for _ in range(3):
        allocator.allocate(4 * (1024 * 1024 // 4))
        num_segments.append(len(segments_of(allocator)))

    assert num_segments == [1, 1, 2]
    assert shape(allocator) == [[(1, True), (1, False)], [(1, True), (1, True)]]  # the last lowest
    assert mib(allocator) == (3, 4)


def test_each_tensor_of_20_mib_has_its_own_segment() -> None:
    """Torch's test_nested_mempool: five allocations of 20 MiB, five segments."""
    allocator = CachingAllocator()
    for _ in range(5):
        allocator.allocate(4 * 20 * (1024 * 1024 // 4))

    assert len(segments_of(allocator)) == 5


def test_sizes_below_10_mib_share_a_segment_of_20_mib() -> None:
    allocator = CachingAllocator()
    for _ in range(3):
        allocator.allocate(6 * MIB)
    assert shape(allocator) == [[(6, True), (6, True), (6, True), (2, False)]]

    allocator.allocate(2 * MIB)  # exactly the remainder
    assert mib(allocator) == (20, 20)

    allocator.allocate(6 * MIB)
    assert mib(allocator) == (26, 40)


def test_a_remainder_of_1_mib_is_not_split_off() -> None:
    allocator = CachingAllocator()
    block = allocator.allocate(9 * MIB)
    allocator.allocate(9 * MIB)
    last = allocator.allocate(1 * MIB + 512)  # of 20 - 18; the remainder of 1 MiB - 512 is too small

    assert last.size_bytes == 2 * MIB
    assert allocator.usage == Usage(19 * MIB + 512, 20 * MIB, 20 * MIB)
    allocator.free(block)
    again = allocator.allocate(8 * MIB)  # 9 - 8 = 1
    assert again.size_bytes == 9 * MIB
    assert allocator.peak.allocated_bytes == 20 * MIB


def test_a_small_remainder_of_512_bytes_is_split_off() -> None:
    allocator = CachingAllocator()
    first = allocator.allocate(1 * MIB)
    allocator.allocate(1 * MIB - 512)  # 2 MiB - 1 MiB - (1 MiB - 512) = 512

    assert allocator.allocate(1).address == first.address + 2 * MIB - 512
    assert len(segments_of(allocator)) == 1


@BOTH_KINDS
def test_pools_do_not_share_memory(expandable: bool) -> None:
    allocator = CachingAllocator(expandable=expandable)
    allocator.free(allocator.allocate(20 * MIB))
    allocator.allocate(1 * MIB)
    assert mib(allocator) == (1, 22)

    allocator.allocate(20 * MIB)
    assert mib(allocator) == (21, 22)


# -- block selection and merging -------------------------------------------------------------------------


def test_the_smallest_block_that_fits_is_used_and_of_equal_ones_the_lowest() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * KIB) for size in (64, 1, 32, 1, 32, 1, 48, 1)]
    addresses = {block.size_bytes: block.address for block in blocks[::2]}
    lower = blocks[2].address
    for block in blocks[::2]:
        allocator.free(block)

    assert allocator.allocate(20 * KIB).address == lower
    assert allocator.allocate(32 * KIB).address == addresses[32 * KIB]  # the upper one
    assert allocator.allocate(33 * KIB).address == addresses[48 * KIB]
    assert allocator.allocate(12 * KIB).address == lower + 20 * KIB
    assert allocator.allocate(64 * KIB).address == addresses[64 * KIB]


@pytest.mark.parametrize(
    ("order", "index"), [({}, 1), ({"downward": False}, 0), ({"addresses": [800 * MIB, 900 * MIB]}, 0)]
)
def test_of_equal_segments_the_lowest_is_used(order: dict[str, Any], index: int) -> None:
    """The driver chooses the addresses; on an H200 the lowest segment was usually the newest."""
    allocator = CachingAllocator(**order)
    segments = [allocator.allocate(20 * MIB) for _ in range(2)]
    addresses = [block.address for block in segments]
    for block in segments:
        allocator.free(block)

    assert allocator.allocate(20 * MIB).address == addresses[index]
    assert [run[0].address for run in segments_of(allocator)] == sorted(addresses)


def test_known_addresses_are_used_first_but_not_by_expandable_segments() -> None:
    known = CachingAllocator(addresses=[700 * MIB])
    assert known.allocate(20 * MIB).address == 700 * MIB
    below, lower = (known.allocate(20 * MIB).address for _ in range(2))
    assert lower == below - 20 * MIB

    addresses = []
    for order in ({}, {"downward": False}, {"addresses": [1, 2, 3]}):
        allocator = CachingAllocator(expandable=True, **order)
        addresses.append([allocator.allocate(30 * MIB).address for _ in range(3)])
    assert addresses[0] == addresses[1] == addresses[2]


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
@BOTH_KINDS
def test_free_neighbors_are_merged(order: tuple[int, ...], expandable: bool) -> None:
    allocator = CachingAllocator(expandable=expandable)
    blocks = [allocator.allocate(6 * MIB) for _ in range(3)]
    for number in order:
        allocator.free(blocks[number])

    assert shape(allocator) == [[(20, False)]]
    assert allocator.usage == Usage(0, 0, 20 * MIB)


@BOTH_KINDS
def test_only_free_neighbors_are_merged(expandable: bool) -> None:
    allocator = CachingAllocator(expandable=expandable)
    first, _, third = (allocator.allocate(6 * MIB) for _ in range(3))
    allocator.free(first)
    allocator.free(third)

    assert shape(allocator) == [[(6, False), (6, True), (8, False)]]


def test_segments_are_not_merged() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(20 * MIB) for _ in range(2)]
    for block in blocks:
        allocator.free(block)
    allocator.allocate(30 * MIB)

    assert mib(allocator) == (30, 20 + 20 + 30)
    assert segments_of(CachingAllocator(expandable=True)) == []


@BOTH_KINDS
def test_fragments_stay_reserved(expandable: bool) -> None:
    allocator = CachingAllocator(expandable=expandable)
    blocks = [allocator.allocate(9 * MIB) for _ in range(6)]
    for block in blocks[::2]:
        allocator.free(block)
    allocator.allocate(12 * MIB)

    if expandable:
        # 6 * 9 = 54 in 60; free are three blocks of 9 and 6 at the end, which grow by a page
        assert mib(allocator) == (3 * 9 + 12, 80)
    else:
        # 9 + 9 + 2 in each of three segments, 9 and 2 of them free; 12 fits nowhere
        assert mib(allocator) == (3 * 9 + 12, 3 * 20 + 12)


# -- the limit ------------------------------------------------------------------------------------------


def test_free_segments_are_returned_before_out_of_memory() -> None:
    allocator = CachingAllocator(limit_bytes=62 * MIB)
    kept = allocator.allocate(6 * MIB)
    for block in [allocator.allocate(20 * MIB) for _ in range(2)]:
        allocator.free(block)
    allocator.free(allocator.allocate(1 * MIB))
    assert mib(allocator) == (6, 20 + 40 + 2)

    big = allocator.allocate(42 * MIB)  # 62 - 20, which `kept` holds

    assert mib(allocator) == (48, 62)
    assert allocator.num_alloc_retries == 1
    allocator.free(big)
    allocator.free(kept)
    message = f"{64 * MIB} bytes from the driver; 0 of {62 * MIB} are reserved"
    with pytest.raises(SimulatedOutOfMemoryError, match=message):
        allocator.allocate(62 * MIB + 1)
    assert allocator.usage == Usage(0, 0, 0)
    assert allocator.num_alloc_retries == 2
    allocator.allocate(62 * MIB)


def test_a_segment_in_use_is_not_returned() -> None:
    allocator = CachingAllocator(limit_bytes=40 * MIB)
    allocator.allocate(2 * MIB)
    remainder = allocator.allocate(18 * MIB)  # of the same segment
    allocator.free(remainder)

    message = f"{22 * MIB} bytes from the driver; {20 * MIB} of {40 * MIB} are reserved"
    with pytest.raises(SimulatedOutOfMemoryError, match=message):
        allocator.allocate(20 * MIB + 1)  # 22 in addition to 20
    assert mib(allocator) == (2, 20)


@BOTH_KINDS
def test_max_split_expandable(expandable: bool) -> None:
    """The figures of torch's test_max_split_expandable: 3 * 40 of 120, no fourth, then 120."""
    allocator = CachingAllocator(120 * MIB, expandable)
    blocks = [allocator.allocate(40 * MIB) for _ in range(3)]
    with pytest.raises(SimulatedOutOfMemoryError):
        allocator.allocate(40 * MIB)
    for block in blocks:
        allocator.free(block)
    allocator.allocate(120 * MIB)

    assert mib(allocator) == (120, 120)
    assert allocator.num_alloc_retries == (1 if expandable else 2)  # an expandable range is contiguous


@BOTH_KINDS
def test_emptying_the_cache_keeps_allocated_blocks(expandable: bool) -> None:
    allocator = CachingAllocator(expandable=expandable)
    small, large = allocator.allocate(1), allocator.allocate(30 * MIB)
    allocator.free(allocator.allocate(45 * MIB))
    allocator.empty_cache()
    # expandable: 75 of 80 were mapped; the page from 20 to 40 is half in use
    assert mib(allocator) == (30 + 512 / MIB, 2 + (40 if expandable else 30))

    allocator.free(large)
    allocator.free(small)
    allocator.empty_cache()
    assert allocator.usage == Usage(0, 0, 0)
    assert segments_of(allocator) == []


# -- expandable segments --------------------------------------------------------------------------------


@BOTH_KINDS
def test_growth_matches_measurements(expandable: bool) -> None:
    """pytorch issue 123548 and pull request 193400, ROCm issue 6603, torch 2.12.

    64 MiB stay allocated; each cycle allocates 91, 45.5 and 2 MiB and frees all but the 2. Measured were 66,
    106, ..., 266 MiB allocated in cycles 0, 20, ..., 100; less than 500 MiB reserved to the end with either
    kind of segments; and 220 reserved in cycle 0 with expandable ones (and max_split_size_mb:128, before any
    free block was as large).
    """
    allocator = CachingAllocator(16 * 2**30, expandable)
    allocator.allocate(64 * MIB)
    figures = []
    for cycle in range(101):
        two = [allocator.allocate(91 * MIB), allocator.allocate(45 * MIB + 512 * KIB)]
        allocator.allocate(2 * MIB)
        for block in two:
            allocator.free(block)
        if cycle % 20 == 0:
            figures.append(mib(allocator))

    assert [allocated for allocated, _ in figures] == [66, 106, 146, 186, 226, 266]
    assert all(reserved < 500 for _, reserved in figures)
    if expandable:
        assert figures[0][1] == 220  # 64 + 91 + 45.5 + 2 = 202.5 in pages of 20
    else:
        # 64, 92, 46, 20; 91 and 45.5 leave remainders of 1 and 0.5 MiB, which are not split off
        assert figures[0][1] == 64 + 92 + 46 + 20
    assert allocator.num_alloc_retries == 0


@BOTH_KINDS
def test_the_end_of_an_expandable_range_is_used_last(expandable: bool) -> None:
    allocator = CachingAllocator(expandable=expandable)
    first = allocator.allocate(9 * MIB)
    allocator.allocate(6 * MIB)
    allocator.free(first)
    # free: 9 MiB at 0, 5 MiB at 15, which can grow in an expandable range
    assert allocator.allocate(4 * MIB).address - first.address == (0 if expandable else 15 * MIB)


def with_pages(*sizes: int) -> tuple[CachingAllocator, list[Block]]:
    """Return consecutive blocks of these sizes in MiB in an expandable range."""
    allocator = CachingAllocator(expandable=True)
    return allocator, [allocator.allocate(size * MIB) for size in sizes]


def test_a_hole_is_filled_before_the_range_grows() -> None:
    allocator, blocks = with_pages(20, 20, 20)
    allocator.free(blocks[0])
    allocator.empty_cache()
    assert mib(allocator) == (40, 40)
    assert len(segments_of(allocator)) == 1

    assert allocator.allocate(30 * MIB).address - LARGE == 60 * MIB  # 30 is larger than the hole
    assert mib(allocator) == (70, 80)
    assert len(segments_of(allocator)) == 1
    assert allocator.allocate(15 * MIB).address == LARGE  # 10 are free at the end, too few
    assert mib(allocator) == (85, 100)


def test_a_hole_and_the_free_block_above_it_are_combined() -> None:
    allocator, blocks = with_pages(30, 10)
    allocator.free(blocks[0])
    allocator.empty_cache()  # 0 to 20 is a whole page, 20 to 30 is not
    assert shape(allocator) == [[(10, False), (10, True)]]

    assert allocator.allocate(25 * MIB).address == LARGE
    assert shape(allocator) == [[(25, True), (5, False), (10, True)]]


def test_pages_of_a_failed_request_are_returned() -> None:
    allocator, blocks = with_pages(20, 20, 20, 20)
    allocator.free(blocks[0])
    allocator.free(blocks[2])
    allocator.empty_cache()
    allocator.free(blocks[1])
    assert shape(allocator) == [[(20, False)], [(20, True)]]  # each between holes

    allocator.limit_bytes = 60 * MIB
    # 56: kRoundLarge, as torch reports it
    with pytest.raises(SimulatedOutOfMemoryError, match=f"{56 * MIB} bytes .* {20 * MIB} of .* are reserved"):
        allocator.allocate(55 * MIB)  # 20 more are available, not 40; after the flush 40, not 60
    assert allocator.peak.reserved_bytes == 80 * MIB

    allocator.limit_bytes = 80 * MIB
    assert allocator.allocate(55 * MIB).address == LARGE
    assert shape(allocator) == [[(55, True), (5, False), (20, True)]]


# -- peaks and lists of events --------------------------------------------------------------------------


def test_peaks_count_from_the_last_reset() -> None:
    allocator = CachingAllocator()
    first = allocator.allocate(12 * MIB - 100)
    allocator.free(first)
    allocator.allocate(1000)
    assert allocator.peak == Usage(12 * MIB - 100, 12 * MIB, 14 * MIB)

    allocator.empty_cache()
    allocator.reset_peaks()
    assert allocator.peak == allocator.usage == Usage(1000, 1024, 2 * MIB)


def test_lists_of_events_can_be_replayed_in_sequence() -> None:
    allocator, live = CachingAllocator(), dict[int, Block]()
    assert replay_events(
        [MemoryEvent(1, 100), MemoryEvent(2, 3 * MIB), MemoryEvent(1, None)], allocator, live
    ) == (
        3 * MIB + 100,
        3 * MIB + 512,
        22 * MIB,
    )
    assert live.keys() == {2}
    replay_events([MemoryEvent(2, None), MemoryEvent(3, 0), MemoryEvent(3, None)], allocator, live)
    assert live == {}
    assert allocator.usage == Usage(0, 0, 22 * MIB)


def test_invalid_events_are_rejected() -> None:
    allocator = CachingAllocator()
    with pytest.raises(ValueError, match="tensor 1 is allocated twice"):
        replay_events([MemoryEvent(1, 5), MemoryEvent(1, 5)], allocator, {})
    with pytest.raises(KeyError):
        replay_events([MemoryEvent(2, None)], allocator, {})


def test_out_of_memory_keeps_the_earlier_tensors() -> None:
    allocator, live = CachingAllocator(limit_bytes=20 * MIB), dict[int, Block]()
    with pytest.raises(SimulatedOutOfMemoryError):
        replay_events([MemoryEvent(n, 7 * MIB) for n in range(5)], allocator, live)
    assert live.keys() == {0, 1}


# -- any sequence ---------------------------------------------------------------------------------------

Action = tuple[str, int]

SIZES = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(1, 3 * MIB),
    st.integers(1 * MIB, 64 * MIB),
    st.sampled_from([MIB * base + off for base in (1, 2, 10, 11, 20) for off in (-512, 0, 1, 512)]),
)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), SIZES),
        st.tuples(st.just("allocate"), SIZES),
        st.tuples(st.just("free"), st.integers(0, 10**6)),
        st.tuples(st.just("free"), st.integers(0, 10**6)),
        st.tuples(st.just("empty"), st.just(0)),
    ),
    min_size=10,
    max_size=80,
)
LIMITS = st.one_of(st.none(), st.integers(0, 200 * MIB))


@dataclass
class SlowAllocator:
    """The same rules with intervals in use, [start, end), and a list of reserved ranges."""

    limit: int | None
    expandable: bool
    downward: bool = True
    used: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # handle: start, end, requested
    reserved: list[tuple[int, int]] = field(default_factory=list)  # segments, or single pages
    next_address: list[int] = field(
        default_factory=lambda: [SMALL, LARGE]
    )  # of the small and of the large pool
    peak: list[int] = field(default_factory=lambda: [0, 0, 0])
    flushes: int = 0

    def usage(self) -> tuple[int, int, int]:
        return (
            sum(requested for _, _, requested in self.used.values()),
            sum(end - start for start, end, _ in self.used.values()),
            sum(end - start for start, end in self.reserved),
        )

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the segments, or the runs of adjacent pages."""
        pages = sorted(self.reserved)
        while pages:
            start, end = pages.pop(0)
            while self.expandable and pages and pages[0][0] == end:
                end = pages.pop(0)[1]
            yield start, end

    def gaps(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the free intervals from start to end."""
        for low, high, _ in sorted(self.used.values()):
            if start <= low < end:
                if start < low:
                    yield start, low
                start = high
        if start < end:
            yield start, end

    def reserve(self, start: int, end: int) -> bool:
        if self.limit is not None and self.usage()[2] + end - start > self.limit:
            return False
        step = (2 * MIB if start < MIDDLE else 20 * MIB) if self.expandable else end - start
        self.reserved += [(low, low + step) for low in range(start, end, step)]
        self.update_peak()
        return True

    def update_peak(self) -> None:
        self.peak = [max(pair) for pair in zip(self.peak, self.usage(), strict=True)]

    def allocate(self, handle: int, requested: int) -> bool:
        size = (requested + 511) // 512 * 512
        small = size <= MIB
        free = [
            (end - start, start)
            for reserved in self.ranges()
            for start, end in self.gaps(*reserved)
            if (start < MIDDLE) == small and end - start >= size
        ]
        if free:
            available, start = self.choose(sorted(free))
        else:
            grow = self.expand if self.expandable else self.segment
            found = grow(small, size)
            if found is None:
                self.flushes += 1
                self.empty()
                found = grow(small, size)
            if found is None:
                return False
            available, start = found
        remainder = available - size
        split = remainder > 0 if small or self.expandable else remainder > MIB
        self.used[handle] = (start, start + (size if split else available), requested)
        self.update_peak()
        return True

    def choose(self, free: list[tuple[int, int]]) -> tuple[int, int]:
        if not self.expandable:
            return free[0]

        def expandable_size(size: int, start: int) -> int:
            above = [low for low, _ in self.reserved if low >= start + size]
            above += [low for low, _, _ in self.used.values() if low >= start + size]
            same_pool = [low for low in above if (low < MIDDLE) == (start < MIDDLE)]
            return min(same_pool, default=10**30) - start

        while len(free) > 1 and expandable_size(*free[1]) < expandable_size(*free[0]):
            free = free[1:]
        return free[0]

    def segment(self, small: bool, size: int) -> tuple[int, int] | None:
        if small:
            segment_size = 2 * MIB
        elif size < 10 * MIB:
            segment_size = 20 * MIB
        else:
            segment_size = (size + 2 * MIB - 1) // (2 * MIB) * (2 * MIB)
        start = self.next_address[not small] - (segment_size if self.downward else 0)
        if not self.reserve(start, start + segment_size):
            return None
        self.next_address[not small] += -segment_size if self.downward else segment_size
        return segment_size, start

    def expand(self, small: bool, size: int) -> tuple[int, int] | None:
        base = SMALL if small else LARGE
        page = 2 * MIB if small else 20 * MIB
        start = next(low for low, high in self.gaps(base, base + 2**60) if high - low >= size)
        first = (start - base) // page * page + base
        while True:
            missing = [
                low for low in range(first, start + size, page) if (low, low + page) not in self.reserved
            ]
            if not missing:
                break
            end = missing[0]  # the hole up to the next mapped page
            while end in missing:
                end += page
            if not self.reserve(missing[0], end):
                return None
        return next(
            (high - low, low)
            for reserved in self.ranges()
            for low, high in self.gaps(*reserved)
            if low == start
        )

    def empty(self) -> None:
        self.reserved = [
            (start, end)
            for start, end in self.reserved
            if any(low < end and high > start for low, high, _ in self.used.values())
        ]


def check_against_slow_allocator(
    actions: list[Action], limit: int | None, expandable: bool, downward: bool
) -> None:
    allocator = CachingAllocator(limit, expandable, downward=downward)
    slow = SlowAllocator(limit, expandable, downward)
    blocks: dict[int, Block] = {}
    for handle, (action, number) in enumerate(actions):
        if action == "allocate":
            fits = slow.allocate(handle, number)
            try:
                blocks[handle] = allocator.allocate(number)
            except SimulatedOutOfMemoryError:
                assert not fits
            else:
                assert fits
        elif action == "free" and blocks:
            chosen = sorted(blocks)[number % len(blocks)]
            allocator.free(blocks.pop(chosen))
            del slow.used[chosen]
        elif action == "empty":
            allocator.empty_cache()
            slow.empty()
        found = {h: (b.address, b.address + b.size_bytes, b.requested_bytes) for h, b in blocks.items()}
        assert found == slow.used
        assert allocator.usage == slow.usage()
        assert [(s[0].address, sum(b.size_bytes for b in s)) for s in segments_of(allocator)] == [
            (start, end - start) for start, end in slow.ranges()
        ]
    assert list(allocator.peak) == slow.peak
    assert allocator.num_alloc_retries == slow.flushes


@settings(deadline=None)
@given(actions=ACTIONS, limit=LIMITS, expandable=st.booleans(), downward=st.booleans())
def test_the_slow_allocator_agrees(
    actions: list[Action], limit: int | None, expandable: bool, downward: bool
) -> None:
    check_against_slow_allocator(actions, limit, expandable, downward)


@pytest.mark.parametrize("limit", [None, 150 * MIB])
@pytest.mark.parametrize("downward", [True, False])
@BOTH_KINDS
def test_the_slow_allocator_agrees_on_a_long_list(
    limit: int | None, expandable: bool, downward: bool
) -> None:
    generator = random.Random(7)
    actions: list[Action] = []
    for number in range(800):
        draw = generator.random()
        if draw < (0.7 if number // 100 % 2 == 0 else 0.3):  # up to 40 more, then down again
            actions.append(("allocate", int(2 ** generator.uniform(0, 24))))
        else:
            actions.append(("free" if draw < 0.99 else "empty", generator.randrange(10**6)))
    check_against_slow_allocator(actions, limit, expandable, downward)


def check_consistent(allocator: CachingAllocator, blocks: list[Block]) -> None:
    usage, segments = allocator.usage, segments_of(allocator)
    assert usage.requested_bytes == sum(block.requested_bytes for block in blocks)
    assert usage.allocated_bytes == sum(block.size_bytes for block in blocks)
    assert usage.reserved_bytes == sum(block.size_bytes for segment in segments for block in segment)
    assert usage.requested_bytes <= usage.allocated_bytes <= usage.reserved_bytes
    assert all(most >= now for most, now in zip(allocator.peak, usage, strict=True))
    if allocator.limit_bytes is not None:
        assert allocator.peak.reserved_bytes <= allocator.limit_bytes
    last_address = -1
    for segment in segments:
        assert segment[0].address > last_address
        for low, high in pairwise(segment):
            assert high.address == low.address + low.size_bytes  # no overlap, no gap
            assert low.allocated or high.allocated
        last_address = segment[-1].address
        assert all(block.size_bytes % 512 == 0 < block.size_bytes for block in segment)
    live = [block for segment in segments for block in segment if block.allocated]
    assert sorted(live, key=id) == sorted(blocks, key=id)  # each in one segment


def run_actions(
    actions: list[Action], limit: int | None, expandable: bool
) -> tuple[CachingAllocator, list[tuple[int, ...]]]:
    """Run the actions; return the allocator after freeing all blocks, and the state after each action."""
    allocator, blocks = CachingAllocator(limit, expandable), list[Block]()
    states: list[tuple[int, ...]] = []
    for action, number in actions:
        before = allocator.peak
        if action == "allocate":
            try:
                blocks.append(allocator.allocate(number))
            except SimulatedOutOfMemoryError:
                assert limit is not None
        elif action == "free" and blocks:
            allocator.free(blocks.pop(number % len(blocks)))
        elif action == "empty":
            allocator.empty_cache()
        check_consistent(allocator, blocks)
        assert all(new >= old for new, old in zip(allocator.peak, before, strict=True))
        states.append((*allocator.usage, *allocator.peak, *(block.address for block in blocks)))
    for block in blocks:
        allocator.free(block)
    check_consistent(allocator, [])
    return allocator, states


@settings(deadline=None)
@given(actions=ACTIONS, limit=LIMITS, expandable=st.booleans())
def test_usage_is_consistent_and_repeatable(
    actions: list[Action], limit: int | None, expandable: bool
) -> None:
    allocator, states = run_actions(actions, limit, expandable)

    assert allocator.usage[:2] == (0, 0)
    assert all(len(segment) == 1 for segment in segments_of(allocator))  # one free block
    allocator.empty_cache()
    assert allocator.usage == Usage(0, 0, 0)
    assert run_actions(actions, limit, expandable)[1] == states
