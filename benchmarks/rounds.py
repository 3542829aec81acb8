"""Time pieces of work in turn, and compare them round by round.

A machine changes from minute to minute. Neighbors in time see the same machine, hence a ratio is the median
over rounds of the ratio within a round, with its smallest and largest value.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Timing(NamedTuple):
    """Seconds of a piece of work."""

    wall: float
    cpu: float
    """of all threads of this process; with one thread, other processes change it less than the wall"""


def timed(work: Callable[[], object]) -> Timing:
    """Run the work once and return its seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def interleave(works: Mapping[str, Callable[[], object]], num_rounds: int) -> dict[str, list[Timing]]:
    """Time each work once per round, every other round in reverse order; the timings are in round order."""
    found: dict[str, list[Timing]] = {name: [] for name in works}
    for number in range(num_rounds):
        names = list(works) if number % 2 == 0 else list(works)[::-1]
        for name in names:
            found[name].append(timed(works[name]))
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum, with four significant digits."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Return the spread of the ratios within each round."""
    return spread([one / other for one, other in zip(numerators, denominators, strict=True)])


def compare(one: Sequence[Timing], other: Sequence[Timing]) -> dict[str, dict[str, float]]:
    """Return the spreads of the ratios of the seconds of `one` to those of `other`, by the wall and by the
    CPU clock."""
    return {
        clock: ratios([getattr(each, clock) for each in one], [getattr(each, clock) for each in other])
        for clock in Timing._fields
    }
