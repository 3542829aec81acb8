"""What a command tells at its end, on standard output."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from captcha_exp.runtime.console import escape_unprintable

if TYPE_CHECKING:  # they bring torch, which a list of runs can do without
    from captcha_exp.config import GpuSpec
    from captcha_exp.data.dataset import Dataset
    from captcha_exp.doctor import Finding
    from captcha_exp.model.evaluate import Evaluation
    from captcha_exp.model.predict import Prediction
    from captcha_exp.sweep.aggregate import SeedGroup
    from captcha_exp.sweep.summary import SweepSummary

MAX_WIDTH = 10_000  # characters of a table, where no edge is to be seen


def get_console() -> Console:
    """Standard output; wide where nobody looks at its edge."""
    out = Console(highlight=False, soft_wrap=True)
    if not out.is_terminal:
        out.width = 160  # a file or a pipe has no edge to wrap at
    return out


def print_training(run_dir: Path, program: str) -> None:
    """The test figure of a finished run, what it cost, where the record is, and what to type next."""
    state, test = (
        json.loads((run_dir / name).read_text(encoding="utf-8")) for name in ("run.json", "test.json")
    )
    result, mlflow = state["result"], state["mlflow"]
    interval = (test["accuracy_low"], test["accuracy_high"])
    share = _format_accuracy(test["accuracy"], interval, test["correct"], test["images"])
    out = get_console()
    out.print()
    out.print(f"[bold]test accuracy {share}[/bold], best epoch {result['best_epoch']}")
    out.print(
        f"time {result['seconds']:.0f} s, peak memory {result['process_peak_mib']:,.0f} MiB (whole process)"
    )
    out.print(f"weights {result['weights_sha256']}", markup=False)
    if mlflow:
        out.print(f"run {mlflow['run_id']}", markup=False)
    out.print(f"folder {run_dir}", markup=False)
    following = "experiment=alnum" if state["name"] != "alnum" else "experiment=quickstart"
    out.print("\nnext:")
    for command, what in (
        (f"{program} evaluate latest", "per character, per position, confusions"),
        (f"{program} ui", "the curves of all runs, in MLflow"),
        (f"{program} train {following}", "another alphabet; conf/experiment/ has them all"),
    ):
        out.print(f"  {command:<50} {what}", markup=False)


def print_dataset(manifest: Mapping[str, Any], sheet: Path) -> None:
    """How many pictures there are, how they are split, and where some can be seen."""
    splits = ", ".join(f"{name} {count:,}" for name, count in manifest["splits"].items())
    out = get_console()
    out.print(f"{manifest['images']:,} pictures with {manifest['distinct_labels']:,} different labels")
    out.print(f"split by label: {splits}")
    out.print(f"sheet {sheet}", markup=False)


def print_evaluation(evaluation: "Evaluation", data: "Dataset", run_dir: Path, split: str) -> None:
    """Whole labels, positions, characters, confusions, the worst errors."""
    out, alphabet = get_console(), data.alphabet
    out.print(f"{run_dir}, {split} split", markup=False)
    whole = _format_accuracy(
        evaluation.accuracy, evaluation.accuracy_interval, evaluation.num_correct, len(evaluation.indices)
    )
    out.print(f"[bold]accuracy {whole}[/bold]; of characters {evaluation.char_accuracy:.2%}")
    positions = Table("position", "right", title="per position", title_justify="left")
    for number, share in enumerate(evaluation.accuracy_by_position(), 1):
        positions.add_row(str(number), f"{share:.2%}")
    characters = Table("character", "right", title="per character, the worst first", title_justify="left")
    occurring = [
        (c, share) for c, share in evaluation.accuracy_by_character(alphabet).items() if share is not None
    ]
    for character, share in sorted(occurring, key=lambda item: item[1])[:12]:
        characters.add_row(character, f"{share:.2%}")
    confusions = Table("label", "read", "times", title="most frequent confusions", title_justify="left")
    for label, read, count in evaluation.confused_pairs(alphabet)[:12]:
        confusions.add_row(label, read, str(count))
    errors = Table("picture", "label", "read", "sure", title="worst errors", title_justify="left")
    for error in evaluation.misreads(data)[:12]:
        texts = (Text(text) for text in (escape_unprintable(error.image), error.label, error.predicted))
        errors.add_row(*texts, f"{error.confidence:.1%}")
    for table in (positions, characters, confusions, errors):
        out.print(table)


def print_predictions(predictions: Sequence["Prediction"]) -> None:
    """A line for each picture, its name first; those that cannot be used on standard error."""
    width = min(
        60, max((len(escape_unprintable(str(r.image))) for r in predictions if not r.error), default=0)
    )
    for reading in predictions:
        name = escape_unprintable(str(reading.image))
        if reading.error:
            print(f"{name}: {reading.error}", file=sys.stderr)
        else:
            print(f"{name:<{width}}  {reading.text}  {reading.confidence:.1%}")


def print_gpu(gpu: "GpuSpec", path: Path, config_dir: str | None) -> None:
    """What is known of a card, where it is written, and what to type with it."""
    out = get_console()
    table = Table("figure", "least", "most", "source", title=Text(gpu.name), title_justify="left")
    for field in fields(gpu):
        figure = getattr(gpu, field.name)
        if not isinstance(figure, str | None):
            table.add_row(field.name, f"{figure.min:,g}", f"{figure.max:,g}", Text(figure.source))
    out.print(table)
    out.print(f"file {path}", markup=False)
    folder = f"--config-dir {shlex.quote(config_dir)} " if config_dir else ""
    out.print(f"use it with {folder}gpu={path.stem}", markup=False)


def print_findings(findings: "Sequence[Finding]") -> None:
    """A line for each finding: how bad, what, and behind an arrow what to do."""
    colours = {"ok": "green", "note": "yellow", "problem": "bold red"}
    out = get_console()
    for finding in findings:
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        level = (f"{finding.level:<8}", colours[finding.level])
        line = Text.assemble(level, finding.message.replace("\n", " "), (remedy.replace("\n", " "), "bold"))
        out.print(line)


def print_sweep(summary: "SweepSummary") -> None:
    """A line for each group of points, what failed with its whole error, and what follows from it all."""
    from captcha_exp.sweep.tables import HEADERS, build_table

    out = get_console()
    heads, lines = build_table(summary.groups)
    table = Table(title=Text(summary.title), title_justify="left")
    for head in heads:
        is_figure = head.partition(" (")[0] in {"points", *HEADERS} - {"fits", "status"}
        justify: JustifyMethod = "right" if is_figure else "left"
        table.add_column(Text(head), justify=justify, overflow="fold")
    for group, line in zip(summary.groups, lines, strict=True):
        table.add_row(*map(Text, line[:-1]), Text(line[-1], _status_color(group)))
    if not out.is_terminal:
        whole = out.options.update_width(MAX_WIDTH)
        out.width = max(out.width, out.measure(table, options=whole).maximum)
    out.print(table)
    for row in summary.results:
        if row.became in ("failed", "killed"):
            folder = f", folder {escape_unprintable(row.folder)}" if row.folder else ""
            error = escape_unprintable(row.error).strip() if row.error else row.became
            out.print(Text.assemble((f"{escape_unprintable(row.name)}: ", "bold red"), f"{error}{folder}"))
    for sentence in summary.conclusions:
        out.print(Text(sentence, "bold"))


def _status_color(group: "SeedGroup") -> str:
    if "failed" in group.outcome_counts:
        return "bold red"
    if "killed" in group.outcome_counts or "not run" in group.outcome_counts:
        return "yellow"
    if "oom" in group.outcome_counts or "unfit" in group.outcome_counts:
        return "yellow" if group.fits == "unsure" else "red"
    return "green"


def _format_accuracy(accuracy: float, interval: Sequence[float], right: int, pictures: int) -> str:
    low, high = interval
    return (
        f"{accuracy:.2%} (95 % interval {low:.2%} to {high:.2%}; {right:,} of {pictures:,} labels read whole)"
    )
