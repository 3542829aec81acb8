"""What is made of the points of a sweep, and how files, MLflow and a person have it."""

import math
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import Any

from captcha_exp.memory.interval import MiBRange
from captcha_exp.sweep import tables
from captcha_exp.sweep.aggregate import METRICS, SeedGroup, group_over_seeds
from captcha_exp.sweep.conclusions import count_outcomes, draw_conclusions, group_by_rest, is_batch_size_sweep
from captcha_exp.sweep.results import JobResult

MAX_SUFFIX_LENGTH = 120  # characters of a metric's name, which MLflow ends at 250
_INVALID_METRIC_CHARS = re.compile(r"[^A-Za-z0-9_. -]")


class SweepSummary:
    """The points of a sweep taken together.

    A figure that is no number (NaN, infinite) counts as one that is not there.
    """

    def __init__(self, results: Sequence[JobResult], parallelism: int = 1) -> None:
        """`side_by_side` points ran at a time."""
        self.results = tuple(_drop_non_finite(row) for row in results)
        self.parallelism = parallelism

    @cached_property
    def groups(self) -> tuple[SeedGroup, ...]:
        """Points that differ in seeds alone, together."""
        return group_over_seeds(self.results)

    @cached_property
    def conclusions(self) -> tuple[str, ...]:
        """What follows, a line each."""
        return draw_conclusions(self.groups, self.parallelism)

    @property
    def has_failures(self) -> bool:
        """Whether a point has no result: too little memory is one, an error is none."""
        return any(row.became in ("failed", "killed", "not run") for row in self.results)

    @property
    def title(self) -> str:
        """What was swept, and how many points became what."""
        swept = ", ".join(tables.swept_keys(self.results)) or "nothing"
        return f"sweep of {swept}: {count_outcomes(self.groups)}"

    def to_json(self) -> dict[str, Any]:
        """Plain values; an interval is a list of two."""
        return {
            "title": self.title,
            "sentences": list(self.conclusions),
            "side_by_side": self.parallelism,
            "groups": [group.to_json() for group in self.groups],
            "points": [tables.result_to_dict(row) for row in self.results],
        }

    def to_csv(self) -> str:
        """A line for each point; see `tables.csv_of`."""
        return tables.to_csv(self.results)

    def to_markdown(self) -> str:
        """The title, a table of the groups, and the sentences."""
        return tables.to_markdown(self.title, self.groups, self.conclusions)

    def metrics_by_step(self) -> list[tuple[int, dict[str, float]]]:
        """(step, metrics) for the run of the sweep: the counts at step 0, then each group's figures.

        The step is the batch size, if that was swept and is a number everywhere; what else was swept then
        ends a metric's name. Otherwise it is the group's number.
        """
        steps = {0: self._counts()}
        if is_batch_size_sweep(self.groups):
            lines = group_by_rest(self.groups)
            for ending, (_, groups) in zip(_metric_suffixes([name for name, _ in lines]), lines, strict=True):
                for group in groups:
                    steps.setdefault(group.batch_size or 0, {}).update(_metrics(group, ending))
        else:
            steps |= {group.number: _metrics(group) for group in self.groups}
        return sorted(steps.items())

    def _counts(self) -> dict[str, float]:
        became = [row.became for row in self.results]
        return {
            "sweep/points": float(len(became)),
            "sweep/finished": float(became.count("finished")),
            "sweep/oom": float(became.count("oom")),
            "sweep/unfit": float(became.count("unfit")),
            "sweep/failed": float(sum(became.count(kind) for kind in ("failed", "killed", "not run"))),
        }


def _drop_non_finite(row: JobResult) -> JobResult:
    """The row without what is NaN or infinite, which can be neither compared nor written as JSON."""
    odd: dict[str, Any] = {}
    for field in fields(JobResult):
        value = getattr(row, field.name)
        numbers = value if isinstance(value, MiBRange) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            odd[field.name] = None
    return replace(row, **odd)


def _metrics(group: SeedGroup, suffix: str = "") -> dict[str, float]:
    found = {f"sweep/{name}{suffix}": group.metrics[name].value for name in METRICS if name in group.metrics}
    if group.predicted_mib is not None:
        found[f"sweep/predicted_mib{suffix}"] = group.predicted_mib.max
    return found


def _metric_suffixes(names: Sequence[str]) -> list[str]:
    """The names as MLflow takes them at the end of a metric's, each another one."""
    endings: list[str] = []
    for number, name in enumerate(names, 1):
        ending = f"/{_INVALID_METRIC_CHARS.sub('_', name)[:MAX_SUFFIX_LENGTH]}" if name else ""
        endings.append(f"{ending}/{number}" if ending in endings else ending)
    return endings
