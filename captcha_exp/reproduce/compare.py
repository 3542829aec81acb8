"""Compare the results of two runs: list the differences and compute the verdict."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from captcha_exp.reproduce.reference import ABSENT, RunResult

Verdict: TypeAlias = Literal["identical", "equivalent", "different"]

VOLATILE_METRICS = ("memory/", "speed/")  # prefixes of metrics that differ in every run

TOLERANCES = {
    "images": "identical, with identical splits: other images are another experiment",
    "train/loss of epoch 1": "within 1 %: rounding differences stay within it, another seed, learning rate "
    "or augmentation usually does not",
    "test/accuracy": "within the 95 % interval of the reference run, its sampling error",
}
"""criteria of an equivalent run"""
LOSS_TOLERANCE = 0.01


@dataclass(frozen=True)
class Difference:
    """One difference between the results of two runs."""

    name: str
    """a metric, the images, the split, a prediction or the weights"""
    epoch: int | None
    expected: Any
    actual: Any

    def describe(self) -> str:
        """Return the name and values, as in "epoch 1, train/loss 2.0 -> 2.5"."""
        where = self.name if self.epoch is None else f"epoch {self.epoch}, {self.name}"
        return f"{where} {_abbreviate(self.expected)} -> {_abbreviate(self.actual)}"

    def to_json(self) -> dict[str, Any]:
        """Return the entry of reproduction.json."""
        return {
            "name": self.name,
            "epoch": self.epoch,
            "expected": _to_json_value(self.expected),
            "actual": _to_json_value(self.actual),
        }


def find_differences(reference: RunResult, rerun: RunResult) -> list[Difference]:
    """List all differences: images, metrics by epoch, predictions, weights."""
    return [
        *_image_differences(reference, rerun),
        *_metric_differences(reference, rerun),
        *_prediction_differences(reference, rerun),
        *_weight_differences(reference, rerun),
    ]


def has_same_images(reference: RunResult, rerun: RunResult) -> bool:
    """Return whether images, labels and splits are identical."""
    return next(_image_differences(reference, rerun), None) is None


def compute_verdict(reference: RunResult, rerun: RunResult) -> Verdict:
    """Return identical, equivalent by `TOLERANCES`, or different."""
    if not find_differences(reference, rerun):
        return "identical"
    expected_loss, actual_loss = (
        result.metrics_by_epoch.get(1, {}).get("train/loss", math.nan) for result in (reference, rerun)
    )
    expected, actual = (
        result.metrics_by_epoch[max(result.metrics_by_epoch)] for result in (reference, rerun)
    )
    low, high = (expected.get(f"test/accuracy_{end}", math.nan) for end in ("low", "high"))
    is_equivalent = (
        has_same_images(reference, rerun)
        and abs(actual_loss - expected_loss) <= LOSS_TOLERANCE * abs(expected_loss)
        and low <= actual.get("test/accuracy", math.nan) <= high
    )
    return "equivalent" if is_equivalent else "different"


def _image_differences(reference: RunResult, rerun: RunResult) -> Iterator[Difference]:
    expected, actual = reference.dataset, rerun.dataset
    for key, name in (("labels_sha256", "labels (SHA-256)"), ("splits", "split")):
        if expected[key] != actual[key]:
            yield Difference(name, None, expected[key], actual[key])
    # The hash covers the whole cache file, with rejected files and remarks; the hashes of the files do not.
    same_files = (
        bool(expected.get("files"))
        and expected["files"] == actual.get("files")
        and _image_provenance(reference) == _image_provenance(rerun)
    )
    key = "images_sha256"
    if expected[key] != actual[key] and not same_files:
        yield Difference("images (SHA-256)", None, expected[key], actual[key])


def _image_provenance(result: RunResult) -> list[Any]:
    """Return the part of the provenance that determines the pixels decoded from the files."""
    provenance = result.dataset.get("provenance")
    if not isinstance(provenance, dict):
        return []
    return [provenance.get(key) for key in ("captcha", "format", "dependencies")]


def _metric_differences(reference: RunResult, rerun: RunResult) -> Iterator[Difference]:
    for epoch in sorted({*reference.metrics_by_epoch, *rerun.metrics_by_epoch}):
        expected, actual = (
            _stable_metrics(result.metrics_by_epoch.get(epoch, {})) for result in (reference, rerun)
        )
        for key in dict.fromkeys([*expected, *actual]):
            pair = expected.get(key, ABSENT), actual.get(key, ABSENT)
            if repr(pair[0]) != repr(pair[1]):  # exact, and NaN equals NaN
                yield Difference(key, epoch, *pair)


def _stable_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if not key.startswith(VOLATILE_METRICS)}


def _prediction_differences(reference: RunResult, rerun: RunResult) -> Iterator[Difference]:
    if reference.num_test_images != rerun.num_test_images:
        yield Difference("test images", None, reference.num_test_images, rerun.num_test_images)
    for image in dict.fromkeys([*reference.misreads, *rerun.misreads]):
        pair = reference.misreads.get(image), rerun.misreads.get(image)
        if pair[0] != pair[1]:
            predictions = [misread[1] if misread else "correct" for misread in pair]
            yield Difference(f"prediction of image {image}", None, *predictions)


def _weight_differences(reference: RunResult, rerun: RunResult) -> Iterator[Difference]:
    if reference.weights_sha256 != rerun.weights_sha256:
        yield Difference("weights (SHA-256)", None, reference.weights_sha256, rerun.weights_sha256)


def _to_json_value(value: Any) -> Any:
    """Replace NaN and infinite values, which JSON cannot represent, by None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _abbreviate(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
