"""`captcha-exp diff`: compare two runs, section by section."""

import argparse
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from captcha_exp import runs
from captcha_exp.cli.output import get_console
from captcha_exp.cli.runs import (
    finite_or_none,
    format_value,
    is_fraction,
    is_number,
    print_table,
    to_text,
)
from captcha_exp.errors import UserError
from captcha_exp.runs.fields import RunFields, read_flat_config, read_flat_dataset, read_flat_environment
from captcha_exp.runtime.console import escape_unprintable

logger = logging.getLogger(__name__)

RESULT_KEYS = ("status", "error", "epochs", "best_epoch", "weights_sha256")
SECTIONS: dict[str, Callable[[RunFields], Mapping[str, Any]]] = {
    "config": lambda run: read_flat_config(run.run_dir),
    "environment": lambda run: read_flat_environment(run.run_dir),
    "dataset": lambda run: read_flat_dataset(run.run_dir),
    "metrics": lambda run: run.metrics(),
    "result": lambda run: {key: run[key] for key in RESULT_KEYS if key in run},
}
MISSING = object()  # None is a value
MAX_VALUE_LENGTH = 100  # characters in a table; --json is not truncated


@dataclass(frozen=True)
class DiffSection:
    """A section of two runs, side by side."""

    title: str
    first: Mapping[str, Any]
    second: Mapping[str, Any]
    errors: tuple[str, ...]
    """a line for each run whose file is missing or damaged"""

    def keys(self) -> list[str]:
        """Return the keys of either run."""
        return list(dict.fromkeys([*self.first, *self.second]))

    def differing_keys(self) -> list[str]:
        """Return the keys whose values differ."""
        return [key for key in self.keys() if not is_equal(*self.values(key))]

    def selected_keys(self, show_all: bool) -> list[str]:
        """Return the keys to show: those that differ, or all; always all of the short section "result"."""
        return self.keys() if show_all or self.title == "result" else self.differing_keys()

    def values(self, key: str) -> tuple[Any, Any]:
        """Return the two values; MISSING for a run without this key."""
        return self.first.get(key, MISSING), self.second.get(key, MISSING)


def diff(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return the differences of two runs as JSON values, or None if they are printed.

    In JSON each key has the two values; null also means that the run lacks the key. A section is null if a
    file is missing or damaged, and standard error names the file.

    Raises:
        UserError: no such run; the line says how to name one.
    """
    run_dirs = [runs.find_run(name) for name in arguments.run]
    first, second = (RunFields(run_dir, runs.RunInfo.load(run_dir)) for run_dir in run_dirs)
    values: dict[str, Any] = {}
    for title in SECTIONS:
        section = compare_section(title, first, second)
        if not arguments.json:
            _print_section(section, (first.short_name, second.short_name), arguments.all)
            continue
        for line in section.errors:
            logger.warning(line)
        pairs = {
            key: [None if value is MISSING else finite_or_none(value) for value in section.values(key)]
            for key in section.selected_keys(arguments.all)
        }
        values[title] = None if section.errors else pairs
    return values if arguments.json else None


def compare_section(title: str, first: RunFields, second: RunFields) -> DiffSection:
    """Read a section of two runs."""
    values: list[Mapping[str, Any]] = []
    errors: list[str] = []
    for run in (first, second):
        try:
            values.append(SECTIONS[title](run))
        except UserError as error:
            values.append({})
            errors += error.lines
    return DiffSection(title, values[0], values[1], tuple(dict.fromkeys(errors)))


def is_equal(first: Any, second: Any) -> bool:
    """Return whether two values are equal; True differs from 1, and NaN equals NaN."""
    if first is MISSING or second is MISSING:
        return first is second
    if is_number(first) and is_number(second):
        return bool(first == second) or (math.isnan(first) and math.isnan(second))
    return json.dumps(first) == json.dumps(second)


def _print_section(section: DiffSection, labels: tuple[str, str], show_all: bool) -> None:
    out = get_console()
    differing, keys = section.differing_keys(), section.keys()
    lines = [escape_unprintable(line) for line in section.errors]
    if not lines and not keys:
        lines = ["empty in both runs"]
    elif not lines and not differing and not show_all:
        lines = ["equal"]
    for line in lines:
        out.print(Text.assemble((section.title, "bold"), f": {line}"))
    if lines:
        return
    counts = f"{len(differing)} of {len(keys)} differ" if differing else "equal"
    title = Text.assemble((section.title, "bold not italic"), (f": {counts}", "not italic"))
    table = Table("", title=title, title_justify="left")
    for label in labels:
        table.add_column(Text(escape_unprintable(label)))
    table.add_column("difference", justify="right")
    for key in section.selected_keys(show_all):
        pair = section.values(key)
        cells = [_format_cell(key, value, exact=section.title not in ("metrics", "result")) for value in pair]
        table.add_row(Text(escape_unprintable(key)), *map(Text, cells), format_difference(key, *pair))
    print_table(table)


def format_difference(key: str, first: Any, second: Any) -> str:
    """Format the second number minus the first; fractions in percentage points."""
    if is_equal(first, second):
        return "equal"
    if not is_number(first) or not is_number(second) or not math.isfinite(second - first):
        return ""
    if is_fraction(key):
        return f"{100 * (second - first):+.3g} points"
    return f"{second - first:+,.1f}" if key.endswith("_mib") else f"{second - first:+.6g}"


def _format_cell(key: str, value: Any, exact: bool) -> str:
    if value is MISSING:
        return "-"
    text = escape_unprintable(to_text(value) if exact else format_value(key, value))
    if key.endswith("sha256"):
        return text[:12]
    return (
        text if len(text) <= MAX_VALUE_LENGTH else f"{text[:MAX_VALUE_LENGTH]}... ({len(text):,} characters)"
    )
