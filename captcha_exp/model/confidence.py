"""Confidences of a model, calibrated, and the answers to give at a chosen accuracy. Imports no torch.

The logits of a trained network are divided by a temperature, and the probability p of the text that they then
give becomes the confidence `sigmoid(slope * logit(p) + intercept)`.

Source: Guo et al., On calibration of modern neural networks, ICML 2017 (temperature); Platt, Probabilistic
outputs for support vector machines, 1999 (the map); Geifman and El-Yaniv, Selective classification for deep
neural networks, NeurIPS 2017 (answers at a chosen accuracy).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

EPSILON = 1e-6  # probabilities nearer to 0 or 1 count as this one
MAX_POINTS = 100


class OperatingPoint(NamedTuple):
    """A threshold of the confidence, below which a model abstains, and its effect."""

    threshold: float
    coverage: float  # fraction of the images that are answered
    accuracy: float  # expected fraction of these answers that are right


@dataclass(frozen=True)
class Calibration:
    """How the confidences of a model are computed from its logits."""

    temperature: float = 1.0
    slope: float = 1.0
    intercept: float = 0.0
    images: int = 0  # that it was fitted on; 0: it was not
    points: tuple[OperatingPoint, ...] = ()  # in order of coverage

    def to_json(self) -> dict[str, Any]:
        """Return it as values of JSON."""
        return {**asdict(self), "points": [list(point) for point in self.points]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Calibration":
        """Return the calibration in values of JSON.

        Raises:
            ValueError: they are none.
        """
        try:
            points = tuple(OperatingPoint(*map(float, point)) for point in values["points"])
            temperature, slope, intercept = numbers = [
                float(values[name]) for name in ("temperature", "slope", "intercept")
            ]
            found = cls(temperature, slope, intercept, int(values["images"]), points)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError("has a calibration that cannot be read") from None
        if not all(map(math.isfinite, [*numbers, *np.ravel(points)])) or found.temperature <= 0:
            raise ValueError("has a calibration with impossible numbers")
        return found

    def confidence(self, probabilities: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the confidences for probabilities of texts."""
        confidences: npt.NDArray[np.float64] = 1 / (
            1 + np.exp(-(self.slope * logit(probabilities) + self.intercept))
        )
        return confidences

    def operating_point(self, accuracy: float) -> OperatingPoint | None:
        """Return the point with the most answers of which this fraction is right; None if there is none.

        One wrong answer in n can only be promised by a point with n answers.
        """
        needed = 1 / (1 - accuracy)
        good = (p for p in reversed(self.points) if p.accuracy >= accuracy)
        return next((p for p in good if p.coverage * self.images >= needed * (1 - 1e-9)), None)

    @property
    def best_accuracy(self) -> float:
        """The largest fraction that `operating_point` accepts; 0 if it accepts none."""
        limits = (min(p.accuracy, 1 - 1 / (p.coverage * self.images)) for p in self.points)
        return max(limits, default=0.0)


NOT_CALIBRATED = Calibration()


def logit(probabilities: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the logarithms of the odds."""
    clipped = np.clip(np.asarray(probabilities, np.float64), EPSILON, 1 - EPSILON)
    odds: npt.NDArray[np.float64] = np.log(clipped / (1 - clipped))
    return odds


def operating_points(confidences: npt.ArrayLike) -> tuple[OperatingPoint, ...]:
    """Return up to MAX_POINTS operating points for calibrated confidences (N,).

    The last one answers all these images, but none with a lower confidence, as of another kind of image.
    """
    ordered = np.sort(np.asarray(confidences, np.float64))[::-1]
    total = len(ordered)
    means = np.cumsum(ordered) / np.arange(1, total + 1)
    counts = np.unique(np.linspace(1, total, min(MAX_POINTS, total)).round().astype(int))
    return tuple(OperatingPoint(float(ordered[n - 1]), float(n / total), float(means[n - 1])) for n in counts)
