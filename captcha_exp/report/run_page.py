"""The report of a run: one HTML page, made at the end of a training or later, that needs no network."""

import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from captcha_exp.data.alphabet import NO_CHARACTER
from captcha_exp.data.dataset import Dataset
from captcha_exp.model.evaluate import Evaluation
from captcha_exp.model.proportions import wilson_interval
from captcha_exp.report import advice, charts, predictions
from captcha_exp.report.charts import Chart, DotPlot, Series, percent
from captcha_exp.report.dataset_page import template_environment
from captcha_exp.report.run_content import RunContent, hide_credentials
from captcha_exp.runs import SavedRun
from captcha_exp.runs.content import PlannedMemory
from captcha_exp.runtime.files import write_atomically

RUN_PAGE = "report/run.html"  # relative to the run directory
MAX_EPOCH_ROWS = 200  # of the table; of more epochs, every n-th is shown


def write_page(
    run: SavedRun, test: Evaluation | None, data: Dataset | None, path: Path, missing: Iterable[str] = ()
) -> list[str]:
    """Write the page of a run, finished or not; return the parts that it lacks, a line each.

    Args:
        run: The run.
        test: The predictions on its test split; without them the page has only recorded figures.
        data: The dataset of the run, if there are predictions.
        path: Where to write it.
        missing: Parts that it is known to lack.
    """
    content = RunContent(run, test, data, list(missing))
    page = template_environment().get_template("run.html").render(**_describe(content))
    write_page_file(path, page)
    return content.missing


def write_page_file(path: Path, page: str) -> None:
    """Write a page; lone surrogates, of a file name that is not valid UTF-8, are escaped."""
    write_atomically(path, page.encode("utf-8", "backslashreplace"))


def _describe(content: RunContent) -> dict[str, Any]:
    """Return the variables of the template."""
    run, test, evaluation, data = content.run, content.test, content.evaluation, content.data
    values: dict[str, Any] = {
        "run": run.info,
        "name": content.name,
        "quoted_name": shlex.quote(content.name),
        "test": test,
        "best_epoch": content.best_epoch,
        "num_epochs": len(content.epochs),
        "status": describe_status(run),
        "curves": _curves(content),
        "speed_chart": _speed_chart(content),
        "images_per_second": content.images_per_second,
        "is_disturbed": content.is_disturbed,
        "epochs": content.epochs[:: -(-len(content.epochs) // MAX_EPOCH_ROWS) or 1],
        "memory": _memory_rows(content),
        "dataset": content.dataset,
        "has_dataset_page": (run.run_dir / "report" / "dataset.html").is_file(),
        "parts": _parts(content),
        "characters": sorted(
            (
                (c, part)
                for c, part in ({} if test is None else test.by_character).items()
                if part is not None
            ),
            key=lambda item: item[1],
        ),
        "no_character": NO_CHARACTER,
        "matrix": None,
        "confidence": None,
        "misreads": [],
        "uncertain": [],
        "changed_settings": content.changed_settings(),
        "configs": content.configs,
        "environment": content.environment_rows(),
        "command": _command(content.environment.get("command")),
        "differences": content.differences(),
        "suggestions": _suggestions(content),
    }
    if evaluation is not None and data is not None:
        values |= {
            "matrix": predictions.confusion_matrix(evaluation, data),
            "confidence": predictions.describe_confidence(evaluation),
            "misreads": predictions.make_tiles(predictions.misread_rows(evaluation), evaluation, data),
            "uncertain": predictions.make_tiles(predictions.uncertain_rows(evaluation), evaluation, data),
        }
    return values | {"missing": content.missing, "num_misreads": 0 if test is None else len(test.misreads)}


def describe_status(run: SavedRun) -> str:
    """Return in a few words how a run without a result has ended, or that it has not."""
    info = run.info
    if info.oom is not None:
        return f"out of memory during {info.oom.during}, in epoch {info.oom.epoch}"
    if info.skipped is not None:
        return "not trained: it is not predicted to fit into the memory"
    reason = info.error or info.stop_reason
    status = "RUNNING, or its process was killed" if info.is_running else info.status
    return f"{status}: {reason}" if reason else status


# -- curves and tables ---------------------------------------------------------------------------------------


def _curves(content: RunContent) -> list[Chart]:
    """Return loss and accuracy by epoch."""
    found = []
    for key, y_format, limits in (
        ("accuracy", percent, (0.0, 1.0)),
        ("loss", "{:.3g}".format, (0.0, math.inf)),
    ):
        series = [
            Series(
                name, [(step, metrics.get(f"{split}/{key}", math.nan)) for step, metrics in content.epochs]
            )
            for split, name in (("train", "training (running mean)"), ("val", "validation"))
        ]
        tested = content.test_metrics.get(f"test/{key}")
        if tested is not None and content.epochs:
            series.append(Series("test, best weights", [(content.best_epoch, tested)], is_line=False))
        title = "Accuracy of whole labels" if key == "accuracy" else "Loss"
        found.append(charts.line_chart(title, series, x_label="epoch", y_format=y_format, y_limits=limits))
    return [chart for chart in found if chart is not None]


def _speed_chart(content: RunContent) -> Chart | None:
    if len(content.epochs) < 2:
        return None
    speeds = [(step, m.get("speed/images_per_second", math.nan)) for step, m in content.epochs]
    return charts.line_chart(
        "Training speed (images/s)",
        [Series("images/s", speeds)],
        x_label="epoch",
        y_format="{:,.0f}".format,
        y_limits=(0.0, math.inf),
    )


def _parts(content: RunContent) -> list[DotPlot]:
    """Return the accuracy per position, from both ends, per length and per folder."""
    test = content.test
    if test is None:
        return []
    counts = content.position_counts()
    lengths = [(f"{length} characters", part) for length, part in test.by_length.items()]
    has_lengths = len(lengths) > 1
    found = [_positions("Characters by position", test.by_position, counts)]
    if has_lengths:
        found.append(_positions("Characters by position from the end", test.by_position_from_end, counts))
    for title, parts in (
        ("Whole labels by length", lengths if has_lengths else []),
        ("Whole labels by folder", list(test.by_folder.items())),
    ):
        rows = [
            (
                name,
                part.accuracy,
                wilson_interval(round(part.accuracy * part.images), part.images),
                f"{percent(part.accuracy)} of {part.images:,}",
            )
            for name, part in parts
        ]
        found.append(charts.dot_plot(title, rows, y_format=percent, limits=(0.0, 1.0)))
    return [plot for plot in found if plot is not None]


def _positions(title: str, fractions: Sequence[float], counts: Sequence[int]) -> DotPlot | None:
    rows: list[tuple[str, float | None, tuple[float, float] | None, str]] = []
    for n, fraction in enumerate(fractions):
        count = counts[n] if len(counts) == len(fractions) else 0
        interval = wilson_interval(round(fraction * count), count) if count else None
        rows.append((f"{n + 1}", fraction, interval, f"{fraction:.2%}"))
    return charts.dot_plot(title, rows, y_format=percent, limits=(0.0, 1.0))


def _memory_rows(content: RunContent) -> list[tuple[str, str]]:
    """Return the predicted and the measured values."""
    rows: list[tuple[str, str]] = []
    on_gpu = str(content.flat_config.get("device.name", "")).startswith("cuda")
    if content.memory:
        plan = PlannedMemory.model_validate(content.memory)
        gpu = content.flat_config.get("gpu.name", "the GPU")
        rows.append(("predicted GPU memory of the process", f"{_mib(plan.process_mib)} on {gpu}"))
        if plan.budget_mib is not None:
            rows.append(("memory budget", f"{_mib(plan.budget_mib)}: {plan.fits}"))
    peaks: dict[str, float] = {}
    for _, metrics in content.epochs:
        for key, value in metrics.items():
            if key.startswith("memory/"):
                peaks[key] = max(value, peaks.get(key, 0.0))
    if (process := peaks.pop("memory/process_peak_mib", None)) is not None:
        kind = "GPU memory" if on_gpu else "RAM; the prediction is of GPU memory, and not comparable"
        rows.append(("measured peak of the process", f"{process:,.0f} MiB ({kind})"))
    for key, value in peaks.items():
        name = key.removeprefix("memory/").removesuffix("_mib").replace("_", " ")
        rows.append((f"measured {name}", f"{value:,.0f} MiB"))
    return rows


def _mib(bounds: Sequence[float]) -> str:
    low, high = (f"{end:,.0f}" for end in bounds)
    return f"{low} MiB" if low == high else f"{low} to {high} MiB"


def _command(words: Any) -> str | None:
    """Return the command that started the training, if it was typed."""
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return None
    if words[1:2] != ["train"]:
        return None
    return shlex.join(map(hide_credentials, [Path(words[0]).name, *words[1:]]))


def _suggestions(content: RunContent) -> list[advice.Suggestion]:
    """Return what to try next."""
    info, test = content.run.info, content.test
    stopped = info.oom or info.skipped
    if stopped is not None:
        return [advice.Suggestion(f"to need less memory, set {remedy}") for remedy in stopped.remedies]
    if test is None:
        return []
    strengths = [
        v for key, v in content.flat_config.items() if key.startswith("augment.") and "warmup" not in key
    ]
    evaluation = content.evaluation
    return advice.suggest(
        advice.Figures(
            run=shlex.quote(content.name),
            test=test,
            epochs=[metrics for _, metrics in content.epochs],
            best_epoch=content.best_epoch,
            num_validation=(content.dataset.get("splits") or {}).get("validation"),
            is_augmented=any(strengths) if strengths else None,
            has_files=bool(content.dataset.get("files")),
            mean_confidence=None if evaluation is None else float(np.mean(evaluation.text_confidences)),
            is_speed_disturbed=content.is_disturbed,
            position_counts=content.position_counts(),
            num_wrong_chars=None if evaluation is None else evaluation.num_wrong_chars,
        )
    )
