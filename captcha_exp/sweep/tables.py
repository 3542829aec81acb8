"""The points of a sweep as tables: CSV for programs, Markdown for MLflow, cells for the terminal."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from captcha_exp.memory.interval import Between
from captcha_exp.runtime.console import shown
from captcha_exp.sweep.aggregate import SEEDS, Group, Mean, short_names, shortened
from captcha_exp.sweep.results import Row

HEADS = ("predicted MiB", "measured MiB", "fits", "pictures/s", "validation", "seconds to it", "status")
"""of what a person reads, behind what was swept"""
_INTERVALS = ("budget_mib", "predicted_mib")
_MARKDOWN = re.compile(r"[\\`*_{}\[\]#|~]")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;"}


def keys(rows: Sequence[Row]) -> tuple[str, ...]:
    """What was swept, in the order of the command."""
    return tuple({key: None for row in rows for key in row.swept})


def plain(row: Row) -> dict[str, Any]:
    """The row as JSON has it; an interval is a list of two."""
    found: dict[str, Any] = {}
    for field in fields(Row):
        value = getattr(row, field.name)
        match value:
            case Between():
                value = list(value)
            case Mapping():
                value = dict(value)
        found[field.name] = value
    return found


def csv_of(rows: Sequence[Row]) -> str:
    """A line for each point, what was swept first; an interval is two columns, nothing an empty cell.

    A column of ours is called point.NAME where NAME was swept.
    """
    swept = keys(rows)
    ours = {column: f"point.{column}" if column in swept else column for column in _columns()}
    text = io.StringIO()
    writer = csv.DictWriter(text, [*swept, *ours.values()])  # its line ends make it quote \r as well as \n
    writer.writeheader()
    for row in rows:
        cells = {ours[column]: value for column, value in _cells(row).items()}
        writer.writerow({**row.swept, **cells})
    return text.getvalue().encode("utf-8", "backslashreplace").decode()  # half a character cannot be written


def _columns() -> list[str]:
    return [
        column
        for field in fields(Row)
        if field.name != "swept"
        for column in (_bounds(field.name) if field.name in _INTERVALS else [field.name])
    ]


def _cells(row: Row) -> dict[str, Any]:
    """Column -> value, an interval as two."""
    values = plain(row)
    for name in _INTERVALS:
        values.update(zip(_bounds(name), values[name] or [None, None], strict=True))
    return {column: values[column] for column in _columns()}


def _bounds(name: str) -> list[str]:
    return [name.replace("_mib", "_least_mib"), name.replace("_mib", "_most_mib")]


def markdown_of(title: str, groups: Sequence[Group], sentences: Sequence[str]) -> str:
    """The title, a line for each group, a list of the sentences; values stand as they are."""
    heads, lines = cells_of(groups)
    table = [heads, *lines]
    text = [_table_line([_escaped(cell) for cell in line]) for line in table]
    text.insert(1, _table_line(["---"] * len(heads)))
    return "\n".join(
        [f"**{_escaped(title)}**", "", *text, "", *(f"- {_escaped(line)}" for line in sentences)]
    )


def _table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    text = _MARKDOWN.sub(r"\\\g<0>", shown(text))
    return "".join(_ENTITIES.get(character, character) for character in text)


def cells_of(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Heads, and a line for each group, that a person reads; what became of it stands last."""
    swept = keys([row for group in groups for row in group.rows])
    shorter = short_names(swept)
    columns = [key for key in swept if key not in SEEDS]
    several = any(group.count > 1 for group in groups)
    on_card = {group.on_card for group in groups if "measured_mib" in group.figures}
    kind = "" if len(on_card) != 1 else " (card)" if on_card == {True} else " (RAM)"
    heads = [shown(shorter[key]) for key in columns]
    heads += ["points"] * several
    heads += [head + kind if head == "measured MiB" else head for head in HEADS]
    lines = []
    for group in groups:
        found = group.figures
        place = "" if kind else " (card)" if group.on_card else " (RAM)"
        lines.append(
            [
                *(shortened(group.swept.get(key, "")) for key in columns),
                *([str(group.count)] * several),
                str(group.predicted_mib or ""),
                _number(found.get("measured_mib"), place),
                group.fits or "",
                _number(found.get("pictures_per_second")),
                _share(found.get("val_accuracy")),
                _number(found.get("seconds_to_best")),
                group.status,
            ]
        )
    return heads, lines


def _number(found: Mean | None, after: str = "") -> str:
    if found is None:
        return ""
    return f"{found.value:,.0f}{after}" if found.value >= 10 else f"{found.value:.2g}{after}"


def _share(found: Mean | None) -> str:
    if found is None:
        return ""
    return f"{found.value:.2%}" if found.half is None else f"{found.value:.2%} ± {found.half:.2%}"
