"""Pictures of a run, where people would rather look than read."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("Agg")  # files alone: no window is ever opened

from matplotlib.figure import Figure

from captcha_exp.alphabet import Alphabet
from captcha_exp.dataset import Dataset
from captcha_exp.evaluate import Evaluation
from captcha_exp.record import MetricsRow, write_atomically

SHOWN = 30  # worst errors on the picture of them


def curves(rows: Sequence[MetricsRow], path: Path) -> None:
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
    _save(figure, path)


def confusion(evaluation: Evaluation, alphabet: Alphabet, path: Path) -> None:
    """Which characters are taken for which; right readings are left out, so that the errors can be seen."""
    counts = evaluation.confusion(len(alphabet))
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
    _save(figure, path)


def errors(evaluation: Evaluation, data: Dataset, path: Path) -> None:
    """The worst errors: pictures read wrong, with what stands there and what was read, the surest first."""
    worst = evaluation.errors(data)
    shown = worst[:SHOWN]
    titles = [f"{error.label} read {error.read} ({error.confidence:.0%})" for error in shown]
    title = f"{len(worst):,} of {len(evaluation.rows):,} labels read wrong"
    if len(worst) > len(shown):
        title += f"; the {len(shown)} that it was surest of"
    _sheet(data.images[[error.row for error in shown]].numpy(), titles, title, path)


def samples(images: npt.NDArray[np.uint8], labels: Sequence[str], path: Path) -> None:
    """A sheet of pictures (N, H, W, C) uint8 with their labels."""
    _sheet(images, labels, "", path)


def _sheet(images: npt.NDArray[np.uint8], titles: Sequence[str], title: str, path: Path) -> None:
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
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    content = io.BytesIO()
    with warnings.catch_warnings():
        # An alphabet may have characters that matplotlib's font lacks; it draws boxes, and says so for each.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        figure.savefig(content, format="png", dpi=110)
    write_atomically(path, content.getvalue())
