"""A pass over a split -> exact match with its interval, per character, per position, confusions."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captcha_exp.config import Config, load
from captcha_exp.data import dataset
from captcha_exp.data.alphabet import Alphabet
from captcha_exp.data.dataset import Dataset, Split
from captcha_exp.model.networks import Recogniser
from captcha_exp.model.weights import load_weights
from captcha_exp.runs import check_file
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.console import Display


@dataclass(frozen=True)
class Error:
    """A picture that was read wrong."""

    row: int  # its number in the dataset
    picture: str  # its file, or its number where it was drawn
    label: str
    read: str
    confidence: float  # of the whole text


@dataclass(frozen=True)
class Evaluation:
    """What a model read on N pictures, and what stands there."""

    loss: float  # mean over the pictures
    predicted: npt.NDArray[np.int64]  # (N, T) class ids
    targets: npt.NDArray[np.int64]  # (N, T) class ids
    confidences: npt.NDArray[np.float32]  # (N, T) probability that the head gives to what it read
    rows: npt.NDArray[np.int64]  # (N,) numbers of the pictures in the dataset

    @property
    def right(self) -> int:
        """Pictures whose whole label is right."""
        return int((self.predicted == self.targets).all(axis=1).sum())

    @property
    def accuracy(self) -> float:
        """Share of pictures whose whole label is right."""
        return self.right / len(self.rows)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return wilson(self.right, len(self.rows))

    @property
    def char_accuracy(self) -> float:
        """Share of characters that are right."""
        return float((self.predicted == self.targets).mean())

    def by_position(self) -> list[float]:
        """Share of right characters at each of the T positions."""
        return [float(share) for share in (self.predicted == self.targets).mean(axis=0)]

    def by_character(self, alphabet: Alphabet) -> dict[str, float | None]:
        """Share of right readings of each character; None for one that does not occur."""
        confusion = self.confusion(len(alphabet))
        occurs = confusion.sum(axis=1)
        return {
            character: float(confusion[k, k] / occurs[k]) if occurs[k] else None
            for k, character in enumerate(alphabet.characters)
        }

    def confusion(self, classes: int) -> npt.NDArray[np.int64]:
        """(K, K) counts: row is what stands there, column what was read."""
        counts = np.zeros((classes, classes), np.int64)
        np.add.at(counts, (self.targets.ravel(), self.predicted.ravel()), 1)
        return counts

    def confusions(self, alphabet: Alphabet) -> list[tuple[str, str, int]]:
        """(stands there, was read, how often) of all errors, the most frequent first."""
        wrong = self.predicted != self.targets
        pairs = Counter(zip(self.targets[wrong].tolist(), self.predicted[wrong].tolist(), strict=True))
        named = [(alphabet.characters[t], alphabet.characters[p], n) for (t, p), n in pairs.items()]
        return sorted(named, key=lambda item: (-item[2], item[0], item[1]))

    def errors(self, data: Dataset) -> list[Error]:
        """Every picture that was read wrong, the one that the head was surest of first."""
        alphabet = data.alphabet
        wrong = np.flatnonzero((self.predicted != self.targets).any(axis=1))
        sure = self.confidences.astype(np.float64).prod(axis=1)
        return [
            Error(
                row=int(self.rows[n]),
                picture=data.name(int(self.rows[n])),
                label=alphabet.decode(self.targets[n]),
                read=alphabet.decode(self.predicted[n]),
                confidence=float(sure[n]),
            )
            for n in wrong[np.argsort(-sure[wrong], kind="stable")]
        ]

    def chance_char_accuracy(self) -> float:
        """What always reading the most frequent character of each position would reach."""
        length = self.targets.shape[1]
        return float(np.mean([np.bincount(self.targets[:, t]).max() for t in range(length)]) / len(self.rows))

    def metrics(self, prefix: str) -> dict[str, float]:
        """The figures that are logged."""
        return {
            f"{prefix}/loss": self.loss,
            f"{prefix}/accuracy": self.accuracy,
            f"{prefix}/char_accuracy": self.char_accuracy,
        }

    def summary(self, data: Dataset) -> dict[str, Any]:
        """Everything, as JSON values."""
        alphabet = data.alphabet
        low, high = self.interval
        return {
            "pictures": len(self.rows),
            "right": self.right,
            "accuracy": self.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "char_accuracy": self.char_accuracy,
            "loss": self.loss,
            "by_position": self.by_position(),
            "by_character": self.by_character(alphabet),
            "confusions": [
                {"label": label, "read": read, "count": count}
                for label, read, count in self.confusions(alphabet)[:20]
            ],
            "errors": [asdict(error) for error in self.errors(data)],
        }


def wilson(right: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """(low, high) of the score interval for a share; z is the normal quantile of 97.5 %.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22
    (1927).
    """
    share = right / total
    middle = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # The exact bounds at the ends are 0 and 1; rounding must not leave them.
    low = 0.0 if right == 0 else (middle - spread) / scale
    high = 1.0 if right == total else (middle + spread) / scale
    return low, high


class Read(NamedTuple):
    """What a model read, on the device, with one tensor for each batch."""

    loss: Tensor  # () sum over the pictures
    predicted: list[Tensor]  # (B, T) class ids
    targets: list[Tensor]  # (B, T) class ids
    confidences: list[Tensor]  # (B, T)
    rows: list[Tensor]  # (B,)


@torch.inference_mode()
def evaluate(
    model: Recogniser, split: Split, config: Config, between: Callable[[], None] = lambda: None
) -> Evaluation:
    """What the model reads on a whole split, in evaluation mode; the model's mode is as it was afterwards.

    `between` is called after each batch.
    """
    found = read(model, split, config, between)
    return Evaluation(
        loss=float(found.loss) / len(split),
        predicted=torch.cat(found.predicted).cpu().numpy(),
        targets=torch.cat(found.targets).cpu().numpy(),
        confidences=torch.cat(found.confidences).cpu().numpy(),
        rows=torch.cat(found.rows).cpu().numpy(),
    )


@torch.inference_mode()
def read(model: Recogniser, split: Split, config: Config, between: Callable[[], None] = lambda: None) -> Read:
    """What the model reads on a whole split, in evaluation mode; the model's mode is as it was afterwards.

    Reads no tensor on the host, so that it can be traced.
    """
    was_training = model.training
    model.eval()
    loss = torch.zeros(
        (), dtype=torch.float64 if split.device.type != "mps" else torch.float32, device=split.device
    )
    found = Read(loss, [], [], [], [])
    for batch in split.batches(config.train.evaluation_batch_size):
        with devices.autocast(config, split.device):
            logits = model(batch.images)
        loss += model.head.loss(logits.float(), batch.targets) * len(batch.rows)
        ids, confidence = model.head.decode(logits.float())
        found.predicted.append(ids)
        found.confidences.append(confidence)
        found.targets.append(batch.targets)
        found.rows.append(batch.rows)
        between()
    model.train(was_training)
    return found


def evaluate_run(
    folder: Path, split: str, display: Display, device_name: str = "auto"
) -> tuple[Evaluation, Dataset]:
    """What a finished run's best weights read on one of its splits, on this machine; and its pictures.

    Raises:
        UserError: the run has no weights, or they are no longer those that it ended with.
    """
    weights = folder / "model.safetensors"
    check_file(folder, weights.name)
    config = load(folder / "config.yaml")
    # Another machine may lack the device that the run was trained on; reading needs any.
    config = devices.to_read(config, device_name, display)
    device = devices.set_up(config)
    model, _ = load_weights(weights, device)
    outline = dataset.outline(config, display)
    recorded = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    data = dataset.prepare(outline, config, display)
    if data.manifest["images_sha256"] != recorded["images_sha256"]:
        display.warn(
            f"the pictures are not those of the run: {_difference(recorded['made_from'], outline.made_from)}"
        )
    chosen = data.split(split, device, config.device.resident_limit_mib)
    return evaluate(model, chosen, config), data


def _difference(then: Any, now: Any, key: str = "") -> str:
    """The first thing that two descriptions do not have in common."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for name in (*then, *now):
            if then.get(name) != now.get(name):
                return _difference(then.get(name), now.get(name), f"{key}.{name}" if key else name)
        return "the same question gave other bytes"
    return f"{key} was {then!r} and is {now!r}"
