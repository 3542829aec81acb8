"""Format the results of a sweep: CSV for programs, Markdown for MLflow, cells for the terminal."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from captcha_exp.runtime.text import escape_unprintable
from captcha_exp.sweep.aggregate import SEEDS, SeedGroup, format_number, swept_keys, truncate
from captcha_exp.sweep.record import shorten_keys
from captcha_exp.sweep.results import JobResult

NUMBER_COLUMNS = ("jobs", "predicted MiB", "measured MiB", "images/s", "validation", "seconds to best")
_RANGE_FIELDS = ("budget_mib", "predicted_mib")
_MARKDOWN_ESCAPES = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;"} | {c: f"\\{c}" for c in r"\`*_{}[]#|~"}
)


def to_csv(results: Sequence[JobResult]) -> str:
    """Return one row per job, the swept keys first; a range is two columns, None an empty cell.

    A result column that is named like a swept key is called job.NAME.
    """
    swept = swept_keys(results)
    names = [f"job.{name}" if name in swept else name for name in _csv_cells(results[0])]
    text = io.StringIO()
    # The default line terminator \r\n makes the writer quote \r as well as \n.
    writer = csv.writer(text)
    writer.writerow([*swept, *names])
    for result in results:
        writer.writerow([*(result.swept.get(key) for key in swept), *_csv_cells(result).values()])
    return text.getvalue().encode("utf-8", "backslashreplace").decode()  # escape lone surrogates


def _csv_cells(result: JobResult) -> dict[str, Any]:
    """Return column -> value, without the swept keys."""
    cells = {}
    for name, value in asdict(result).items():
        if name in _RANGE_FIELDS:
            for index, end in enumerate(("min", "max")):
                cells[name.replace("_mib", f"_{end}_mib")] = None if value is None else value[index]
        elif name != "swept":
            cells[name] = value
    return cells


def to_markdown(title: str, groups: Sequence[SeedGroup], conclusions: Sequence[str]) -> str:
    """Return the title, a table row per group, and a list of the conclusions, all escaped."""
    rows = build_table(groups)
    table = [
        f"| {' | '.join(map(_escape_markdown, cells))} |" for cells in (rows[0], *map(dict.values, rows))
    ]
    table.insert(1, "|" + " --- |" * len(rows[0]))
    items = [f"- {_escape_markdown(line)}" for line in conclusions]
    return "\n".join([f"**{_escape_markdown(title)}**", "", *table, "", *items, ""])


def _escape_markdown(text: str) -> str:
    return escape_unprintable(text).translate(_MARKDOWN_ESCAPES)


def build_table(groups: Sequence[SeedGroup]) -> list[dict[str, str]]:
    """Return column -> cell for each group, for people to read; the status is the last column.

    The kind of the measured memory (GPU or RAM) is in its column's name, or in the cells if both occur.
    """
    swept = swept_keys(result for group in groups for result in group.results)
    short_keys = shorten_keys(swept)
    has_repeats = any(len(group.results) > 1 for group in groups)
    kinds = {_memory_kind(group) for group in groups if "measured_mib" in group.metrics}
    kind = kinds.pop() if len(kinds) == 1 else ""
    rows = []
    for group in groups:
        keys = {escape_unprintable(short_keys[key]): key for key in swept if key not in SEEDS}
        cells = {column: truncate(group.swept.get(key, "")) for column, key in keys.items()}
        if has_repeats:
            cells["jobs"] = str(len(group.results))
        cells["predicted MiB"] = str(group.predicted_mib or "")
        cells[f"measured MiB{kind}"] = _format_mean(
            group, "measured_mib", "" if kind else _memory_kind(group)
        )
        cells["fits"] = group.fits or ""
        suffix = " (disturbed)" if group.is_disturbed else ""
        cells["images/s"] = _format_mean(group, "images_per_second", suffix)
        cells["validation"] = _format_accuracy(group)
        cells["seconds to best"] = _format_mean(group, "seconds_to_best")
        cells["status"] = group.status
        rows.append(cells)
    return rows


def _memory_kind(group: SeedGroup) -> str:
    return " (GPU)" if group.on_gpu else " (RAM)"


def _format_mean(group: SeedGroup, metric: str, suffix: str = "") -> str:
    mean = group.metrics.get(metric)
    return "" if mean is None else f"{format_number(mean.value)}{suffix}"


def _format_accuracy(group: SeedGroup) -> str:
    mean = group.metrics.get("val_accuracy")
    if mean is None:
        return ""
    return f"{mean.value:.2%}" if mean.half_width is None else f"{mean.value:.2%} ± {mean.half_width:.2%}"
