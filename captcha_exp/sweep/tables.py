"""The points of a sweep as tables: CSV for programs, Markdown for MLflow, cells for the terminal."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from captcha_exp.memory.interval import MiBRange
from captcha_exp.runtime.console import escape_unprintable
from captcha_exp.sweep.aggregate import SEEDS, MeanEstimate, SeedGroup, shorten_keys, truncate
from captcha_exp.sweep.results import JobResult

HEADERS = ("predicted MiB", "measured MiB", "fits", "images/s", "validation", "seconds to it", "status")
"""of what a person reads, behind what was swept"""
_RANGE_FIELDS = ("budget_mib", "predicted_mib")
_MARKDOWN_SPECIAL = re.compile(r"[\\`*_{}\[\]#|~]")
_HTML_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;"}


def swept_keys(results: Sequence[JobResult]) -> tuple[str, ...]:
    """What was swept, in the order of the command."""
    return tuple({key: None for row in results for key in row.swept})


def result_to_dict(result: JobResult) -> dict[str, Any]:
    """The row as JSON has it; an interval is a list of two."""
    found: dict[str, Any] = {}
    for field in fields(JobResult):
        value = getattr(result, field.name)
        match value:
            case MiBRange():
                value = list(value)
            case Mapping():
                value = dict(value)
        found[field.name] = value
    return found


def to_csv(results: Sequence[JobResult]) -> str:
    """A line for each point, what was swept first; an interval is two columns, nothing an empty cell.

    A column of ours is called point.NAME where NAME was swept.
    """
    swept = swept_keys(results)
    ours = {column: f"point.{column}" if column in swept else column for column in _columns()}
    text = io.StringIO()
    writer = csv.DictWriter(text, [*swept, *ours.values()])  # its line ends make it quote \r as well as \n
    writer.writeheader()
    for row in results:
        cells = {ours[column]: value for column, value in _cells(row).items()}
        writer.writerow({**row.swept, **cells})
    return text.getvalue().encode("utf-8", "backslashreplace").decode()  # half a character cannot be written


def _columns() -> list[str]:
    return [
        column
        for field in fields(JobResult)
        if field.name != "swept"
        for column in (_bound_columns(field.name) if field.name in _RANGE_FIELDS else [field.name])
    ]


def _cells(row: JobResult) -> dict[str, Any]:
    """Column -> value, an interval as two."""
    values = result_to_dict(row)
    for name in _RANGE_FIELDS:
        values.update(zip(_bound_columns(name), values[name] or [None, None], strict=True))
    return {column: values[column] for column in _columns()}


def _bound_columns(name: str) -> list[str]:
    return [name.replace("_mib", "_least_mib"), name.replace("_mib", "_most_mib")]


def to_markdown(title: str, groups: Sequence[SeedGroup], conclusions: Sequence[str]) -> str:
    """The title, a line for each group, a list of the sentences; values stand as they are."""
    heads, lines = build_table(groups)
    table = [heads, *lines]
    text = [_markdown_row([_escape_markdown(cell) for cell in line]) for line in table]
    text.insert(1, _markdown_row(["---"] * len(heads)))
    return "\n".join(
        [
            f"**{_escape_markdown(title)}**",
            "",
            *text,
            "",
            *(f"- {_escape_markdown(line)}" for line in conclusions),
        ]
    )


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape_markdown(text: str) -> str:
    text = _MARKDOWN_SPECIAL.sub(r"\\\g<0>", escape_unprintable(text))
    return "".join(_HTML_ENTITIES.get(character, character) for character in text)


def build_table(groups: Sequence[SeedGroup]) -> tuple[list[str], list[list[str]]]:
    """Heads, and a line for each group, that a person reads; what became of it stands last."""
    swept = swept_keys([row for group in groups for row in group.results])
    shorter = shorten_keys(swept)
    columns = [key for key in swept if key not in SEEDS]
    several = any(group.num_jobs > 1 for group in groups)
    on_card = {group.on_gpu for group in groups if "measured_mib" in group.metrics}
    kind = "" if len(on_card) != 1 else " (card)" if on_card == {True} else " (RAM)"
    heads = [escape_unprintable(shorter[key]) for key in columns]
    heads += ["points"] * several
    heads += [head + kind if head == "measured MiB" else head for head in HEADERS]
    lines = []
    for group in groups:
        found = group.metrics
        place = "" if kind else " (card)" if group.on_gpu else " (RAM)"
        lines.append(
            [
                *(truncate(group.swept.get(key, "")) for key in columns),
                *([str(group.num_jobs)] * several),
                str(group.predicted_mib or ""),
                _format_number(found.get("measured_mib"), place),
                group.fits or "",
                _format_number(found.get("images_per_second")),
                _format_fraction(found.get("val_accuracy")),
                _format_number(found.get("seconds_to_best")),
                group.status,
            ]
        )
    return heads, lines


def _format_number(found: MeanEstimate | None, after: str = "") -> str:
    if found is None:
        return ""
    return f"{found.value:,.0f}{after}" if found.value >= 10 else f"{found.value:.2g}{after}"


def _format_fraction(found: MeanEstimate | None) -> str:
    if found is None:
        return ""
    return f"{found.value:.2%}" if found.half is None else f"{found.value:.2%} ± {found.half:.2%}"
