"""The heads: what becomes of features, and all that depends on the encoding of labels.

Axes: B batch, D features, S columns of the feature map, T positions in the longest label, K characters of the
alphabet.

A head maps features (B, D, S) to logits, and owns the loss, the loss at chance, and decoding. Labels are
(B, T) class ids, with END after the last character. To add a head: add a class here, its name in
config/schema.py, and a case in `build_head`.
"""

import logging
import math
from typing import NamedTuple, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captcha_exp.config import CaptchaConfig, Config, HeadName
from captcha_exp.data.alphabet import END
from captcha_exp.errors import UserError
from captcha_exp.model import ctc

logger = logging.getLogger(__name__)

CHANCE_SAMPLE = 1000  # labels for the loss at chance
MIN_PROBABILITY = 1e-3
"""of a character in a log likelihood: below, it only says that the network has not seen such a case"""
NO_CLASS = -100  # at a position without a loss


class Decoded(NamedTuple):
    """The predicted texts of a batch."""

    ids: Tensor  # (B, T) class ids, END after the last character
    confidences: Tensor  # (B, T) probability of each character; 1 after the last
    text_confidence: Tensor  # (B,) probability of the whole text


class Head(nn.Module):
    """The interface of a head."""

    def loss(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the () mean loss over the batch of fp32 logits for labels (B, T)."""
        raise NotImplementedError

    def loss_at_chance(self, targets: Tensor, /) -> float:
        """Return the loss of equal logits for all classes, for labels like these (N, T)."""
        raise NotImplementedError

    def decode(self, logits: Tensor) -> Decoded:
        """Return the texts that fp32 logits predict."""
        raise NotImplementedError

    def log_likelihood(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return (B,) log probabilities of labels (B, T), given fp32 logits.

        Args:
            logits: The output of the head.
            targets: The labels.
            label_smoothing: That of the training, whose effect on the probabilities is taken back.
        """
        raise NotImplementedError


def _decode_positions(logits: Tensor) -> Decoded:
    """Return the most likely class of each position of logits (B, T, K)."""
    confidences, ids = logits.softmax(dim=-1).max(dim=-1)
    return Decoded(ids, confidences, confidences.prod(dim=1))


def _log_likelihood(logits: Tensor, classes: Tensor, label_smoothing: float) -> Tensor:
    """Return (B,) log probabilities of classes (B, T), NO_CLASS where there is none, for logits (B, T, K).

    A network that is trained with label smoothing s learns (1 - s) p + s / K instead of p.
    """
    learned, num_classes = logits.softmax(dim=2), logits.shape[2]
    probabilities = (learned - label_smoothing / num_classes) / (1 - label_smoothing)
    chosen = probabilities.gather(2, classes.clamp(min=0)[..., None])[..., 0]
    return torch.where(classes >= 0, chosen.clamp(min=MIN_PROBABILITY).log(), 0.0).sum(dim=1)


class PositionHead(Head):
    """Attention pooling over the columns for each position, then a classifier shared by all.

    The attention is the sum of a learned bias, the usual column of a position, and a score of the features.
    Sharing the classifier lets all positions learn from every character. For labels of one length.
    """

    def __init__(self, num_features: int, num_columns: int, num_positions: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pos_bias = nn.Parameter(torch.zeros(num_positions, num_columns))
        # No bias: the softmax would cancel it.
        self.attn_score = nn.Conv1d(num_features, num_positions, 1, bias=False)
        self.classifier = nn.Linear(num_features, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, T, K)."""
        columns = features.mT  # (B, S, D)
        scores = F.linear(
            columns, self.attn_score.weight[..., 0]
        )  # in the memory format of the products below
        attention = (scores.mT + self.pos_bias).softmax(dim=-1)  # (B, T, S)
        logits: Tensor = self.classifier(attention @ columns)
        return logits

    def loss(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=label_smoothing)

    def loss_at_chance(self, _targets: Tensor) -> float:
        return math.log(self.num_classes)

    def decode(self, logits: Tensor) -> Decoded:
        return _decode_positions(logits)

    def log_likelihood(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return _log_likelihood(logits, targets, label_smoothing)


class EndClassHead(PositionHead):
    """A position head with one more class, the end of the label, for labels of different lengths.

    The probability of a text is the product of those of its characters and of the end after them, which the
    longest labels do not have: the probabilities of all texts sum to 1. The loss of an image is divided by T,
    not by the length of its label: that of a batch is then the mean of those of its micro-batches.
    """

    def __init__(
        self, num_features: int, num_columns: int, num_positions: int, num_characters: int, min_length: int
    ) -> None:
        super().__init__(num_features, num_columns, num_positions, num_characters + 1)  # the end is the last
        self.min_length = min_length

    def _classes(self, targets: Tensor) -> Tensor:
        """Return labels with the class of the end after the last character, and NO_CLASS after it."""
        is_end = targets == END
        is_first = is_end.cumsum(dim=1) == 1
        return torch.where(is_end, torch.where(is_first, self.num_classes - 1, NO_CLASS), targets)

    def loss(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        classes = self._classes(targets).flatten()
        total = F.cross_entropy(
            logits.flatten(0, 1), classes, label_smoothing=label_smoothing, reduction="sum"
        )
        return total / targets.numel()

    def loss_at_chance(self, targets: Tensor) -> float:
        share = float((self._classes(targets) >= 0).float().mean())
        return share * math.log(self.num_classes)

    def log_likelihood(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return _log_likelihood(logits, self._classes(targets), label_smoothing)

    def decode(self, logits: Tensor) -> Decoded:
        log_probs = logits.log_softmax(dim=2)
        best, ids = log_probs[..., :-1].max(dim=2)  # (B, T), of the characters
        length = ids.shape[1]
        # Log probability of the best text of each length 0 to T. Not cumsum, which CUDA lacks a deterministic
        # implementation of.
        sums = best @ torch.ones(length, length, device=best.device).triu()
        scores = F.pad(sums, (1, 0)) + F.pad(log_probs[..., -1], (0, 1))
        number = torch.arange(length + 1, device=logits.device)
        scores = torch.where(number >= self.min_length, scores, -torch.inf)
        text, count = scores.max(dim=1, keepdim=True)
        is_used = number[:length] < count
        return Decoded(
            torch.where(is_used, ids, END), torch.where(is_used, best.exp(), 1.0), text[:, 0].exp()
        )


class CtcHead(Head):
    """Connectionist temporal classification, for labels of different lengths: a class or none per column.

    The loss of an image is its negative log likelihood divided by T.
    """

    def __init__(
        self, num_features: int, num_columns: int, num_positions: int, num_characters: int, min_length: int
    ) -> None:
        super().__init__()
        self.num_columns, self.num_positions, self.min_length = num_columns, num_positions, min_length
        self.classifier = nn.Conv1d(num_features, num_characters + 1, 3, padding=1)  # the blank is the last

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, S, K + 1), the blank last."""
        logits: Tensor = self.classifier(features.contiguous())  # else it would copy them unseen by a trace
        return logits.mT

    def loss(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        loss = ctc.negative_log_likelihood(logits, targets).mean() / self.num_positions
        if not label_smoothing:
            return loss
        uniform = -logits.log_softmax(dim=2).mean()
        return (1 - label_smoothing) * loss + label_smoothing * uniform

    def loss_at_chance(self, targets: Tensor) -> float:
        sample = targets[:CHANCE_SAMPLE]  # the loss depends on the lengths and on repeated characters
        equal = torch.zeros(len(sample), self.num_columns, self.classifier.out_channels, device=sample.device)
        return float(self.loss(equal, sample))

    def log_likelihood(self, logits: Tensor, targets: Tensor, _label_smoothing: float = 0.0) -> Tensor:
        # Smoothing acts on columns, not on labels: its effect on their probability has no formula.
        least = self.num_positions * math.log(MIN_PROBABILITY)
        return ctc.log_likelihood(logits, targets).clamp(min=least)

    def decode(self, logits: Tensor) -> Decoded:
        alignment = ctc.decode(logits, self.min_length, self.num_positions)
        likelihood = ctc.log_likelihood(logits, alignment.ids).exp()
        return Decoded(alignment.ids, alignment.confidences, likelihood)


class GroupedSoftmaxHead(Head):
    """The article's head: a linear layer with T*K outputs, a softmax per group of K, binary cross entropy."""

    def __init__(self, num_features: int, num_columns: int, num_positions: int, num_classes: int) -> None:
        super().__init__()
        self.num_positions, self.num_classes = num_positions, num_classes
        self.linear = nn.Linear(num_features * num_columns, num_positions * num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, T, K)."""
        logits: Tensor = self.linear(features.flatten(1))
        return logits.view(-1, self.num_positions, self.num_classes)

    def loss(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        expected = (
            F.one_hot(targets, self.num_classes).to(logits.dtype) * (1 - label_smoothing)
            + label_smoothing / self.num_classes
        )
        return F.binary_cross_entropy(logits.softmax(dim=-1), expected)

    def loss_at_chance(self, _targets: Tensor) -> float:
        p = 1 / self.num_classes
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    def decode(self, logits: Tensor) -> Decoded:
        return _decode_positions(logits)

    def log_likelihood(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return _log_likelihood(logits, targets, label_smoothing)


def report_choice(requested: Config, config: Config) -> None:
    """Log which head was chosen if `auto` was requested, and for what."""
    if requested.model.head != "auto":
        return
    captcha = config.captcha
    lengths = f"{captcha.length} characters"
    if captcha.shortest_length < captcha.length:
        lengths = f"{captcha.shortest_length} to {lengths}"
    logger.info(f"model.head: {config.model.head}, chosen (labels of {lengths})")


def build_head(name: HeadName, num_features: int, num_columns: int, captcha: CaptchaConfig) -> Head:
    """Build a head for features (B, num_features, num_columns).

    Raises:
        UserError: the images are too narrow for labels of this length; the line says what to change.
    """
    length, min_length, num_classes = captcha.length, captcha.shortest_length, len(captcha.alphabet)
    match name:
        case "position":
            return PositionHead(num_features, num_columns, length, num_classes)
        case "end_class":
            return EndClassHead(num_features, num_columns, length, num_classes, min_length)
        case "ctc":
            # A character that is repeated needs a blank between, thus two columns.
            if (needed := 2 * length - 1) > num_columns:
                raise UserError(
                    f"captcha.width={captcha.width}: model.head=ctc has {num_columns} columns for it, but "
                    f"labels of {length} characters need {needed}; use a width of at least "
                    f"{-(-captcha.width * needed // num_columns)}, or model.head=end_class"
                )
            return CtcHead(num_features, num_columns, length, num_classes, min_length)
        case "grouped_softmax":
            return GroupedSoftmaxHead(num_features, num_columns, length, num_classes)
        case _:
            assert_never(name)
