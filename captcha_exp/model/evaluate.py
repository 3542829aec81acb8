"""Evaluation of a model on a split: exact match with an interval, accuracy per position, confusions."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captcha_exp.config import Config
from captcha_exp.data.alphabet import END, Alphabet
from captcha_exp.data.dataset import Dataset, Split
from captcha_exp.model.alignment import align
from captcha_exp.model.confidence import NOT_CALIBRATED, Calibration
from captcha_exp.model.networks import Recognizer
from captcha_exp.model.proportions import wilson_interval
from captcha_exp.runtime import device as devices

logger = logging.getLogger(__name__)

ANSWER_ACCURACIES = (0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


@dataclass(frozen=True)
class Misread:
    """An image whose predicted text is wrong."""

    index: int  # in the dataset
    image: str  # its file name, or its index if it was rendered
    label: str
    predicted: str
    confidence: float  # of the whole text


@dataclass(frozen=True)
class Evaluation:
    """The predictions of a model for N images, with their labels; class ids are END after a text."""

    loss: float  # mean over the images
    predicted: npt.NDArray[np.int64]  # (N, T) class ids
    targets: npt.NDArray[np.int64]  # (N, T) class ids
    confidences: npt.NDArray[np.float32]  # (N, T) probability of each predicted character
    text_confidences: npt.NDArray[np.float32]  # (N,) probability of each predicted text
    indices: npt.NDArray[np.int64]  # (N,) indices of the images in the dataset
    calibration: Calibration = field(default=NOT_CALIBRATED, kw_only=True)  # that the confidences have

    @cached_property
    def is_correct(self) -> npt.NDArray[np.bool_]:
        """(N,) whether the whole label of an image is predicted correctly."""
        found: npt.NDArray[np.bool_] = (self.predicted == self.targets).all(axis=1)
        return found

    @property
    def num_correct(self) -> int:
        """Number of images whose whole label is predicted correctly."""
        return int(self.is_correct.sum())

    @property
    def accuracy(self) -> float:
        """Fraction of images whose whole label is predicted correctly."""
        return self.num_correct / len(self.indices)

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """95% confidence interval of the accuracy."""
        return wilson_interval(self.num_correct, len(self.indices))

    @cached_property
    def char_pairs(self) -> npt.NDArray[np.int64]:
        """(2, M) class ids of the characters of labels and of predictions, END if one has none there."""
        same_length = ((self.targets == END) == (self.predicted == END)).all(axis=1)
        is_used = same_length[:, None] & (self.targets != END)
        pairs = [np.stack([self.targets[is_used], self.predicted[is_used]])]
        for row in np.flatnonzero(~same_length):
            label, predicted = (ids[row][ids[row] != END].tolist() for ids in (self.targets, self.predicted))
            pairs.append(np.array(align(label, predicted), np.int64).T)
        return np.concatenate(pairs, axis=1)

    @cached_property
    def wrong_pairs(self) -> npt.NDArray[np.int64]:
        """The pairs of characters that differ."""
        pairs = self.char_pairs
        return pairs[:, pairs[0] != pairs[1]]

    @property
    def num_chars(self) -> int:
        """Number of characters in the labels."""
        return int((self.targets != END).sum())

    @property
    def num_wrong_chars(self) -> int:
        """Number of characters that are wrong, missing or added."""
        return int(self.wrong_pairs.shape[1])

    @property
    def char_accuracy(self) -> float:
        """Fraction of characters of the labels that are predicted correctly."""
        pairs = self.char_pairs
        return int((pairs[0] == pairs[1]).sum()) / self.num_chars

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N,) numbers of characters of the labels."""
        counts: npt.NDArray[np.int64] = np.count_nonzero(self.targets != END, axis=1)
        return counts

    @property
    def has_lengths(self) -> bool:
        """Whether labels or predictions differ in length."""
        return bool((self.targets == END).any() or (self.predicted == END).any())

    @property
    def calibration_error(self) -> float:
        """Mean difference of confidence and accuracy, in ten parts of the images ordered by confidence.

        Source: Nixon et al., Measuring calibration in deep learning, CVPR workshops 2019 (adaptive bins).
        """
        errors = (self.text_confidences - self.is_correct)[np.argsort(self.text_confidences, kind="stable")]
        return sum(abs(float(part.sum())) for part in np.array_split(errors, 10)) / len(errors)

    def operating_points(self) -> list[dict[str, float]]:
        """Return coverage and accuracy for each of ANSWER_ACCURACIES that can be promised."""
        found = []
        for target in ANSWER_ACCURACIES:
            if (point := self.calibration.operating_point(target)) is None:
                continue
            is_answered = self.text_confidences >= point.threshold
            values = {"min_confidence": target, "threshold": point.threshold}
            if is_answered.any():
                values["accuracy"] = float(self.is_correct[is_answered].mean())
            found.append(
                values | {"coverage": float(is_answered.mean()), "expected_coverage": point.coverage}
            )
        return found

    def accuracy_by_position(self) -> list[float]:
        """Return the fraction of correct characters at each of the T positions, from the start."""
        return _accuracy_by_position(self.targets, self.predicted)

    def accuracy_from_end(self) -> list[float]:
        """Return the fraction of correct characters at each position, counted from the end."""
        return _accuracy_by_position(_right_aligned(self.targets), _right_aligned(self.predicted))

    def accuracy_by_length(self) -> dict[int, tuple[int, float]]:
        """Return for each length of a label the number of images, and the accuracy of whole labels."""
        lengths = self.lengths
        return {
            int(length): (int((lengths == length).sum()), float(self.is_correct[lengths == length].mean()))
            for length in np.unique(lengths)
        }

    def accuracy_by_folder(self, data: Dataset) -> dict[str, tuple[int, float]]:
        """Return for each of several folders the number of images, and the accuracy of whole labels."""
        numbers = data.folder_numbers(self.indices)
        return {
            folder["path"]: (int((numbers == n).sum()), float(self.is_correct[numbers == n].mean()))
            for n, folder in enumerate(data.manifest["folders"], 1)
            if (numbers == n).any()
        }

    def accuracy_by_character(self, alphabet: Alphabet) -> dict[str, float | None]:
        """Return the recall of each character; None for a character that does not occur."""
        label, predicted = self.char_pairs[:, self.char_pairs[0] != END]
        occurs = np.bincount(label, minlength=len(alphabet))
        correct = np.bincount(label[label == predicted], minlength=len(alphabet))
        return {
            character: float(correct[k] / occurs[k]) if occurs[k] else None
            for k, character in enumerate(alphabet.characters)
        }

    def confusion_matrix(self, classes: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return (n, n) counts of n class ids, which are sorted: rows are labels, columns predictions."""
        counts = np.zeros((len(classes), len(classes)), np.int64)
        is_counted = np.isin(self.char_pairs, classes).all(axis=0)
        pairs = np.searchsorted(classes, self.char_pairs[:, is_counted])
        np.add.at(counts, tuple(pairs), 1)
        return counts

    def most_confused_classes(self, num_classes: int, max_classes: int) -> list[int]:
        """Return the ids, sorted, of the classes that are most often misread or predicted wrongly.

        END is one of them if characters are missing or were added.
        """
        errors = np.bincount(self.wrong_pairs.ravel() - END, minlength=num_classes - END)
        first = 0 if errors[0] else 1  # END is the first
        order = first + np.argsort(-errors[first:], kind="stable")
        return sorted((order[:max_classes] + END).tolist())

    def confused_pairs(self, alphabet: Alphabet) -> list[tuple[str, str, int]]:
        """Return (label, predicted, count) of all wrong characters, the most frequent first; "" for none."""
        names = {END: "", **dict(enumerate(alphabet.characters))}
        pairs = Counter(zip(*self.wrong_pairs.tolist(), strict=True))
        named = [(names[t], names[p], n) for (t, p), n in pairs.items()]
        return sorted(named, key=lambda item: (-item[2], item[0], item[1]))

    def misreads(self, data: Dataset) -> list[Misread]:
        """Return every misread image, the one with the highest confidence first."""
        alphabet = data.alphabet
        wrong, confidences = np.flatnonzero(~self.is_correct), self.text_confidences
        return [
            Misread(
                index=int(self.indices[n]),
                image=data.image_name(int(self.indices[n])),
                label=alphabet.decode(self.targets[n]),
                predicted=alphabet.decode(self.predicted[n]),
                confidence=float(confidences[n]),
            )
            for n in wrong[np.argsort(-confidences[wrong], kind="stable")]
        ]

    def chance_char_accuracy(self) -> float:
        """Return the character accuracy of always predicting the most frequent character of each position."""
        columns = [column[column != END] for column in self.targets.T]
        most_frequent = [np.bincount(column).max() for column in columns if column.size]
        return float(sum(most_frequent) / self.num_chars)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the metrics that are logged."""
        return {
            f"{prefix}/loss": self.loss,
            f"{prefix}/accuracy": self.accuracy,
            f"{prefix}/char_accuracy": self.char_accuracy,
        }

    def to_json(self, data: Dataset) -> dict[str, Any]:
        """Return the content of test.json."""
        alphabet = data.alphabet
        low, high = self.accuracy_interval
        return {
            "images": len(self.indices),
            "correct": self.num_correct,
            "accuracy": self.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "char_accuracy": self.char_accuracy,
            "char_accuracy_at_chance": self.chance_char_accuracy(),
            "loss": self.loss,
            "calibration_error": self.calibration_error,
            "answers": self.operating_points(),
            "by_position": self.accuracy_by_position(),
            "by_position_from_end": self.accuracy_from_end(),
            "by_length": {
                str(length): {"images": count, "accuracy": accuracy}
                for length, (count, accuracy) in self.accuracy_by_length().items()
            },
            "by_folder": {
                path: {"images": count, "accuracy": accuracy}
                for path, (count, accuracy) in self.accuracy_by_folder(data).items()
            },
            "by_character": self.accuracy_by_character(alphabet),
            "confusions": [
                {"label": label, "predicted": predicted, "count": count}
                for label, predicted, count in self.confused_pairs(alphabet)[:20]
            ],
            "misreads": [asdict(misread) for misread in self.misreads(data)],
        }


def _accuracy_by_position(targets: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> list[float]:
    """Return the fraction of correct characters in each column in which labels have characters."""
    is_char = targets != END
    correct = ((targets == predicted) & is_char).sum(axis=0)
    return [float(n / total) for n, total in zip(correct, is_char.sum(axis=0), strict=True) if total]


def _right_aligned(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return texts (N, T) reversed: the last character first, END after the first."""
    length = (ids != END).sum(axis=1, keepdims=True)
    source = length - 1 - np.arange(ids.shape[1])
    return np.where(source >= 0, np.take_along_axis(ids, np.maximum(source, 0), axis=1), END)


class Predictions(NamedTuple):
    """Predictions of a model on the device, one tensor per batch; fields in the order of `Evaluation`."""

    loss: Tensor  # () sum over the images
    predicted: list[Tensor]  # (B, T) class ids
    targets: list[Tensor]  # (B, T) class ids
    confidences: list[Tensor]  # (B, T)
    text_confidences: list[Tensor]  # (B,)
    indices: list[Tensor]  # (B,)


@torch.inference_mode()
def evaluate(
    model: Recognizer, split: Split, config: Config, after_batch: Callable[[], None] = lambda: None
) -> Evaluation:
    """Evaluate the model on a whole split, in evaluation mode; its mode is restored afterwards.

    `after_batch` is called after each batch.
    """
    loss, *parts = predict_split(model, split, config, after_batch)
    arrays = (torch.cat(part).cpu().numpy() for part in parts)
    return Evaluation(float(loss) / len(split), *arrays, calibration=model.calibration)


@torch.inference_mode()
def predict_split(
    model: Recognizer, split: Split, config: Config, after_batch: Callable[[], None] = lambda: None
) -> Predictions:
    """Predict a whole split in evaluation mode; the mode of the model is restored afterwards.

    Reads no tensor on the host, and can therefore be traced.
    """
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=devices.widest_float(split.device), device=split.device)
    found = Predictions(loss, [], [], [], [], [])
    for batch in split.batches(config.train.eval_batch_size):
        with devices.autocast(config, split.device):
            logits = model(batch.images)
        loss += model.head.loss(logits.float(), batch.targets) * len(batch.indices)
        decoded = model.decode(logits.float())
        found.predicted.append(decoded.ids)
        found.confidences.append(decoded.confidences)
        found.text_confidences.append(decoded.text_confidence)
        found.targets.append(batch.targets)
        found.indices.append(batch.indices)
        after_batch()
    model.train(was_training)
    return found
