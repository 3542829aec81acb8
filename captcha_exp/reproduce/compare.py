"""Two runs' results, side by side: the first difference, and how far apart they are."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from captcha_exp.reproduce.reference import ABSENT, Outcome

Verdict: TypeAlias = Literal["identical", "equivalent", "different"]

ITS_OWN = ("memory/", "speed/")  # metrics of the process and of the moment; every run has others

TOLERANCES = {
    "pictures": "the same, on the same sides of the split: other ones are another experiment",
    "train/loss of epoch 1": "within 1 %: the same weights, order and steps, rounded otherwise, are still "
    "together; another seed, rate or augmentation mostly is not",
    "test/accuracy": "within the run's own 95 % interval: what chance alone could have given it",
}
"""what an equivalent run must be"""
LOSS_SHARE = 0.01


@dataclass(frozen=True)
class Difference:
    """One place where two runs are not the same."""

    where: str
    """a metric, pictures, split, predictions or weights"""
    epoch: int | None
    then: Any
    now: Any

    def words(self) -> str:
        """As a sentence has it."""
        if self.epoch is None:
            return f"{self.where} {_short(self.then)} -> {_short(self.now)}"
        return f"epoch {self.epoch}, {self.where} {_short(self.then)} -> {_short(self.now)}"

    def to_json(self) -> dict[str, Any]:
        """As reproduction.json has it."""
        return {"where": self.where, "epoch": self.epoch, "then": _plain(self.then), "now": _plain(self.now)}


def differences(then: Outcome, now: Outcome) -> list[Difference]:
    """Every difference of the results, in the order in which a training meets them."""
    return [
        *_of_pictures(then, now),
        *_of_epochs(then, now),
        *_of_readings(then, now),
        *_of_weights(then, now),
    ]


def same_pictures(then: Outcome, now: Outcome) -> bool:
    """Whether pictures, labels and splits are the same."""
    return next(_of_pictures(then, now), None) is None


def verdict(then: Outcome, now: Outcome) -> Verdict:
    """How alike two runs are; equivalent is what TOLERANCES says."""
    if not differences(then, now):
        return "identical"
    first, again = (outcome.epochs.get(1, {}).get("train/loss", math.nan) for outcome in (then, now))
    last, today = (outcome.epochs[max(outcome.epochs)] for outcome in (then, now))
    low, high = (last.get(f"test/accuracy_{end}", math.nan) for end in ("low", "high"))
    alike = (
        same_pictures(then, now)
        and abs(again - first) <= LOSS_SHARE * abs(first)
        and low <= today.get("test/accuracy", math.nan) <= high
    )
    return "equivalent" if alike else "different"


def _of_pictures(then: Outcome, now: Outcome) -> Iterator[Difference]:
    for key, where in (("labels_sha256", "labels (SHA-256)"), ("splits", "split")):
        if then.dataset[key] != now.dataset[key]:
            yield Difference(where, None, then.dataset[key], now.dataset[key])
    # The hash is of the whole cache file, with what was refused and noted; the files' own say it as well.
    files = [outcome.dataset.get("files") for outcome in (then, now)]
    by_files = bool(files[0]) and files[0] == files[1] and _origin(then) == _origin(now)
    if then.dataset["images_sha256"] != now.dataset["images_sha256"] and not by_files:
        pair = then.dataset["images_sha256"], now.dataset["images_sha256"]
        yield Difference("pictures (SHA-256)", None, *pair)


def _origin(outcome: Outcome) -> list[Any]:
    """What made an array of numbers of the files."""
    made_from = outcome.dataset.get("made_from")
    if not isinstance(made_from, dict):
        return []
    return [made_from.get(key) for key in ("captcha", "format", "origin")]


def _of_epochs(then: Outcome, now: Outcome) -> Iterator[Difference]:
    for epoch in sorted({*then.epochs, *now.epochs}):
        first, second = _results(then.epochs.get(epoch, {})), _results(now.epochs.get(epoch, {}))
        for key in dict.fromkeys([*first, *second]):
            pair = first.get(key, ABSENT), second.get(key, ABSENT)
            if repr(pair[0]) != repr(pair[1]):  # to the bit, and nan is as good as nan
                yield Difference(key, epoch, *pair)


def _results(metrics: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if not key.startswith(ITS_OWN)}


def _of_readings(then: Outcome, now: Outcome) -> Iterator[Difference]:
    if then.tested != now.tested:
        yield Difference("pictures of the test split", None, then.tested, now.tested)
    for picture in dict.fromkeys([*then.readings, *now.readings]):
        pair = then.readings.get(picture), now.readings.get(picture)
        if pair[0] != pair[1]:
            read = [reading[1] if reading else "read right" for reading in pair]
            yield Difference(f"prediction of picture {picture}", None, *read)


def _of_weights(then: Outcome, now: Outcome) -> Iterator[Difference]:
    if then.weights_sha256 != now.weights_sha256:
        yield Difference("weights (SHA-256)", None, then.weights_sha256, now.weights_sha256)


def _plain(value: Any) -> Any:
    """What JSON can write."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
