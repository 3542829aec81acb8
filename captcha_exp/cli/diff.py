"""`captcha-exp diff`: what two runs differ in, section by section."""

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from captcha_exp import runs
from captcha_exp.cli.output import console
from captcha_exp.cli.runs import finite, is_number, is_share, print_whole, tell, tidy, written
from captcha_exp.errors import UserError
from captcha_exp.runs.fields import Facts, config_leaves, dataset_leaves, environment_leaves
from captcha_exp.runtime.console import shown

RESULT = ("status", "error", "epochs", "best_epoch", "weights_sha256")
SECTIONS: dict[str, Callable[[Facts], Mapping[str, Any]]] = {
    "config": lambda run: config_leaves(run.folder),
    "environment": lambda run: environment_leaves(run.folder),
    "dataset": lambda run: dataset_leaves(run.folder),
    "metrics": lambda run: run.metrics(),
    "result": lambda run: {key: run[key] for key in RESULT if key in run},
}
LACKING = object()  # null is a value
LONGEST = 100  # characters of a value in a table; --json has all of them


@dataclass(frozen=True)
class Section:
    """One part of two runs, side by side."""

    title: str
    first: Mapping[str, Any]
    second: Mapping[str, Any]
    unread: tuple[str, ...]
    """a line for each run whose file is missing or damaged"""

    def keys(self) -> list[str]:
        """Every key that one of them has."""
        return list(dict.fromkeys([*self.first, *self.second]))

    def differing(self) -> list[str]:
        """The keys whose values are not the same."""
        return [key for key in self.keys() if not same(*self.pair(key))]

    def chosen(self, everything: bool) -> list[str]:
        """The keys to tell of: those that differ, or everything; the result is short and always whole."""
        return self.keys() if everything or self.title == "result" else self.differing()

    def pair(self, key: str) -> tuple[Any, Any]:
        """The two values; LACKING for that of a run without this key."""
        return self.first.get(key, LACKING), self.second.get(key, LACKING)


def diff(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """What two runs differ in as JSON values where they are asked for, else printed.

    In JSON a key has the two values, null also for what a run lacks. A section is null where a file is
    missing or damaged, and standard error says which.

    Raises:
        UserError: one of them is no run.
    """
    folders = [runs.find(name) for name in arguments.run]
    first, second = (
        Facts(folder, json.loads((folder / "run.json").read_text(encoding="utf-8")), tell)
        for folder in folders
    )
    values: dict[str, Any] = {}
    for title in SECTIONS:
        section = side_by_side(title, first, second)
        if not arguments.json:
            _tell_section(section, (first.label, second.label), arguments.all)
            continue
        for line in section.unread:
            tell(line)
        pairs = {
            key: [None if value is LACKING else finite(value) for value in section.pair(key)]
            for key in section.chosen(arguments.all)
        }
        values[title] = None if section.unread else pairs
    return values if arguments.json else None


def side_by_side(title: str, first: Facts, second: Facts) -> Section:
    """One part of two runs."""
    found: list[Mapping[str, Any]] = []
    unread: list[str] = []
    for run in (first, second):
        try:
            found.append(SECTIONS[title](run))
        except UserError as error:
            found.append({})
            unread += error.lines
    return Section(title, found[0], found[1], tuple(dict.fromkeys(unread)))


def same(first: Any, second: Any) -> bool:
    """Whether two values are the same; true is not 1, and what is no number is the same as another such."""
    if first is LACKING or second is LACKING:
        return first is second
    if is_number(first) and is_number(second):
        return bool(first == second) or (math.isnan(first) and math.isnan(second))
    return json.dumps(first) == json.dumps(second)


def _tell_section(section: Section, labels: tuple[str, str], everything: bool) -> None:
    out = console()
    differing, keys = section.differing(), section.keys()
    lines = [shown(line) for line in section.unread]
    if not lines and not keys:
        lines = ["neither run has any"]
    elif not lines and not differing and not everything:
        lines = ["the same"]
    for line in lines:
        out.print(Text.assemble((section.title, "bold"), f": {line}"))
    if lines:
        return
    counts = f"{len(differing)} of {len(keys)} differ" if differing else "the same"
    title = Text.assemble((section.title, "bold not italic"), (f": {counts}", "not italic"))
    table = Table("", title=title, title_justify="left")
    for label in labels:
        table.add_column(Text(shown(label)))
    table.add_column("difference", justify="right")
    for key in section.chosen(everything):
        pair = section.pair(key)
        cells = [_short(key, value, exact=section.title not in ("metrics", "result")) for value in pair]
        table.add_row(Text(shown(key)), *map(Text, cells), difference(key, *pair))
    print_whole(table)


def difference(key: str, first: Any, second: Any) -> str:
    """How much the second number is above the first; of shares in points, which are hundredths."""
    if same(first, second):
        return "the same"
    if not is_number(first) or not is_number(second) or not math.isfinite(second - first):
        return ""
    if is_share(key):
        return f"{100 * (second - first):+.3g} points"
    return f"{second - first:+,.1f}" if key.endswith("_mib") else f"{second - first:+.6g}"


def _short(key: str, value: Any, exact: bool) -> str:
    if value is LACKING:
        return "-"
    text = shown(written(value) if exact else tidy(key, value))
    if key.endswith("sha256"):
        return text[:12]
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} characters)"
