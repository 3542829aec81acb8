"""Connectionist temporal classification: loss with its gradient, likelihood of texts, and decoding.

Axes: B batch, S columns, C classes (the characters and, as the last one, the blank), T positions in the
longest label, N = 2T + 1 states of a label: its characters with a blank before, between and after them.
Labels are (B, T) class ids, with END after the last character.

torch's CTC is not deterministic on CUDA and cannot be traced. This one consists of operators that are: the
gradient is summed over states by a matrix product, not by atomic additions.

Source: Graves et al., Connectionist temporal classification, ICML 2006, sections 4.1 and 4.2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from captcha_exp.data.alphabet import END

NEVER = -1e30  # log probability of what is impossible; finite, as infinities give NaN in differences

Tensors: TypeAlias = tuple[Tensor, ...]
Step: TypeAlias = Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]


def _scan(step: Step, carry: Tensors, columns: Tensors) -> tuple[Tensors, Tensors]:
    """Apply a step to one column after another; return the last carry and the stacked outputs (S, B, ...).

    In an exported graph this is a loop, not a copy of the step for each column.

    Args:
        step: (carry, columns (B, ...)) -> (carry, outputs (B, ...)).
        carry: What the first step receives.
        columns: (S, B, ...) tensors.
    """
    if torch.compiler.is_exporting():
        from torch._higher_order_ops.scan import scan

        return cast(tuple[Tensors, Tensors], scan(step, carry, columns))
    outputs = []
    for number in range(columns[0].shape[0]):
        carry, output = step(carry, tuple(each[number] for each in columns))
        outputs.append(output)
    return carry, tuple(torch.stack(each) for each in zip(*outputs, strict=True))


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
    current = _first_scores(emitted[:, 0])
    scores = [current]
    for column in range(1, emitted.shape[1]):
        current = _next_scores(current, emitted[:, column], states)
        scores.append(current)
    return torch.stack(scores, dim=1)


def _first_scores(emitted: Tensor) -> Tensor:
    """Return (B, N) scores of the first column, which is in one of the first two states."""
    number = torch.arange(emitted.shape[1], device=emitted.device)
    return torch.where(number < 2, emitted, NEVER)


def _next_scores(current: Tensor, emitted: Tensor, states: _States) -> Tensor:
    """Return (B, N) scores of a column, given those of the column before it."""
    skipped = torch.where(states.can_skip, _shifted(current, 2), NEVER)
    return torch.stack([current, _shifted(current, 1), skipped]).logsumexp(dim=0) + emitted


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


def log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Return (B,) log likelihoods of labels (B, T), given logits (B, S, C), without a gradient."""
    log_probs, states = logits.log_softmax(dim=2), _states(targets, logits.shape[2] - 1)
    emitted = _emitted(log_probs, states)

    def step(scores: Tensors, columns: Tensors) -> tuple[Tensors, Tensors]:
        return (_next_scores(scores[0], columns[0], states),), ()

    (last,), _ = _scan(step, (_first_scores(emitted[:, 0]),), (emitted[:, 1:].movedim(1, 0),))
    return _total(last, states)


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
    num_classes, device = log_probs.shape[2], logits.device
    blank = num_classes - 1
    classes, number = torch.arange(num_classes, device=device), torch.arange(length + 1, device=device)
    is_blank = classes == blank
    is_first = number[:, None] == (~is_blank).long()  # no character and the blank, or one that is not
    first = torch.where(is_first, log_probs[:, :1], NEVER)  # (B, length + 1, C)

    def step(carry: Tensors, columns: Tensors) -> tuple[Tensors, Tensors]:
        (scores,), (emitted,) = carry, columns
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
        came_from = torch.where(has_stayed, classes, moved_class).to(torch.int16)
        return (torch.where(has_stayed, scores, moved) + emitted[:, None],), (came_from,)

    (scores,), (came_from,) = _scan(step, (first,), (log_probs[:, 1:].movedim(1, 0),))
    final = torch.where(number[:, None] >= min_length, scores, NEVER).flatten(1).argmax(dim=1)
    return _trace_back(final // num_classes, final % num_classes, came_from, log_probs, length)


def _trace_back(count: Tensor, last: Tensor, came_from: Tensor, log_probs: Tensor, length: int) -> Alignment:
    """Return the alignments that end with these numbers of characters (B,) and classes (B,).

    `came_from` (S - 1, B, length + 1, C) has the class of the column before.
    """
    size, _, num_classes = log_probs.shape
    blank = num_classes - 1
    position = torch.arange(length, device=log_probs.device)

    def read(carry: Tensors, emitted: Tensor) -> Tensors:
        ids, confidences, count, current = carry
        is_here = (position == count[:, None] - 1) & (current != blank)[:, None]
        probability = emitted.gather(1, current[:, None]).exp()
        confidences = torch.where(is_here, torch.maximum(confidences, probability), confidences)
        return torch.where(is_here, current[:, None], ids), confidences

    def step(carry: Tensors, columns: Tensors) -> tuple[Tensors, Tensors]:
        (*_, count, current), (emitted, rows) = carry, columns
        ids, confidences = read(carry, emitted)
        before = rows.flatten(1).gather(1, (count * num_classes + current)[:, None])[:, 0].long()
        count = count - ((before != current) & (current != blank)).long()
        return (ids, confidences, count, before), ()

    ids = torch.full((size, length), END, dtype=torch.int64, device=log_probs.device)
    confidences = torch.zeros((size, length), dtype=log_probs.dtype, device=log_probs.device)
    columns = log_probs[:, 1:].movedim(1, 0).flip(0), came_from.flip(0)
    carry, _ = _scan(step, (ids, confidences, count, last), columns)
    ids, confidences = read(carry, log_probs[:, 0])
    return Alignment(ids, torch.where(position < count[:, None], confidences, 1.0))
