"""Points of a sweep that differ in seeds alone, taken together."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from captcha_exp.memory.interval import Between, Fits
from captcha_exp.runtime.console import shown
from captcha_exp.sweep.results import Became, Row

SEEDS = ("seed", "data.seed", "data.split_seed")
BATCH_SIZE = "train.batch_size"
FIGURES = ("val_accuracy", "test_accuracy", "pictures_per_second", "seconds_to_best", "measured_mib")
SHARES = ("val_accuracy", "test_accuracy")  # they end at 0 and 1, and so does what may be their mean
LONGEST_VALUE = 40  # characters of a value in a name
LONGEST_ERROR = 60  # in a table, which names it; what tells it all stands beside


class Mean(NamedTuple):
    """The mean of one figure, and how well that many points know it."""

    value: float
    points: int
    half: float | None
    """of the 95 % interval; None for one point, which does not know"""
    interval: tuple[float, float] | None
    """95 %, by Student's t"""


def mean(values: Sequence[float], is_share: bool = False) -> Mean:
    """The mean of at least one value; the interval of a share ends at 0 and 1."""
    centre, count = statistics.fmean(values), len(values)
    if count == 1:
        return Mean(centre, 1, None, None)
    from scipy.special import stdtrit  # scipy.stats has the same one, and takes half a second more to import

    half = float(stdtrit(count - 1, 0.975)) * statistics.stdev(values) / math.sqrt(count)
    low, high = centre - half, centre + half
    return Mean(centre, count, half, (max(0.0, low), min(1.0, high)) if is_share else (low, high))


@dataclass(frozen=True)
class Group:
    """Points that differ in seeds alone."""

    number: int
    """from 1, in the order of the points"""
    name: str
    """by what was swept besides seeds; empty if nothing was"""
    swept: Mapping[str, str]
    """as of a row, without seeds"""
    rows: tuple[Row, ...]

    @property
    def count(self) -> int:
        """Points in it."""
        return len(self.rows)

    @property
    def became(self) -> Mapping[Became, int]:
        """How many became what."""
        return Counter(row.became for row in self.rows)

    @property
    def batch_size(self) -> int | None:
        """What was swept, if it was and is a number."""
        text = self.swept.get(BATCH_SIZE, "")
        return int(text) if re.fullmatch("[1-9][0-9_]{0,8}", text) and text[-1] != "_" else None

    @property
    def on_card(self) -> bool:
        """Whether what was measured is a card's memory, and can stand beside what was foretold."""
        return all(row.device.startswith("cuda") for row in self.rows)

    @cached_property
    def figures(self) -> Mapping[str, Mean]:
        """The mean of each figure over the finished points that have it."""
        found = {}
        for name in FIGURES:
            values = [getattr(row, name) for row in self.rows if row.became == "finished"]
            if known := [value for value in values if value is not None]:
                found[name] = mean(known, name in SHARES)
        return found

    @property
    def predicted_mib(self) -> Between | None:
        """What was foretold, from the least of any point to the most."""
        return _around(row.predicted_mib for row in self.rows)

    @property
    def budget_mib(self) -> Between | None:
        """What there is, as far as the points know it."""
        return _around(row.budget_mib for row in self.rows)

    @property
    def fits(self) -> Fits | None:
        """What holds for all of its points; None: nobody says how much memory there is."""
        answers = {fits_of(row) for row in self.rows}
        order: tuple[Fits | None, ...] = ("does not fit", "unsure", None, "fits")
        return next(answer for answer in order if answer in answers)

    @property
    def can_be_taken(self) -> bool:
        """Whether all of its points fit; where nobody says how much there is, what finished did."""
        return all(
            fits_of(row) == "fits" or (row.budget_mib is None and row.became == "finished")
            for row in self.rows
        )

    @property
    def status(self) -> str:
        """What became of its points."""
        if self.count == 1:
            error = self.rows[0].error if self.rows[0].became == "failed" else None
            return f"{status_of(self.rows[0])}{f': {shortened(error, LONGEST_ERROR)}' if error else ''}"
        return ", ".join(f"{number} {word}" for word, number in Counter(map(status_of, self.rows)).items())

    def to_json(self) -> dict[str, Any]:
        """Plain values; an interval is a list of two."""
        return {
            "number": self.number,
            "name": self.name,
            "swept": dict(self.swept),
            "points": [row.number for row in self.rows],
            "became": dict(self.became),
            "fits": self.fits,
            "predicted_mib": None if self.predicted_mib is None else list(self.predicted_mib),
            "figures": {
                name: found._asdict() | {"interval": None if found.interval is None else list(found.interval)}
                for name, found in self.figures.items()
            },
        }


def grouped(rows: Sequence[Row]) -> tuple[Group, ...]:
    """The groups, in the order of their first points."""
    found: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in rows:
        key = tuple((key, value) for key, value in row.swept.items() if key not in SEEDS)
        found.setdefault(key, []).append(row)
    shorter = short_names({key: None for row in rows for key in row.swept})
    return tuple(
        Group(number, named(dict(key), shorter), dict(key), tuple(members))
        for number, (key, members) in enumerate(found.items(), 1)
    )


def fits_of(row: Row) -> Fits | None:
    """What a card showed; else what was foretold; None: nobody says how much memory there is."""
    if row.became == "oom":
        return "does not fit"
    if row.became == "unfit":
        return "unsure" if row.fits == "unsure" else "does not fit"
    room, measured = row.budget_mib, row.measured_mib
    if room is None:
        return None
    if row.became == "finished" and row.device.startswith("cuda") and measured is not None:
        if measured <= room.least:
            return "fits"
        if measured > room.most:
            return "does not fit"
    return row.fits


def status_of(row: Row) -> str:
    """What became of a point, in a word or two."""
    if row.became == "unfit":
        return "unsure" if row.fits == "unsure" else "does not fit"
    word = "FAILED" if row.became == "failed" else row.became
    micro, whole = row.micro_batch_size, row.batch_size
    split = micro is not None and (whole is None or micro < whole)
    return f"{word} (split to {micro:,})" if split else word


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Each key's last part, or all of the key where another one ends the same."""
    last = {key: key.rpartition(".")[2] for key in keys}
    times = Counter(last.values())
    return {key: ending if times[ending] == 1 else key for key, ending in last.items()}


def named(swept: Mapping[str, str], shorter: Mapping[str, str]) -> str:
    """What was swept, as in batch_size=64 model=compact; on one line, a long value without its middle."""
    return " ".join(f"{shorter[key]}={shortened(value)}" for key, value in swept.items())


def shortened(text: str, most: int = LONGEST_VALUE) -> str:
    """The text on one line, without its middle where it is longer."""
    text = shown(text)
    kept = (most - 1) // 2
    return text if len(text) <= most else f"{text[:kept]}…{text[-kept:]}"


def _around(intervals: Iterable[Between | None]) -> Between | None:
    known = [each for each in intervals if each is not None]
    return Between(min(each.least for each in known), max(each.most for each in known)) if known else None
