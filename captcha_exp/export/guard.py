"""Guard an exported model: measure it on labeled images, and compare that with a baseline.

A baseline has the text that was read in each image, by the hash of its content. The same images are then
compared in pairs: of a thousand images, five that are lost and none gained are beyond chance, which two
accuracies alone would not show.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from captcha_exp.config.documents import parse_json, read_document
from captcha_exp.errors import UserError, one_line
from captcha_exp.export.manifest import Manifest
from captcha_exp.export.predictor import OnnxPredictor
from captcha_exp.export.speed import Rate, Speed, measure_speed, slowdown_limit
from captcha_exp.model.proportions import fisher_p, mcnemar_p, wilson_interval

FORMAT = 1
ALPHA = 0.05  # of each comparison of accuracies: probability that an equal model is called worse
MAX_GROWTH = 0.1  # share by which the file may grow
MIN_SHARED = 0.5  # share of the images of the baseline that make a comparison in pairs
MAX_BASELINE_BYTES = 64 * 2**20
STRICT = ConfigDict(extra="forbid")
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=200)]


@dataclass(config=STRICT, frozen=True)
class Reading:
    """An image of the baseline: its label, and the text that was read."""

    label: Text
    text: Text
    correct: bool


@dataclass(config=STRICT, frozen=True)
class Measurement:
    """A model, measured on labeled images: the content of a baseline."""

    format: Literal[1]
    model_sha256: Hash
    num_bytes: Annotated[int, Field(gt=0)]
    speed: Speed
    images: Annotated[dict[Hash, Reading], Field(min_length=1)]

    @property
    def num_correct(self) -> int:
        """Number of images whose whole label was read."""
        return sum(each.correct for each in self.images.values())

    @property
    def accuracy(self) -> float:
        """Exact match."""
        return self.num_correct / len(self.images)

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """95% confidence interval of the accuracy."""
        return wilson_interval(self.num_correct, len(self.images))

    def to_json(self) -> bytes:
        """Return the content of a baseline file, with a line for each image."""
        values = _ADAPTER.dump_python(self, mode="json")
        images = sorted(values.pop("images").items())
        head = json.dumps(values, indent=2).removesuffix("\n}")
        lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in images)
        return f'{head},\n  "images": {{\n{lines}\n  }}\n}}\n'.encode()


_ADAPTER = TypeAdapter(Measurement)


@plain_dataclass(frozen=True)
class LabeledImage:
    """A labeled image in memory."""

    name: str
    sha256: str  # of its content
    label: str  # in Unicode NFC
    pixels: npt.NDArray[np.uint8]  # (H, W, 3)


def check_alphabet(predictor: OnnxPredictor) -> None:
    """Check that the alphabet of a model is one.

    Raises:
        UserError: it is not; the file was not written by `captcha-exp export`.
    """
    from captcha_exp.data.alphabet import Alphabet

    try:
        Alphabet(predictor.manifest.alphabet)
    except ValueError as error:
        raise UserError(
            f"{predictor.path}: {one_line(error)}; captcha-exp export RUN writes a model"
        ) from None


def fold_label(label: str, manifest: Manifest) -> str:
    """Return a label in the case in which the model writes."""
    from captcha_exp.data.alphabet import Alphabet

    return Alphabet(manifest.alphabet).fold_case(label) if manifest.case == "fold" else label


def can_write(label: str, manifest: Manifest) -> bool:
    """Return whether a label is a text that the model can read at all."""
    is_length = manifest.min_length <= len(label) <= manifest.length
    return is_length and set(fold_label(label, manifest)) <= set(manifest.alphabet)


def measure(predictor: OnnxPredictor, sha256: str, images: Sequence[LabeledImage]) -> Measurement:
    """Read images with a model, whose file has this hash, and measure its speed."""
    manifest = predictor.manifest
    arrays = [each.pixels for each in images]
    readings = {}
    for image, answer in zip(images, predictor.predict_arrays(arrays), strict=True):
        is_correct = answer.text == fold_label(image.label, manifest)
        readings[image.sha256] = Reading(image.label, answer.text, is_correct)
    speed = measure_speed(predictor, arrays)
    return Measurement(1, sha256, len(predictor.content), speed, readings)


def read_baseline(path: Path) -> Measurement:
    """Return the measurement in a baseline file.

    Raises:
        UserError: the file is missing, damaged or no baseline; `evaluate --save-baseline` writes one.
    """
    remedy = "write one with --save-baseline"
    try:
        content = read_document(path, MAX_BASELINE_BYTES)
        values = parse_json(content)  # with its limits
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"it is not a baseline of format {FORMAT}")
        return _ADAPTER.validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:100]
        problem = f"{where}: {first['msg']}"
    except OSError as error:
        problem = error.strerror or one_line(error)
    except (ValueError, RecursionError) as error:
        problem = one_line(error)
    raise UserError(f"--baseline {path}: cannot be used: {problem}; {remedy}")


def check_shared(before: Measurement, images: Sequence[LabeledImage], baseline: str, folder: str) -> None:
    """Check that most images of a baseline are in a folder, with any label.

    Raises:
        UserError: they are not, so a model could be worse without being compared in pairs.
    """
    shared = len(before.images.keys() & {each.sha256 for each in images})
    if shared < MIN_SHARED * len(before.images):
        raise UserError(
            f"--must-hold: {shared:,} of the {len(before.images):,} images of --baseline {baseline} are in "
            f"--data {folder}, and at least half are needed; name the folder of the baseline, or write a "
            "baseline of these images with the model that it is for: --save-baseline FILE"
        )


def is_baseline(path: Path) -> bool:
    """Return whether a file is a baseline, or empty."""
    try:
        read_baseline(path)
    except UserError:
        return path.is_file() and not path.stat().st_size
    return True


@plain_dataclass(frozen=True)
class Finding:
    """One property of a model in comparison with the baseline."""

    name: str  # accuracy, size, or speed at a batch size
    verdict: Literal["worse", "not worse", "not compared"]
    text: str


def compare(before: Measurement, now: Measurement) -> list[Finding]:
    """Compare a measurement with the baseline."""
    findings = [_compare_accuracy(before, now), _compare_size(before, now)]
    if before.speed.machine != now.speed.machine:
        names = ("CPU", "number of cores", "version of ONNX Runtime")
        pairs = zip(names, before.speed.machine, now.speed.machine, strict=True)
        other = ", ".join(f"{name} {old!r} -> {new!r}" for name, old, new in pairs if old != new)
        text = f"speed is compared on equal machines alone; of the baseline's differ: {other}"
        return [*findings, Finding("speed", "not compared", text)]
    for size in (1, 64):
        one, other_rate = (getattr(each.speed, f"batch_{size}") for each in (before, now))
        findings.append(_compare_speed(size, one, other_rate))
    return findings


def _compare_accuracy(before: Measurement, now: Measurement) -> Finding:
    """Compare in pairs the images that both have, or else the two accuracies."""
    shared = [
        key
        for key, each in now.images.items()
        if key in before.images and before.images[key].label == each.label
    ]
    if len(shared) >= MIN_SHARED * len(before.images):
        lost = sum(before.images[key].correct and not now.images[key].correct for key in shared)
        gained = sum(now.images[key].correct and not before.images[key].correct for key in shared)
        p = mcnemar_p(lost, gained)
        used = f"{len(shared):,} images" if len(shared) > 1 else "1 image"
        others = (
            ""
            if len(shared) == len(before.images) == len(now.images)
            else f"; {_describe_others(before, now)}"
        )
        text = (
            f"of {used} of the baseline, {lost:,} are misread that were correct, and {gained:,} are correct "
            f"that were misread (exact McNemar test, one-sided: p = {p:.2g}, alpha = {ALPHA:g}){others}"
        )
    else:
        p = fisher_p(before.num_correct, len(before.images), now.num_correct, len(now.images))
        text = (
            f"accuracy was {before.accuracy:.2%} and is {now.accuracy:.2%} (Fisher's exact test of two "
            f"proportions, one-sided: p = {p:.2g}, alpha = {ALPHA:g}, as the images are others: "
            f"{_describe_others(before, now)})"
        )
    return Finding("accuracy", "worse" if p <= ALPHA else "not worse", text)


def _describe_others(before: Measurement, now: Measurement) -> str:
    """Return how the images differ from those of the baseline."""
    common = before.images.keys() & now.images.keys()
    relabeled = sum(before.images[key].label != now.images[key].label for key in common)
    counts = {
        "missing": len(before.images) - len(common),
        "new": len(now.images) - len(common),
        "with another label": relabeled,
    }
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count) + " since the baseline"


def _compare_size(before: Measurement, now: Measurement) -> Finding:
    growth = now.num_bytes / before.num_bytes - 1
    sizes = f"the file has {now.num_bytes:,} bytes, and had {before.num_bytes:,}"
    text = f"{sizes} ({growth:+.1%}; limit +{MAX_GROWTH:.0%})"
    return Finding("size", "worse" if growth > MAX_GROWTH else "not worse", text)


def _compare_speed(size: int, before: Rate, now: Rate) -> Finding:
    growth, limit = now.cost / before.cost - 1, slowdown_limit(before, now)
    text = (
        f"an image in a batch of {size} costs {growth:+.0%} processor time, relative to a reference workload "
        f"(limit +{limit:.0%}, beyond what repeats vary)"
    )
    return Finding(f"speed, batch {size}", "worse" if growth > limit else "not worse", text)


def to_json(measured: Measurement, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the values of `evaluate --json`."""
    low, high = measured.accuracy_interval
    rates: Mapping[str, Rate] = {"1": measured.speed.batch_1, "64": measured.speed.batch_64}
    return {
        "images": len(measured.images),
        "correct": measured.num_correct,
        "accuracy": measured.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "bytes": measured.num_bytes,
        "images_per_second": {name: rate.images_per_second for name, rate in rates.items()},
        "findings": [vars(each) for each in findings],
    }
