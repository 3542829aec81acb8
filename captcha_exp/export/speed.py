"""Speed of an exported model on one thread, as a ratio to a reference workload in the same process.

A speed in images per second says as much about what else the machine does as about the model. Therefore both
are measured in turn, in the processor time of the thread, which does not count time that others had the core.
What remains (caches, clock rates) changes both. The ratio still depends on the kernels that a CPU and a
version of ONNX Runtime choose, and is compared only where these are equal.
"""

import base64
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from captcha_exp.export.predictor import BATCH_SIZE, OnnxPredictor
from captcha_exp.runtime.cpu_name import detect_cpu_name

ROUNDS = 11
NUM_SINGLE = 16  # images of a round that are predicted one by one
REFERENCE_RUNS = 24  # of the reference workload in a round: some tens of milliseconds
MIN_SLOWDOWN = 0.2  # a smaller one is never called slower
NUM_DEVIATIONS = 5.0  # standard deviations of the rounds by which a slower model differs
_REFERENCE_SHAPES = {"x": (1, 16, 48, 64), "w": (16, 16, 3, 3)}
_REFERENCE_MODEL = """
CAgSADqUAwo6CgF4CgF3EgJjMCIEQ29udioVCgxrZXJuZWxfc2hhcGVAA0ADoAEHKhEKBHBhZHNAAUABQAFAAaABBwoOCgJjMBICaDAi
BFJlbHUKOwoCaDAKAXcSAmMxIgRDb252KhUKDGtlcm5lbF9zaGFwZUADQAOgAQcqEQoEcGFkc0ABQAFAAUABoAEHCg4KAmMxEgJoMSIE
UmVsdQo7CgJoMQoBdxICYzIiBENvbnYqFQoMa2VybmVsX3NoYXBlQANAA6ABByoRCgRwYWRzQAFAAUABQAGgAQcKDgoCYzISAmgyIgRS
ZWx1CjsKAmgyCgF3EgJjMyIEQ29udioVCgxrZXJuZWxfc2hhcGVAA0ADoAEHKhEKBHBhZHNAAUABQAFAAaABBwoNCgJjMxIBeSIEUmVs
dRIJcmVmZXJlbmNlWhsKAXgSFgoUCAESEAoCCAEKAggQCgIIMAoCCEBaGwoBdxIWChQIARIQCgIIEAoCCBAKAggDCgIIA2IbCgF5EhYK
FAgBEhAKAggBCgIIEAoCCDAKAghAQgQKABAS
"""
"""four convolutions of 16 channels, each with a rectifier; a test builds the same with the package onnx"""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(config=ConfigDict(extra="forbid"), frozen=True)
class Rate:
    """Speed at one batch size."""

    images_per_second: Positive  # of wall time, the median of the rounds
    cost: Positive  # processor time of an image, in runs of the reference workload; the median
    deviation: NotNegative  # of the cost between rounds, relative: a robust standard deviation


@dataclass(config=ConfigDict(extra="forbid"), frozen=True)
class Speed:
    """Speed of a model on one thread, and where it was measured."""

    batch_1: Rate
    batch_64: Rate
    cpu: str
    cores: int
    onnxruntime: str

    @property
    def machine(self) -> tuple[str, int, str]:
        """The values that have to be equal for a comparison."""
        return self.cpu, self.cores, self.onnxruntime


def measure_speed(predictor: OnnxPredictor, arrays: Sequence[npt.NDArray[np.uint8]]) -> Speed:
    """Measure a model with images (H, W, 3) of the most frequent size among these."""
    import onnxruntime

    single = OnnxPredictor(predictor.path, num_threads=1, content=predictor.content)
    shape = Counter(array.shape for array in arrays).most_common(1)[0][0]
    chosen = [array for array in arrays if array.shape == shape][:BATCH_SIZE]
    batch = (chosen * math.ceil(BATCH_SIZE / len(chosen)))[:BATCH_SIZE]
    reference = _reference_workload()

    def one_by_one() -> None:
        for array in batch[:NUM_SINGLE]:
            list(single.predict_arrays([array]))

    def at_once() -> None:
        list(single.predict_arrays(batch))

    for warm_up in (reference, one_by_one, at_once):
        warm_up()
    rounds = [tuple(_time(work) for work in (reference, one_by_one, at_once)) for _ in range(ROUNDS)]
    rates = []
    for which, count in ((1, NUM_SINGLE), (2, BATCH_SIZE)):
        costs = [(each[which][1] / count) / (each[0][1] / REFERENCE_RUNS) for each in rounds]
        cost = statistics.median(costs)
        deviation = 1.4826 * statistics.median(abs(each - cost) for each in costs) / cost
        wall = statistics.median(each[which][0] for each in rounds)
        rates.append(Rate(count / wall, cost, deviation))
    return Speed(rates[0], rates[1], detect_cpu_name(), os.cpu_count() or 1, onnxruntime.__version__)


def slowdown_limit(before: Rate, now: Rate) -> float:
    """Return the relative growth of the cost from which on a model is slower, beyond what repeats vary."""
    return max(MIN_SLOWDOWN, NUM_DEVIATIONS * math.hypot(before.deviation, now.deviation))


def _reference_workload() -> Callable[[], None]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        base64.b64decode(_REFERENCE_MODEL), options, providers=["CPUExecutionProvider"]
    )
    feed: dict[str, Any] = {
        name: np.full(shape, 0.01, np.float32) for name, shape in _REFERENCE_SHAPES.items()
    }

    def run() -> None:
        for _ in range(REFERENCE_RUNS):
            session.run(None, feed)

    return run


def _time(work: Callable[[], None]) -> tuple[float, float]:
    """Return the wall time and the processor time of this thread, in seconds."""
    wall, cpu = time.perf_counter(), time.thread_time()
    work()
    return time.perf_counter() - wall, max(time.thread_time() - cpu, 1e-9)
