"""`captcha-exp diff`: compare two runs, section by section."""

import argparse
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from rich.text import Text

from captcha_exp import runs
from captcha_exp.cli import output
from captcha_exp.cli.output import is_number
from captcha_exp.config import flatten_mapping
from captcha_exp.errors import UserError
from captcha_exp.runs.fields import RunFields, read_flat_dataset
from captcha_exp.runtime.text import escape_unprintable

logger = logging.getLogger(__name__)

RESULT_KEYS = ("status", "error", "epochs", "best_epoch", "weights_sha256")
SECTIONS: dict[str, Callable[[RunFields], Mapping[str, Any]]] = {
    "config": lambda run: run.run.flat_config(),
    "environment": lambda run: flatten_mapping(run.run.read_json("environment.json")),
    "dataset": lambda run: read_flat_dataset(run.run),
    "metrics": lambda run: run.metrics(),
    "result": lambda run: {key: run[key] for key in RESULT_KEYS if key in run},
}
MISSING = object()  # None is a value
MAX_VALUE_LENGTH = 100  # characters in a table; --json is not truncated


def diff(arguments: argparse.Namespace) -> None:
    """Print the differences of two runs.

    In JSON each key has the two values; null also means that the run lacks the key. A section is null if a
    file is missing or damaged, and standard error names the file.

    Raises:
        UserError: no such run; the line says how to name one.
    """
    first, second = (RunFields(runs.load(runs.find_run(name))) for name in arguments.run)
    values: dict[str, Any] = {}
    for title in SECTIONS:
        pairs, errors = read_section(title, first, second)
        differing = {key: pair for key, pair in pairs.items() if not is_equal(*pair)}
        shown = pairs if arguments.all or title == "result" else differing  # the result is short
        if arguments.json:
            for line in errors:
                logger.warning(line)
            found = {
                key: [None if v is MISSING else output.finite_or_none(v) for v in pair]
                for key, pair in shown.items()
            }
            values[title] = None if errors else found
        elif errors or (not differing and not (arguments.all and pairs)):
            for line in errors or ["equal" if pairs else "empty in both runs"]:
                output.get_console().print(Text.assemble((title, "bold"), f": {escape_unprintable(line)}"))
        else:
            counts = f"{len(differing)} of {len(pairs)} differ" if differing else "equal"
            _print_section(title, counts, (first.short_name, second.short_name), shown)
    if arguments.json:
        output.print_json(values)


def read_section(
    title: str, first: RunFields, second: RunFields
) -> tuple[dict[str, tuple[Any, Any]], list[str]]:
    """Return key -> the two values (MISSING if a run lacks the key), and a line per unreadable file."""
    sections: list[Mapping[str, Any]] = []
    errors: list[str] = []
    for run in (first, second):
        try:
            sections.append(SECTIONS[title](run))
        except UserError as error:
            sections.append({})
            errors += error.lines
    keys = dict.fromkeys(key for section in sections for key in section)
    pairs = {key: (sections[0].get(key, MISSING), sections[1].get(key, MISSING)) for key in keys}
    return pairs, list(dict.fromkeys(errors))


def is_equal(first: Any, second: Any) -> bool:
    """Return whether two values are equal; True differs from 1, and NaN equals NaN."""
    return (is_number(first) and is_number(second) and first == second) or repr(first) == repr(second)


def _print_section(
    title: str, counts: str, labels: tuple[str, str], pairs: Mapping[str, tuple[Any, Any]]
) -> None:
    heading = Text.assemble((title, "bold not italic"), (f": {counts}", "not italic"))
    rows = [
        (
            key,
            *(_format_cell(key, value, exact=title not in ("metrics", "result")) for value in pair),
            format_difference(key, *pair),
        )
        for key, pair in pairs.items()
    ]
    columns = ("", *labels, "difference")
    output.print_table(output.make_table(columns, rows, heading, right=("difference",)))


def format_difference(key: str, first: Any, second: Any) -> str:
    """Format the second number minus the first; fractions in percentage points."""
    if is_equal(first, second):
        return "equal"
    if not is_number(first) or not is_number(second) or not math.isfinite(second - first):
        return ""
    if output.is_fraction(key):
        return f"{100 * (second - first):+.3g} points"
    return f"{second - first:+,.1f}" if key.endswith("_mib") else f"{second - first:+.6g}"


def _format_cell(key: str, value: Any, exact: bool) -> str:
    if value is MISSING:
        return "-"
    text = escape_unprintable(output.to_text(value) if exact else output.format_value(key, value))
    if key.endswith("sha256"):
        return text[:12]
    return (
        text if len(text) <= MAX_VALUE_LENGTH else f"{text[:MAX_VALUE_LENGTH]}... ({len(text):,} characters)"
    )
