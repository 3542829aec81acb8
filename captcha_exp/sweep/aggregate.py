"""Points of a sweep that differ in seeds alone, taken together."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from captcha_exp.memory.interval import Fits, MiBRange
from captcha_exp.runtime.console import escape_unprintable
from captcha_exp.sweep.results import JobResult, Outcome

SEEDS = ("seed", "data.seed", "data.split_seed")
BATCH_SIZE = "train.batch_size"
METRICS = ("val_accuracy", "test_accuracy", "images_per_second", "seconds_to_best", "measured_mib")
FRACTION_METRICS = (
    "val_accuracy",
    "test_accuracy",
)  # they end at 0 and 1, and so does what may be their mean
MAX_VALUE_LENGTH = 40  # characters of a value in a name
MAX_ERROR_LENGTH = 60  # in a table, which names it; what tells it all stands beside


class MeanEstimate(NamedTuple):
    """The mean of one figure, and how well that many points know it."""

    value: float
    points: int
    half: float | None
    """of the 95 % interval; None for one point, which does not know"""
    interval: tuple[float, float] | None
    """95 %, by Student's t"""


def estimate_mean(values: Sequence[float], is_fraction: bool = False) -> MeanEstimate:
    """The mean of at least one value; the interval of a share ends at 0 and 1."""
    centre, count = statistics.fmean(values), len(values)
    if count == 1:
        return MeanEstimate(centre, 1, None, None)
    from scipy.special import stdtrit  # scipy.stats has the same one, and takes half a second more to import

    half = float(stdtrit(count - 1, 0.975)) * statistics.stdev(values) / math.sqrt(count)
    low, high = centre - half, centre + half
    return MeanEstimate(centre, count, half, (max(0.0, low), min(1.0, high)) if is_fraction else (low, high))


@dataclass(frozen=True)
class SeedGroup:
    """Points that differ in seeds alone."""

    number: int
    """from 1, in the order of the points"""
    name: str
    """by what was swept besides seeds; empty if nothing was"""
    swept: Mapping[str, str]
    """as of a row, without seeds"""
    results: tuple[JobResult, ...]

    @property
    def num_jobs(self) -> int:
        """Points in it."""
        return len(self.results)

    @property
    def outcome_counts(self) -> Mapping[Outcome, int]:
        """How many became what."""
        return Counter(row.became for row in self.results)

    @property
    def batch_size(self) -> int | None:
        """What was swept, if it was and is a number."""
        text = self.swept.get(BATCH_SIZE, "")
        return int(text) if re.fullmatch("[1-9][0-9_]{0,8}", text) and text[-1] != "_" else None

    @property
    def on_gpu(self) -> bool:
        """Whether what was measured is a card's memory, and can stand beside what was foretold."""
        return all(row.device.startswith("cuda") for row in self.results)

    @cached_property
    def metrics(self) -> Mapping[str, MeanEstimate]:
        """The mean of each figure over the finished points that have it."""
        found = {}
        for name in METRICS:
            values = [getattr(row, name) for row in self.results if row.became == "finished"]
            if known := [value for value in values if value is not None]:
                found[name] = estimate_mean(known, name in FRACTION_METRICS)
        return found

    @property
    def predicted_mib(self) -> MiBRange | None:
        """What was foretold, from the least of any point to the most."""
        return _bounding_range(row.predicted_mib for row in self.results)

    @property
    def budget_mib(self) -> MiBRange | None:
        """What there is, as far as the points know it."""
        return _bounding_range(row.budget_mib for row in self.results)

    @property
    def fits(self) -> Fits | None:
        """What holds for all of its points; None: nobody says how much memory there is."""
        answers = {effective_fits(row) for row in self.results}
        order: tuple[Fits | None, ...] = ("does not fit", "unsure", None, "fits")
        return next(answer for answer in order if answer in answers)

    @property
    def is_recommendable(self) -> bool:
        """Whether all of its points fit; where nobody says how much there is, what finished did."""
        return all(
            effective_fits(row) == "fits" or (row.budget_mib is None and row.became == "finished")
            for row in self.results
        )

    @property
    def status(self) -> str:
        """What became of its points."""
        if self.num_jobs == 1:
            error = self.results[0].error if self.results[0].became == "failed" else None
            return (
                f"{format_status(self.results[0])}{f': {truncate(error, MAX_ERROR_LENGTH)}' if error else ''}"
            )
        return ", ".join(
            f"{number} {word}" for word, number in Counter(map(format_status, self.results)).items()
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; an interval is a list of two."""
        return {
            "number": self.number,
            "name": self.name,
            "swept": dict(self.swept),
            "points": [row.number for row in self.results],
            "became": dict(self.outcome_counts),
            "fits": self.fits,
            "predicted_mib": None if self.predicted_mib is None else list(self.predicted_mib),
            "figures": {
                name: found._asdict() | {"interval": None if found.interval is None else list(found.interval)}
                for name, found in self.metrics.items()
            },
        }


def group_over_seeds(results: Sequence[JobResult]) -> tuple[SeedGroup, ...]:
    """The groups, in the order of their first points."""
    found: dict[tuple[tuple[str, str], ...], list[JobResult]] = {}
    for row in results:
        key = tuple((key, value) for key, value in row.swept.items() if key not in SEEDS)
        found.setdefault(key, []).append(row)
    shorter = shorten_keys({key: None for row in results for key in row.swept})
    return tuple(
        SeedGroup(number, format_job(dict(key), shorter), dict(key), tuple(members))
        for number, (key, members) in enumerate(found.items(), 1)
    )


def effective_fits(result: JobResult) -> Fits | None:
    """What a card showed; else what was foretold; None: nobody says how much memory there is."""
    if result.became == "oom":
        return "does not fit"
    if result.became == "unfit":
        return "unsure" if result.fits == "unsure" else "does not fit"
    room, measured = result.budget_mib, result.measured_mib
    if room is None:
        return None
    if result.became == "finished" and result.device.startswith("cuda") and measured is not None:
        if measured <= room.min:
            return "fits"
        if measured > room.max:
            return "does not fit"
    return result.fits


def format_status(result: JobResult) -> str:
    """What became of a point, in a word or two."""
    if result.became == "unfit":
        return "unsure" if result.fits == "unsure" else "does not fit"
    word = "FAILED" if result.became == "failed" else result.became
    micro, whole = result.micro_batch_size, result.batch_size
    split = micro is not None and (whole is None or micro < whole)
    return f"{word} (split to {micro:,})" if split else word


def shorten_keys(keys: Iterable[str]) -> dict[str, str]:
    """Each key's last part, or all of the key where another one ends the same."""
    last = {key: key.rpartition(".")[2] for key in keys}
    times = Counter(last.values())
    return {key: ending if times[ending] == 1 else key for key, ending in last.items()}


def format_job(swept: Mapping[str, str], short_keys: Mapping[str, str]) -> str:
    """What was swept, as in batch_size=64 model=compact; on one line, a long value without its middle."""
    return " ".join(f"{short_keys[key]}={truncate(value)}" for key, value in swept.items())


def truncate(text: str, max_length: int = MAX_VALUE_LENGTH) -> str:
    """The text on one line, without its middle where it is longer."""
    text = escape_unprintable(text)
    kept = (max_length - 1) // 2
    return text if len(text) <= max_length else f"{text[:kept]}…{text[-kept:]}"


def _bounding_range(intervals: Iterable[MiBRange | None]) -> MiBRange | None:
    known = [each for each in intervals if each is not None]
    return MiBRange(min(each.min for each in known), max(each.max for each in known)) if known else None
