"""How far confidences can be trusted: accuracy by confidence, and by the share of images that is answered."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from captcha_exp.model.proportions import wilson_interval

NUM_BINS = 10


class ReliabilityBin(NamedTuple):
    """Images whose confidence is in one range."""

    low: float
    high: float
    num_images: int
    num_correct: int
    mean_confidence: float
    accuracy: float
    interval: tuple[float, float]
    """95% confidence interval of the accuracy"""


class CoveragePoint(NamedTuple):
    """The answers that remain if only images with at least this confidence are answered."""

    threshold: float
    num_answered: int
    num_correct: int
    coverage: float
    """fraction of all images"""
    accuracy: float
    """fraction of the answered images"""
    interval: tuple[float, float]
    """95% confidence interval of the accuracy"""


def reliability_bins(
    confidences: npt.NDArray[np.floating], is_correct: npt.NDArray[np.bool_], num_bins: int = NUM_BINS
) -> list[ReliabilityBin]:
    """Return the bins of equal width in [0, 1] that have images; confidences and is_correct are (N,).

    A bin has its upper bound, as in (0.8, 0.9]; the first one has both.

    Source: C. Guo et al., On calibration of modern neural networks, ICML 2017.
    """
    known = _clean(confidences)
    numbers = np.clip(np.ceil(known * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    bins = []
    for number in np.unique(numbers).tolist():
        members = numbers == number
        count, correct = int(members.sum()), int(is_correct[members].sum())
        bins.append(
            ReliabilityBin(
                low=number / num_bins,
                high=(number + 1) / num_bins,
                num_images=count,
                num_correct=correct,
                mean_confidence=float(known[members].mean()),
                accuracy=correct / count,
                interval=wilson_interval(correct, count),
            )
        )
    return bins


def coverage_curve(
    confidences: npt.NDArray[np.floating], is_correct: npt.NDArray[np.bool_]
) -> list[CoveragePoint]:
    """Return a point for each distinct confidence, the highest first; confidences and is_correct are (N,).

    Images of equal confidence are answered together: no threshold separates them.
    """
    known = _clean(confidences)
    order = np.argsort(-known, kind="stable")
    ordered, correct = known[order], np.cumsum(is_correct[order])
    last_of_equal = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    points = []
    for n in last_of_equal.tolist():
        answered, right = n + 1, int(correct[n])
        points.append(
            CoveragePoint(
                threshold=float(ordered[n]),
                num_answered=answered,
                num_correct=right,
                coverage=answered / len(known),
                accuracy=right / answered,
                interval=wilson_interval(right, answered),
            )
        )
    return points


def at_coverage(curve: Sequence[CoveragePoint], coverage: float) -> CoveragePoint | None:
    """Return the point with the largest coverage up to this one; None if the first exceeds it."""
    return next((point for point in reversed(curve) if point.coverage <= coverage + 1e-12), None)


def _clean(confidences: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Return confidences in [0, 1]; NaN, of a model that has diverged, becomes 0."""
    return np.clip(np.nan_to_num(confidences.astype(np.float64)), 0.0, 1.0)
