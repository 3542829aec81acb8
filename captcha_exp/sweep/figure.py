"""Plot the summary of a sweep."""

from pathlib import Path

from captcha_exp.report import figures
from captcha_exp.runtime.text import escape_unprintable
from captcha_exp.sweep.aggregate import SeedGroup, truncate
from captcha_exp.sweep.conclusions import group_by_rest, is_batch_size_sweep
from captcha_exp.sweep.summary import SweepSummary

MAX_LABEL_LENGTH = 28  # characters of a tick label


def save_figure(summary: SweepSummary, path: Path) -> None:
    """Save a PNG of memory, speed and accuracy against the batch size, else against the swept groups."""
    groups = summary.groups
    budgets = sorted({group.budget_mib for group in groups if group.budget_mib is not None})
    x_label, tick_labels = "batch size", []
    if is_batch_size_sweep(groups):
        series = [
            figures.Series(name, [_plot_point(group, group.batch_size or 0) for group in members])
            for name, members in group_by_rest(groups)
        ]
    else:
        series = [figures.Series("", [_plot_point(group, x) for x, group in enumerate(groups)])]
        x_label = ", ".join(map(escape_unprintable, groups[0].swept)) if groups else ""
        tick_labels = [_tick_label(group) for group in groups]
    figures.try_to_plot(figures.plot_sweep, series, budgets, x_label, tick_labels, path)


def _tick_label(group: SeedGroup) -> str:
    values = group.swept.values()
    labels = [truncate(value, max(8, MAX_LABEL_LENGTH // len(values))) for value in values]
    return ", ".join(labels) or "all jobs"


def _plot_point(group: SeedGroup, x: int) -> figures.PlotPoint:
    means = {name: mean.value for name, mean in group.metrics.items()}
    accuracy = group.metrics.get("val_accuracy")
    return figures.PlotPoint(
        x=x,
        predicted_mib=group.predicted_mib,
        measured_mib=means.get("measured_mib") if group.on_gpu else None,
        fits=group.fits not in ("does not fit", "unsure"),
        images_per_second=means.get("images_per_second"),
        is_disturbed=group.is_disturbed,
        val_accuracy=means.get("val_accuracy"),
        accuracy_interval=None if accuracy is None else accuracy.interval,
    )
