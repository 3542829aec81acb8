"""The parts of a run's page that need its predictions on the test split: confusions, confidences, images."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from captcha_exp.data.alphabet import END, NO_CHARACTER
from captcha_exp.data.dataset import Dataset
from captcha_exp.model.evaluate import Evaluation
from captcha_exp.report import charts, reliability
from captcha_exp.report.charts import Series, percent
from captcha_exp.report.dataset_page import data_uri

MAX_TILES = 24  # images in a list
MAX_IMAGE_CHARS = 1_000_000  # of the images in a list, encoded; keeps a page below 3 MB
MAX_TILE_PIXELS = 320  # rows or columns of an image; of a larger one, every n-th is shown
MAX_CLASSES = 40  # characters in the confusion matrix
MIN_ANSWERED = 20  # images, from which the coverage curve is drawn
COVERAGES = (1.0, 0.99, 0.95, 0.9, 0.75, 0.5)  # rows of the table


def confusion_matrix(evaluation: Evaluation, data: Dataset) -> dict[str, Any] | None:
    """Return the counts of wrong characters, those predicted correctly aside; None if all are correct."""
    if not evaluation.num_wrong_chars:
        return None
    alphabet = data.alphabet
    classes = evaluation.most_confused_classes(len(alphabet), MAX_CLASSES)
    counts = evaluation.confusion_matrix(classes)
    errors = counts - np.diag(np.diag(counts))
    names = [NO_CHARACTER if k == END else alphabet.characters[k] for k in classes]
    largest = int(errors.max()) or 1
    return {
        "names": names,
        "rows": [
            (name, [(n, round(100 * math.sqrt(n / largest))) for n in row])
            for name, row in zip(names, errors.tolist(), strict=True)
        ],
        "num_wrong": evaluation.num_wrong_chars,
        "num_chars": evaluation.num_chars,
        "num_shown": int(errors.sum()),
        "num_classes": len(alphabet),
    }


def describe_confidence(evaluation: Evaluation) -> dict[str, Any]:
    """Return the reliability diagram, the coverage curve and a table of thresholds."""
    confidences, is_correct = evaluation.text_confidences, evaluation.is_correct
    bins = reliability.reliability_bins(confidences, is_correct)
    curve = reliability.coverage_curve(confidences, is_correct)
    diagram = charts.line_chart(
        "Reliability: accuracy by confidence",
        [
            Series(
                "accuracy",
                [(each.mean_confidence, each.accuracy) for each in bins],
                [each.interval for each in bins],
                is_line=False,
            )
        ],
        x_label="mean confidence of the images in a bin",
        y_format=percent,
        x_format=percent,
        x_range=(0.0, 1.0),
        y_range=(0.0, 1.0),
        has_diagonal=True,
    )
    drawn = [each for each in curve if each.num_answered >= min(MIN_ANSWERED, len(is_correct))]
    coverage = charts.line_chart(
        "Accuracy of the answers by coverage",
        [
            Series(
                "accuracy of the answers",
                [(each.coverage, each.accuracy) for each in drawn],
                [each.interval for each in drawn],
                is_band=True,
            )
        ],
        x_label="images that are answered, the most certain first",
        y_format=percent,
        x_format=percent,
        x_range=(0.0, 1.0),
        y_limits=(0.0, 1.0),
    )
    rows = {point: None for each in COVERAGES if (point := reliability.at_coverage(curve, each))}
    return {
        "charts": [diagram, coverage],
        "bins": bins,
        "error": evaluation.calibration_error,
        "mean": float(np.mean(confidences)),
        "accuracy": evaluation.accuracy,
        "rows": list(rows),
    }


class Tile(NamedTuple):
    """An image of the page."""

    image: str
    label: str
    predicted: str
    confidence: float
    name: str
    is_correct: bool


def misread_rows(evaluation: Evaluation) -> list[int]:
    """Return the rows of the misread images, the one with the highest confidence first."""
    wrong = np.flatnonzero(~evaluation.is_correct)
    order = np.argsort(-evaluation.text_confidences[wrong], kind="stable")
    return [int(n) for n in wrong[order]]


def uncertain_rows(evaluation: Evaluation) -> list[int]:
    """Return the rows of all images, the one with the lowest confidence first."""
    return [int(n) for n in np.argsort(evaluation.text_confidences, kind="stable")]


def make_tiles(rows: Sequence[int], evaluation: Evaluation, data: Dataset) -> list[Tile]:
    """Return the first images of these rows, as many as the page has room for."""
    alphabet, num_chars, tiles = data.alphabet, 0, list[Tile]()
    for n in rows[:MAX_TILES]:
        index = int(evaluation.indices[n])
        pixels = data.images[index].numpy()
        step = -(-max(pixels.shape[:2]) // MAX_TILE_PIXELS)
        image = data_uri(pixels[::step, ::step])
        num_chars += len(image)
        if num_chars > MAX_IMAGE_CHARS:
            break
        tiles.append(
            Tile(
                image=image,
                label=alphabet.decode(evaluation.targets[n]),
                predicted=alphabet.decode(evaluation.predicted[n]),
                confidence=float(evaluation.text_confidences[n]),
                name=data.image_name(index) if data.manifest["files"] else f"image {index}",
                is_correct=bool(evaluation.is_correct[n]),
            )
        )
    return tiles
