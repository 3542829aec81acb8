"""Summarize the results of a sweep for files, MLflow and the terminal."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

from captcha_exp.sweep import tables
from captcha_exp.sweep.aggregate import METRICS, SeedGroup, group_over_seeds, swept_keys
from captcha_exp.sweep.conclusions import count_outcomes, draw_conclusions
from captcha_exp.sweep.results import JobResult

FAILURES = ("failed", "killed", "not run")
"""outcomes without a result; running out of memory is a result, an error is not"""


class SweepSummary:
    """Groups, conclusions and tables of the results of a sweep.

    A metric that is NaN or infinite counts as missing.
    """

    def __init__(self, results: Sequence[JobResult], parallelism: int = 1) -> None:
        self.results = tuple(_drop_non_finite(result) for result in results)
        self.parallelism = parallelism

    @cached_property
    def groups(self) -> tuple[SeedGroup, ...]:
        """The results, grouped over seeds."""
        return group_over_seeds(self.results)

    @cached_property
    def conclusions(self) -> tuple[str, ...]:
        """One line each."""
        return draw_conclusions(self.groups, self.parallelism)

    @property
    def has_failures(self) -> bool:
        """Whether a job has no result."""
        return any(result.outcome in FAILURES for result in self.results)

    @property
    def title(self) -> str:
        """The swept keys and the number of jobs per outcome."""
        swept = ", ".join(swept_keys(self.results)) or "nothing"
        return f"sweep over {swept}: {count_outcomes(self.groups)}"

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; a range or an interval is a tuple, in JSON a list of two numbers."""
        return {
            "title": self.title,
            "conclusions": list(self.conclusions),
            "parallelism": self.parallelism,
            "groups": [group.to_json() for group in self.groups],
            "jobs": [asdict(result) for result in self.results],
        }

    def to_csv(self) -> str:
        """Return one CSV row per job; see `tables.to_csv`."""
        return tables.to_csv(self.results)

    def to_markdown(self) -> str:
        """Return the title, a table of the groups, and the conclusions."""
        return tables.to_markdown(self.title, self.groups, self.conclusions)


def _drop_non_finite(result: JobResult) -> JobResult:
    """Replace NaN and infinite metrics, which can be neither compared nor written as JSON, by None."""
    non_finite: dict[str, Any] = {
        name: None for name in METRICS if not math.isfinite(getattr(result, name) or 0)
    }
    return replace(result, **non_finite)
