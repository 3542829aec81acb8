"""`captcha-exp runs`: which runs there are, chosen, in an order, and how their values are written."""

import argparse
import difflib
import json
import math
import operator
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from rich.table import Table
from rich.text import Text

from captcha_exp import runs as record
from captcha_exp.cli.output import get_console
from captcha_exp.errors import UserError
from captcha_exp.runs.fields import RUN_KEYS, RunFields
from captcha_exp.runtime.console import escape_unprintable
from captcha_exp.runtime.paths import root_dir

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
RESULT_COLUMNS = {  # of a result: the column of each, and how it is written
    "epochs": ("epochs", ""),
    "validation": ("val_accuracy", ".2%"),
    "test": ("test_accuracy", ".2%"),
    "seconds": ("seconds", ".0f"),
    "peak MiB": ("process_peak_mib", ",.0f"),
}
MAX_WIDTH = 10_000  # characters of a line
SORT_LAST = 2  # place of a run without a value
DEFAULT_COLUMNS = ("run_dir", "status", "epochs", "seconds")  # facts that every table of runs shows


@dataclass(frozen=True)
class Condition:
    """What a run must say of one key."""

    key: str
    operator: str
    expected: str

    @staticmethod
    def parse(text: str) -> "Condition":
        """The condition that a person wrote.

        Raises:
            UserError: it is none; the line says how one looks.
        """
        match = re.fullmatch(r"([^=!<>~]+?)\s*(!=|>=|<=|[=><~])\s*(.*)", text, re.DOTALL)
        if match is None:
            raise UserError(
                f"{text}: is no condition; write KEY OP VALUE in one word, OP one of = != > >= < <= ~, "
                "in quotes, for the shell: 'test/accuracy>98%'"
            )
        return Condition(*match.groups())

    def __str__(self) -> str:
        return f"{self.key}{self.operator}{self.expected}"

    def matches(self, value: Any) -> bool:
        """Whether it is true of this value. Numbers and texts have an order; all else is equal or is not."""
        if self.operator == "~":
            return value is not None and self.expected in to_text(value)
        if isinstance(value, str):
            return OPERATORS[self.operator](value, self.expected)
        if is_number(value) and (wanted := parse_number(self.expected)) is not None:
            return OPERATORS[self.operator](value, wanted)
        if self.operator not in ("=", "!="):
            return False
        return OPERATORS[self.operator](to_text(value).replace(" ", ""), self.expected.replace(" ", ""))

    def check(self, known: Iterable[RunFields]) -> None:
        """Nothing, if it can be true of a run.

        Raises:
            UserError: numbers alone are compared with what is none.
        """
        if self.operator == "~" or self.expected == "null" or parse_number(self.expected) is not None:
            return
        values = [run[self.key] for run in known if self.key in run]
        if values and all(map(is_number, values)):
            raise UserError(
                f"{self}: {self.key} is a number, and {self.expected!r} is none; 98% is one, and so is 0.98"
            )


def list_runs(arguments: argparse.Namespace) -> list[dict[str, Any]] | None:
    """The chosen runs as JSON values where they are asked for, else printed: the oldest first, or by a key.

    Raises:
        UserError: a condition is none, no run has a key, or there are to be fewer runs than one.
    """
    conditions = [Condition.parse(text) for text in arguments.conditions]
    columns = arguments.columns.split(",") if arguments.columns is not None else []
    sort: list[str] = [] if arguments.sort is None else [arguments.sort]
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit={arguments.limit}: must be at least 1")
    known = [RunFields(folder, state, print_stderr) for folder, state in record.list_runs(print_stderr)]
    keys = list(dict.fromkeys([*(each.key for each in conditions), *sort, *columns]))
    if known:
        check_keys(keys, known)
    for each in conditions:
        each.check(known)
    chosen = [run for run in known if all(c.key in run and c.matches(run[c.key]) for c in conditions)]
    chosen = sort_runs(chosen, arguments.sort, arguments.reverse)[: arguments.limit]
    if arguments.json:
        return [
            {
                "run_dir": str(run.run_dir),
                **run.state,
                "values": {key: finite_or_none(run[key]) for key in keys if key in run},
            }
            for run in chosen
        ]
    outputs = root_dir() / "outputs"
    if not known:
        get_console().print(f"no run in {outputs} yet", markup=False)
    elif not chosen:
        words = " and ".join(map(str, conditions))
        get_console().print(f"none of {len(known):,} runs in {outputs}: {words}", markup=False)
    else:
        _print_runs(chosen, [key for key in keys if key not in DEFAULT_COLUMNS])
    return None


def check_keys(keys: Iterable[str], known: Sequence[RunFields]) -> None:
    """Nothing, if some run has each key, or may have it once it has ended.

    Raises:
        UserError: a line for each key that no run has, with the nearest spelling.
    """
    lines = []
    for key in keys:
        if key in RUN_KEYS or any(key in run for run in known):
            continue
        there = {name for run in known for name in run.all_keys()} | set(RUN_KEYS)
        close = difflib.get_close_matches(key, sorted(there), n=1, cutoff=0.7)
        known_are = f"known are the leaves of config.yaml, metrics, and {', '.join(RUN_KEYS)}"
        hint = f"did you mean {close[0]}?" if close else known_are
        lines.append(f"{key}: no run has such a key; {hint}")
    if lines:
        raise UserError(*lines)


def sort_runs(selected: Sequence[RunFields], sort: str | None, reverse: bool) -> list[RunFields]:
    """By this key, else as they stand, by start; those that have no value come last in either direction."""
    if sort is None or sort == "started":  # as texts, times of two zones have another order
        return list(reversed(selected)) if reverse else list(selected)
    ordered = sorted(selected, key=lambda run: _sort_key(run, sort), reverse=reverse)
    return sorted(ordered, key=lambda run: _sort_key(run, sort)[0] == SORT_LAST)


def _sort_key(run: RunFields, key: str) -> tuple[int, Any]:
    """Where a run stands by a key: numbers come before texts."""
    value = run.get(key)
    if value is None or value != value:  # nan is not even equal to itself
        return SORT_LAST, 0
    return (0, value) if is_number(value) else (1, to_text(value))


def _print_runs(chosen: Sequence[RunFields], keys: Sequence[str]) -> None:
    table = Table("run", "status", *RESULT_COLUMNS, "MLflow id")
    for key in keys:
        table.add_column(Text(escape_unprintable(key)), justify="right")
    for run in chosen:
        result = run.state["result"] if isinstance(run.state["result"], dict) else {}
        figures = ((result.get(key), form) for key, form in RESULT_COLUMNS.values())
        cells = (
            run.short_name,
            to_text(run["status"]),
            *(format(value, form) if is_number(value) else "" for value, form in figures),
            to_text(run["run_id"] or "")[:8],
            *(format_value(key, run[key]) if key in run else "" for key in keys),
        )
        table.add_row(*(Text(escape_unprintable(cell)) for cell in cells))
    print_table(table)


def format_value(key: str, value: Any) -> str:
    """A value as a table shows it: accuracies in per cent, MiB without fractions, texts as they are."""
    if not isinstance(value, float):
        return to_text(value)
    if not math.isfinite(value):
        return str(value)
    if is_fraction(key):
        return f"{value:.2%}"
    return f"{value:,.0f}" if key.endswith("_mib") else f"{value:g}"


def is_number(value: Any) -> bool:
    """Whether a value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_fraction(key: str) -> bool:
    """Whether the numbers of this key are shares of a whole."""
    return re.search(r"accuracy(_low|_high)?$", key) is not None


def parse_number(text: str) -> float | None:
    """The number that a person wrote, 98% for 0.98; None if it is none."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        # 97.3 / 100 would be another number than 0.973 in floats.
        return float(Decimal(text.removesuffix("%")) / (100 if text.endswith("%") else 1))
    except ArithmeticError:
        return None


def finite_or_none(value: Any) -> Any:
    """The value, or None for a number that JSON cannot write."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_text(value: Any) -> str:
    """A value on one line: a text as it is, the rest as YAML and JSON both write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def print_stderr(line: str) -> None:
    """The line on standard error."""
    print(escape_unprintable(line), file=sys.stderr)


def print_table(table: Table) -> None:
    """The table with nothing cut off: one that is wider than the terminal has no frame and long lines."""
    out = get_console()
    edge = out.width if out.is_terminal else MAX_WIDTH
    out.width = MAX_WIDTH
    if out.measure(table).maximum > edge:
        table.box, table.pad_edge = None, False
    out.print(table)
