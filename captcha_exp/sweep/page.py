"""The report of a sweep: one HTML page with the conclusions, the table and figures, and links to the runs."""

import math
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from captcha_exp.report import charts
from captcha_exp.report.charts import Chart, DotPlot, Series, percent
from captcha_exp.report.dataset_page import template_environment
from captcha_exp.report.run_page import RUN_PAGE, write_page_file
from captcha_exp.runs.fields import short_name
from captcha_exp.runtime.text import escape_unprintable
from captcha_exp.sweep.aggregate import SeedGroup, truncate
from captcha_exp.sweep.conclusions import group_by_rest, is_batch_size_sweep
from captcha_exp.sweep.record import Sweep
from captcha_exp.sweep.results import JobResult
from captcha_exp.sweep.summary import SweepSummary
from captcha_exp.sweep.tables import NUMBER_COLUMNS, build_table

SWEEP_PAGE = "summary.html"  # relative to the sweep directory
MAX_LINES = 6  # in a chart; of more series, only the first are drawn
MAX_ROWS = 60  # of a dot plot, and groups of a chart
MAX_JOBS = 500  # of the table of jobs

Bounds = tuple[float, float]


def write_page(sweep: Sweep, summary: SweepSummary, path: Path) -> list[str]:
    """Write the page of a sweep; return the parts that it lacks, a line each."""
    missing = []
    if len(summary.results) > MAX_JOBS:
        missing.append(f"the table of jobs has the first {MAX_JOBS:,} of {len(summary.results):,}")
    rows = build_table(summary.groups)
    name = short_name(sweep.run_dir)
    page = (
        template_environment()
        .get_template("sweep.html")
        .render(
            name=name,
            quoted_name=shlex.quote(name),
            info=sweep.info,
            title=summary.title,
            conclusions=summary.conclusions,
            missing=missing,
            columns=list(rows[0]),
            rows=rows,
            number_columns=[each for each in rows[0] if each.partition(" (")[0] in NUMBER_COLUMNS],
            has_repeats=any(len(group.results) > 1 for group in summary.groups),
            figures=_figures(summary),
            jobs=[_describe_job(result, path.parent) for result in summary.results[:MAX_JOBS]],
        )
    )
    write_page_file(path, page)
    return missing


def _describe_job(result: JobResult, from_dir: Path) -> dict[str, Any]:
    """Return the row of a job; `page` is the address of its run's page, relative to this one, or None."""
    page = None if result.run_dir is None else Path(result.run_dir) / RUN_PAGE
    address = None
    if page is not None and page.is_file():
        # Without "./", an address such as 1-a:b.html would be one of the scheme "1-a".
        address = quote(
            f"./{Path(os.path.relpath(page, from_dir.resolve())).as_posix()}", errors="surrogateescape"
        )
    return {
        "number": result.number,
        "name": result.name,
        "page": address,
        "outcome": "out of memory" if result.outcome == "oom" else result.outcome,
        "error": result.error,
        "val_accuracy": result.val_accuracy,
        "test_accuracy": result.test_accuracy,
    }


def _figures(summary: SweepSummary) -> list[Chart | DotPlot]:
    """Return memory, speed and accuracy by batch size, else by group of jobs."""
    groups = summary.groups
    draw = _by_batch_size if is_batch_size_sweep(groups) else _by_group
    found = [
        draw(groups, "Best validation accuracy", _accuracy, percent, (0.0, 1.0)),
        draw(groups, "Training speed (images/s)", _speed, "{:,.0f}".format, (0.0, math.inf)),
        draw(
            groups,
            "Predicted GPU memory (MiB, minimum to maximum)",
            _predicted,
            "{:,.0f}".format,
            (0.0, math.inf),
        ),
        draw(groups, "Measured GPU memory (MiB)", _measured, "{:,.0f}".format, (0.0, math.inf)),
    ]
    return [figure for figure in found if figure is not None]


Value = tuple[float, Bounds | None]


def _accuracy(group: SeedGroup) -> Value | None:
    mean = group.metrics.get("val_accuracy")
    return None if mean is None else (mean.value, mean.interval)


def _speed(group: SeedGroup) -> Value | None:
    mean = group.metrics.get("images_per_second")
    return None if mean is None else (mean.value, mean.interval)


def _measured(group: SeedGroup) -> Value | None:
    mean = group.metrics.get("measured_mib") if group.on_gpu else None
    return None if mean is None else (mean.value, mean.interval)


def _predicted(group: SeedGroup) -> Value | None:
    """Return the middle of the prediction, with its range."""
    bounds = group.predicted_mib
    return None if bounds is None else ((bounds.min + bounds.max) / 2, (bounds.min, bounds.max))


def _by_batch_size(
    groups: tuple[SeedGroup, ...],
    title: str,
    get: Callable[[SeedGroup], Value | None],
    y_format: Callable[[float], str],
    limits: Bounds,
) -> Chart | None:
    """Return a chart with a line for each combination of the other swept settings."""
    series = []
    for name, members in group_by_rest(groups)[:MAX_LINES]:
        known = [(group.batch_size or 1, value) for group in members if (value := get(group)) is not None]
        points = [(float(size), value) for size, (value, _) in known]
        intervals = [interval or (value, value) for _, (value, interval) in known]
        has_intervals = any(interval for _, (_, interval) in known)
        if points:
            series.append(Series(name, points, intervals if has_intervals else ()))
    sizes = sorted({x for each in series for x, _ in each.points})
    return charts.line_chart(
        title, series, x_label="batch size", y_format=y_format, x_values=sizes, y_limits=limits
    )


def _by_group(
    groups: tuple[SeedGroup, ...],
    title: str,
    get: Callable[[SeedGroup], Value | None],
    y_format: Callable[[float], str],
    limits: Bounds,
) -> DotPlot | None:
    """Return a dot plot with a row for each group."""
    rows: list[tuple[str, float | None, Bounds | None, str]] = []
    for group in groups[:MAX_ROWS]:
        label = truncate(escape_unprintable(group.name)) or "all jobs"
        if (known := get(group)) is not None:
            value, interval = known
            rows.append((label, value, interval, y_format(value)))
        else:
            rows.append((label, None, None, ""))
    return charts.dot_plot(title, rows, y_format=y_format, limits=limits)
