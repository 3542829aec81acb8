"""Infer the captcha group of a folder from its labels and images, by rules that its page in docs/ states.

Labels decide alphabet, lengths and case, a sample of the images size and channels. A value that is not `auto`
is kept.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from captcha_exp.config import CaptchaConfig
from captcha_exp.data import images
from captcha_exp.data.filters import box_mean
from captcha_exp.errors import UserError

MAX_ODD_SHARE = 0.005  # of the labels that may have a length, or a case, that does not count
MIN_FOR_ODD = 20  # labels, of which a single one of some length is odd
MAX_LENGTH = 32  # of captcha.length
MAX_GRAY_CHROMA = 12  # difference of the channels of a pixel that JPEG leaves in a gray image
MIN_COLOR_SHARE = 0.002  # of the pixels that have a color, in an image with color
MIN_STROKE_PIXELS = 2.0
MIN_HEIGHT, MAX_HEIGHT = 24, 48
MAX_PIXELS = 5_200  # of a resized image, which bounds the cost of a step
SIZE_STEP = 4  # multiples, for the strides of the networks
NUM_SAMPLED = 100


@dataclass(frozen=True)
class Inference:
    """A value that was inferred, and from what."""

    key: str  # of the config
    value: str
    evidence: str


def infer_labels(captcha: CaptchaConfig, labels: Sequence[str]) -> tuple[CaptchaConfig, list[Inference]]:
    """Infer the alphabet, the lengths and the case from labels.

    Raises:
        UserError: all labels consist of one character; the line says what decides them.
    """
    texts = _select_texts([unicodedata.normalize("NFC", label) for label in labels])
    usual, odd = _usual_lengths(texts)
    found: list[Inference] = []
    if captcha.is_auto("length"):
        shortest, longest = min(usual), min(max(usual), MAX_LENGTH)
        captcha = replace(captcha, length=longest)
        note = f"; {odd:,} {'labels have' if odd > 1 else 'label has'} another length" if odd else ""
        found.append(Inference("captcha.length", str(longest), f"longest of {len(texts):,} labels{note}"))
        if captcha.is_auto("min_length"):
            captcha = replace(captcha, min_length=None if shortest >= longest else shortest)
            value = "null" if captcha.min_length is None else str(captcha.min_length)
            evidence = "all have one length" if captcha.min_length is None else "shortest of them"
            found.append(Inference("captcha.min_length", value, evidence))
        texts = [text for text in texts if len(text) in usual]
    elif captcha.is_auto("min_length"):
        captcha = replace(captcha, min_length=None)
        found.append(Inference("captcha.min_length", "null", "captcha.length is given"))
    if captcha.is_auto("case"):
        captcha, evidence = _infer_case(captcha, texts)
        found.append(Inference("captcha.case", captcha.case, evidence))
    if captcha.is_auto("alphabet"):
        counts = Counter("".join(_fold(texts) if captcha.case == "fold" else texts))
        characters = "".join(sorted(counts))
        rare = sorted(c for c, count in counts.items() if count == 1)
        note = f"; only once: {' '.join(rare)}" if rare and len(texts) >= 100 else ""
        if len(characters) == 1:
            raise UserError(
                f"captcha.alphabet=auto: all {len(texts):,} labels consist of {characters!r}: there is "
                "nothing to learn; check where data.labels and data.filename_pattern take them from"
            )
        captcha = replace(captcha, alphabet=characters or "01")  # without labels, every image is rejected
        evidence = f"{len(characters)} characters in {len(texts):,} labels{note}"
        found.append(Inference("captcha.alphabet", characters, evidence))
    return captcha, found


def _usual_lengths(texts: Sequence[str]) -> tuple[set[int], int]:
    """Return the lengths that count, and the number of texts of other lengths.

    A length that one text in many has, or MAX_ODD_SHARE of them, is a mistake rather than a kind of label.
    """
    lengths = Counter(map(len, texts)) or Counter({1: 1})
    total = lengths.total()
    odd_count = max(MAX_ODD_SHARE * total, 1 if total >= MIN_FOR_ODD else 0)
    usual = {length for length, count in lengths.items() if count > odd_count} or set(lengths)
    return usual, sum(count for length, count in lengths.items() if length not in usual)


def _select_texts(labels: Sequence[str]) -> list[str]:
    """Return the labels that count: without invisible characters, and without separators of file names.

    If most have separators, return their parts, one of which is the label.
    """
    visible = [label for label in labels if label and not any(map(_is_invisible, label))]
    is_arithmetic = any(c in label for label in visible for c in "+=")
    separators = re.compile("[_~@#()\\[\\],;.]+" if is_arithmetic else "[-_~@#()\\[\\],;.]+")
    usable = [label for label in visible if not separators.search(label)]
    if 2 * len(usable) >= len(visible):
        return usable
    return [part for label in visible for part in separators.split(label) if part]


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character)[0] in "CZM"


def _infer_case(captcha: CaptchaConfig, texts: Sequence[str]) -> tuple[CaptchaConfig, str]:
    """Return `keep` if labels have letters of both cases, else `fold`."""
    if not captcha.is_auto("alphabet"):
        return replace(captcha, case="fold"), "captcha.alphabet is given"
    upper = sum(any(c.isupper() for c in text) for text in texts)
    lower = sum(any(c.islower() for c in text) for text in texts)
    if not upper or not lower:
        return replace(captcha, case="fold"), "letters of one case" if upper or lower else "no letters"
    rare, name = min((upper, "upper"), (lower, "lower"))
    share = f"{rare:,} of {len(texts):,} labels have {name} case letters"
    is_odd = rare <= MAX_ODD_SHARE * len(texts)
    return replace(captcha, case="fold" if is_odd else "keep"), share


def _fold(texts: Sequence[str]) -> list[str]:
    """Convert the letters of all texts to the case that most of them have."""
    characters = "".join(texts)
    is_upper = sum(c.isupper() for c in characters) > sum(c.islower() for c in characters)
    return ["".join(_convert(c, is_upper) for c in text) for text in texts]


def _convert(character: str, is_upper: bool) -> str:
    other = character.upper() if is_upper else character.lower()
    return other if len(other) == 1 else character


def infer_images(
    captcha: CaptchaConfig, sample: Sequence[Image.Image]
) -> tuple[CaptchaConfig, list[Inference]]:
    """Infer the size and the channels from a sample of the images."""
    found: list[Inference] = []
    if not sample:
        captcha = replace(
            captcha,
            width=32 if captcha.is_auto("width") else captcha.width,
            height=32 if captcha.is_auto("height") else captcha.height,
            channels=1 if captcha.is_auto("channels") else captcha.channels,
        )
        return captcha, found
    arrays = [images.to_array(image, 3) for image in sample]
    if captcha.is_auto("channels"):
        colored = sum(_has_color(array) for array in arrays)
        captcha = replace(captcha, channels=3 if colored else 1)
        evidence = f"{colored:,} of {len(sample):,} images have color" if colored else "the images are gray"
        found.append(Inference("captcha.channels", str(captcha.channels), evidence))
    if captcha.is_auto("width", "height"):
        width, height = (float(np.median([array.shape[axis] for array in arrays])) for axis in (1, 0))
        strokes = [each for array in arrays if (each := stroke_width(array)) is not None]
        stroke = float(np.median(strokes)) if strokes else MIN_STROKE_PIXELS
        size = _choose_size(captcha, width, height, stroke)
        shapes = sorted({(array.shape[1], array.shape[0]) for array in arrays})
        sizes = " to ".join(f"{w}x{h}" for w, h in dict.fromkeys((shapes[0], shapes[-1])))
        evidence = f"images of {sizes} with strokes of {stroke:.1f} pixels"
        found += [
            Inference(f"captcha.{key}", str(value), evidence)
            for key, value in zip(("width", "height"), size, strict=True)
            if captcha.is_auto(key)
        ]
        captcha = replace(captcha, width=size[0], height=size[1])
    return captcha, found


def _has_color(array: npt.NDArray[np.uint8]) -> bool:
    chroma = array.max(axis=2).astype(np.int16) - array.min(axis=2)
    return bool((chroma > MAX_GRAY_CHROMA).mean() > MIN_COLOR_SHARE)


def _choose_size(captcha: CaptchaConfig, width: float, height: float, stroke: float) -> tuple[int, int]:
    """Return (width, height) in pixels that keep the aspect ratio of the images, as far as they are `auto`.

    The height is the smallest multiple of SIZE_STEP at which strokes have MIN_STROKE_PIXELS.
    """
    if not captcha.is_auto("height"):
        target_height = captcha.height
    elif not captcha.is_auto("width"):
        target_height = _to_multiple(captcha.width * height / width, SIZE_STEP)
    else:
        needed = height * MIN_STROKE_PIXELS / stroke
        affordable = (MAX_PIXELS * height / width) ** 0.5
        wanted = min(needed, affordable, MAX_HEIGHT, max(height, MIN_HEIGHT))
        target_height = max(MIN_HEIGHT, _to_multiple(wanted, SIZE_STEP))
    target_width = captcha.width
    if captcha.is_auto("width"):
        target_width = _to_multiple(target_height * width / height, SIZE_STEP)
    return min(max(target_width, 16), 2048), min(max(target_height, 16), 2048)


def _to_multiple(value: float, step: int) -> int:
    return max(step, round(value / step) * step)


def stroke_width(array: npt.NDArray[np.uint8]) -> float | None:
    """Return the median width in pixels of the strokes in an image (H, W, C); None if there are none.

    Ink differs from the mean of its neighborhood, so a gradient is none. The width of a long stroke is twice
    its area divided by its perimeter.
    """
    gray = array.astype(np.float32).mean(axis=2)
    contrast = np.abs(gray - box_mean(gray, 2 * max(3, gray.shape[0] // 4) + 1))
    ink = contrast > max(12.0, 0.5 * float(np.quantile(contrast, 0.98)))
    edges = (ink[:, 1:] != ink[:, :-1]).sum() + (ink[1:] != ink[:-1]).sum()
    return 2 * float(ink.sum()) / float(edges) if edges else None
