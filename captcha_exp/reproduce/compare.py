"""Two runs' results, side by side: the first difference, and how far apart they are."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from captcha_exp.reproduce.reference import ABSENT, RunResult

Verdict: TypeAlias = Literal["identical", "equivalent", "different"]

VOLATILE_METRICS = ("memory/", "speed/")  # metrics of the process and of the moment; every run has others

TOLERANCES = {
    "images": "the same, on the same sides of the split: other ones are another experiment",
    "train/loss of epoch 1": "within 1 %: the same weights, order and steps, rounded otherwise, are still "
    "together; another seed, rate or augmentation mostly is not",
    "test/accuracy": "within the run's own 95 % interval: what chance alone could have given it",
}
"""what an equivalent run must be"""
LOSS_TOLERANCE = 0.01


@dataclass(frozen=True)
class Difference:
    """One place where two runs are not the same."""

    name: str
    """a metric, pictures, split, predictions or weights"""
    epoch: int | None
    expected: Any
    actual: Any

    def describe(self) -> str:
        """As a sentence has it."""
        if self.epoch is None:
            return f"{self.name} {_abbreviate(self.expected)} -> {_abbreviate(self.actual)}"
        return f"epoch {self.epoch}, {self.name} {_abbreviate(self.expected)} -> {_abbreviate(self.actual)}"

    def to_json(self) -> dict[str, Any]:
        """As reproduction.json has it."""
        return {
            "where": self.name,
            "epoch": self.epoch,
            "then": _to_json_value(self.expected),
            "now": _to_json_value(self.actual),
        }


def find_differences(reference: RunResult, rerun: RunResult) -> list[Difference]:
    """Every difference of the results, in the order in which a training meets them."""
    return [
        *_image_differences(reference, rerun),
        *_metric_differences(reference, rerun),
        *_prediction_differences(reference, rerun),
        *_weight_differences(reference, rerun),
    ]


def has_same_images(reference: RunResult, rerun: RunResult) -> bool:
    """Whether pictures, labels and splits are the same."""
    return next(_image_differences(reference, rerun), None) is None


def compute_verdict(reference: RunResult, rerun: RunResult) -> Verdict:
    """How alike two runs are; equivalent is what TOLERANCES says."""
    if not find_differences(reference, rerun):
        return "identical"
    first, again = (
        outcome.metrics_by_epoch.get(1, {}).get("train/loss", math.nan) for outcome in (reference, rerun)
    )
    last, today = (outcome.metrics_by_epoch[max(outcome.metrics_by_epoch)] for outcome in (reference, rerun))
    low, high = (last.get(f"test/accuracy_{end}", math.nan) for end in ("low", "high"))
    alike = (
        has_same_images(reference, rerun)
        and abs(again - first) <= LOSS_TOLERANCE * abs(first)
        and low <= today.get("test/accuracy", math.nan) <= high
    )
    return "equivalent" if alike else "different"


def _image_differences(then: RunResult, now: RunResult) -> Iterator[Difference]:
    for key, where in (("labels_sha256", "labels (SHA-256)"), ("splits", "split")):
        if then.dataset[key] != now.dataset[key]:
            yield Difference(where, None, then.dataset[key], now.dataset[key])
    # The hash is of the whole cache file, with what was refused and noted; the files' own say it as well.
    files = [outcome.dataset.get("files") for outcome in (then, now)]
    by_files = bool(files[0]) and files[0] == files[1] and _image_provenance(then) == _image_provenance(now)
    if then.dataset["images_sha256"] != now.dataset["images_sha256"] and not by_files:
        pair = then.dataset["images_sha256"], now.dataset["images_sha256"]
        yield Difference("pictures (SHA-256)", None, *pair)


def _image_provenance(outcome: RunResult) -> list[Any]:
    """What made an array of numbers of the files."""
    provenance = outcome.dataset.get("provenance")
    if not isinstance(provenance, dict):
        return []
    return [provenance.get(key) for key in ("captcha", "format", "dependencies")]


def _metric_differences(then: RunResult, now: RunResult) -> Iterator[Difference]:
    for epoch in sorted({*then.metrics_by_epoch, *now.metrics_by_epoch}):
        first, second = (
            _stable_metrics(then.metrics_by_epoch.get(epoch, {})),
            _stable_metrics(now.metrics_by_epoch.get(epoch, {})),
        )
        for key in dict.fromkeys([*first, *second]):
            pair = first.get(key, ABSENT), second.get(key, ABSENT)
            if repr(pair[0]) != repr(pair[1]):  # to the bit, and nan is as good as nan
                yield Difference(key, epoch, *pair)


def _stable_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if not key.startswith(VOLATILE_METRICS)}


def _prediction_differences(then: RunResult, now: RunResult) -> Iterator[Difference]:
    if then.num_test_images != now.num_test_images:
        yield Difference("pictures of the test split", None, then.num_test_images, now.num_test_images)
    for picture in dict.fromkeys([*then.misreads, *now.misreads]):
        pair = then.misreads.get(picture), now.misreads.get(picture)
        if pair[0] != pair[1]:
            read = [reading[1] if reading else "read right" for reading in pair]
            yield Difference(f"prediction of picture {picture}", None, *read)


def _weight_differences(then: RunResult, now: RunResult) -> Iterator[Difference]:
    if then.weights_sha256 != now.weights_sha256:
        yield Difference("weights (SHA-256)", None, then.weights_sha256, now.weights_sha256)


def _to_json_value(value: Any) -> Any:
    """What JSON can write."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _abbreviate(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
