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
from captcha_exp.cli.output import console
from captcha_exp.errors import UserError
from captcha_exp.runs.fields import FACTS, Facts
from captcha_exp.runtime.console import shown
from captcha_exp.runtime.paths import root

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
FIGURES = {  # of a result: the column of each, and how it is written
    "epochs": ("epochs", ""),
    "validation": ("val_accuracy", ".2%"),
    "test": ("test_accuracy", ".2%"),
    "seconds": ("seconds", ".0f"),
    "peak MiB": ("process_peak_mib", ",.0f"),
}
WIDEST = 10_000  # characters of a line
LAST = 2  # place of a run without a value
IN_THE_TABLE = ("folder", "status", "epochs", "seconds")  # facts that every table of runs shows


@dataclass(frozen=True)
class Condition:
    """What a run must say of one key."""

    key: str
    operator: str
    wanted: str

    @staticmethod
    def read(text: str) -> "Condition":
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
        return f"{self.key}{self.operator}{self.wanted}"

    def holds(self, value: Any) -> bool:
        """Whether it is true of this value. Numbers and texts have an order; all else is equal or is not."""
        if self.operator == "~":
            return value is not None and self.wanted in written(value)
        if isinstance(value, str):
            return OPERATORS[self.operator](value, self.wanted)
        if is_number(value) and (wanted := number(self.wanted)) is not None:
            return OPERATORS[self.operator](value, wanted)
        if self.operator not in ("=", "!="):
            return False
        return OPERATORS[self.operator](written(value).replace(" ", ""), self.wanted.replace(" ", ""))

    def check(self, known: Iterable[Facts]) -> None:
        """Nothing, if it can be true of a run.

        Raises:
            UserError: numbers alone are compared with what is none.
        """
        if self.operator == "~" or self.wanted == "null" or number(self.wanted) is not None:
            return
        values = [run[self.key] for run in known if self.key in run]
        if values and all(map(is_number, values)):
            raise UserError(
                f"{self}: {self.key} is a number, and {self.wanted!r} is none; 98% is one, and so is 0.98"
            )


def runs(arguments: argparse.Namespace) -> list[dict[str, Any]] | None:
    """The chosen runs as JSON values where they are asked for, else printed: the oldest first, or by a key.

    Raises:
        UserError: a condition is none, no run has a key, or there are to be fewer runs than one.
    """
    conditions = [Condition.read(text) for text in arguments.conditions]
    columns = arguments.columns.split(",") if arguments.columns is not None else []
    sort: list[str] = [] if arguments.sort is None else [arguments.sort]
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit={arguments.limit}: must be at least 1")
    known = [Facts(folder, state, tell) for folder, state in record.runs(tell)]
    keys = list(dict.fromkeys([*(each.key for each in conditions), *sort, *columns]))
    if known:
        check_keys(keys, known)
    for each in conditions:
        each.check(known)
    chosen = [run for run in known if all(c.key in run and c.holds(run[c.key]) for c in conditions)]
    chosen = in_order(chosen, arguments.sort, arguments.reverse)[: arguments.limit]
    if arguments.json:
        return [
            {
                "folder": str(run.folder),
                **run.state,
                "values": {key: finite(run[key]) for key in keys if key in run},
            }
            for run in chosen
        ]
    outputs = root() / "outputs"
    if not known:
        console().print(f"no run in {outputs} yet", markup=False)
    elif not chosen:
        words = " and ".join(map(str, conditions))
        console().print(f"none of {len(known):,} runs in {outputs}: {words}", markup=False)
    else:
        _tell_runs(chosen, [key for key in keys if key not in IN_THE_TABLE])
    return None


def check_keys(keys: Iterable[str], known: Sequence[Facts]) -> None:
    """Nothing, if some run has each key, or may have it once it has ended.

    Raises:
        UserError: a line for each key that no run has, with the nearest spelling.
    """
    lines = []
    for key in keys:
        if key in FACTS or any(key in run for run in known):
            continue
        there = {name for run in known for name in run.all_keys()} | set(FACTS)
        close = difflib.get_close_matches(key, sorted(there), n=1, cutoff=0.7)
        known_are = f"known are the leaves of config.yaml, metrics, and {', '.join(FACTS)}"
        hint = f"did you mean {close[0]}?" if close else known_are
        lines.append(f"{key}: no run has such a key; {hint}")
    if lines:
        raise UserError(*lines)


def in_order(chosen: Sequence[Facts], sort: str | None, reverse: bool) -> list[Facts]:
    """By this key, else as they stand, by start; those that have no value come last in either direction."""
    if sort is None or sort == "started":  # as texts, times of two zones have another order
        return list(reversed(chosen)) if reverse else list(chosen)
    ordered = sorted(chosen, key=lambda run: _place(run, sort), reverse=reverse)
    return sorted(ordered, key=lambda run: _place(run, sort)[0] == LAST)


def _place(run: Facts, key: str) -> tuple[int, Any]:
    """Where a run stands by a key: numbers come before texts."""
    value = run.get(key)
    if value is None or value != value:  # nan is not even equal to itself
        return LAST, 0
    return (0, value) if is_number(value) else (1, written(value))


def _tell_runs(chosen: Sequence[Facts], keys: Sequence[str]) -> None:
    table = Table("run", "status", *FIGURES, "MLflow id")
    for key in keys:
        table.add_column(Text(shown(key)), justify="right")
    for run in chosen:
        result = run.state["result"] if isinstance(run.state["result"], dict) else {}
        figures = ((result.get(key), form) for key, form in FIGURES.values())
        cells = (
            run.label,
            written(run["status"]),
            *(format(value, form) if is_number(value) else "" for value, form in figures),
            written(run["run_id"] or "")[:8],
            *(tidy(key, run[key]) if key in run else "" for key in keys),
        )
        table.add_row(*(Text(shown(cell)) for cell in cells))
    print_whole(table)


def tidy(key: str, value: Any) -> str:
    """A value as a table shows it: accuracies in per cent, MiB without fractions, texts as they are."""
    if not isinstance(value, float):
        return written(value)
    if not math.isfinite(value):
        return str(value)
    if is_share(key):
        return f"{value:.2%}"
    return f"{value:,.0f}" if key.endswith("_mib") else f"{value:g}"


def is_number(value: Any) -> bool:
    """Whether a value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_share(key: str) -> bool:
    """Whether the numbers of this key are shares of a whole."""
    return re.search(r"accuracy(_low|_high)?$", key) is not None


def number(text: str) -> float | None:
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


def finite(value: Any) -> Any:
    """The value, or None for a number that JSON cannot write."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def written(value: Any) -> str:
    """A value on one line: a text as it is, the rest as YAML and JSON both write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def tell(line: str) -> None:
    """The line on standard error."""
    print(shown(line), file=sys.stderr)


def print_whole(table: Table) -> None:
    """The table with nothing cut off: one that is wider than the terminal has no frame and long lines."""
    out = console()
    edge = out.width if out.is_terminal else WIDEST
    out.width = WIDEST
    if out.measure(table).maximum > edge:
        table.box, table.pad_edge = None, False
    out.print(table)
