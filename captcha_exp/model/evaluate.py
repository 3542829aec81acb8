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
from captcha_exp.model.networks import Recognizer
from captcha_exp.model.weights import load_weights
from captcha_exp.runs import check_file_unchanged
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.console import Display


@dataclass(frozen=True)
class Misread:
    """A picture that was read wrong."""

    index: int  # its number in the dataset
    image: str  # its file, or its number where it was drawn
    label: str
    predicted: str
    confidence: float  # of the whole text


@dataclass(frozen=True)
class Evaluation:
    """What a model read on N pictures, and what stands there."""

    loss: float  # mean over the pictures
    predicted: npt.NDArray[np.int64]  # (N, T) class ids
    targets: npt.NDArray[np.int64]  # (N, T) class ids
    confidences: npt.NDArray[np.float32]  # (N, T) probability that the head gives to what it read
    indices: npt.NDArray[np.int64]  # (N,) numbers of the pictures in the dataset

    @property
    def num_correct(self) -> int:
        """Pictures whose whole label is right."""
        return int((self.predicted == self.targets).all(axis=1).sum())

    @property
    def accuracy(self) -> float:
        """Share of pictures whose whole label is right."""
        return self.num_correct / len(self.indices)

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return wilson_interval(self.num_correct, len(self.indices))

    @property
    def char_accuracy(self) -> float:
        """Share of characters that are right."""
        return float((self.predicted == self.targets).mean())

    def accuracy_by_position(self) -> list[float]:
        """Share of right characters at each of the T positions."""
        return [float(share) for share in (self.predicted == self.targets).mean(axis=0)]

    def accuracy_by_character(self, alphabet: Alphabet) -> dict[str, float | None]:
        """Share of right readings of each character; None for one that does not occur."""
        confusion = self.confusion_matrix(len(alphabet))
        occurs = confusion.sum(axis=1)
        return {
            character: float(confusion[k, k] / occurs[k]) if occurs[k] else None
            for k, character in enumerate(alphabet.characters)
        }

    def confusion_matrix(self, num_classes: int) -> npt.NDArray[np.int64]:
        """(K, K) counts: row is what stands there, column what was read."""
        counts = np.zeros((num_classes, num_classes), np.int64)
        np.add.at(counts, (self.targets.ravel(), self.predicted.ravel()), 1)
        return counts

    def confused_pairs(self, alphabet: Alphabet) -> list[tuple[str, str, int]]:
        """(stands there, was read, how often) of all errors, the most frequent first."""
        wrong = self.predicted != self.targets
        pairs = Counter(zip(self.targets[wrong].tolist(), self.predicted[wrong].tolist(), strict=True))
        named = [(alphabet.characters[t], alphabet.characters[p], n) for (t, p), n in pairs.items()]
        return sorted(named, key=lambda item: (-item[2], item[0], item[1]))

    def misreads(self, data: Dataset) -> list[Misread]:
        """Every picture that was read wrong, the one that the head was surest of first."""
        alphabet = data.alphabet
        wrong = np.flatnonzero((self.predicted != self.targets).any(axis=1))
        sure = self.confidences.astype(np.float64).prod(axis=1)
        return [
            Misread(
                index=int(self.indices[n]),
                image=data.image_name(int(self.indices[n])),
                label=alphabet.decode(self.targets[n]),
                predicted=alphabet.decode(self.predicted[n]),
                confidence=float(sure[n]),
            )
            for n in wrong[np.argsort(-sure[wrong], kind="stable")]
        ]

    def chance_char_accuracy(self) -> float:
        """What always reading the most frequent character of each position would reach."""
        length = self.targets.shape[1]
        return float(
            np.mean([np.bincount(self.targets[:, t]).max() for t in range(length)]) / len(self.indices)
        )

    def metrics(self, prefix: str) -> dict[str, float]:
        """The figures that are logged."""
        return {
            f"{prefix}/loss": self.loss,
            f"{prefix}/accuracy": self.accuracy,
            f"{prefix}/char_accuracy": self.char_accuracy,
        }

    def to_json(self, data: Dataset) -> dict[str, Any]:
        """Everything, as JSON values."""
        alphabet = data.alphabet
        low, high = self.accuracy_interval
        return {
            "images": len(self.indices),
            "correct": self.num_correct,
            "accuracy": self.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "char_accuracy": self.char_accuracy,
            "loss": self.loss,
            "by_position": self.accuracy_by_position(),
            "by_character": self.accuracy_by_character(alphabet),
            "confusions": [
                {"label": label, "read": read, "count": count}
                for label, read, count in self.confused_pairs(alphabet)[:20]
            ],
            "errors": [asdict(error) for error in self.misreads(data)],
        }


def wilson_interval(num_correct: int, num_total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """(low, high) of the score interval for a share; z is the normal quantile of 97.5 %.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22
    (1927).
    """
    share = num_correct / num_total
    middle = share + z * z / (2 * num_total)
    spread = z * math.sqrt(share * (1 - share) / num_total + z * z / (4 * num_total * num_total))
    scale = 1 + z * z / num_total
    # The exact bounds at the ends are 0 and 1; rounding must not leave them.
    low = 0.0 if num_correct == 0 else (middle - spread) / scale
    high = 1.0 if num_correct == num_total else (middle + spread) / scale
    return low, high


class Predictions(NamedTuple):
    """What a model read, on the device, with one tensor for each batch."""

    loss: Tensor  # () sum over the pictures
    predicted: list[Tensor]  # (B, T) class ids
    targets: list[Tensor]  # (B, T) class ids
    confidences: list[Tensor]  # (B, T)
    indices: list[Tensor]  # (B,)


@torch.inference_mode()
def evaluate(
    model: Recognizer, split: Split, config: Config, after_batch: Callable[[], None] = lambda: None
) -> Evaluation:
    """What the model reads on a whole split, in evaluation mode; the model's mode is as it was afterwards.

    `between` is called after each batch.
    """
    found = predict_split(model, split, config, after_batch)
    return Evaluation(
        loss=float(found.loss) / len(split),
        predicted=torch.cat(found.predicted).cpu().numpy(),
        targets=torch.cat(found.targets).cpu().numpy(),
        confidences=torch.cat(found.confidences).cpu().numpy(),
        indices=torch.cat(found.indices).cpu().numpy(),
    )


@torch.inference_mode()
def predict_split(
    model: Recognizer, split: Split, config: Config, after_batch: Callable[[], None] = lambda: None
) -> Predictions:
    """What the model reads on a whole split, in evaluation mode; the model's mode is as it was afterwards.

    Reads no tensor on the host, so that it can be traced.
    """
    was_training = model.training
    model.eval()
    loss = torch.zeros(
        (), dtype=torch.float64 if split.device.type != "mps" else torch.float32, device=split.device
    )
    found = Predictions(loss, [], [], [], [])
    for batch in split.batches(config.train.eval_batch_size):
        with devices.autocast(config, split.device):
            logits = model(batch.images)
        loss += model.head.loss(logits.float(), batch.targets) * len(batch.indices)
        ids, confidence = model.head.decode(logits.float())
        found.predicted.append(ids)
        found.confidences.append(confidence)
        found.targets.append(batch.targets)
        found.indices.append(batch.indices)
        after_batch()
    model.train(was_training)
    return found


def evaluate_run(
    run_dir: Path, split: str, display: Display, device_name: str = "auto"
) -> tuple[Evaluation, Dataset]:
    """What a finished run's best weights read on one of its splits, on this machine; and its pictures.

    Raises:
        UserError: the run has no weights, or they are no longer those that it ended with.
    """
    weights = run_dir / "model.safetensors"
    check_file_unchanged(run_dir, weights.name)
    config = load(run_dir / "config.yaml")
    # Another machine may lack the device that the run was trained on; reading needs any.
    config = devices.for_inference(config, device_name, display)
    device = devices.setup_device(config)
    model, _ = load_weights(weights, device)
    outline = dataset.inspect_dataset(config, display)
    recorded = json.loads((run_dir / "dataset.json").read_text(encoding="utf-8"))
    data = dataset.load_or_build(outline, config, display)
    if data.manifest["images_sha256"] != recorded["images_sha256"]:
        display.warn(
            "the pictures are not those of the run: "
            f"{_first_difference(recorded['provenance'], outline.provenance)}"
        )
    chosen = data.split(split, device, config.device.preload_limit_mib)
    return evaluate(model, chosen, config), data


def _first_difference(then: Any, now: Any, key: str = "") -> str:
    """The first thing that two descriptions do not have in common."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for name in (*then, *now):
            if then.get(name) != now.get(name):
                return _first_difference(then.get(name), now.get(name), f"{key}.{name}" if key else name)
        return "the same question gave other bytes"
    return f"{key} was {then!r} and is {now!r}"
