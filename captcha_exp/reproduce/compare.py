"""Compare the results of two runs: list the differences and compute the verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from captcha_exp.reproduce.reference import RunResult
from captcha_exp.runs.fields import changed_values, to_short_text

Verdict: TypeAlias = Literal["identical", "equivalent", "different"]

LABELS, SPLIT, IMAGES = "labels (SHA-256)", "split", "images (SHA-256)"
VOLATILE_METRICS = ("memory/", "speed/")  # prefixes of metrics that differ in every run

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
        return f"{where} {to_short_text(self.expected)} -> {to_short_text(self.actual)}"

    def to_json(self) -> dict[str, Any]:
        """Return the entry of reproduction.json; None for NaN and infinite values, which JSON lacks."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in vars(self).items()
        }


def find_differences(reference: RunResult, rerun: RunResult) -> list[Difference]:
    """List all differences: images, metrics by epoch, predictions and weights."""
    images = changed_values(_image_values(reference), _image_values(rerun))
    # The hash covers the whole cache file, with rejected files and remarks; the hashes of the files do not.
    if reference.dataset.get("files") and _image_files(reference) == _image_files(rerun):
        images.pop(IMAGES, None)
    differences = [Difference(name, None, *pair) for name, pair in images.items()]
    for epoch in sorted({*reference.metrics_by_epoch, *rerun.metrics_by_epoch}):
        metrics = (_stable_metrics(result.metrics_by_epoch.get(epoch, {})) for result in (reference, rerun))
        differences += [Difference(name, epoch, *pair) for name, pair in changed_values(*metrics).items()]
    outputs = changed_values(_output_values(reference), _output_values(rerun), missing="correct")
    return differences + [Difference(name, None, *pair) for name, pair in outputs.items()]


def has_same_images(differences: Sequence[Difference]) -> bool:
    """Return whether images, labels and splits are identical."""
    return not any(difference.name in (LABELS, SPLIT, IMAGES) for difference in differences)


def compute_verdict(reference: RunResult, rerun: RunResult) -> Verdict:
    """Return identical, equivalent or different.

    Equivalent runs have the same images and split (other images are another experiment), a loss of the first
    epoch within `LOSS_TOLERANCE` (rounding differences stay within it, another seed or learning rate usually
    does not), and a test accuracy within the 95 % interval of the reference run, its sampling error.
    """
    differences = find_differences(reference, rerun)
    if not differences:
        return "identical"
    expected_loss, actual_loss = (
        result.metrics_by_epoch.get(1, {}).get("train/loss", math.nan) for result in (reference, rerun)
    )
    expected, actual = (
        result.metrics_by_epoch[max(result.metrics_by_epoch)] for result in (reference, rerun)
    )
    low, high = (expected.get(f"test/accuracy_{end}", math.nan) for end in ("low", "high"))
    is_equivalent = (
        has_same_images(differences)
        and abs(actual_loss - expected_loss) <= LOSS_TOLERANCE * abs(expected_loss)
        and low <= actual.get("test/accuracy", math.nan) <= high
    )
    return "equivalent" if is_equivalent else "different"


def _image_values(result: RunResult) -> dict[str, Any]:
    dataset = result.dataset
    return {LABELS: dataset["labels_sha256"], SPLIT: dataset["splits"], IMAGES: dataset["images_sha256"]}


def _image_files(result: RunResult) -> list[Any]:
    """Return the files of an image folder, and what determines how they are decoded."""
    provenance = result.dataset.get("provenance", {})
    return [result.dataset.get("files"), *map(provenance.get, ("captcha", "format", "dependencies"))]


def _stable_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if not key.startswith(VOLATILE_METRICS)}


def _output_values(result: RunResult) -> dict[str, Any]:
    predictions = {f"prediction of image {image}": text for image, (_, text) in result.misreads.items()}
    return (
        {"test images": result.num_test_images} | predictions | {"weights (SHA-256)": result.weights_sha256}
    )
