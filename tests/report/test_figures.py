"""The figures of a run and of a sweep are complete PNG files, whatever characters they contain."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from captcha_exp.config import Config
from captcha_exp.data.alphabet import Alphabet
from captcha_exp.data.dataset import Dataset
from captcha_exp.model.evaluate import Evaluation
from captcha_exp.report import figures
from captcha_exp.runs import MetricsRow
from captcha_exp.training.train import train

ODD = [
    "$_^",
    "$\\{}%",
    "01+-=x",
    "ßéЖ",
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789",
    "中文字",
]

SAVE_FIGURE, SAVE_IMAGE_GRID = figures._save_figure, figures._save_image_grid


@pytest.fixture(autouse=True)
def complete_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the figures, which other tests replace by small files."""
    monkeypatch.setattr(figures, "_save_figure", SAVE_FIGURE)
    monkeypatch.setattr(figures, "_save_image_grid", SAVE_IMAGE_GRID)


def open_figure(path: Path) -> Image.Image:
    """Open a PNG file; check that it is complete and not of a single color."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.verify()
    with Image.open(path) as image:
        image.load()
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 2
        return image.copy()


def row(step: int, **metrics: float) -> MetricsRow:
    return MetricsRow(step, 0, {name.replace("_", "/", 1): value for name, value in metrics.items()})


def epoch(step: int, accuracy: float) -> MetricsRow:
    return row(step, train_loss=1 / step, train_accuracy=accuracy, val_loss=2 / step, val_accuracy=accuracy)


def evaluation(classes: int) -> Evaluation:
    """Return an evaluation with every class once, whose last class is predicted as the first."""
    targets = np.arange(classes)[:, None]
    predicted = targets.copy()
    predicted[-1] = 0
    confidences = np.ones((classes, 1), np.float32)
    return Evaluation(0.1, predicted, targets, confidences, confidences[:, 0], np.arange(classes))


def predictions(
    alphabet: str, results: Sequence[tuple[str, str, float]], channels: int = 3
) -> tuple[Evaluation, Dataset]:
    """Return an evaluation of (label, predicted, confidence), and its images of noise in reverse order."""
    count, letters = len(results), Alphabet(alphabet)
    noise = np.random.default_rng(0).integers(0, 256, (count, 16, 32, channels), dtype=np.uint8)
    targets = np.array([letters.encode(label) for label, _, _ in results])
    predicted = np.array([letters.encode(text) for _, text, _ in results])
    confidences = np.ones(targets.shape, np.float32)
    text_confidences = np.array([confidence for _, _, confidence in results], np.float32)
    reverse = np.arange(count)[::-1].copy()
    manifest = {"provenance": {"captcha": {"alphabet": alphabet}}, "files": []}
    data = Dataset(torch.from_numpy(noise), torch.from_numpy(targets[::-1].copy()), [], {}, manifest)
    return Evaluation(0.1, predicted, targets, confidences, text_confidences, reverse), data


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures that are saved."""
    drawn_figures: list[Figure] = []
    savefig = Figure.savefig

    def save(self: Figure, *args: Any, **kwargs: Any) -> None:
        drawn_figures.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    return drawn_figures


def parts(figure: Figure) -> list[Axes]:
    axes: list[Axes] = figure.axes
    return axes


def tiles(figure: Figure, height: int = 16, width: int = 32) -> list[tuple[str, Any]]:
    """Return the text and the (H, W, 3) pixels of each image of a grid."""
    (axes,) = parts(figure)
    pixels = np.asarray(axes.images[0].get_array())
    corners = [
        (int(text.get_position()[0] - width / 2), int(text.get_position()[1]) + 1) for text in axes.texts
    ]
    assert not any(text.get_parse_math() for text in axes.texts)
    images = [pixels[y : y + height, x : x + width] for x, y in corners]
    return list(zip(texts(axes), images, strict=True))


def points(line: Line2D) -> tuple[list[float], list[float]]:
    x, y = np.asarray(line.get_data(), float).tolist()
    return x, y


def test_curves_show_every_epoch_and_the_test(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [epoch(1, 0.2), epoch(2, 0.5), epoch(3, 0.4), row(3, test_loss=0.3, test_accuracy=0.45)]
    figures.plot_curves(rows, tmp_path / "curves.png")
    open_figure(tmp_path / "curves.png")
    accuracy, loss = parts(drawn[0])
    lines = [points(line) for line in accuracy.lines]
    assert lines == [([1, 2, 3], [0.2, 0.5, 0.4]), ([1, 2, 3], [0.2, 0.5, 0.4]), ([3], [0.45])]
    assert [points(line)[1] for line in loss.lines] == [[1, 1 / 2, 1 / 3], [2, 1, 2 / 3], [0.3]]


@pytest.mark.parametrize("epochs", [0, 1])
def test_curves_of_a_short_run_are_drawn_too(tmp_path: Path, epochs: int) -> None:
    figures.plot_curves([epoch(n + 1, 0.0) for n in range(epochs)], tmp_path / "curves.png")
    open_figure(tmp_path / "curves.png")


def test_curves_accept_nan_and_infinity(tmp_path: Path) -> None:
    rows = [epoch(1, 0.2), row(2, train_loss=np.nan, train_accuracy=0, val_loss=np.inf, val_accuracy=0)]
    figures.plot_curves(rows, tmp_path / "curves.png")
    open_figure(tmp_path / "curves.png")


@pytest.mark.parametrize("characters", ODD)
def test_the_confusion_matrix_of_any_alphabet_is_drawn(tmp_path: Path, characters: str) -> None:
    figures.plot_confusion_matrix(
        evaluation(len(characters)), Alphabet(characters), tmp_path / "confusion.png"
    )
    open_figure(tmp_path / "confusion.png")


def test_the_confusion_matrix_has_labels_as_rows_and_predictions_as_columns(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    figures.plot_confusion_matrix(evaluation(3), Alphabet("$_^"), tmp_path / "confusion.png")
    axes = parts(drawn[0])[0]
    assert axes.get_title() == "1 wrong of 3 characters"
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("label", "predicted")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["$", "_", "^"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["$", "_", "^"]
    errors = np.zeros((3, 3))
    errors[2, 0] = 1
    assert (np.asarray(axes.images[0].get_array()) == errors).all()


def test_a_model_without_errors_has_an_empty_confusion_matrix(tmp_path: Path) -> None:
    made = evaluation(4)
    made.predicted[:] = made.targets
    figures.plot_confusion_matrix(made, Alphabet("0123"), tmp_path / "confusion.png")
    open_figure(tmp_path / "confusion.png")


def test_of_a_large_alphabet_only_the_most_confused_characters_are_drawn(
    tmp_path: Path, drawn: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "MAX_CONFUSED", 4)
    characters = "".join(chr(0x4E00 + n) for n in range(6_500))
    made = evaluation(6_500)
    made.predicted[[10, 20, 30, 40, 50], 0] = [20, 10, 20, 50, 4_000]
    figures.plot_confusion_matrix(made, Alphabet(characters), tmp_path / "confusion.png")
    axes = parts(drawn[0])[0]
    assert [characters.index(tick.get_text()) for tick in axes.get_xticklabels()] == [0, 10, 20, 50]
    assert np.asarray(axes.images[0].get_array()).tolist() == [
        *([0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0])
    ]
    assert axes.get_title() == "6 wrong of 6500 characters\n2 of them among the 4 most confused of 6500"


def test_the_size_of_a_figure_does_not_grow_with_that_of_its_images(tmp_path: Path) -> None:
    for height, width in ((2048, 16), (16, 2048), (1000, 1000)):
        images = np.random.default_rng(0).integers(0, 256, (2, height, width, 1), dtype=np.uint8)
        figures.plot_samples(images, ["ab", "cd"], tmp_path / "samples.png")
        assert max(open_figure(tmp_path / "samples.png").size) <= 1300


@pytest.mark.parametrize("error", [MemoryError(), ValueError("image size\ntoo large"), OSError(28, "full")])
def test_a_figure_that_cannot_be_drawn_is_a_warning(tmp_path: Path, error: Exception) -> None:
    def plot(path: Path) -> None:
        raise error

    lines: list[str] = []
    figures.try_to_plot(plot, tmp_path / "x.png", warn=lines.append)
    (line,) = lines
    assert line.startswith(f"{tmp_path / 'x.png'}: this figure could not be drawn: {type(error).__name__}: ")
    assert "\n" not in line


@pytest.mark.parametrize("channels", [1, 3])
def test_misreads_are_shown_with_label_and_prediction_by_confidence(
    tmp_path: Path, channels: int, drawn: list[Figure]
) -> None:
    results = [("01", "01", 1.0), ("01", "02", 0.4), ("22", "20", 0.9), ("11", "00", 0.6)]
    made, data = predictions("012", results, channels)
    figures.plot_misreads(made, data, tmp_path / "misreads.png")
    open_figure(tmp_path / "misreads.png")
    assert drawn[0].get_suptitle() == "3 of 4 images misread"
    titles, images = zip(*tiles(drawn[0]), strict=True)
    assert titles == ("22 as 20 (90%)", "11 as 00 (60%)", "01 as 02 (40%)")
    for image, row in zip(images, [1, 0, 2], strict=True):
        assert (image == data.images[row].numpy()).all()


def test_a_model_without_errors_has_a_figure_without_images(tmp_path: Path, drawn: list[Figure]) -> None:
    made, data = predictions("01", [("0", "0", 0.9), ("1", "1", 0.8)])
    figures.plot_misreads(made, data, tmp_path / "misreads.png")
    open_figure(tmp_path / "misreads.png")
    assert drawn[0].get_suptitle() == "0 of 2 images misread"
    assert tiles(drawn[0]) == []


@pytest.mark.parametrize("more", [0, 1])
def test_of_many_misreads_those_with_the_highest_confidence_are_shown(
    tmp_path: Path, more: int, drawn: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "MAX_MISREADS", 7)
    made, data = predictions("01", [("0", "1", 0.1 + n / 10) for n in range(7 + more)])
    figures.plot_misreads(made, data, tmp_path / "misreads.png")
    title = drawn[0].get_suptitle()
    assert (
        title == ["7 of 7 images misread", "8 of 8 images misread; the 7 with the highest confidence"][more]
    )
    shown = [text for text, _ in tiles(drawn[0])]
    assert shown == [f"0 as 1 ({10 * (n + more)}%)" for n in range(7, 0, -1)]


@pytest.mark.parametrize("characters", ODD)
def test_titles_of_misreads_are_not_parsed_as_math(
    tmp_path: Path, characters: str, drawn: list[Figure]
) -> None:
    first, last = characters[:2], characters[-2:]
    figures.plot_misreads(*predictions(characters, [(first, last, 0.5)]), tmp_path / "misreads.png")
    open_figure(tmp_path / "misreads.png")
    assert [text for text, _ in tiles(drawn[0])] == [f"{first} as {last} (50%)"]


@pytest.mark.long
def test_a_run_has_four_figures(tiny: Config) -> None:
    paths = sorted((train(tiny).run_dir / "report").glob("*.png"))
    assert [path.name for path in paths] == ["confusion.png", "curves.png", "images.png", "misreads.png"]
    for path in paths:
        open_figure(path)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 6, 8])
def test_samples_show_every_image(tmp_path: Path, channels: int, count: int, drawn: list[Figure]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 32, channels), dtype=np.uint8)
    figures.plot_samples(images, [f"{n:04}" for n in range(count)], tmp_path / "samples.png")
    open_figure(tmp_path / "samples.png")
    titles, shown = zip(*tiles(drawn[0]), strict=True)
    assert list(titles) == [f"{n:04}" for n in range(count)]
    for pixels, image in zip(shown, images, strict=True):
        assert (pixels == image).all()


@pytest.mark.parametrize("label", ["$_^$", "$\\frac$", "a$b$c", "$$", "中文"])
def test_labels_are_not_parsed_as_math(tmp_path: Path, label: str, drawn: list[Figure]) -> None:
    """As math `$_^$` would be an error, and `a$b$c` would lose its dollar signs."""
    figures.plot_samples(np.zeros((1, 16, 32, 3), np.uint8), [label], tmp_path / "samples.png")
    open_figure(tmp_path / "samples.png")
    assert [text for text, _ in tiles(drawn[0])] == [label]


# -- the figure of a sweep -----------------------------------------------------------------------------------


def point(x: int, **others: Any) -> figures.PlotPoint:
    """Return a point that fits and has all values."""
    values: dict[str, Any] = {
        "predicted_mib": (900.0, 1200.0),
        "measured_mib": 1000.0,
        "fits": True,
        "images_per_second": 100.0 * x,
        "val_accuracy": 0.9,
        "accuracy_interval": None,
    }
    return figures.PlotPoint(x=x, **(values | others))


def marks(axes: Axes, marker: str) -> list[tuple[list[float], list[float]]]:
    return [points(line) for line in axes.lines if line.get_marker() == marker]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def labels(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


NOTHING = {"measured_mib": None, "images_per_second": None, "val_accuracy": None}


def test_a_sweep_shows_memory_speed_and_accuracy(tmp_path: Path, drawn: list[Figure]) -> None:
    unfit = point(800, predicted_mib=(6000.0, 6900.0), fits=False, **NOTHING)
    line = figures.Series("", [point(25), point(100, accuracy_interval=(0.8, 1.0)), unfit])
    figures.plot_sweep([line], [(3908.0, 3908.0)], "batch size", [], tmp_path / "sweep.png")
    open_figure(tmp_path / "sweep.png")
    memory, speed, accuracy = parts(drawn[0])
    assert marks(memory, "o") == [([25], [1000]), ([100], [1000])]
    assert marks(memory, "x") == [([800], [6900])]
    assert memory.get_ylim()[1] > 6900
    assert texts(memory) == ["budget 3,908"]
    assert marks(speed, "o") == [([25, 100], [2500, 10000])]
    assert marks(speed, "x") == []
    assert marks(accuracy, "o") == [([25, 100], [0.9, 0.9])]
    (bar,) = accuracy.collections
    (path,) = bar.get_paths()
    assert np.asarray(path.vertices, float)[:, 1] == pytest.approx([0.8, 1.0])
    for axes in (memory, speed, accuracy):
        assert axes.get_xscale() == "log"
        assert labels(axes) == ["25", "100", "800"]
        assert axes.get_xlabel() == "batch size"
    assert not drawn[0].legends


def test_a_disturbed_speed_has_a_white_dot(tmp_path: Path, drawn: list[Figure]) -> None:
    line = figures.Series("", [point(25), point(50, is_disturbed=True)])
    figures.plot_sweep([line], [], "batch size", [], tmp_path / "sweep.png")
    _, speed, accuracy = parts(drawn[0])
    assert marks(speed, "o") == [([25, 50], [2500, 5000]), ([50], [5000])]
    assert speed.get_title() == "training speed (images/s; white dot: disturbed)"
    assert len(marks(accuracy, "o")) == 1


def test_a_job_that_does_not_fit_has_a_cross_on_every_axis(tmp_path: Path, drawn: list[Figure]) -> None:
    figures.plot_sweep(
        [figures.Series("", [point(25, fits=False)])], [], "batch size", [], tmp_path / "sweep.png"
    )
    heights = [marks(axes, "x")[0][1] for axes in parts(drawn[0])]
    assert heights == [[1000], [2500], [0.9]]


def test_the_names_of_series_are_in_a_legend(tmp_path: Path, drawn: list[Figure]) -> None:
    lines = [figures.Series(f"alphabet=$_^${number}", [point(25), point(50)]) for number in range(20)]
    figures.plot_sweep(lines, [], "batch size", [], tmp_path / "sweep.png")
    open_figure(tmp_path / "sweep.png")
    entries = drawn[0].legends[0].get_texts()
    assert [text.get_text() for text in entries] == [
        *(f"alphabet=$_^${number}" for number in range(16)),
        "and 4 more",
    ]
    assert not any(text.get_parse_math() for text in entries)


def test_a_budget_range_is_a_band_and_many_budgets_are_not_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    line = figures.Series("", [point(25)])
    figures.plot_sweep([line], [(3700.0, 3900.0)], "batch size", [], tmp_path / "sweep.png")
    memory = parts(drawn[0])[0]
    assert texts(memory) == ["budget 3,700 to 3,900"]
    assert len(memory.patches) == 1
    figures.plot_sweep(
        [line], [(n, n) for n in (1.0, 2.0, 3.0, 4.0)], "batch size", [], tmp_path / "sweep.png"
    )
    assert texts(parts(drawn[1])[0]) == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("count", "every"), [(1, 1), (2, 1), (8, 1), (9, 1), (30, 1), (31, 2), (60, 2), (61, 3)]
)
def test_every_nth_name_is_shown_if_there_are_many(
    tmp_path: Path, drawn: list[Figure], count: int, every: int
) -> None:
    names = [f"$_{number}^$" for number in range(count)]
    line = figures.Series("", [point(number) for number in range(count)])
    figures.plot_sweep([line], [], "a$_^$b", names, tmp_path / "sweep.png")
    open_figure(tmp_path / "sweep.png")
    for axes in parts(drawn[0]):
        assert axes.get_xscale() == "linear"
        assert labels(axes) == names[::every]
        assert not any(label.get_parse_math() for label in axes.get_xticklabels())
        assert axes.get_xlabel() == "a$_^$b"


def test_not_all_of_many_close_batch_sizes_are_shown(tmp_path: Path, drawn: list[Figure]) -> None:
    line = figures.Series("", [point(size) for size in range(1000, 1100)])
    figures.plot_sweep([line], [], "batch size", [], tmp_path / "sweep.png")
    named = labels(parts(drawn[0])[0])
    assert named[0] == "1000"
    assert 8 <= len(named) <= 14


@pytest.mark.parametrize(
    "line", [[], [point(25, **NOTHING, predicted_mib=None)]], ids=["no point", "no value"]
)
def test_a_sweep_without_values_has_a_note(
    tmp_path: Path, drawn: list[Figure], line: list[figures.PlotPoint]
) -> None:
    figures.plot_sweep([figures.Series("", line)], [], "batch size", [], tmp_path / "sweep.png")
    open_figure(tmp_path / "sweep.png")
    assert [texts(axes) for axes in parts(drawn[0])] == [["no data"]] * 3


def test_accuracies_of_0_and_1_are_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    for share in (0.0, 1.0):
        line = figures.Series("", [point(25, val_accuracy=share), point(50, val_accuracy=share)])
        figures.plot_sweep([line], [], "batch size", [], tmp_path / "sweep.png")
        low, high = parts(drawn[-1])[2].get_ylim()
        assert -0.03 < low < share + 0.001
        assert share - 0.001 < high < 1.01


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    path.write_bytes(b"half an image")
    figures.plot_curves([epoch(1, 0.1)], path)
    open_figure(path)
    assert list(tmp_path.iterdir()) == [path]
