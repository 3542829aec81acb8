"""The training speed of a run, from its rows of metrics."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from captcha_exp.runs.saved import MetricsRow


class TrainingSpeed(NamedTuple):
    """The speed of a training."""

    images_per_second: float
    """median over the undisturbed epochs, or over all of them if each was disturbed"""
    is_disturbed: bool
    """whether each epoch was disturbed: the process did not get the cores that it asked for"""


def training_speed(rows: Sequence[MetricsRow]) -> TrainingSpeed | None:
    """Return the speed after the first epoch, which includes warm-up, if there are more; None without any."""
    epochs = [row.metrics for row in rows if "speed/images_per_second" in row.metrics]
    if not epochs:
        return None
    epochs = epochs[1:] or epochs
    undisturbed = [metrics for metrics in epochs if not metrics.get("speed/disturbed")]
    speeds = [metrics["speed/images_per_second"] for metrics in undisturbed or epochs]
    return TrainingSpeed(statistics.median(speeds), not undisturbed)
