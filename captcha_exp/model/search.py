"""The most likely texts of an image among those that a pattern allows, exactly. Imports no torch.

Axes: T positions in the longest label, S columns, K characters of the alphabet, Q states of a pattern.

A prefix represents all texts of the pattern that begin with it; its mass is the sum of their probabilities,
which the log probabilities of a head give exactly. The search extends the prefix with the largest mass: no
text has more than its prefixes, so those that it finds first are the most likely ones.

Source: Graves, Supervised sequence labelling with recurrent neural networks, 2012, section 7.5.1 (prefix
search decoding), here with the mass of the remaining columns computed beforehand, backward.
"""

import heapq
import itertools
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from captcha_exp.model.pattern import NO_STATE, Pattern

Floats = npt.NDArray[np.float64]
MAX_EXPANSIONS = 5000  # of prefixes; more only where the answers are arbitrary anyway


class Found(NamedTuple):
    """A text of the pattern."""

    ids: tuple[int, ...]  # class ids
    log_probability: float
    log_conditionals: tuple[float, ...]  # of each character, given those before it and the pattern


class _Prefix(NamedTuple):
    """A prefix, with the numbers that its extensions need."""

    ids: tuple[int, ...]
    state: int  # of the pattern, after the prefix
    conditionals: tuple[float, ...]
    log_mass: float
    scores: Floats  # specific to the head


class _Scorer(Protocol):
    """The log probabilities of an image, for a pattern."""

    def root(self) -> _Prefix:
        """Return the empty prefix, whose mass is that of the pattern."""

    def log_text(self, prefix: _Prefix) -> float:
        """Return the log probability of the text that ends after a prefix."""

    def log_masses(self, prefix: _Prefix) -> Floats:
        """Return (K,) the log mass of the prefix with each character added."""

    def extend_scores(self, prefix: _Prefix, character: int) -> Floats:
        """Return the scores of the prefix with a character added."""


def find_texts(scorer: _Scorer, pattern: Pattern, top: int) -> tuple[list[Found], float]:
    """Return the most likely texts of a pattern, at most `top`, and the log probability of all of them."""
    root, order = scorer.root(), itertools.count()
    heap: list[tuple[float, int, Found | tuple[_Prefix, int]]] = []
    found: list[Found] = []

    def expand(prefix: _Prefix) -> None:
        if (log_text := scorer.log_text(prefix)) > -np.inf:
            heapq.heappush(heap, (-log_text, next(order), Found(prefix.ids, log_text, prefix.conditionals)))
        masses = scorer.log_masses(prefix)
        for character in np.flatnonzero(masses > -np.inf).tolist():
            heapq.heappush(heap, (-float(masses[character]), next(order), (prefix, character)))

    expand(root)
    expansions = 1
    while heap and len(found) < top:
        negative_mass, _, best = heapq.heappop(heap)
        if isinstance(best, Found):
            found.append(best)
        elif expansions < MAX_EXPANSIONS:
            prefix, character = best
            expand(
                _Prefix(
                    (*prefix.ids, character),
                    int(pattern.next_state[prefix.state, character]),
                    (*prefix.conditionals, min(0.0, -negative_mass - prefix.log_mass)),
                    -negative_mass,
                    scorer.extend_scores(prefix, character),
                )
            )
            expansions += 1
    return found, root.log_mass


class PositionScorer:
    """A character per position, independent of the others, and perhaps the end of the text."""

    def __init__(self, log_probs: Floats, has_end: bool, pattern: Pattern) -> None:
        """Take log probabilities (T, K), or (T, K + 1) with those of the end."""
        length = len(log_probs)
        self._log_probs = log_probs[:, :-1] if has_end else log_probs
        # The end after n characters; after the last position it needs no class.
        self._log_end = np.full(length + 1, -np.inf)
        self._log_end[length] = 0.0
        if has_end:
            self._log_end[:length] = log_probs[:, -1]
        self._pattern = pattern
        self._rest = [np.empty(0)] * (length + 1)  # (Q,) log mass of all that may follow n characters
        for n in range(length, -1, -1):
            rest = np.where(pattern.is_final, self._log_end[n], -np.inf)
            if n < length:
                following = _follow(pattern, self._rest[n + 1][:, None]) + self._log_probs[n]
                rest = np.logaddexp(rest, _log_sum(following))
            self._rest[n] = rest

    def root(self) -> _Prefix:
        return _Prefix((), 0, (), float(self._rest[0][0]), np.zeros(1))

    def log_text(self, prefix: _Prefix) -> float:
        if not self._pattern.is_final[prefix.state]:
            return -np.inf
        return float(prefix.scores[0] + self._log_end[len(prefix.ids)])

    def log_masses(self, prefix: _Prefix) -> Floats:
        n = len(prefix.ids)
        if n == len(self._log_probs):
            return np.empty(0)
        following = _follow(self._pattern, self._rest[n + 1][:, None])[prefix.state]
        masses: Floats = prefix.scores[0] + self._log_probs[n] + following
        return masses

    def extend_scores(self, prefix: _Prefix, character: int) -> Floats:
        scores: Floats = prefix.scores + self._log_probs[len(prefix.ids), character]
        return scores


class CtcScorer:
    """A class per column, or the blank: alignments, as in `model.ctc`.

    The scores of a prefix (2, S + 1): log probability that the first s columns give exactly this prefix, and
    end with its last character, or with the blank.
    """

    def __init__(self, log_probs: Floats, pattern: Pattern) -> None:
        """Take log probabilities (S, K + 1), those of the blank last."""
        self._log_probs, self._log_blank, self._pattern = log_probs[:, :-1], log_probs[:, -1], pattern
        count, num_characters = self._log_probs.shape
        # Log mass of the columns from s on, in each state after each last class: (S+1, Q, K+1).
        rest = np.full((count + 1, len(pattern.is_final), num_characters + 1), -np.inf)
        rest[count, pattern.is_final] = 0.0
        for s in range(count - 1, -1, -1):
            later = rest[s + 1]
            blank = self._log_blank[s] + later[:, -1:]  # (Q, 1)
            added = self._log_probs[s] + _follow(pattern, later[:, :-1])  # (Q, K)
            rest[s, :, -1] = np.logaddexp(blank[:, 0], _log_sum(added))
            stays = self._log_probs[s] + later[:, :-1]
            rest[s, :, :-1] = np.logaddexp(np.logaddexp(blank, stays), _log_sum_of_others(added))
        self._rest = rest

    def root(self) -> _Prefix:
        blanks = np.concatenate([[0.0], np.cumsum(self._log_blank)])
        scores = np.stack([np.full_like(blanks, -np.inf), blanks])
        return _Prefix((), 0, (), float(self._rest[0, 0, -1]), scores)

    def log_text(self, prefix: _Prefix) -> float:
        if not self._pattern.is_final[prefix.state]:
            return -np.inf
        return float(np.logaddexp(*prefix.scores[:, -1]))

    def log_masses(self, prefix: _Prefix) -> Floats:
        following = _follow(self._pattern, self._rest[1:, :, :-1], prefix.state)  # (S, K)
        entered = np.logaddexp(*prefix.scores[:, :-1])[:, None] + self._log_probs + following
        if prefix.ids:  # the same character once more needs a blank before it
            last = prefix.ids[-1]
            entered[:, last] = prefix.scores[1, :-1] + self._log_probs[:, last] + following[:, last]
        return _log_sum(entered.T)

    def extend_scores(self, prefix: _Prefix, character: int) -> Floats:
        is_repeated = prefix.ids[-1:] == (character,)
        before = prefix.scores[1] if is_repeated else np.logaddexp(*prefix.scores)
        scores = np.full_like(prefix.scores, -np.inf)
        emitted = self._log_probs[:, character]
        for s in range(len(emitted)):
            scores[0, s + 1] = emitted[s] + np.logaddexp(scores[0, s], before[s])
            scores[1, s + 1] = self._log_blank[s] + np.logaddexp(scores[0, s], scores[1, s])
        return scores


def _follow(pattern: Pattern, values: Floats, state: int | None = None) -> Floats:
    """Return values (..., Q, K) of the states that follow each state (..., Q, K), or the one named (..., K).

    They are -inf where a character leaves the pattern.
    """
    next_state = pattern.next_state if state is None else pattern.next_state[state]
    characters = np.arange(values.shape[-1]) if values.shape[-1] > 1 else 0
    found: Floats = np.where(next_state == NO_STATE, -np.inf, values[..., next_state, characters])
    return found


def _log_sum(values: Floats) -> Floats:
    """Return the logarithms of the sums over the last axis."""
    total: Floats = np.logaddexp.reduce(values, axis=-1)
    return total


def _log_sum_of_others(values: Floats) -> Floats:
    """Return for each value the logarithm of the sum over the others of its row."""
    nothing = np.full((len(values), 1), -np.inf)
    left = np.concatenate([nothing, np.logaddexp.accumulate(values, axis=1)[:, :-1]], axis=1)
    right = np.concatenate([np.logaddexp.accumulate(values[:, ::-1], axis=1)[:, -2::-1], nothing], axis=1)
    others: Floats = np.logaddexp(left, right)
    return others


def make_scorer(head: str, log_probs: npt.ArrayLike, pattern: Pattern) -> _Scorer:
    """Return the scorer of a head for the log probabilities (T or S, classes) of one image."""
    values = np.asarray(log_probs, np.float64)
    if head == "ctc":
        return CtcScorer(values, pattern)
    return PositionScorer(values, head == "end_class", pattern)
