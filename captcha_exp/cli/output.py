"""Print the results of the commands on standard output."""

import json
import math
import re
import shlex
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from captcha_exp.cli.parser import PROGRAM
from captcha_exp.data.alphabet import NO_CHARACTER
from captcha_exp.runs.info import MlflowRef
from captcha_exp.runtime.console import SafeConsole
from captcha_exp.runtime.text import escape_unprintable

if TYPE_CHECKING:  # some import torch, which takes seconds
    from captcha_exp.config import GpuSpec
    from captcha_exp.data.dataset import Dataset
    from captcha_exp.doctor import Finding
    from captcha_exp.model.evaluate import Evaluation
    from captcha_exp.model.predict import Prediction
    from captcha_exp.sweep.aggregate import SeedGroup
    from captcha_exp.sweep.summary import SweepSummary
    from captcha_exp.tracking.sync import SyncResult

MAX_SUSPECTS = 20  # rows of the table of suspected labels
MAX_ROWS = 12  # of a table of `evaluate`
MAX_WIDTH = 10_000  # characters of a line in a file or a pipe
PRIVATE_USE = 0xE000  # code points of no character


def get_console() -> SafeConsole:
    """Return a console on standard output, 160 columns wide if that is not a terminal."""
    out = SafeConsole(highlight=False, soft_wrap=True, emoji=False)
    if not out.is_terminal:
        out.width = 160
    return out


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    print(to_json(value, indent=2))


def to_json(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON with the characters that a terminal can print; the others are escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def make_table(
    columns: Iterable[str],
    rows: Iterable[Iterable[str | Text]],
    title: str | Text = "",
    right: Container[str] = (),
) -> Table:
    """Return a table of texts without markup; columns in `right` are aligned to the right."""
    table = Table(
        title=title if isinstance(title, Text) else Text(escape_unprintable(title)), title_justify="left"
    )
    for column in columns:
        justify: JustifyMethod = "right" if column in right else "left"
        table.add_column(Text(escape_unprintable(column)), justify=justify, overflow="fold")
    for row in rows:
        cells = (cell if isinstance(cell, Text) else Text(escape_unprintable(cell)) for cell in row)
        table.add_row(*cells)
    return table


def print_table(table: Table, out: SafeConsole | None = None) -> None:
    """Print a table without truncation: one wider than the terminal has no frame and long lines."""
    out = out or get_console()
    width = out.width if out.is_terminal else MAX_WIDTH
    out.width = MAX_WIDTH
    if out.measure(table).maximum > width:
        table.box, table.pad_edge = None, False
    out.print(table)


def print_rows(columns: Sequence[str], rows: Iterable[Iterable[str]], right: Container[str] = ()) -> None:
    """Print a table of many rows as `print_table` does.

    Rich renders the frame and one row, whose placeholders are replaced: it would take 1 ms for each row.
    """
    texts = [[escape_unprintable(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(columns, *texts, strict=True)]
    placeholders = [chr(PRIVATE_USE + number) * width for number, width in enumerate(widths)]
    out = get_console()
    with out.capture() as capture:
        print_table(make_table(columns, [map(Text, placeholders)], right=right), out)
    above, row, below = re.split(rf"(?m)^(.*{placeholders[0]}.*\n)", capture.get())
    lines = []
    for cells in texts:
        line = row
        for column, cell, placeholder, width in zip(columns, cells, placeholders, widths, strict=True):
            padding = " " * (width - cell_len(cell))
            line = line.replace(placeholder, padding + cell if column in right else cell + padding)
        lines.append(line)
    print("".join([above, *lines, below]), end="", file=out.file)


def format_value(key: str, value: Any) -> str:
    """Format a value for a table: accuracies in percent, MiB without decimals, strings unchanged."""
    if not isinstance(value, float):
        return to_text(value)
    if not math.isfinite(value):
        return str(value)
    if is_fraction(key):
        return f"{value:.2%}"
    return f"{value:,.0f}" if key.endswith("_mib") else f"{value:g}"


def is_number(value: Any) -> bool:
    """Return whether a value is a number; a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_fraction(key: str) -> bool:
    """Return whether the values of this key are fractions, shown in percent."""
    return re.search(r"accuracy(_low|_high)?$", key) is not None


def finite_or_none(value: Any) -> Any:
    """Return the value, or None for NaN and infinity, which JSON lacks."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_text(value: Any) -> str:
    """Return a value as one line: a string unchanged, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def print_owed(mlflow: MlflowRef) -> None:
    """Print what MLflow does not have of a run or sweep, if anything."""
    if not mlflow.closed:
        owed = ", ".join(mlflow.owed) or "the end of the run"
        text = f"MLflow does not have yet: {owed}; {PROGRAM} sync delivers it to {mlflow.uri}"
        get_console().print(text, markup=False)


def print_sync(results: "Sequence[SyncResult]") -> None:
    """Print a line for each run that MLflow did not have completely."""
    for result in results:
        get_console().print(str(result), markup=False)
    if any(result.problem is not None for result in results):
        get_console().print("captcha-exp sync --to URI delivers to another store, if the address is wrong")
    if not results:
        get_console().print("nothing to deliver: MLflow has every run that has ended")


def print_dataset(manifest: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Print what is in a dataset, and the files with its images."""
    splits = ", ".join(f"{name} {count:,}" for name, count in manifest["splits"].items())
    out = get_console()
    out.print(f"{manifest['images']:,} images with {manifest['distinct_labels']:,} distinct labels")
    out.print(f"split by label: {splits}")
    for name in ("lengths", "sizes", "formats"):
        shown = [f"{key} ({count:,})" for key, count in list(manifest[name].items())[:6]]
        more = len(manifest[name]) - len(shown)
        if shown:
            out.print(f"{name} {', '.join(shown)}{f' and {more} more' if more else ''}", markup=False)
    for name in ("absent_characters", "rare_characters"):
        if values[name]:
            out.print(f"{name.replace('_', ' ')}: {' '.join(values[name])}", markup=False)
    if values["repeated_labels"]:
        out.print(f"{len(values['repeated_labels']):,} labels have several images")
    for name in ("page", "preview"):
        if values[name]:
            out.print(f"{name} {values[name]}", markup=False)
    if values["suspects_page"]:
        _print_suspects(values["suspects"], values["suspects_page"])


def _print_suspects(suspects: Mapping[str, Any], page: str) -> None:
    """Print how many labels look wrong, the most certain ones, and where to correct them."""
    out, found = get_console(), suspects["found"]
    rows = [
        [each["file"], each["label"], each["read"], f"{each['confidence']:.1%}", each["ratio_text"]]
        for each in found[:MAX_SUSPECTS]
    ]
    if rows:
        more = f" (the first {len(rows)} of {len(found):,})" if len(found) > len(rows) else ""
        title = f"suspected wrong labels{more}"
        columns = ("file", "label", "read", "probability", "likelihood ratio")
        print_table(make_table(columns, rows, title, right=set(columns[3:])))
    share = suspects["probable"] / suspects["read"]
    out.print(
        f"{suspects['probable']:,} of {suspects['read']:,} labels ({share:.1%}) are probably wrong; "
        f"{len(found) - suspects['probable']:,} more are read otherwise"
    )
    for key, text in (
        ("decided", "have a correction already"),
        ("unread", "were not judged: runs were trained on them, or have other characters or lengths"),
    ):
        if suspects[key]:
            out.print(f"{suspects[key]:,} images {text}")
    out.print(f"look at them in {page}, and save what is right as {suspects['corrections']}", markup=False)


def print_evaluation(evaluation: "Evaluation", data: "Dataset", run_dir: Path, split: str) -> None:
    """Print accuracies per label, position and character, the confusions, and the worst misreads."""
    out, alphabet = get_console(), data.alphabet
    out.print(f"{run_dir}, {split} split", markup=False)
    accuracy = format_accuracy(
        evaluation.accuracy, evaluation.accuracy_interval, evaluation.num_correct, len(evaluation.indices)
    )
    out.print(f"[bold]accuracy {accuracy}[/bold]; character accuracy {evaluation.char_accuracy:.2%}")
    positions = _numbered(evaluation.accuracy_by_position())
    from_end = _numbered(evaluation.accuracy_from_end()) if evaluation.has_lengths else []
    lengths = [
        (str(length), f"{count:,}", f"{part:.2%}")
        for length, (count, part) in evaluation.accuracy_by_length().items()
    ]
    folders = [
        (path, f"{count:,}", f"{part:.2%}")
        for path, (count, part) in evaluation.accuracy_by_folder(data).items()
    ]
    known = [(c, part) for c, part in evaluation.accuracy_by_character(alphabet).items() if part is not None]
    known.sort(key=lambda item: item[1])
    characters = [(c, f"{part:.2%}") for c, part in known[:MAX_ROWS]]
    if more := known[MAX_ROWS:]:
        worst, best = f"{more[0][1]:.2%}", f"{more[-1][1]:.2%}"
        characters.append((f"{len(more)} more", worst if worst == best else f"{worst} to {best}"))
    confusions = [
        (label or NO_CHARACTER, read or NO_CHARACTER, str(count))
        for label, read, count in evaluation.confused_pairs(alphabet)
    ]
    misreads = [(m.image, m.label, m.predicted, f"{m.confidence:.1%}") for m in evaluation.misreads(data)]
    if evaluation.calibration.images:
        out.print(f"calibration error {evaluation.calibration_error:.2%}")
    answers = [
        (
            f"{each['min_confidence']:.1%}",
            f"{each['threshold']:.4f}",
            f"{each['coverage']:.1%}",
            f"{each['accuracy']:.2%}",
        )
        for each in evaluation.operating_points()
        if "accuracy" in each
    ]
    for title, columns, rows in (
        ("predict --min-confidence", ("to be right in", "threshold", "answers", "right of these"), answers),
        ("per position", ("position", "accuracy"), positions),
        ("per position from the end", ("position", "accuracy"), from_end),
        ("per length of the label", ("characters", "images", "accuracy"), lengths),
        ("per folder", ("folder", "images", "accuracy"), folders),
        ("per character, worst first", ("character", "accuracy"), characters),
        ("most frequent confusions", ("label", "predicted", "count"), confusions),
        ("worst misreads", ("image", "label", "predicted", "confidence"), misreads),
    ):
        shown = rows if rows is characters else rows[:MAX_ROWS]
        count = f" ({len(shown)} of {len(rows):,})" if len(rows) > len(shown) else ""
        if rows:
            out.print(make_table(columns, shown, title + count))


def _numbered(fractions: Iterable[float]) -> list[tuple[str, str]]:
    return [(str(n), f"{part:.2%}") for n, part in enumerate(fractions, 1)]


def print_predictions(predictions: Sequence["Prediction"]) -> None:
    """Print a line for each image; invalid images go to standard error."""
    width = min(
        60, max((len(escape_unprintable(str(p.image))) for p in predictions if not p.error), default=0)
    )
    for prediction in predictions:
        name = escape_unprintable(str(prediction.image))
        if prediction.error:
            print(f"{name}: {escape_unprintable(prediction.error)}", file=sys.stderr)
        else:
            print(f"{name:<{width}}  {prediction.to_line()}")


def print_gpu(gpu: "GpuSpec", path: Path, config_dir: str | None) -> None:
    """Print the figures of a GPU, the path of its file, and the override that selects it."""
    out = get_console()
    figures = {field.name: getattr(gpu, field.name) for field in fields(gpu)}
    rows = [
        (name, f"{bounds.min:,g}", f"{bounds.max:,g}", bounds.source)
        for name, bounds in figures.items()
        if not isinstance(bounds, str | None)
    ]
    out.print(make_table(("figure", "min", "max", "source"), rows, gpu.name))
    out.print(f"file {path}", markup=False)
    flag = f"--config-dir {shlex.quote(config_dir)} " if config_dir else ""
    out.print(f"use it with {flag}gpu={path.stem}", markup=False)


def print_findings(findings: "Sequence[Finding]") -> None:
    """Print a line for each finding: level, message, and the remedy after an arrow."""
    colors = {"ok": "green", "info": "yellow", "problem": "bold red"}
    out = get_console()
    for finding in findings:
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        level = (f"{finding.level:<8}", colors[finding.level])
        line = Text.assemble(level, finding.message.replace("\n", " "), (remedy.replace("\n", " "), "bold"))
        out.print(line)


def print_sweep(summary: "SweepSummary") -> None:
    """Print a row for each group of jobs, the error of each failed job, and the conclusions."""
    from captcha_exp.sweep.tables import NUMBER_COLUMNS, build_table

    out = get_console()
    rows = build_table(summary.groups)
    cells: list[list[str | Text]] = [
        [*list(row.values())[:-1], Text(row["status"], _status_color(group))]
        for group, row in zip(summary.groups, rows, strict=True)
    ]
    right = [column for column in rows[0] if column.partition(" (")[0] in NUMBER_COLUMNS]
    table = make_table(rows[0], cells, summary.title, right)
    if not out.is_terminal:
        out.width = MAX_WIDTH
    out.print(table)
    for result in summary.results:
        if result.outcome in ("failed", "killed") or (result.outcome == "finished" and result.error):
            location = f", run directory {escape_unprintable(result.run_dir)}" if result.run_dir else ""
            error = escape_unprintable(result.error).strip() if result.error else result.outcome
            name = (f"{escape_unprintable(result.name)}: ", "bold red")
            out.print(Text.assemble(name, f"{error}{location}"))
    for sentence in summary.conclusions:
        out.print(Text(sentence, "bold"))


def _status_color(group: "SeedGroup") -> str:
    if "failed" in group.outcome_counts:
        return "bold red"
    if "killed" in group.outcome_counts or "not run" in group.outcome_counts:
        return "yellow"
    if "oom" in group.outcome_counts or "skipped" in group.outcome_counts:
        return "yellow" if group.fits == "unsure" else "red"
    return "green"


def format_accuracy(accuracy: float, interval: Sequence[float], num_correct: int, num_images: int) -> str:
    low, high = interval
    return (
        f"{accuracy:.2%} (95% confidence interval {low:.2%} to {high:.2%}; {num_correct:,} of "
        f"{num_images:,} labels fully correct)"
    )
