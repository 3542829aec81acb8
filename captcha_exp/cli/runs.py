"""`captcha-exp runs`: filter, sort and print the recorded runs."""

import argparse
import difflib
import logging
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, get_args

from captcha_exp import runs
from captcha_exp.cli import output
from captcha_exp.cli.output import finite_or_none, format_value, is_number, to_text
from captcha_exp.config.messages import renamed
from captcha_exp.errors import UserError
from captcha_exp.runs import Status
from captcha_exp.runs.fields import RUN_KEYS, RunFields
from captcha_exp.runtime.paths import root_dir

logger = logging.getLogger(__name__)

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
RESULT_COLUMNS = {  # column -> key of the result, and its format
    "epochs": ("epochs", ""),
    "validation": ("val_accuracy", ".2%"),
    "test": ("test_accuracy", ".2%"),
    "seconds": ("seconds", ".0f"),
    "peak MiB": ("process_peak_mib", ",.0f"),
}
STATUSES = (*get_args(Status), "stale", "skipped")
SORT_LAST = 2  # rank of a run without a value
DEFAULT_COLUMNS = ("run_dir", "status", "epochs", "seconds")  # keys that every table shows


@dataclass(frozen=True)
class Condition:
    """A condition on the value of a key."""

    key: str
    operator: str
    expected: str

    @staticmethod
    def parse(text: str) -> "Condition":
        """Parse KEY OP VALUE.

        Raises:
            UserError: invalid syntax; the line has an example.
        """
        match = re.fullmatch(r"([^=!<>~]+?)\s*(!=|>=|<=|[=><~])\s*(.*)", text, re.DOTALL)
        if match is None:
            raise UserError(
                f"{text}: invalid condition; write KEY OP VALUE without spaces, OP one of = != > >= < <= ~, "
                "quoted for the shell: 'test/accuracy>98%'"
            )
        return Condition(*match.groups())

    def __str__(self) -> str:
        return f"{self.key}{self.operator}{self.expected}"

    def matches(self, value: Any) -> bool:
        """Return whether the value satisfies it. Only numbers and strings are ordered."""
        if self.operator == "~":
            return value is not None and self.expected in to_text(value)
        if isinstance(value, str):
            return OPERATORS[self.operator](value, self.expected)
        if is_number(value) and (expected := parse_number(self.expected)) is not None:
            return OPERATORS[self.operator](value, expected)
        if self.operator not in ("=", "!="):
            return False
        return OPERATORS[self.operator](to_text(value).replace(" ", ""), self.expected.replace(" ", ""))

    def check(self, known: Iterable[RunFields]) -> None:
        """Check that it can hold for one of the runs.

        Raises:
            UserError: the key has only numbers, but the expected value is not a number.
        """
        if self.key == "status" and self.operator in ("=", "!=") and self.expected not in STATUSES:
            raise UserError(f"{self}: must be one of {', '.join(STATUSES)}")
        if self.operator == "~" or self.expected == "null" or parse_number(self.expected) is not None:
            return
        values = [run[self.key] for run in known if self.key in run]
        if values and all(map(is_number, values)):
            raise UserError(
                f"{self}: {self.key} is a number, but {self.expected!r} is not; write a number such as "
                "0.98 or 98%"
            )


def list_runs(arguments: argparse.Namespace) -> None:
    """Print the selected runs, oldest first, or sorted by a key.

    Raises:
        UserError: a condition is invalid, no run has a key, or --limit is below 1.
    """
    conditions = [Condition.parse(text) for text in arguments.conditions]
    columns = ",".join(arguments.columns).split(",") if arguments.columns is not None else []
    sort: list[str] = [] if arguments.sort is None else [arguments.sort]
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit={arguments.limit}: must be at least 1")
    unreadable: list[str] = []
    known = [RunFields(run) for run in runs.list_runs(unreadable.append)]
    for line in unreadable:
        logger.warning(line)
    keys = list(dict.fromkeys([*(each.key for each in conditions), *sort, *columns]))
    if known:
        check_keys(keys, known)
    for each in conditions:
        each.check(known)
    selected = [run for run in known if all(c.key in run and c.matches(run[c.key]) for c in conditions)]
    selected = sort_runs(selected, arguments.sort, arguments.reverse)[: arguments.limit]
    outputs = root_dir() / "outputs"
    if arguments.json:
        output.print_json(
            [
                {
                    "run_dir": str(run.run_dir),
                    **run.info.model_dump(),
                    "values": {key: finite_or_none(run[key]) for key in keys if key in run},
                }
                for run in selected
            ]
        )
    elif not known:
        output.get_console().print(f"no runs in {outputs} yet", markup=False)
    elif not selected:
        text = " and ".join(map(str, conditions))
        output.get_console().print(
            f"none of the {len(known):,} runs in {outputs} matches {text}", markup=False
        )
    else:
        _print_runs(selected, [key for key in keys if key not in DEFAULT_COLUMNS])


def check_keys(keys: Iterable[str], known: Sequence[RunFields]) -> None:
    """Check that each key exists in some run, or is a standard key of run.json.

    Raises:
        UserError: a line for each unknown key, with the closest one.
    """
    lines = []
    for key in keys:
        if key in RUN_KEYS or any(key in run for run in known):
            continue
        all_keys = {name for run in known for name in run.all_keys()} | set(RUN_KEYS)
        close = difflib.get_close_matches(key, sorted(all_keys), n=1, cutoff=0.7)
        allowed = f"use a key of config.yaml, a metric, or one of {', '.join(RUN_KEYS)}"
        hint = f"did you mean {close[0]}?" if close else allowed
        new_name = renamed(key, None)
        lines.append(
            f"{key}: was renamed to {new_name}" if new_name else f"{key}: no run has this key; {hint}"
        )
    if lines:
        raise UserError(*lines)


def sort_runs(selected: Sequence[RunFields], sort: str | None, reverse: bool) -> list[RunFields]:
    """Sort by a key, or keep the order of their start. Runs without a value come last, also in reverse."""
    if sort is None or sort == "started":  # strings of different time zones would sort in another order
        return list(reversed(selected)) if reverse else list(selected)
    ordered = sorted(selected, key=lambda run: _sort_key(run, sort), reverse=reverse)
    return sorted(ordered, key=lambda run: _sort_key(run, sort)[0] == SORT_LAST)


def _sort_key(run: RunFields, key: str) -> tuple[int, Any]:
    """Return the sort key of a run: numbers before strings."""
    value = run.get(key)
    if value is None or value != value:  # NaN
        return SORT_LAST, 0
    return (0, value) if is_number(value) else (1, to_text(value))


def _print_runs(selected: Sequence[RunFields], keys: Sequence[str]) -> None:
    rows = []
    for run in selected:
        results = ((getattr(run.info.result, key, None), spec) for key, spec in RESULT_COLUMNS.values())
        rows.append(
            (
                run.short_name,
                to_text(run["status"]),
                *(format(value, spec) if is_number(value) else "" for value, spec in results),
                to_text(run["run_id"] or "")[:8],
                *(_format_cell(run, key) if key in run else "" for key in keys),
            )
        )
    columns = ("run", "status", *RESULT_COLUMNS, "MLflow id", *keys)
    output.print_rows(columns, rows, right=keys)


def _format_cell(run: RunFields, key: str) -> str:
    is_disturbed = key == "speed/images_per_second" and run.get("speed_disturbed")
    return f"{format_value(key, run[key])}{' (disturbed)' if is_disturbed else ''}"


def parse_number(text: str) -> float | None:
    """Parse a number such as 0.98 or 98%; return None if it is not one."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        # Decimal, because 97.3 / 100 differs from 0.973 in floating point.
        return float(Decimal(text.removesuffix("%")) / (100 if text.endswith("%") else 1))
    except ArithmeticError:
        return None
