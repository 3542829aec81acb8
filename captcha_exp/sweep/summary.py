"""Summarize the results of a sweep for files, MLflow and the terminal."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

from captcha_exp.sweep import tables
from captcha_exp.sweep.aggregate import METRICS, SeedGroup, group_over_seeds, swept_keys
from captcha_exp.sweep.conclusions import count_outcomes, draw_conclusions, group_by_rest, is_batch_size_sweep
from captcha_exp.sweep.results import JobResult

MAX_SUFFIX_LENGTH = 120  # characters; MLflow limits the name of a metric to 250
FAILURES = ("failed", "killed", "not run")
"""outcomes without a result; running out of memory is a result, an error is not"""
_INVALID_METRIC_CHARS = re.compile(r"[^A-Za-z0-9_. -]")


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

    def metrics_by_step(self) -> list[tuple[int, dict[str, float]]]:
        """Return (step, metrics) for the MLflow parent run: counts at step 0, then the metrics per group.

        In a sweep of the batch size, the step is the batch size, and the other swept overrides become a
        suffix of the metric's name. Otherwise the step is the number of the group.
        """
        steps = {0: self._counts()}
        if is_batch_size_sweep(self.groups):
            parts = group_by_rest(self.groups)
            suffixes = _metric_suffixes([name for name, _ in parts])
            for suffix, (_, groups) in zip(suffixes, parts, strict=True):
                for group in groups:
                    steps.setdefault(group.batch_size or 0, {}).update(_metrics(group, suffix))
        else:
            steps |= {group.number: _metrics(group) for group in self.groups}
        return sorted(steps.items())

    def _counts(self) -> dict[str, float]:
        outcomes = ("failed" if each.outcome in FAILURES else each.outcome for each in self.results)
        counts: Counter[str] = Counter(outcomes)
        kinds = ("finished", "oom", "skipped", "failed")
        return {"sweep/jobs": float(counts.total())} | {
            f"sweep/{kind}": float(counts[kind]) for kind in kinds
        }


def _drop_non_finite(result: JobResult) -> JobResult:
    """Replace NaN and infinite metrics, which can be neither compared nor written as JSON, by None."""
    non_finite: dict[str, Any] = {
        name: None for name in METRICS if not math.isfinite(getattr(result, name) or 0)
    }
    return replace(result, **non_finite)


def _metrics(group: SeedGroup, suffix: str = "") -> dict[str, float]:
    metrics = {
        f"sweep/{name}{suffix}": group.metrics[name].value for name in METRICS if name in group.metrics
    }
    if group.predicted_mib is not None:
        metrics[f"sweep/predicted_mib{suffix}"] = group.predicted_mib.max
    return metrics


def _metric_suffixes(names: Sequence[str]) -> list[str]:
    """Return unique suffixes of metric names that MLflow accepts."""
    suffixes: list[str] = []
    for number, name in enumerate(names, 1):
        suffix = f"/{_INVALID_METRIC_CHARS.sub('_', name)[:MAX_SUFFIX_LENGTH]}" if name else ""
        suffixes.append(f"{suffix}/{number}" if suffix in suffixes else suffix)
    return suffixes
