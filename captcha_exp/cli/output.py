"""Print the results of the commands on standard output."""

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

if TYPE_CHECKING:  # some import torch, which takes seconds
    from captcha_exp.config import GpuSpec
    from captcha_exp.data.dataset import Dataset
    from captcha_exp.doctor import Finding
    from captcha_exp.model.evaluate import Evaluation
    from captcha_exp.model.predict import Prediction
    from captcha_exp.sweep.aggregate import SeedGroup
    from captcha_exp.sweep.summary import SweepSummary

MAX_WIDTH = 10_000  # of a table in a file or a pipe


def get_console() -> Console:
    """Return a console on standard output, 160 columns wide if that is not a terminal."""
    out = Console(highlight=False, soft_wrap=True)
    if not out.is_terminal:
        out.width = 160
    return out


def print_training(run_dir: Path, program: str) -> None:
    """Print test accuracy, cost, weights and location of a finished run, and suggested next commands."""
    state, test = (
        json.loads((run_dir / name).read_text(encoding="utf-8")) for name in ("run.json", "test.json")
    )
    result, mlflow = state["result"], state["mlflow"]
    interval = (test["accuracy_low"], test["accuracy_high"])
    accuracy = _format_accuracy(test["accuracy"], interval, test["correct"], test["images"])
    out = get_console()
    out.print()
    out.print(f"[bold]test accuracy {accuracy}[/bold], best epoch {result['best_epoch']}")
    out.print(
        f"time {result['seconds']:.0f} s, peak memory {result['process_peak_mib']:,.0f} MiB (whole process)"
    )
    out.print(f"weights {result['weights_sha256']}", markup=False)
    if mlflow:
        out.print(f"run {mlflow['run_id']}", markup=False)
    out.print(f"run directory {run_dir}", markup=False)
    other = "experiment=alnum" if state["name"] != "alnum" else "experiment=quickstart"
    out.print("\nnext:")
    for command, description in (
        (f"{program} evaluate latest", "accuracy per character and position, confusions"),
        (f"{program} ui", "learning curves of all runs, in MLflow"),
        (f"{program} train {other}", "another alphabet; see conf/experiment/ for more"),
    ):
        out.print(f"  {command:<50} {description}", markup=False)


def print_dataset(manifest: Mapping[str, Any], preview: Path) -> None:
    """Print the size of a dataset, its splits, and the path of the preview image."""
    splits = ", ".join(f"{name} {count:,}" for name, count in manifest["splits"].items())
    out = get_console()
    out.print(f"{manifest['images']:,} images with {manifest['distinct_labels']:,} distinct labels")
    out.print(f"split by label: {splits}")
    out.print(f"preview {preview}", markup=False)


def print_evaluation(evaluation: "Evaluation", data: "Dataset", run_dir: Path, split: str) -> None:
    """Print accuracies per label, position and character, the confusions, and the worst misreads."""
    out, alphabet = get_console(), data.alphabet
    out.print(f"{run_dir}, {split} split", markup=False)
    accuracy = _format_accuracy(
        evaluation.accuracy, evaluation.accuracy_interval, evaluation.num_correct, len(evaluation.indices)
    )
    out.print(f"[bold]accuracy {accuracy}[/bold]; character accuracy {evaluation.char_accuracy:.2%}")
    positions = Table("position", "accuracy", title="per position", title_justify="left")
    for number, fraction in enumerate(evaluation.accuracy_by_position(), 1):
        positions.add_row(str(number), f"{fraction:.2%}")
    characters = Table("character", "accuracy", title="per character, worst first", title_justify="left")
    occurring = [(c, a) for c, a in evaluation.accuracy_by_character(alphabet).items() if a is not None]
    for character, fraction in sorted(occurring, key=lambda item: item[1])[:12]:
        characters.add_row(character, f"{fraction:.2%}")
    confusions = Table("label", "predicted", "count", title="most frequent confusions", title_justify="left")
    for label, predicted, count in evaluation.confused_pairs(alphabet)[:12]:
        confusions.add_row(label, predicted, str(count))
    misreads = Table(
        "image", "label", "predicted", "confidence", title="worst misreads", title_justify="left"
    )
    for misread in evaluation.misreads(data)[:12]:
        texts = (escape_unprintable(misread.image), misread.label, misread.predicted)
        misreads.add_row(*map(Text, texts), f"{misread.confidence:.1%}")
    for table in (positions, characters, confusions, misreads):
        out.print(table)


def print_predictions(predictions: Sequence["Prediction"]) -> None:
    """Print a line for each image; invalid images go to standard error."""
    width = min(
        60, max((len(escape_unprintable(str(p.image))) for p in predictions if not p.error), default=0)
    )
    for prediction in predictions:
        name = escape_unprintable(str(prediction.image))
        if prediction.error:
            print(f"{name}: {prediction.error}", file=sys.stderr)
        else:
            print(f"{name:<{width}}  {prediction.text}  {prediction.confidence:.1%}")


def print_gpu(gpu: "GpuSpec", path: Path, config_dir: str | None) -> None:
    """Print the figures of a GPU, the path of its file, and the override that selects it."""
    out = get_console()
    table = Table("figure", "min", "max", "source", title=Text(gpu.name), title_justify="left")
    for field in fields(gpu):
        bounds = getattr(gpu, field.name)
        if not isinstance(bounds, str | None):
            table.add_row(field.name, f"{bounds.min:,g}", f"{bounds.max:,g}", Text(bounds.source))
    out.print(table)
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
    table = Table(title=Text(summary.title), title_justify="left")
    for column in rows[0]:
        justify: JustifyMethod = "right" if column.partition(" (")[0] in NUMBER_COLUMNS else "left"
        table.add_column(Text(column), justify=justify, overflow="fold")
    for group, row in zip(summary.groups, rows, strict=True):
        *cells, status = row.values()
        table.add_row(*map(Text, cells), Text(status, _status_color(group)))
    if not out.is_terminal:
        out.width = MAX_WIDTH
    out.print(table)
    for result in summary.results:
        if result.outcome in ("failed", "killed"):
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


def _format_accuracy(accuracy: float, interval: Sequence[float], num_correct: int, num_images: int) -> str:
    low, high = interval
    return (
        f"{accuracy:.2%} (95% confidence interval {low:.2%} to {high:.2%}; {num_correct:,} of "
        f"{num_images:,} labels fully correct)"
    )
