"""What is made of the points of a sweep, and how files, MLflow and a person have it."""

import math
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import Any

from captcha_exp.memory.interval import Between
from captcha_exp.sweep import tables
from captcha_exp.sweep.aggregate import FIGURES, Group, grouped
from captcha_exp.sweep.conclusions import batch_was_swept, by_others, counted, sentences
from captcha_exp.sweep.results import Row

LONGEST_ENDING = 120  # characters of a metric's name, which MLflow ends at 250
_ODD_IN_METRIC = re.compile(r"[^A-Za-z0-9_. -]")


class Verdict:
    """The points of a sweep taken together.

    A figure that is no number (NaN, infinite) counts as one that is not there.
    """

    def __init__(self, rows: Sequence[Row], side_by_side: int = 1) -> None:
        """`side_by_side` points ran at a time."""
        self.rows = tuple(_without_odd_numbers(row) for row in rows)
        self.side_by_side = side_by_side

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Points that differ in seeds alone, together."""
        return grouped(self.rows)

    @cached_property
    def sentences(self) -> tuple[str, ...]:
        """What follows, a line each."""
        return sentences(self.groups, self.side_by_side)

    @property
    def failed(self) -> bool:
        """Whether a point has no result: too little memory is one, an error is none."""
        return any(row.became in ("failed", "killed", "not run") for row in self.rows)

    @property
    def title(self) -> str:
        """What was swept, and how many points became what."""
        return f"sweep of {', '.join(tables.keys(self.rows)) or 'nothing'}: {counted(self.groups)}"

    def to_json(self) -> dict[str, Any]:
        """Plain values; an interval is a list of two."""
        return {
            "title": self.title,
            "sentences": list(self.sentences),
            "side_by_side": self.side_by_side,
            "groups": [group.to_json() for group in self.groups],
            "points": [tables.plain(row) for row in self.rows],
        }

    def to_csv(self) -> str:
        """A line for each point; see `tables.csv_of`."""
        return tables.csv_of(self.rows)

    def to_markdown(self) -> str:
        """The title, a table of the groups, and the sentences."""
        return tables.markdown_of(self.title, self.groups, self.sentences)

    def figures(self) -> list[tuple[int, dict[str, float]]]:
        """(step, metrics) for the run of the sweep: the counts at step 0, then each group's figures.

        The step is the batch size, if that was swept and is a number everywhere; what else was swept then
        ends a metric's name. Otherwise it is the group's number.
        """
        steps = {0: self._counts()}
        if batch_was_swept(self.groups):
            lines = by_others(self.groups)
            for ending, (_, groups) in zip(_endings([name for name, _ in lines]), lines, strict=True):
                for group in groups:
                    steps.setdefault(group.batch_size or 0, {}).update(_metrics(group, ending))
        else:
            steps |= {group.number: _metrics(group) for group in self.groups}
        return sorted(steps.items())

    def _counts(self) -> dict[str, float]:
        became = [row.became for row in self.rows]
        return {
            "sweep/points": float(len(became)),
            "sweep/finished": float(became.count("finished")),
            "sweep/oom": float(became.count("oom")),
            "sweep/unfit": float(became.count("unfit")),
            "sweep/failed": float(sum(became.count(kind) for kind in ("failed", "killed", "not run"))),
        }


def _without_odd_numbers(row: Row) -> Row:
    """The row without what is NaN or infinite, which can be neither compared nor written as JSON."""
    odd: dict[str, Any] = {}
    for field in fields(Row):
        value = getattr(row, field.name)
        numbers = value if isinstance(value, Between) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            odd[field.name] = None
    return replace(row, **odd)


def _metrics(group: Group, ending: str = "") -> dict[str, float]:
    found = {f"sweep/{name}{ending}": group.figures[name].value for name in FIGURES if name in group.figures}
    if group.predicted_mib is not None:
        found[f"sweep/predicted_mib{ending}"] = group.predicted_mib.most
    return found


def _endings(names: Sequence[str]) -> list[str]:
    """The names as MLflow takes them at the end of a metric's, each another one."""
    endings: list[str] = []
    for number, name in enumerate(names, 1):
        ending = f"/{_ODD_IN_METRIC.sub('_', name)[:LONGEST_ENDING]}" if name else ""
        endings.append(f"{ending}/{number}" if ending in endings else ending)
    return endings
