"""The pictures of a run and of a sweep are whole PNG files, whatever characters stand in them."""

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
from captcha_exp.report import figures as report
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


def look(path: Path) -> Image.Image:
    """The picture, whose file is whole and not of one colour."""
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
    """Every class once, and the last is read as the first."""
    targets = np.arange(classes)[:, None]
    predicted = targets.copy()
    predicted[-1] = 0
    shape = np.ones((classes, 1), np.float32)
    return Evaluation(0.1, predicted, targets, shape, np.arange(classes))


def readings(
    alphabet: str, seen: Sequence[tuple[str, str, float]], channels: int = 3
) -> tuple[Evaluation, Dataset]:
    """Of (label, what was read, how surely); the pictures, of noise, lie the other way round."""
    count, letters = len(seen), Alphabet(alphabet)
    noise = np.random.default_rng(0).integers(0, 256, (count, 16, 32, channels), dtype=np.uint8)
    targets = np.array([letters.encode(label) for label, _, _ in seen])
    predicted = np.array([letters.encode(read) for _, read, _ in seen])
    sure = np.ones(targets.shape, np.float32)
    sure[:, 0] = [confidence for _, _, confidence in seen]
    backwards = np.arange(count)[::-1].copy()
    manifest = {"provenance": {"captcha": {"alphabet": alphabet}}, "files": []}
    data = Dataset(torch.from_numpy(noise), torch.from_numpy(targets[::-1].copy()), [], {}, manifest)
    return Evaluation(0.1, predicted, targets, sure, backwards), data


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were drawn, to look at their parts."""
    figures: list[Figure] = []
    plain = Figure.savefig

    def save(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        plain(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


def parts(figure: Figure) -> list[Axes]:
    axes: list[Axes] = figure.axes
    return axes


def points(line: Line2D) -> tuple[list[float], list[float]]:
    x, y = np.asarray(line.get_data(), float).tolist()
    return x, y


def test_curves_show_every_epoch_and_the_test(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [epoch(1, 0.2), epoch(2, 0.5), epoch(3, 0.4), row(3, test_loss=0.3, test_accuracy=0.45)]
    report.plot_curves(rows, tmp_path / "curves.png")
    look(tmp_path / "curves.png")
    accuracy, loss = parts(drawn[0])
    lines = [points(line) for line in accuracy.lines]
    assert lines == [([1, 2, 3], [0.2, 0.5, 0.4]), ([1, 2, 3], [0.2, 0.5, 0.4]), ([3], [0.45])]
    assert [points(line)[1] for line in loss.lines] == [[1, 1 / 2, 1 / 3], [2, 1, 2 / 3], [0.3]]


@pytest.mark.parametrize("epochs", [0, 1])
def test_curves_of_a_short_run_are_drawn_too(tmp_path: Path, epochs: int) -> None:
    report.plot_curves([epoch(n + 1, 0.0) for n in range(epochs)], tmp_path / "curves.png")
    look(tmp_path / "curves.png")


def test_curves_survive_numbers_that_are_no_numbers(tmp_path: Path) -> None:
    rows = [epoch(1, 0.2), row(2, train_loss=np.nan, train_accuracy=0, val_loss=np.inf, val_accuracy=0)]
    report.plot_curves(rows, tmp_path / "curves.png")
    look(tmp_path / "curves.png")


@pytest.mark.parametrize("characters", ODD)
def test_the_confusion_of_any_alphabet_is_drawn(tmp_path: Path, characters: str) -> None:
    report.plot_confusion_matrix(
        evaluation(len(characters)), Alphabet(characters), tmp_path / "confusion.png"
    )
    look(tmp_path / "confusion.png")


def test_the_confusion_has_labels_down_and_readings_across(tmp_path: Path, drawn: list[Figure]) -> None:
    report.plot_confusion_matrix(evaluation(3), Alphabet("$_^"), tmp_path / "confusion.png")
    axes = parts(drawn[0])[0]
    assert axes.get_title() == "1 wrong of 3 characters"
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("label", "read")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["$", "_", "^"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["$", "_", "^"]
    errors = np.zeros((3, 3))
    errors[2, 0] = 1
    assert (np.asarray(axes.images[0].get_array()) == errors).all()


def test_a_model_without_errors_has_an_empty_confusion(tmp_path: Path) -> None:
    made = evaluation(4)
    made.predicted[:] = made.targets
    report.plot_confusion_matrix(made, Alphabet("0123"), tmp_path / "confusion.png")
    look(tmp_path / "confusion.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_errors_are_shown_with_label_and_reading_the_surest_first(
    tmp_path: Path, channels: int, drawn: list[Figure]
) -> None:
    seen = [("01", "01", 1.0), ("01", "02", 0.4), ("22", "20", 0.9), ("11", "00", 0.6)]
    made, data = readings("012", seen, channels)
    report.plot_misreads(made, data, tmp_path / "errors.png")
    look(tmp_path / "errors.png")
    assert drawn[0].get_suptitle() == "3 of 4 labels read wrong"
    shown = [axes for axes in parts(drawn[0]) if axes.images]
    titles = [axes.get_title() for axes in shown]
    assert titles == ["22 read 20 (90%)", "11 read 00 (60%)", "01 read 02 (40%)"]
    for axes, row in zip(shown, [1, 0, 2], strict=True):
        picture = data.images[row].numpy()
        assert (np.asarray(axes.images[0].get_array()).reshape(picture.shape) == picture).all()


def test_a_model_without_errors_has_an_empty_sheet_that_says_so(tmp_path: Path, drawn: list[Figure]) -> None:
    made, data = readings("01", [("0", "0", 0.9), ("1", "1", 0.8)])
    report.plot_misreads(made, data, tmp_path / "errors.png")
    look(tmp_path / "errors.png")
    assert drawn[0].get_suptitle() == "0 of 2 labels read wrong"
    assert not any(axes.images for axes in parts(drawn[0]))


@pytest.mark.parametrize("more", [0, 1])
def test_of_many_errors_the_surest_are_shown_and_the_title_says_so(
    tmp_path: Path, more: int, drawn: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "SHOWN", 7)
    made, data = readings("01", [("0", "1", 0.1 + n / 10) for n in range(7 + more)])
    report.plot_misreads(made, data, tmp_path / "errors.png")
    title = drawn[0].get_suptitle()
    assert (
        title == ["7 of 7 labels read wrong", "8 of 8 labels read wrong; the 7 that it was surest of"][more]
    )
    shown = [axes.get_title() for axes in parts(drawn[0]) if axes.images]
    assert shown == [f"0 read 1 ({10 * (n + more)}%)" for n in range(7, 0, -1)]


@pytest.mark.parametrize("characters", ODD)
def test_errors_of_any_alphabet_are_text_and_no_formulas(
    tmp_path: Path, characters: str, drawn: list[Figure]
) -> None:
    first, last = characters[:2], characters[-2:]
    report.plot_misreads(*readings(characters, [(first, last, 0.5)]), tmp_path / "errors.png")
    look(tmp_path / "errors.png")
    title = parts(drawn[0])[0].title
    assert title.get_text() == f"{first} read {last} (50%)"
    assert not title.get_parse_math()


def test_a_run_leaves_its_four_pictures(tiny: Config) -> None:
    folder = train(tiny).run_dir / "report"
    pictures = sorted(folder.iterdir())
    assert [path.name for path in pictures] == ["confusion.png", "curves.png", "errors.png", "pictures.png"]
    for path in pictures:
        look(path)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 6, 8])
def test_samples_show_every_picture(tmp_path: Path, channels: int, count: int, drawn: list[Figure]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 32, channels), dtype=np.uint8)
    report.plot_samples(images, [f"{n:04}" for n in range(count)], tmp_path / "samples.png")
    look(tmp_path / "samples.png")
    shown = [axes for axes in parts(drawn[0]) if axes.images]
    assert [axes.get_title() for axes in shown] == [f"{n:04}" for n in range(count)]
    for axes, image in zip(shown, images, strict=True):
        assert (np.asarray(axes.images[0].get_array()).reshape(image.shape) == image).all()


@pytest.mark.parametrize("label", ["$_^$", "$\\frac$", "a$b$c", "$$", "中文"])
def test_labels_are_text_and_no_formulas(tmp_path: Path, label: str, drawn: list[Figure]) -> None:
    """`$_^$` as a formula is an error, and `a$b$c` would lose its dollars."""
    report.plot_samples(np.zeros((1, 16, 32, 3), np.uint8), [label], tmp_path / "samples.png")
    look(tmp_path / "samples.png")
    title = parts(drawn[0])[0].title
    assert title.get_text() == label
    assert not title.get_parse_math()


# -- the picture of a sweep ----------------------------------------------------------------------------------


def place(at: int, **others: Any) -> report.PlotPoint:
    """A point that fits, with every figure."""
    values: dict[str, Any] = {
        "predicted_mib": (900.0, 1200.0),
        "measured_mib": 1000.0,
        "fits": True,
        "images_per_second": 100.0 * at,
        "val_accuracy": 0.9,
        "accuracy_interval": None,
    }
    return report.PlotPoint(x=at, **(values | others))


def marks(axes: Axes, marker: str) -> list[tuple[list[float], list[float]]]:
    return [points(line) for line in axes.lines if line.get_marker() == marker]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def labels(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


NOTHING = {"measured_mib": None, "images_per_second": None, "val_accuracy": None}


def test_a_sweep_shows_memory_speed_and_accuracy(tmp_path: Path, drawn: list[Figure]) -> None:
    unfit = place(800, predicted_mib=(6000.0, 6900.0), fits=False, **NOTHING)
    line = report.Series("", [place(25), place(100, accuracy_interval=(0.8, 1.0)), unfit])
    report.plot_sweep([line], [(3908.0, 3908.0)], "batch size", [], tmp_path / "sweep.png")
    look(tmp_path / "sweep.png")
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


def test_what_was_trained_without_room_has_its_cross_everywhere(tmp_path: Path, drawn: list[Figure]) -> None:
    report.plot_sweep(
        [report.Series("", [place(25, fits=False)])], [], "batch size", [], tmp_path / "sweep.png"
    )
    heights = [marks(axes, "x")[0][1] for axes in parts(drawn[0])]
    assert heights == [[1000], [2500], [0.9]]


def test_lines_have_their_names_in_a_legend(tmp_path: Path, drawn: list[Figure]) -> None:
    lines = [report.Series(f"alphabet=$_^${number}", [place(25), place(50)]) for number in range(20)]
    report.plot_sweep(lines, [], "batch size", [], tmp_path / "sweep.png")
    look(tmp_path / "sweep.png")
    said = drawn[0].legends[0].get_texts()
    assert [text.get_text() for text in said] == [
        *(f"alphabet=$_^${number}" for number in range(16)),
        "and 4 more",
    ]
    assert not any(text.get_parse_math() for text in said)


def test_a_budget_within_bounds_is_a_band_and_of_many_none_is_drawn(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    line = report.Series("", [place(25)])
    report.plot_sweep([line], [(3700.0, 3900.0)], "batch size", [], tmp_path / "sweep.png")
    memory = parts(drawn[0])[0]
    assert texts(memory) == ["budget 3,700 to 3,900"]
    assert len(memory.patches) == 1
    report.plot_sweep(
        [line], [(n, n) for n in (1.0, 2.0, 3.0, 4.0)], "batch size", [], tmp_path / "sweep.png"
    )
    assert texts(parts(drawn[1])[0]) == []


@pytest.mark.parametrize(
    ("count", "every"), [(1, 1), (2, 1), (8, 1), (9, 1), (30, 1), (31, 2), (60, 2), (61, 3)]
)
def test_names_stand_below_of_many_every_nth(
    tmp_path: Path, drawn: list[Figure], count: int, every: int
) -> None:
    names = [f"$_{number}^$" for number in range(count)]
    line = report.Series("", [place(number) for number in range(count)])
    report.plot_sweep([line], [], "a$_^$b", names, tmp_path / "sweep.png")
    look(tmp_path / "sweep.png")
    for axes in parts(drawn[0]):
        assert axes.get_xscale() == "linear"
        assert labels(axes) == names[::every]
        assert not any(label.get_parse_math() for label in axes.get_xticklabels())
        assert axes.get_xlabel() == "a$_^$b"


def test_of_batch_sizes_close_together_some_are_named(tmp_path: Path, drawn: list[Figure]) -> None:
    line = report.Series("", [place(size) for size in range(1000, 1100)])
    report.plot_sweep([line], [], "batch size", [], tmp_path / "sweep.png")
    named = labels(parts(drawn[0])[0])
    assert named[0] == "1000"
    assert 8 <= len(named) <= 14


@pytest.mark.parametrize(
    "line", [[], [place(25, **NOTHING, predicted_mib=None)]], ids=["no point", "no figure"]
)
def test_a_sweep_without_figures_says_so(
    tmp_path: Path, drawn: list[Figure], line: list[report.PlotPoint]
) -> None:
    report.plot_sweep([report.Series("", line)], [], "batch size", [], tmp_path / "sweep.png")
    look(tmp_path / "sweep.png")
    assert [texts(axes) for axes in parts(drawn[0])] == [["no figures"]] * 3


def test_accuracies_of_all_and_of_none_are_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    for share in (0.0, 1.0):
        line = report.Series("", [place(25, val_accuracy=share), place(50, val_accuracy=share)])
        report.plot_sweep([line], [], "batch size", [], tmp_path / "sweep.png")
        low, high = parts(drawn[-1])[2].get_ylim()
        assert -0.03 < low < share + 0.001
        assert share - 0.001 < high < 1.01


def test_an_old_picture_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    path.write_bytes(b"half a picture")
    report.plot_curves([epoch(1, 0.1)], path)
    look(path)
    assert list(tmp_path.iterdir()) == [path]
