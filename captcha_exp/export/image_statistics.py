"""Simple statistics of an image and of its predicted text; imports neither torch nor onnxruntime.

They show whether images are still those of the training, without labels: another font, size, color, noise or
compression moves at least one of them.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from captcha_exp.export.predictor import OnnxPredictor

STATISTICS = {
    "confidence": "of the text, from 0 to 1",
    "width": "pixels",
    "height": "pixels",
    "brightness": "mean gray value",
    "contrast": "standard deviation of the gray values",
    "saturation": "mean difference of the largest and the smallest channel of a pixel",
    "warmth": "mean of red minus blue",
    "greenness": "mean of green minus the mean of red and blue",
    "sharpness": "mean difference of neighboring gray values",
    "grain": "mean difference of a gray value and the mean of its four neighbors",
    "ink": "percentage of pixels that differ from the median gray value by more than 32",
}
"""name -> its definition, for the image as it arrives"""
MAX_ROWS = 512  # images in a reference
MAX_VALUE = 1e9  # of a statistic; neither an infinity nor NaN is below
INK_DIFFERENCE = 32  # gray values


def describe(pixels: npt.NDArray[np.uint8], confidence: float) -> tuple[float, ...]:
    """Return the statistics of an image (H, W, 3), in the order of STATISTICS, rounded.

    Rounding makes them equal on all machines, where sums and confidences differ in their last digits.
    """
    height, width = pixels.shape[:2]
    channels = pixels.astype(np.float32)
    red, green, blue = (channels[..., n] for n in range(3))
    gray = 0.299 * red + 0.587 * green + 0.114 * blue
    steps = [np.abs(np.diff(gray, axis=axis)) for axis in (0, 1)]
    padded = np.pad(gray, 1, mode="edge")
    neighbors = (padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]) / 4
    values = (
        width,
        height,
        gray.mean(),
        gray.std(),
        (channels.max(axis=-1) - channels.min(axis=-1)).mean(),
        (red - blue).mean(),
        (green - (red + blue) / 2).mean(),
        sum(float(step.mean()) for step in steps if step.size),
        np.abs(gray - neighbors).mean(),
        100 * (np.abs(gray - np.median(gray)) > INK_DIFFERENCE).mean(),
    )
    known = confidence if math.isfinite(confidence) else 0.0
    return round(known, 5), *(round(float(value), 2) for value in values)


def describe_all(
    predictor: OnnxPredictor, arrays: Sequence[npt.NDArray[np.uint8]]
) -> npt.NDArray[np.float64]:
    """Return the statistics (N, K) of images (H, W, 3), K being those in STATISTICS."""
    answers = predictor.predict_arrays(arrays)
    rows = [describe(each, answer.confidence) for each, answer in zip(arrays, answers, strict=True)]
    return np.array(rows).reshape(-1, len(STATISTICS))


def make_reference(
    predictor: OnnxPredictor, arrays: Sequence[npt.NDArray[np.uint8]]
) -> dict[str, list[float]]:
    """Return the statistics of at most MAX_ROWS of the images (H, W, 3) of a test split, by name."""
    count = min(len(arrays), MAX_ROWS)
    columns = describe_all(predictor, [arrays[n * len(arrays) // count] for n in range(count)]).T
    return dict(zip(STATISTICS, columns.tolist(), strict=True))


def read_reference(reference: Mapping[str, Sequence[float]]) -> npt.NDArray[np.float64]:
    """Return the statistics (N, K) in the manifest of a model.

    Raises:
        ValueError: there are none, or they are damaged.
    """
    if not reference:
        raise ValueError("has no statistics of its test images; export its run again")
    columns = []
    for name in STATISTICS:
        column = reference.get(name)
        if (
            not isinstance(column, list)
            or not 0 < len(column) <= MAX_ROWS
            or not all(type(each) in (int, float) and abs(each) < MAX_VALUE for each in column)
        ):
            raise ValueError(f"has damaged statistics of its test images ({name}); export its run again")
        columns.append(column)
    if len({len(column) for column in columns}) != 1:
        raise ValueError("has statistics of its test images of unequal numbers; export its run again")
    return np.array(columns, np.float64).T
