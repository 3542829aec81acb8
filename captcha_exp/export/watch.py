"""Watch whether images are still those that a model was trained on, without labels.

The statistics of new images are compared with those of the test split in the model (`image_statistics`) by a
sequential test (`conformal`). Needs numpy, Pillow and onnxruntime alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from captcha_exp.export.conformal import ConformalMartingale
from captcha_exp.export.image_statistics import STATISTICS

ALPHA = 0.02  # probability that unchanged images are ever called changed
SEED = 0  # of the order among ties
MAX_LOG_WEALTH = 700.0  # beyond it exp() overflows


@dataclass(frozen=True)
class Movement:
    """One statistic of the images that were watched."""

    wealth: float  # largest of the gambler's; 1 before the first bet
    found_at: int | None  # number of images after which it had moved; None if it has not
    since: int  # number of the image from which on it had moved, estimated; 1 if it has not
    usual: tuple[float, float]  # 5% and 95% quantiles of the test images
    usual_median: float  # of the test images
    median: float  # of the images since then


@dataclass(frozen=True)
class WatchResult:
    """Whether images have changed, and which of their statistics."""

    num_images: int
    num_reference: int
    movements: Mapping[str, Movement]

    @property
    def moved(self) -> list[str]:
        """The statistics that have moved, the first one found first."""
        found = [(each.found_at, name) for name, each in self.movements.items() if each.found_at is not None]
        return [name for _, name in sorted(found, key=lambda pair: pair[0])]

    @property
    def is_changed(self) -> bool:
        """Whether any statistic has moved."""
        return bool(self.moved)

    @property
    def found_at(self) -> int | None:
        """The number of images after which a change was found; None without one."""
        return self.movements[self.moved[0]].found_at if self.moved else None

    def to_json(self) -> dict[str, Any]:
        """Return the values of `watch --json`."""
        return {
            "changed": self.is_changed,
            "images": self.num_images,
            "reference_images": self.num_reference,
            "alpha": ALPHA,
            "found_at": self.found_at,
            "moved": self.moved,
            "statistics": {
                name: {
                    "wealth": each.wealth,
                    "threshold": threshold(len(self.movements)),
                    "found_at": each.found_at,
                    "since": each.since,
                    "usual": list(each.usual),
                    "usual_median": each.usual_median,
                    "median": each.median,
                }
                for name, each in self.movements.items()
            },
        }


def threshold(num_statistics: int, alpha: float = ALPHA) -> float:
    """Return the wealth at which one of several statistics has moved: the bound of the union."""
    return num_statistics / alpha


def compare(reference: npt.NDArray[np.float64], rows: npt.NDArray[np.float64]) -> WatchResult:
    """Compare the statistics of images (N, K) in their order with those of a reference (M, K)."""
    movements = {
        name: _follow(reference[:, k], rows[:, k], np.random.default_rng([SEED, k]))
        for k, name in enumerate(STATISTICS)
    }
    return WatchResult(len(rows), len(reference), movements)


def _follow(
    reference: npt.NDArray[np.float64], values: npt.NDArray[np.float64], rng: np.random.Generator
) -> Movement:
    """Bet on each value of one statistic."""
    martingale = ConformalMartingale(reference.tolist(), rng)
    limit = math.log(threshold(len(STATISTICS)))
    lowest, since, largest, found_at = 0.0, 0, 0.0, None
    for number, value in enumerate(values.tolist(), 1):
        log_wealth = martingale.update(value)
        largest = max(largest, log_wealth)
        if found_at is None and log_wealth >= limit:
            found_at = number
        elif found_at is None and log_wealth < lowest:
            lowest, since = log_wealth, number
    if found_at is None:
        since = 0
    low, usual, high = np.quantile(reference, [0.05, 0.5, 0.95]).tolist()
    median = float(np.median(values[since:]))
    return Movement(math.exp(min(largest, MAX_LOG_WEALTH)), found_at, since + 1, (low, high), usual, median)
