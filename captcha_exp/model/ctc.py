"""Connectionist temporal classification: loss with its gradient, likelihood of texts, and decoding.

Axes: B batch, S columns, C classes (the characters and, as the last one, the blank), T positions in the
longest label, N = 2T + 1 states of a label: its characters with a blank before, between and after them.
Labels are (B, T) class ids, with END after the last character.

torch's CTC is not deterministic on CUDA and cannot be traced. This one consists of operators that are: the
gradient is summed over states by a matrix product, not by atomic additions.

Source: Graves et al., Connectionist temporal classification, ICML 2006, sections 4.1 and 4.2.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from captcha_exp.data.alphabet import END

NEVER = -1e30  # log probability of what is impossible; finite, as infinities give NaN in differences


class _States(NamedTuple):
    """The states of labels."""

    classes: Tensor  # (B, N) class ids
    can_skip: Tensor  # (B, N) bool; whether the blank before this state may be left out
    is_final: Tensor  # (B, N) bool; whether an alignment may end here


def _states(targets: Tensor, blank: int) -> _States:
    size, length = targets.shape
    is_char = targets != END
    classes = torch.full((size, 2 * length + 1), blank, dtype=torch.int64, device=targets.device)
    classes[:, 1::2] = torch.where(is_char, targets, blank)
    can_skip = torch.zeros_like(classes, dtype=torch.bool)
    can_skip[:, 3::2] = (targets[:, 1:] != targets[:, :-1]) & is_char[:, 1:]
    last = 2 * is_char.sum(dim=1, keepdim=True)  # the blank after the last character
    number = torch.arange(2 * length + 1, device=targets.device)
    return _States(classes, can_skip, (number == last) | (number == last - 1))


def _shifted(scores: Tensor, steps: int) -> Tensor:
    """Return scores (B, N) moved by this number of states, later ones if positive."""
    return F.pad(scores, (steps, -steps), value=NEVER)


def _forward_scores(emitted: Tensor, states: _States) -> Tensor:
    """Return (B, S, N) log probabilities of all alignments up to a column that are in a state there."""
    number = torch.arange(emitted.shape[2], device=emitted.device)
    current = torch.where(number < 2, emitted[:, 0], NEVER)
    scores = [current]
    for column in range(1, emitted.shape[1]):
        skipped = torch.where(states.can_skip, _shifted(current, 2), NEVER)
        arrived = torch.stack([current, _shifted(current, 1), skipped]).logsumexp(dim=0)
        current = arrived + emitted[:, column]
        scores.append(current)
    return torch.stack(scores, dim=1)


def _backward_scores(emitted: Tensor, states: _States) -> Tensor:
    """Return (B, S, N) log probabilities of all ends of alignments after a column, from a state there."""
    current = torch.where(states.is_final, 0.0, torch.full_like(emitted[:, 0], NEVER))
    scores = [current]
    for column in range(emitted.shape[1] - 1, 0, -1):
        after = current + emitted[:, column]
        skipped = _shifted(torch.where(states.can_skip, after, NEVER), -2)
        current = torch.stack([after, _shifted(after, -1), skipped]).logsumexp(dim=0)
        scores.append(current)
    return torch.stack(scores[::-1], dim=1)


def _emitted(log_probs: Tensor, states: _States) -> Tensor:
    """Return (B, S, N) log probabilities of the class of each state in each column."""
    return log_probs.gather(2, states.classes[:, None].expand(-1, log_probs.shape[1], -1))


def _total(scores: Tensor, states: _States) -> Tensor:
    """Return (B,) log probabilities of labels from the scores (B, N) of the last column."""
    return torch.where(states.is_final, scores, NEVER).logsumexp(dim=1)


class _NegativeLogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, targets: Tensor) -> Tensor:
        log_probs, states = logits.log_softmax(dim=2), _states(targets, logits.shape[2] - 1)
        emitted = _emitted(log_probs, states)
        scores = _forward_scores(emitted, states)
        total = _total(scores[:, -1], states)
        ctx.save_for_backward(log_probs, targets, scores, total)
        return -total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        log_probs, targets, scores, total = ctx.saved_tensors
        states = _states(targets, log_probs.shape[2] - 1)
        after = _backward_scores(_emitted(log_probs, states), states)
        posterior = (scores + after - total[:, None, None]).exp()  # (B, S, N) of each state
        one_hot = F.one_hot(states.classes, log_probs.shape[2]).to(posterior.dtype)  # (B, N, C)
        return (log_probs.exp() - posterior @ one_hot) * gradient[:, None, None], None


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Return (B,) negative log likelihoods of labels (B, T), given logits (B, S, C)."""
    # torch has no types for apply.
    return cast(Tensor, _NegativeLogLikelihood.apply(logits, targets))  # type: ignore[no-untyped-call]


class Alignment(NamedTuple):
    """The most likely alignment of each image, and its text."""

    ids: Tensor  # (B, T) class ids, END after the last character
    confidences: Tensor  # (B, T) highest probability of a character in its columns; 1 after the last


def decode(logits: Tensor, min_length: int, length: int) -> Alignment:
    """Return the most likely alignments whose texts have `min_length` to `length` characters.

    In each column, an alignment is in a state (n, c): it has n characters so far, and its class is c. The
    next column repeats the class, or leaves it for the blank, or adds a character that differs from it.
    """
    log_probs = logits.log_softmax(dim=2)
    size, num_columns, num_classes = log_probs.shape
    blank = num_classes - 1
    device = logits.device
    scores = logits.new_full((size, length + 1, num_classes), NEVER)
    scores[:, 0, blank] = log_probs[:, 0, blank]
    scores[:, 1, :blank] = log_probs[:, 0, :blank]
    classes = torch.arange(num_classes, device=device)
    is_blank = classes == blank
    came_from = []  # per column: (B, length + 1, C) class of the column before
    for column in range(1, num_columns):
        best, best_class = scores.max(dim=2, keepdim=True)  # (B, length + 1, 1)
        is_best = classes == best_class
        second, second_class = scores.masked_fill(is_best, 2 * NEVER).max(dim=2, keepdim=True)
        # To the blank: from any class, with the same number of characters.
        # To a character: from the best class other than it, with one character less.
        other = torch.where(is_best, second, best)
        other_class = torch.where(is_best, second_class, best_class)
        added = F.pad(other, (0, 0, 1, 0), value=NEVER)[:, :-1]
        added_class = F.pad(other_class, (0, 0, 1, 0), value=blank)[:, :-1]
        moved = torch.where(is_blank, best, added)
        moved_class = torch.where(is_blank, best_class, added_class)
        has_stayed = scores >= moved
        came_from.append(torch.where(has_stayed, classes, moved_class).to(torch.int16))
        scores = torch.where(has_stayed, scores, moved) + log_probs[:, column, None]
    allowed = torch.arange(length + 1, device=device) >= min_length
    final = torch.where(allowed[:, None], scores, NEVER).flatten(1).argmax(dim=1)
    return _trace_back(final // num_classes, final % num_classes, came_from, log_probs, length)


def _trace_back(
    count: Tensor, current: Tensor, came_from: list[Tensor], log_probs: Tensor, length: int
) -> Alignment:
    """Return the alignments that end with these numbers of characters (B,) and classes (B,)."""
    size, num_columns, num_classes = log_probs.shape
    blank = num_classes - 1
    position = torch.arange(length, device=log_probs.device)
    ids = torch.full((size, length), END, dtype=torch.int64, device=log_probs.device)
    confidences = torch.zeros((size, length), dtype=log_probs.dtype, device=log_probs.device)
    is_used = position < count[:, None]
    for column in range(num_columns - 1, -1, -1):
        is_here = (position == count[:, None] - 1) & (current != blank)[:, None]
        probability = log_probs[:, column].gather(1, current[:, None]).exp()
        ids = torch.where(is_here, current[:, None], ids)
        confidences = torch.where(is_here, torch.maximum(confidences, probability), confidences)
        if column:
            rows = came_from[column - 1].flatten(1)
            before = rows.gather(1, (count * num_classes + current)[:, None])[:, 0].long()
            count = count - ((before != current) & (current != blank)).long()
            current = before
    return Alignment(ids, torch.where(is_used, confidences, 1.0))
