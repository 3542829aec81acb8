"""Format the results of a sweep: CSV for programs, Markdown for MLflow, cells for the terminal."""

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

HEADERS = ("predicted MiB", "measured MiB", "fits", "images/s", "validation", "seconds to best", "status")
"""columns of the Markdown and terminal tables after the swept keys"""
_RANGE_FIELDS = ("budget_mib", "predicted_mib")
_MARKDOWN_SPECIAL = re.compile(r"[\\`*_{}\[\]#|~]")
_HTML_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;"}


def swept_keys(results: Sequence[JobResult]) -> tuple[str, ...]:
    """Return the swept keys in the order of the command."""
    return tuple({key: None for result in results for key in result.swept})


def result_to_dict(result: JobResult) -> dict[str, Any]:
    """Return the result as JSON values; a range is a list of two numbers."""
    values: dict[str, Any] = {}
    for field in fields(JobResult):
        value = getattr(result, field.name)
        match value:
            case MiBRange():
                value = list(value)
            case Mapping():
                value = dict(value)
        values[field.name] = value
    return values


def to_csv(results: Sequence[JobResult]) -> str:
    """Return one row per job, the swept keys first; a range is two columns, None an empty cell.

    A result column that is named like a swept key is called job.NAME.
    """
    swept = swept_keys(results)
    names = {column: f"job.{column}" if column in swept else column for column in _columns()}
    text = io.StringIO()
    # The default line terminator \r\n makes the writer quote \r as well as \n.
    writer = csv.DictWriter(text, [*swept, *names.values()])
    writer.writeheader()
    for result in results:
        cells = {names[column]: value for column, value in _cells(result).items()}
        writer.writerow({**result.swept, **cells})
    return text.getvalue().encode("utf-8", "backslashreplace").decode()  # escape lone surrogates


def _columns() -> list[str]:
    return [
        column
        for field in fields(JobResult)
        if field.name != "swept"
        for column in (_bound_columns(field.name) if field.name in _RANGE_FIELDS else [field.name])
    ]


def _cells(result: JobResult) -> dict[str, Any]:
    """Return column -> value, a range as two columns."""
    values = result_to_dict(result)
    for name in _RANGE_FIELDS:
        values.update(zip(_bound_columns(name), values[name] or [None, None], strict=True))
    return {column: values[column] for column in _columns()}


def _bound_columns(name: str) -> list[str]:
    return [name.replace("_mib", "_min_mib"), name.replace("_mib", "_max_mib")]


def to_markdown(title: str, groups: Sequence[SeedGroup], conclusions: Sequence[str]) -> str:
    """Return the title, a table row per group, and a list of the conclusions, all escaped."""
    header, rows = build_table(groups)
    table = [_markdown_row([_escape_markdown(cell) for cell in row]) for row in (header, *rows)]
    table.insert(1, _markdown_row(["---"] * len(header)))
    items = [f"- {_escape_markdown(line)}" for line in conclusions]
    return "\n".join([f"**{_escape_markdown(title)}**", "", *table, "", *items])


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape_markdown(text: str) -> str:
    text = _MARKDOWN_SPECIAL.sub(r"\\\g<0>", escape_unprintable(text))
    return "".join(_HTML_ENTITIES.get(character, character) for character in text)


def build_table(groups: Sequence[SeedGroup]) -> tuple[list[str], list[list[str]]]:
    """Return the header and a row per group for people to read; the status is the last column.

    The kind of the measured memory (GPU or RAM) is in the header, or in the cells if both occur.
    """
    swept = swept_keys([result for group in groups for result in group.results])
    short_keys = shorten_keys(swept)
    columns = [key for key in swept if key not in SEEDS]
    has_repeats = any(group.num_jobs > 1 for group in groups)
    on_gpu = {group.on_gpu for group in groups if "measured_mib" in group.metrics}
    kind = "" if len(on_gpu) != 1 else " (GPU)" if on_gpu == {True} else " (RAM)"
    header = [escape_unprintable(short_keys[key]) for key in columns]
    header += ["jobs"] * has_repeats
    header += [name + kind if name == "measured MiB" else name for name in HEADERS]
    rows = []
    for group in groups:
        metrics = group.metrics
        cell_kind = "" if kind else " (GPU)" if group.on_gpu else " (RAM)"
        rows.append(
            [
                *(truncate(group.swept.get(key, "")) for key in columns),
                *([str(group.num_jobs)] * has_repeats),
                str(group.predicted_mib or ""),
                _format_number(metrics.get("measured_mib"), cell_kind),
                group.fits or "",
                _format_number(metrics.get("images_per_second")),
                _format_fraction(metrics.get("val_accuracy")),
                _format_number(metrics.get("seconds_to_best")),
                group.status,
            ]
        )
    return header, rows


def _format_number(mean: MeanEstimate | None, suffix: str = "") -> str:
    if mean is None:
        return ""
    return f"{mean.value:,.0f}{suffix}" if mean.value >= 10 else f"{mean.value:.2g}{suffix}"


def _format_fraction(mean: MeanEstimate | None) -> str:
    if mean is None:
        return ""
    return f"{mean.value:.2%}" if mean.half_width is None else f"{mean.value:.2%} ± {mean.half_width:.2%}"
