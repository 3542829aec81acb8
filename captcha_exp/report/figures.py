"""Pictures of a run, where people would rather look than read."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("Agg")  # files alone: no window is ever opened

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator, PercentFormatter, StrMethodFormatter

from captcha_exp.data.alphabet import Alphabet
from captcha_exp.data.dataset import Dataset
from captcha_exp.model.evaluate import Evaluation
from captcha_exp.runs import MetricsRow
from captcha_exp.runtime.files import write_atomically

MAX_MISREADS = 30  # worst errors on the picture of them
MAX_TICK_LABELS = 30  # of a sweep's points below the picture; of more every n-th
MAX_LEGEND_ENTRIES = 16  # of a sweep in its legend
MAX_TICK_CHARS = 48  # characters side by side below one of three pictures
MAX_BUDGETS = 3  # that a sweep's picture shows; more lines say nothing


@dataclass(frozen=True, kw_only=True)
class PlotPoint:
    """A point in the picture of a sweep, or the mean of some; what is None is not drawn."""

    x: int
    """the batch size, or the number of its name, from 0"""
    predicted_mib: tuple[float, float] | None
    """of a card, least and most"""
    measured_mib: float | None
    """of a card; the memory of a machine is another thing"""
    fits: bool
    images_per_second: float | None
    val_accuracy: float | None
    accuracy_interval: tuple[float, float] | None


@dataclass(frozen=True)
class Series:
    """Points that a line connects."""

    name: str
    points: Sequence[PlotPoint]


def plot_curves(rows: Sequence[MetricsRow], path: Path) -> None:
    """Accuracy and loss of every epoch, with the test figure at the end."""
    epochs = [row for row in rows if "val/accuracy" in row.metrics]
    steps = [row.step for row in epochs]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        # The training's figures are those of moving weights, and its loss has the label smoothing in it.
        for split, label in (("train", "training, while it ran"), ("val", "validation")):
            values = [row.metrics[f"{split}/{name}"] for row in epochs]
            axes.plot(steps, values, marker="o", markersize=3, label=label)
        for row in rows:
            if f"test/{name}" in row.metrics:
                axes.plot([row.step], [row.metrics[f"test/{name}"]], "k*", label="test, best epoch's weights")
        axes.set(xlabel="epoch", ylabel=name, title=f"{name} (whole label)" if name == "accuracy" else name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    _save_figure(figure, path)


def plot_confusion_matrix(evaluation: Evaluation, alphabet: Alphabet, path: Path) -> None:
    """Which characters are taken for which; right readings are left out, so that the errors can be seen."""
    counts = evaluation.confusion_matrix(len(alphabet))
    errors = counts - np.diag(np.diag(counts))
    side = max(5.0, 0.28 * len(alphabet))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(errors, cmap="Reds", vmin=0, vmax=max(1, int(errors.max())))
    ticks = np.arange(len(alphabet))
    axes.set_xticks(ticks, list(alphabet.characters))
    axes.set_yticks(ticks, list(alphabet.characters))
    axes.set(
        xlabel="read", ylabel="label", title=f"{int(errors.sum())} wrong of {int(counts.sum())} characters"
    )
    figure.colorbar(image, ax=axes, shrink=0.8)
    _save_figure(figure, path)


def plot_misreads(evaluation: Evaluation, data: Dataset, path: Path) -> None:
    """The worst errors: pictures read wrong, with what stands there and what was read, the surest first."""
    worst = evaluation.misreads(data)
    shown = worst[:MAX_MISREADS]
    titles = [f"{error.label} read {error.predicted} ({error.confidence:.0%})" for error in shown]
    title = f"{len(worst):,} of {len(evaluation.indices):,} labels read wrong"
    if len(worst) > len(shown):
        title += f"; the {len(shown)} that it was surest of"
    _save_image_grid(data.images[[error.index for error in shown]].numpy(), titles, title, path)


def plot_samples(images: npt.NDArray[np.uint8], labels: Sequence[str], path: Path) -> None:
    """A sheet of pictures (N, H, W, C) uint8 with their labels."""
    _save_image_grid(images, labels, "", path)


def plot_sweep(
    series: Sequence[Series],
    budgets: Sequence[tuple[float, float]],
    x_label: str,
    tick_labels: Sequence[str],
    path: Path,
) -> None:
    """Memory, speed and accuracy of a sweep's points side by side, with crosses where the memory does not do.

    Against the batch size; or against the points' names, if they have some. `axis` says what those are.
    """
    figure = Figure(figsize=(15, 5 if tick_labels or len(series) > 1 else 4.2), layout="constrained")
    memory, speed, accuracy = figure.subplots(1, 3)
    few, many = matplotlib.colormaps["tab10"], matplotlib.colormaps["turbo"]
    colours = [few(n) if len(series) <= 10 else many(n / len(series)) for n in range(len(series))]
    for number, (each, colour) in enumerate(zip(series, colours, strict=True)):
        # Intervals of several lines beside one another, not on top.
        aside = (number - (len(series) - 1) / 2) * 0.04
        _plot_memory(memory, each, colour, not tick_labels)
        _plot_metric(speed, each, "images_per_second", colour, aside, not tick_labels)
        _plot_metric(accuracy, each, "val_accuracy", colour, aside, not tick_labels)
    _plot_budgets(memory, budgets)
    for axes, title in ((memory, "MiB of the card"), (speed, "pictures/s in training")):
        axes.set_title(title)
        axes.set_ylim(0, axes.get_ylim()[1] * 1.08)
        if axes.get_ylim()[1] >= 10:
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    accuracy.set_title("best validation accuracy")
    bottom, top = accuracy.get_ylim()
    accuracy.set_ylim(max(bottom, -0.02), min(top, 1.005))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    sizes = sorted({point.x for each in series for point in each.points})
    for axes in (memory, speed, accuracy):
        axes.set_xlabel(x_label, parse_math=False)
        axes.grid(alpha=0.3)
        if not axes.has_data():
            axes.text(0.5, 0.5, "no figures", transform=axes.transAxes, ha="center", color="grey")
            axes.set_yticks([])
        _set_name_ticks(axes, tick_labels) if tick_labels else _set_batch_size_ticks(axes, sizes)
    _add_legends(figure, memory, series, colours)
    _save_figure(figure, path)


def _plot_memory(axes: Axes, series: Series, color: Any, connected: bool) -> None:
    """What was foretold as a band, from least to most, what was measured as dots."""
    foretold = [(point.x, *point.predicted_mib) for point in series.points if point.predicted_mib]
    if foretold:
        at, least, most = zip(*foretold, strict=True)
        if connected and len(foretold) > 1:
            axes.fill_between(at, least, most, color=color, alpha=0.2, linewidth=0)
        axes.vlines(at, least, most, color=color, alpha=0.4, linewidth=5)
    for point in series.points:
        if point.measured_mib is not None:
            axes.plot(point.x, point.measured_mib, "o", color=color, markersize=6)
        if not point.fits and (height := point.measured_mib or (point.predicted_mib or (0, 0))[1]):
            axes.plot(point.x, height, "x", color="black", markersize=10, markeredgewidth=2)


def _plot_metric(axes: Axes, series: Series, name: str, color: Any, offset: float, connected: bool) -> None:
    """One figure of the points that have it, with its interval where there is one."""
    found = [point for point in series.points if getattr(point, name) is not None]
    if not found:
        return
    at = [point.x for point in found]
    values = [getattr(point, name) for point in found]
    axes.plot(at, values, "o-" if connected else "o", color=color, markersize=6)
    for point, value in zip(found, values, strict=True):
        if name == "val_accuracy" and point.accuracy_interval is not None:
            low, high = point.accuracy_interval
            place = point.x * 2**offset if connected else point.x
            sides = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.errorbar([place], [value], yerr=sides, color=color, capsize=4, linewidth=1.5)
        if not point.fits:
            axes.plot(point.x, value, "x", color="black", markersize=10, markeredgewidth=2)


def _plot_budgets(axes: Axes, budgets: Sequence[tuple[float, float]]) -> None:
    for least, most in budgets if len(budgets) <= MAX_BUDGETS else ():
        axes.axhline(most, color="tab:red", linestyle="--", linewidth=1.5)
        if least < most:
            axes.axhspan(least, most, color="tab:red", alpha=0.15, linewidth=0)
        words = f"budget {most:,.0f}" if least == most else f"budget {least:,.0f} to {most:,.0f}"
        across = axes.get_yaxis_transform()  # x of the axes, y of the data
        axes.text(0.015, most, words, transform=across, va="bottom", color="tab:red", fontsize=9)


def _set_batch_size_ticks(axes: Axes, sizes: Sequence[int]) -> None:
    """Each batch size below its place, without those that have no room."""
    if not sizes:
        axes.set_xticks([])
        return
    span = sizes[-1] / sizes[0]
    axes.set_xscale("log", base=2)
    beside = span**0.08 if span > 1 else 2
    axes.set_xlim(sizes[0] / beside, sizes[-1] * beside)
    shown: list[int] = []
    for size in sizes:
        if not shown or size >= shown[-1] * span**0.08:
            shown.append(size)
    axes.set_xticks(shown, [str(size) for size in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def _set_name_ticks(axes: Axes, tick_labels: Sequence[str]) -> None:
    """The names below their places, of many every n-th."""
    places = range(0, len(tick_labels), -(-len(tick_labels) // MAX_TICK_LABELS))
    shown = [tick_labels[place] for place in places]
    axes.set_xticks(list(places), shown, parse_math=False)
    if len(shown) * max(map(len, shown)) > MAX_TICK_CHARS:
        upright = len(shown) > 8
        for label in axes.get_xticklabels():
            label.set(rotation=90 if upright else 35, ha="center" if upright else "right")
            label.set_rotation_mode("default" if upright else "anchor")
    axes.set_xlim(-0.6, len(tick_labels) - 0.4)


def _add_legends(figure: Figure, memory: Axes, series: Sequence[Series], colors: Sequence[Any]) -> None:
    """What the marks mean; and which colour is what, if there are several."""
    points = [point for each in series for point in each.points]
    marks: list[tuple[Any, str]] = []
    if any(point.predicted_mib for point in points):
        marks.append((Patch(color="grey", alpha=0.4), "foretold, least to most"))
    if any(point.measured_mib is not None for point in points):
        marks.append((Line2D([], [], color="grey", marker="o", linestyle=""), "measured"))
    if not all(point.fits for point in points):
        cross = Line2D([], [], color="black", marker="x", linestyle="", markersize=10, markeredgewidth=2)
        marks.append((cross, "does not fit, or may not"))
    if marks:
        memory.legend(*zip(*marks, strict=True), loc="best", fontsize=9)
    if len(series) == 1:
        return
    lines = [Line2D([], [], color=colour, marker="o") for colour in colors[:MAX_LEGEND_ENTRIES]]
    words = [each.name for each in series[:MAX_LEGEND_ENTRIES]]
    if len(series) > MAX_LEGEND_ENTRIES:
        lines.append(Line2D([], [], linestyle=""))
        words.append(f"and {len(series) - MAX_LEGEND_ENTRIES} more")
    columns = max(1, min(4, len(words), 200 // max(map(len, words))))
    legend = figure.legend(lines, words, loc="outside lower center", ncols=columns, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _save_image_grid(images: npt.NDArray[np.uint8], titles: Sequence[str], title: str, path: Path) -> None:
    columns = 6
    rows = max(1, -(-len(titles) // columns))
    figure = Figure(figsize=(columns * 1.9, rows * 1.1 + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axes, image, words in zip(
        figure.subplots(rows, columns, squeeze=False).flat, images, titles, strict=False
    ):
        axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
        axes.set_title(words, fontsize=9, parse_math=False)
    for axes in figure.axes:
        axes.set_axis_off()
    _save_figure(figure, path)


def _save_figure(figure: Any, path: Path) -> None:
    content = io.BytesIO()
    with warnings.catch_warnings():
        # An alphabet may have characters that matplotlib's font lacks; it draws boxes, and says so for each.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        figure.savefig(content, format="png", dpi=110)
    write_atomically(path, content.getvalue())
