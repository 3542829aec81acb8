"""Run the short forms of the benchmarks of speed one after the other, and print their figures in one table.

A row is marked where other processes disturbed it. `make bench` runs this; docs/performance.md has the full
commands. Exit code 1 if a benchmark fails.

    python benchmarks/bench.py [--only roofline loader] [--json FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).resolve().parent
FRESH = "{FRESH}"
ERROR_LINES = 5  # shown of a benchmark that fails

Line = dict[str, Any]


class Row(NamedTuple):
    """A row of the table."""

    figure: str
    value: str
    goal: str = ""


def _spread(found: dict[str, float], scale: float = 1, unit: str = "") -> str:
    median, low, high = (scale * found[name] for name in ("median", "min", "max"))
    return f"{median:.3g}{unit} ({low:.3g} to {high:.3g})"


def _goal(line: Line) -> str:
    if not line.get("goal"):
        return ""
    return f"{line['goal']}: {({True: 'met', False: 'missed', None: 'no conclusion'})[line['met']]}"


def _same_network(line: Line) -> list[Row]:
    seconds = line["seconds_per_800_images"]
    return [
        Row("article's network, 800 images, its loop", _spread(seconds["article"], unit=" s")),
        Row(f"the same, captcha-exp in {line['precision']}", _spread(seconds["ours"], unit=" s")),
        Row("the same, ratio", _spread(line["ratio"]), _goal(line)),
    ]


def _roofline(line: Line) -> list[Row]:
    rates = [
        Row(
            f"fastest convolution in {line['precision']}",
            _spread(line["convolution_gflops"], unit=" GFLOP/s"),
        )
    ]
    return rates + [
        Row(f"step of {name} as a fraction of it", _spread(each["fraction"]), _goal(each))
        for name, each in line["networks"].items()
    ]


def _loader(line: Line) -> list[Row]:
    return [
        Row(f"loader, {name}, of a step", _spread(each["fraction"], 100, " %"), _goal(each))
        for name, each in line["cases"].items()
    ]


def _cost_of_tracking(line: Line) -> list[Row]:
    return [
        Row("record and MLflow, of the epochs", f"{100 * line['share']:.2g} %", _goal(line)),
        Row("the same without MLflow's thread", f"{100 * line['share_of_main_thread']:.2g} %"),
    ]


def _time_to_accuracy(line: Line) -> list[Row]:
    name = f"{line['task']} to {line['target']:.0%}"
    if "ratio" not in line:
        return [Row(name, "target not reached")]
    return [Row(f"{name}, ratio", _spread(line["ratio"]), _goal(line))]


def _numbers(line: Line) -> list[Row]:
    """Return a row for each number of a benchmark that has no function of its own."""
    skipped = {"runs", "cores_of_others"}
    return [
        Row(f"{line['benchmark']}: {name.replace('_', ' ')}", f"{value:.3g}")
        for name, value in line.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in skipped
    ]


# Short arguments, in which {FRESH} is an empty folder, and the rows of the output.
BENCHMARKS: dict[str, tuple[tuple[str, ...], Callable[[Line], list[Row]]]] = {
    "startup": (("--runs", "3"), _numbers),
    "same_network": (("--images", "200", "--rounds", "3"), _same_network),
    "roofline": (("--rounds", "3"), _roofline),
    "loader": (("--steps", "10", "--rounds", "5"), _loader),
    "cost_of_tracking": (("--pairs", "0", "data.count=8000", "train.epochs=2"), _cost_of_tracking),
    # An easy task: the article's loop takes 17 minutes for the task itself.
    "time_to_accuracy": (
        (
            *("--task", "digits", "--target", "0.3", "--seeds", "1", "--max-article-epochs", "6"),
            *("--results", f"{FRESH}/results.jsonl"),
            *("data.count=1500", "captcha.alphabet='01'", "captcha.width=40", "captcha.height=16"),
            "train.epochs=10",
        ),
        _time_to_accuracy,
    ),
    "sweeping": ((), _numbers),
}


def run(name: str, arguments: tuple[str, ...]) -> Line | str:
    """Run a benchmark; return its last line of JSON, or the error."""
    with tempfile.TemporaryDirectory() as fresh:  # no result of an earlier call is reused
        words = [word.replace(FRESH, fresh) for word in arguments]
        command = [sys.executable, str(FOLDER / f"{name}.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return "\n".join(done.stderr.splitlines()[-ERROR_LINES:]) or f"exit code {done.returncode}"
    found: Line = json.loads(lines[-1])
    return found


def note(line: Line) -> str:
    """Return the remark about other processes, of the line or of its first part that has one."""
    parts = [
        line,
        *line.get("networks", {}).values(),
        *line.get("cases", {}).values(),
        line.get("machine", {}),
    ]
    cores = max((part.get("cores_of_others", 0.0) for part in parts), default=0.0)
    is_disturbed = any(part.get("disturbed") for part in parts)
    return f"disturbed: others used {cores:.2g} cores" if is_disturbed else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=tuple(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the JSON lines to this file")
    options = parser.parse_args()
    console, failed = Console(), []
    table = Table("figure", "value (range)", "goal", "note", title="short forms", title_justify="left")
    for name in options.only:
        console.print(f"running {name}", style="dim")
        short, rows_of = BENCHMARKS[name]
        line = run(name, short)
        if isinstance(line, str):
            failed.append(name)
            table.add_row(name, "failed", "", line)
            continue
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        for row in rows_of(line):
            table.add_row(*row, note(line))
    console.print(table)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
