"""Figures of runs and sweeps."""

import io
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator, PercentFormatter, StrMethodFormatter

from captcha_exp.data.alphabet import END, NO_CHARACTER, Alphabet
from captcha_exp.data.dataset import Dataset
from captcha_exp.errors import one_line
from captcha_exp.model.evaluate import Evaluation
from captcha_exp.runs import MetricsRow
from captcha_exp.runtime.files import write_atomically

logger = logging.getLogger(__name__)

MAX_CONFUSED = 64  # characters in the confusion matrix
MAX_MISREADS = 30
MAX_SAMPLES = 30
MAX_TILE_PIXELS = 256  # rows or columns of an image in a grid; of a larger one, every n-th is drawn
MAX_TILE_INCHES = 8.0  # height of a row of a grid
MAX_MARKED_EPOCHS = 200  # drawn as points on the line
MAX_NAME_CHARS = 100  # of a legend or an axis
MAX_TICK_LABELS = 30  # names of jobs below an axis; every n-th if there are more
MAX_LEGEND_ENTRIES = 16
MAX_TICK_CHARS = 48  # characters side by side below one of three axes
MAX_BUDGETS = 3  # drawn as lines; more would be unreadable


@dataclass(frozen=True, kw_only=True)
class PlotPoint:
    """One job in the figure of a sweep, or the mean over several seeds; None values are not drawn."""

    x: int
    """the batch size, or the index of its name"""
    predicted_mib: tuple[float, float] | None
    """on a GPU, min and max"""
    measured_mib: float | None
    """on a GPU; the memory of the machine is not comparable"""
    fits: bool
    images_per_second: float | None
    is_disturbed: bool = False
    """whether the speed is"""
    val_accuracy: float | None
    accuracy_interval: tuple[float, float] | None


@dataclass(frozen=True)
class Series:
    """Points connected by a line."""

    name: str
    points: Sequence[PlotPoint]


def try_to_plot(
    plot: Callable[..., object], *arguments: Any, warn: Callable[[str], None] = logger.warning
) -> None:
    """Call a function of this module, whose last argument is the path; on an error, only warn.

    A figure is never worth a run: not even if the memory does not suffice.
    """
    try:
        plot(*arguments)
    except Exception as error:
        warn(f"{arguments[-1]}: this figure could not be drawn: {type(error).__name__}: {one_line(error)}")


def plot_curves(rows: Sequence[MetricsRow], path: Path) -> None:
    """Plot accuracy and loss per epoch, with the test results at the end."""
    epochs = [row for row in rows if "val/accuracy" in row.metrics]
    steps = [row.step for row in epochs]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        # Training metrics are means while the weights change, and the loss includes label smoothing.
        for split, label in (("train", "training (running mean)"), ("val", "validation")):
            values = [row.metrics[f"{split}/{name}"] for row in epochs]
            marker = "o" if len(steps) <= MAX_MARKED_EPOCHS else ""
            axes.plot(steps, values, marker=marker, markersize=3, label=label)
        for row in rows:
            if f"test/{name}" in row.metrics:
                axes.plot([row.step], [row.metrics[f"test/{name}"]], "k*", label="test, best weights")
        axes.set(xlabel="epoch", ylabel=name, title=f"{name} (whole label)" if name == "accuracy" else name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    _save_figure(figure, path)


def plot_confusion_matrix(evaluation: Evaluation, alphabet: Alphabet, path: Path) -> None:
    """Plot the confusion matrix of the most confused characters.

    Those predicted correctly, which would hide the errors, are not counted.
    """
    classes = evaluation.most_confused_classes(len(alphabet), MAX_CONFUSED)
    counts = evaluation.confusion_matrix(classes)
    errors = counts - np.diag(np.diag(counts))
    title = f"{evaluation.num_wrong_chars} wrong of {evaluation.num_chars} characters"
    if len(classes) < len(alphabet):
        title += f"\n{int(errors.sum())} of them among the {len(classes)} most confused of {len(alphabet)}"
    side = max(5.0, 0.28 * len(classes))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(errors, cmap="Reds", vmin=0, vmax=max(1, int(errors.max())))
    names = [NO_CHARACTER if k == END else alphabet.characters[k] for k in classes]
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="label", title=title)
    figure.colorbar(image, ax=axes, shrink=0.8)
    _save_figure(figure, path)


def plot_misreads(evaluation: Evaluation, data: Dataset, path: Path) -> None:
    """Plot misread images with label and prediction, the highest confidence first."""
    misreads = evaluation.misreads(data)
    shown = misreads[:MAX_MISREADS]
    titles = [f"{each.label} as {each.predicted} ({each.confidence:.0%})" for each in shown]
    title = f"{len(misreads):,} of {len(evaluation.indices):,} images misread"
    if len(misreads) > len(shown):
        title += f"; the {len(shown)} with the highest confidence"
    _save_image_grid(data.images[[each.index for each in shown]].numpy(), titles, title, path)


def plot_samples(images: npt.NDArray[np.uint8], labels: Sequence[str], path: Path) -> None:
    """Plot images (N, H, W, C) uint8 with their labels."""
    _save_image_grid(images, labels, "", path)


def plot_preview(data: Dataset, augmented: Sequence[npt.NDArray[np.uint8]], path: Path) -> None:
    """Plot the first images as the network sees them; with augmented versions (N, H, W, C), each in a row."""
    images = data.images[: len(augmented[0]) if augmented else MAX_SAMPLES].numpy()
    versions = np.stack([images, *augmented], axis=1)  # (N, versions, H, W, C)
    titles = [
        title for label in data.labels[: len(images)] for title in (label, *["augmented"] * len(augmented))
    ]
    _save_image_grid(versions.reshape(-1, *images.shape[1:]), titles, "", path)


def plot_sweep(
    series: Sequence[Series],
    budgets: Sequence[tuple[float, float]],
    x_label: str,
    tick_labels: Sequence[str],
    path: Path,
) -> None:
    """Plot memory, speed and accuracy of the jobs of a sweep, with crosses on jobs that do not fit.

    The x axis is the batch size, or the names of the jobs if `tick_labels` has any.
    """
    figure = Figure(figsize=(15, 5 if tick_labels or len(series) > 1 else 4.2), layout="constrained")
    memory, speed, accuracy = figure.subplots(1, 3)
    few, many = matplotlib.colormaps["tab10"], matplotlib.colormaps["turbo"]
    colors = [few(n) if len(series) <= 10 else many(n / len(series)) for n in range(len(series))]
    for number, (each, color) in enumerate(zip(series, colors, strict=True)):
        offset = (number - (len(series) - 1) / 2) * 0.04  # keeps error bars from overlapping
        _plot_memory(memory, each, color, not tick_labels)
        _plot_metric(speed, each, "images_per_second", color, offset, not tick_labels)
        _plot_metric(accuracy, each, "val_accuracy", color, offset, not tick_labels)
    _plot_budgets(memory, budgets)
    is_disturbed = any(point.is_disturbed for each in series for point in each.points)
    speed_title = f"training speed (images/s{'; white dot: disturbed' if is_disturbed else ''})"
    for axes, title in ((memory, "GPU memory (MiB)"), (speed, speed_title)):
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
        axes.set_xlabel(_shorten(x_label), parse_math=False)
        axes.grid(alpha=0.3)
        if not axes.has_data():
            axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color="gray")
            axes.set_yticks([])
        _set_name_ticks(axes, tick_labels) if tick_labels else _set_batch_size_ticks(axes, sizes)
    _add_legends(figure, memory, series, colors)
    _save_figure(figure, path)


def _plot_memory(axes: Axes, series: Series, color: Any, connected: bool) -> None:
    """Plot predictions as bands from min to max and measurements as dots."""
    predicted = [(point.x, *point.predicted_mib) for point in series.points if point.predicted_mib]
    if predicted:
        xs, lows, highs = zip(*predicted, strict=True)
        if connected and len(predicted) > 1:
            axes.fill_between(xs, lows, highs, color=color, alpha=0.2, linewidth=0)
        axes.vlines(xs, lows, highs, color=color, alpha=0.4, linewidth=5)
    for point in series.points:
        if point.measured_mib is not None:
            axes.plot(point.x, point.measured_mib, "o", color=color, markersize=6)
        if not point.fits and (height := point.measured_mib or (point.predicted_mib or (0, 0))[1]):
            axes.plot(point.x, height, "x", color="black", markersize=10, markeredgewidth=2)


def _plot_metric(axes: Axes, series: Series, name: str, color: Any, offset: float, connected: bool) -> None:
    """Plot one metric of the points that have it, with error bars if there are intervals."""
    points = [point for point in series.points if getattr(point, name) is not None]
    if not points:
        return
    values = [getattr(point, name) for point in points]
    axes.plot([point.x for point in points], values, "o-" if connected else "o", color=color, markersize=6)
    for point, value in zip(points, values, strict=True):
        if name == "val_accuracy" and point.accuracy_interval is not None:
            low, high = point.accuracy_interval
            x = point.x * 2**offset if connected else point.x
            errors = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.errorbar([x], [value], yerr=errors, color=color, capsize=4, linewidth=1.5)
        if name == "images_per_second" and point.is_disturbed:
            axes.plot(point.x, value, "o", color="white", markersize=4)
        if not point.fits:
            axes.plot(point.x, value, "x", color="black", markersize=10, markeredgewidth=2)


def _plot_budgets(axes: Axes, budgets: Sequence[tuple[float, float]]) -> None:
    for low, high in budgets if len(budgets) <= MAX_BUDGETS else ():
        axes.axhline(high, color="tab:red", linestyle="--", linewidth=1.5)
        if low < high:
            axes.axhspan(low, high, color="tab:red", alpha=0.15, linewidth=0)
        text = f"budget {high:,.0f}" if low == high else f"budget {low:,.0f} to {high:,.0f}"
        transform = axes.get_yaxis_transform()  # x in axes coordinates, y in data coordinates
        axes.text(0.015, high, text, transform=transform, va="bottom", color="tab:red", fontsize=9)


def _set_batch_size_ticks(axes: Axes, sizes: Sequence[int]) -> None:
    """Label the batch sizes, except those too close to the one before."""
    if not sizes:
        axes.set_xticks([])
        return
    span = sizes[-1] / sizes[0]
    axes.set_xscale("log", base=2)
    margin = span**0.08 if span > 1 else 2
    axes.set_xlim(sizes[0] / margin, sizes[-1] * margin)
    shown: list[int] = []
    for size in sizes:
        if not shown or size >= shown[-1] * span**0.08:
            shown.append(size)
    axes.set_xticks(shown, [str(size) for size in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def _set_name_ticks(axes: Axes, tick_labels: Sequence[str]) -> None:
    """Label the jobs with their names; every n-th if there are many."""
    ticks = range(0, len(tick_labels), -(-len(tick_labels) // MAX_TICK_LABELS))
    shown = [tick_labels[tick] for tick in ticks]
    axes.set_xticks(list(ticks), shown, parse_math=False)
    if len(shown) * max(map(len, shown)) > MAX_TICK_CHARS:
        vertical = len(shown) > 8
        for label in axes.get_xticklabels():
            label.set(rotation=90 if vertical else 35, ha="center" if vertical else "right")
            label.set_rotation_mode("default" if vertical else "anchor")
    axes.set_xlim(-0.6, len(tick_labels) - 0.4)


def _add_legends(figure: Figure, memory: Axes, series: Sequence[Series], colors: Sequence[Any]) -> None:
    """Add the legend of the markers, and that of the colors if there are several series."""
    points = [point for each in series for point in each.points]
    marks: list[tuple[Any, str]] = []
    if any(point.predicted_mib for point in points):
        marks.append((Patch(color="gray", alpha=0.4), "predicted (min to max)"))
    if any(point.measured_mib is not None for point in points):
        marks.append((Line2D([], [], color="gray", marker="o", linestyle=""), "measured"))
    if not all(point.fits for point in points):
        cross = Line2D([], [], color="black", marker="x", linestyle="", markersize=10, markeredgewidth=2)
        marks.append((cross, "does not fit or unsure"))
    if marks:
        memory.legend(*zip(*marks, strict=True), loc="best", fontsize=9)
    if len(series) == 1:
        return
    lines = [Line2D([], [], color=color, marker="o") for color in colors[:MAX_LEGEND_ENTRIES]]
    names = [_shorten(each.name) for each in series[:MAX_LEGEND_ENTRIES]]
    if len(series) > MAX_LEGEND_ENTRIES:
        lines.append(Line2D([], [], linestyle=""))
        names.append(f"and {len(series) - MAX_LEGEND_ENTRIES} more")
    columns = max(1, min(4, len(names), 200 // max(map(len, names))))
    legend = figure.legend(lines, names, loc="outside lower center", ncols=columns, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _save_image_grid(images: npt.NDArray[np.uint8], titles: Sequence[str], title: str, path: Path) -> None:
    """Save images (N, H, W, C) as tiles of one array, which is much faster to draw than an axes for each."""
    columns, rows = 6, max(1, -(-len(titles) // 6))
    step = -(-max(images.shape[1:3]) // MAX_TILE_PIXELS)
    images = images[:, ::step, ::step]
    height, width = images.shape[1:3]
    tile_width = width + max(1, width // 16)
    tile_height = height + -(-tile_width // 8)  # with a line of text above the image
    tiles = np.full((rows * tile_height, columns * tile_width, 3), 255, np.uint8)
    figure_height = rows * min(1.9 * tile_height / tile_width, MAX_TILE_INCHES) + 0.4
    figure = Figure(figsize=(1.9 * columns, figure_height))
    figure.suptitle(title, fontsize=11)
    axes = figure.add_axes((0, 0, 1, 1 - 0.4 / figure_height))
    axes.set_axis_off()
    for number, (image, text) in enumerate(zip(images, titles, strict=True)):
        x, y = number % columns * tile_width, (number // columns + 1) * tile_height - height
        tiles[y : y + height, x : x + width] = image  # a gray image in each of the three channels
        axes.text(x + width / 2, y - 1, text, ha="center", va="bottom", fontsize=9, parse_math=False)
    axes.imshow(tiles)
    _save_figure(figure, path)


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_NAME_CHARS else f"{name[: MAX_NAME_CHARS - 1]}…"


def _save_figure(figure: Any, path: Path) -> None:
    content = io.BytesIO()
    with warnings.catch_warnings():
        # For characters that its font lacks matplotlib draws boxes and warns each time.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        figure.savefig(content, format="png", dpi=110)
    write_atomically(path, content.getvalue())
