"""Group the jobs of a sweep that differ only in their seeds, and average their metrics."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from captcha_exp.memory.interval import Fits, MiBRange
from captcha_exp.runtime.text import escape_unprintable
from captcha_exp.sweep.record import shorten_keys
from captcha_exp.sweep.results import JobResult, Outcome

SEEDS = ("seed", "data.seed", "data.split_seed")
BATCH_SIZE = "train.batch_size"
METRICS = ("val_accuracy", "test_accuracy", "images_per_second", "seconds_to_best", "measured_mib")
FRACTION_METRICS = ("val_accuracy", "test_accuracy")
"""metrics whose interval is clipped to [0, 1]"""
MAX_VALUE_LENGTH = 40  # characters of a value in a name
MAX_ERROR_LENGTH = 60  # characters in a table; the full error is printed below it


class MeanEstimate(NamedTuple):
    """Mean of one metric over several jobs, with its 95 % confidence interval."""

    value: float
    num_jobs: int
    half_width: float | None
    """of the interval; None for a single job"""
    interval: tuple[float, float] | None
    """95 %, by Student's t; None for a single job"""


def estimate_mean(values: Sequence[float], is_fraction: bool = False) -> MeanEstimate:
    """Return the mean of at least one value with its 95 % interval, clipped to [0, 1] for a fraction."""
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return MeanEstimate(mean, 1, None, None)
    from scipy.special import stdtrit  # importing scipy.stats takes half a second longer

    half_width = float(stdtrit(count - 1, 0.975)) * statistics.stdev(values) / math.sqrt(count)
    low, high = mean - half_width, mean + half_width
    interval = (max(0.0, low), min(1.0, high)) if is_fraction else (low, high)
    return MeanEstimate(mean, count, half_width, interval)


@dataclass(frozen=True)
class SeedGroup:
    """Jobs that differ only in their seeds."""

    number: int
    """from 1, in the order of the jobs"""
    name: str
    """the swept overrides without seeds; empty if only seeds were swept"""
    swept: Mapping[str, str]
    """as in `JobResult`, without seeds"""
    results: tuple[JobResult, ...]

    @property
    def outcome_counts(self) -> Mapping[Outcome, int]:
        """Number of jobs per outcome."""
        return Counter(result.outcome for result in self.results)

    @property
    def batch_size(self) -> int | None:
        """The swept batch size; None if it was not swept or is not a number."""
        text = self.swept.get(BATCH_SIZE, "")
        return int(text) if re.fullmatch("[1-9][0-9_]{0,8}", text) and text[-1] != "_" else None

    @property
    def on_gpu(self) -> bool:
        """Whether the measured memory is GPU memory, and so comparable to the prediction."""
        return all(result.device.startswith("cuda") for result in self.results)

    @property
    def finished(self) -> tuple[JobResult, ...]:
        """Its finished jobs."""
        return tuple(result for result in self.results if result.outcome == "finished")

    @property
    def is_disturbed(self) -> bool:
        """Whether the speed of each finished job was disturbed."""
        return bool(self.finished) and all(result.disturbed for result in self.finished)

    @cached_property
    def metrics(self) -> Mapping[str, MeanEstimate]:
        """The mean of each metric over the finished jobs that have it; of the speed over the undisturbed ones
        if there are any."""
        estimates = {}
        for name in METRICS:
            is_believed = name != "images_per_second" or self.is_disturbed
            results = [result for result in self.finished if is_believed or not result.disturbed]
            values = [getattr(result, name) for result in results]
            if known := [value for value in values if value is not None]:
                estimates[name] = estimate_mean(known, name in FRACTION_METRICS)
        return estimates

    @property
    def predicted_mib(self) -> MiBRange | None:
        """The range that covers the predictions of all jobs."""
        return _bounding_range(result.predicted_mib for result in self.results)

    @property
    def budget_mib(self) -> MiBRange | None:
        """The range that covers the memory budgets of all jobs; None if none is known."""
        return _bounding_range(result.budget_mib for result in self.results)

    @property
    def fits(self) -> Fits | None:
        """The least favorable verdict of its jobs; None if no memory budget is known."""
        answers = {effective_fits(result) for result in self.results}
        order: tuple[Fits | None, ...] = ("does not fit", "unsure", None, "fits")
        return next(answer for answer in order if answer in answers)

    @property
    def is_recommendable(self) -> bool:
        """Whether all of its jobs fit; without a known budget, a finished job counts as fitting."""
        return all(
            effective_fits(result) == "fits" or (result.budget_mib is None and result.outcome == "finished")
            for result in self.results
        )

    @property
    def status(self) -> str:
        """The status of its jobs, as in "2 finished, 1 killed"; a single failed job with its error."""
        if len(self.results) == 1:
            (result,) = self.results
            error = result.error if result.outcome == "failed" else None
            return f"{format_status(result)}{f': {truncate(error, MAX_ERROR_LENGTH)}' if error else ''}"
        counts = Counter(map(format_status, self.results))
        return ", ".join(f"{count} {status}" for status, count in counts.items())

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; a range or an interval is a tuple, in JSON a list of two numbers."""
        return {
            "number": self.number,
            "name": self.name,
            "swept": self.swept,
            "jobs": [result.number for result in self.results],
            "outcomes": self.outcome_counts,
            "fits": self.fits,
            "predicted_mib": self.predicted_mib,
            "metrics": {name: mean._asdict() for name, mean in self.metrics.items()},
            "disturbed": self.is_disturbed,
        }


Member = TypeVar("Member", JobResult, SeedGroup)


def group_by_swept(
    members: Iterable[Member], ignored_keys: Sequence[str]
) -> list[tuple[dict[str, str], list[Member]]]:
    """Group by the swept overrides without some keys, in the order of each group's first member."""
    groups: dict[tuple[tuple[str, str], ...], list[Member]] = {}
    for member in members:
        rest = tuple((key, value) for key, value in member.swept.items() if key not in ignored_keys)
        groups.setdefault(rest, []).append(member)
    return [(dict(rest), found) for rest, found in groups.items()]


def group_over_seeds(results: Sequence[JobResult]) -> tuple[SeedGroup, ...]:
    """Group the results by everything swept except seeds, in the order of each group's first job."""
    short_keys = shorten_keys(swept_keys(results))
    return tuple(
        SeedGroup(number, format_job(swept, short_keys), swept, tuple(members))
        for number, (swept, members) in enumerate(group_by_swept(results, SEEDS), 1)
    )


def swept_keys(results: Iterable[JobResult]) -> tuple[str, ...]:
    """Return the swept keys in the order of the command."""
    return tuple({key: None for result in results for key in result.swept})


def effective_fits(result: JobResult) -> Fits | None:
    """Return the measured verdict if available, else the predicted one; None if no budget is known."""
    if result.outcome == "oom":
        return "does not fit"
    if result.outcome == "skipped":
        return "unsure" if result.fits == "unsure" else "does not fit"
    budget, measured = result.budget_mib, result.measured_mib
    if budget is None:
        return None
    if result.outcome == "finished" and result.device.startswith("cuda") and measured is not None:
        if measured <= budget.min:
            return "fits"
        if measured > budget.max:
            return "does not fit"
    return result.fits


def format_status(result: JobResult) -> str:
    """Return the status of a job for a table, as in "finished (split to 16)"."""
    if result.outcome == "skipped":
        return "unsure" if result.fits == "unsure" else "does not fit"
    status = "FAILED" if result.outcome == "failed" else result.outcome
    micro, full = result.micro_batch_size, result.batch_size
    is_split = micro is not None and (full is None or micro < full)
    return f"{status} (split to {micro:,})" if is_split else status


def format_job(swept: Mapping[str, str], short_keys: Mapping[str, str]) -> str:
    """Return the swept overrides on one line, as in "batch_size=64 model=compact"; truncate long values."""
    return " ".join(f"{short_keys[key]}={truncate(value)}" for key, value in swept.items())


def format_number(value: float) -> str:
    """Format a number with two digits, a larger one without decimals."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def truncate(text: str, max_length: int = MAX_VALUE_LENGTH) -> str:
    """Return the text on one line; replace the middle of a longer one by an ellipsis."""
    text = escape_unprintable(text)
    num_kept = (max_length - 1) // 2
    return text if len(text) <= max_length else f"{text[:num_kept]}…{text[-num_kept:]}"


def _bounding_range(ranges: Iterable[MiBRange | None]) -> MiBRange | None:
    known = [each for each in ranges if each is not None]
    return MiBRange(min(each.min for each in known), max(each.max for each in known)) if known else None
