"""Answers: constraints on the texts, alternatives, and abstaining. Imports no torch."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from captcha_exp.errors import UserError
from captcha_exp.model.confidence import Calibration
from captcha_exp.model.pattern import compile_pattern
from captcha_exp.model.search import find_texts, make_scorer

MAX_ALTERNATIVES = 100
MAX_MASK = 1000  # characters


@dataclass(frozen=True)
class ReadingOptions:
    """Options of the answers; by default, every text that a model predicts is one."""

    min_confidence: float | None = None  # fraction of the answers given that have to be right
    length: int | None = None  # characters of every text
    mask: str | None = None  # of every text, as in `model.pattern`
    top: int = 1  # the most likely texts

    def __post_init__(self) -> None:
        """Check the types, which a caller in Python may mistake.

        Raises:
            TypeError: a value has the wrong type; the line names it.
        """
        kinds = {"min_confidence": int | float, "length": int, "mask": str, "top": int}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if (value is None and name != "top") or (isinstance(value, kind) and not isinstance(value, bool)):
                continue
            raise TypeError(f"{name} must be {getattr(kind, '__name__', 'a number')}, not {value!r}")

    @property
    def needs_search(self) -> bool:
        """Whether the text is not simply the one that the head decodes."""
        return self.length is not None or self.mask is not None or self.top > 1


class Alternative(NamedTuple):
    """A text that an image may have."""

    text: str
    confidence: float  # of the whole text, in [0, 1]
    confidences: tuple[float, ...]  # of each character


@dataclass(frozen=True)
class Answer:
    """The predicted text of an image."""

    text: str = ""  # empty if the model abstains
    confidence: float = 0.0  # of the whole text, in [0, 1]
    confidences: tuple[float, ...] = ()  # of each character
    abstains: bool = False
    alternatives: tuple[Alternative, ...] = ()  # the most likely texts; at least one if the model abstains

    def to_json(self) -> dict[str, Any]:
        """Return the values that `predict --json` prints for an image."""
        values: dict[str, Any] = {
            "text": self.text,
            "confidence": self.confidence,
            "confidences": list(self.confidences),
        }
        if self.abstains:
            values["abstains"] = True
        if self.alternatives:
            values["alternatives"] = [
                {"text": text, "confidence": confidence, "confidences": list(confidences)}
                for text, confidence, confidences in self.alternatives
            ]
        return values

    def to_line(self) -> str:
        """Return the text that `predict` prints after the name of an image."""
        shown = self.alternatives or [Alternative(self.text, self.confidence, self.confidences)]
        texts = "  ".join(f"{text}  {confidence:.1%}" for text, confidence, _ in shown)
        return f"abstains  ({texts})" if self.abstains else texts


class Reader:
    """Turns the probabilities of a model into answers."""

    def __init__(
        self,
        head: str,
        alphabet: str,
        min_length: int,
        length: int,
        calibration: Calibration,
        options: ReadingOptions,
    ) -> None:
        """Check the options for a model.

        Raises:
            UserError: the model cannot read in this way; the line has the limits.
        """
        self._head, self._alphabet, self._calibration, self._options = head, alphabet, calibration, options
        if options.length is not None and not min_length <= options.length <= length:
            lengths = f"{min_length} to {length}" if min_length < length else str(length)
            raise UserError(f"--length {options.length}: the model predicts texts of {lengths} characters")
        if not 1 <= options.top <= MAX_ALTERNATIVES:
            raise UserError(f"--top {options.top}: use 1 to {MAX_ALTERNATIVES}")
        if options.mask is not None and len(options.mask) > MAX_MASK:
            raise UserError(f"--mask: has {len(options.mask):,} characters; use at most {MAX_MASK}")
        shortest, longest = (min_length, length) if options.length is None else (options.length,) * 2
        self._pattern = compile_pattern(alphabet, shortest, longest, options.mask)
        self._threshold = _threshold(calibration, options.min_confidence)

    @property
    def needs_search(self) -> bool:
        """Whether `search` has to be called instead of decoding."""
        return self._options.needs_search

    def search(self, log_probs: npt.ArrayLike) -> Answer:
        """Return the answer for the log probabilities (positions or columns, classes) of an image.

        With a length or a mask, the probabilities are those among the texts that these allow.
        """
        found, log_total = find_texts(
            make_scorer(self._head, log_probs, self._pattern), self._pattern, self._options.top
        )
        is_constrained = self._options.length is not None or self._options.mask is not None
        logs = np.array([each.log_probability for each in found]) - (log_total if is_constrained else 0.0)
        confidences = self._calibration.confidence(np.exp(np.minimum(logs, 0.0))).tolist()
        alternatives = tuple(
            Alternative(
                "".join(self._alphabet[k] for k in each.ids),
                confidence,
                tuple(np.exp(each.log_conditionals).tolist()),
            )
            for each, confidence in zip(found, confidences, strict=True)
        )
        return self.answer(alternatives, math.exp(min(log_total, 0.0)) if is_constrained else 1.0)

    def answer(self, alternatives: tuple[Alternative, ...], allowed: float = 1.0) -> Answer:
        """Return the answer with the most likely text, the first one, or abstain.

        `allowed` is the probability that the image has one of the texts that length and mask allow. With
        min_confidence=0.99 the model abstains where it is 99 % sure that it does not.
        """
        best = alternatives[0] if alternatives else Alternative("", 0.0, ())
        is_excluded = allowed < 1 - (self._options.min_confidence or 1.0)
        abstains = best.confidence < self._threshold or is_excluded
        shown = alternatives if self._options.top > 1 or abstains else ()
        return Answer("" if abstains else best.text, best.confidence, best.confidences, abstains, shown)


def _threshold(calibration: Calibration, min_confidence: float | None) -> float:
    """Return the least confidence of an answer.

    Raises:
        UserError: the model cannot promise this; the line has the limit.
    """
    if min_confidence is None:
        return 0.0
    if not 0 < min_confidence < 1:
        raise UserError(f"--min-confidence {min_confidence}: use a fraction between 0 and 1, as in 0.99")
    if not calibration.images:
        raise UserError(
            f"--min-confidence {min_confidence}: the confidences of this model are not calibrated; train it "
            "with this version"
        )
    if point := calibration.operating_point(min_confidence):
        return point.threshold
    raise UserError(
        f"--min-confidence {min_confidence}: the {calibration.images:,} images of the validation split do "
        f"not support this; use at most {np.floor(calibration.best_accuracy * 1e4) / 1e4:.4f}"
    )
