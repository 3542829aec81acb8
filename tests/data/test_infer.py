"""Values of the captcha group that are inferred from labels and images."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from captcha_exp.config import CaptchaConfig
from captcha_exp.data.sources import infer
from captcha_exp.errors import UserError

AUTO: dict[str, Any] = dict.fromkeys(
    ("width", "height", "channels", "alphabet", "length", "min_length", "case"), "auto"
)


def from_labels(labels: list[str], **given: Any) -> CaptchaConfig:
    return infer.infer_labels(CaptchaConfig(**{**AUTO, **given}), labels)[0]


def test_labels_of_one_character_are_an_error() -> None:
    with pytest.raises(UserError, match=r"all 3 labels consist of '9': there is nothing"):
        from_labels(["9999", "99", "9"])


def from_images(sample: list[Image.Image], **given: Any) -> CaptchaConfig:
    return infer.infer_images(CaptchaConfig(**{**AUTO, **given}), sample)[0]


@pytest.mark.parametrize(
    ("labels", "alphabet", "length", "min_length", "case"),
    [
        (["1234", "5671"], "1234567", 4, None, "fold"),
        (["ab1", "c"], "1abc", 3, 1, "fold"),
        (["AB", "CD"], "ABCD", 2, None, "fold"),
        (["Ab", "cD"], "ADbc", 2, None, "keep"),
        (["ab"] * 300 + ["Cd"], "abcd", 2, None, "fold"),
        (["AB"] * 300 + ["Cd"], "ABCD", 2, None, "fold"),
        (["1234"] * 300 + ["5"], "1234", 4, None, "fold"),
        (["1234"] * 30 + ["NA"], "1234", 4, None, "fold"),
        (["1234"] * 10 + ["567"], "1234567", 4, 3, "fold"),
        (["3+15=", "1-2="], "+-1235=", 5, 4, "fold"),
        (["\u0065\u0301a", "ab"], "ab\u00e9", 2, None, "fold"),  # decomposed, as macOS stores names
    ],
)
def test_alphabet_lengths_and_case_of_labels(
    labels: list[str], alphabet: str, length: int, min_length: int | None, case: str
) -> None:
    found = from_labels(labels)
    assert (found.alphabet, found.length, found.min_length, found.case) == (
        alphabet,
        length,
        min_length,
        case,
    )


def test_separators_are_not_inferred() -> None:
    found = from_labels([*(f"{n:04}" for n in range(300)), "12 4", "1_2", "a.b"])
    assert (found.alphabet, found.length, found.min_length) == ("0123456789", 4, None)


def test_parts_of_names_are_inferred_if_most_have_separators() -> None:
    found = from_labels([f"{n:05}_{n * 7919 % 9999:04}" for n in range(300)])
    assert (found.alphabet, found.length, found.min_length) == ("0123456789", 5, 4)


def test_given_values_are_kept() -> None:
    found = from_labels(["123", "abcd"], alphabet="0123456789", length=4)
    assert (found.alphabet, found.length, found.min_length, found.case) == ("0123456789", 4, None, "fold")
    found = from_labels(["123", "abcd"], min_length=2)
    assert (found.length, found.min_length) == (4, 2)


def test_no_labels_give_a_valid_config() -> None:
    captcha, _ = infer.infer_images(from_labels([]), [])
    assert captcha.inferred_keys == []


def test_evidence_names_rare_characters_and_lengths() -> None:
    captcha = CaptchaConfig(**AUTO)
    labels = [f"{n:04}" for n in range(1000)] + ["123x", "1"]
    _, found = infer.infer_labels(captcha, labels)
    evidence = {each.key: each.evidence for each in found}
    assert evidence["captcha.alphabet"] == "11 characters in 1,001 labels; only once: x"
    assert evidence["captcha.length"] == "longest of 1,002 labels; 1 label has another length"


def drawing(
    width: int, height: int, stroke: int, color: Any = (0, 0, 0), ground: Any = (255,) * 3
) -> Image.Image:
    """Return an image with vertical lines of a stroke width."""
    image = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(image)
    for x in range(10, width - 10, 6 * stroke):
        draw.rectangle((x, height // 5, x + stroke - 1, height * 4 // 5), fill=color)
    return image


@pytest.mark.parametrize("stroke", [1, 2, 3, 5])
def test_stroke_width(stroke: int) -> None:
    found = infer.stroke_width(np.asarray(drawing(200, 80, stroke)))
    assert found == pytest.approx(stroke, rel=0.15)


def test_a_gradient_is_no_stroke() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 200, dtype=np.uint8)[None, :, None], (80, 200, 3)).copy()
    image = Image.fromarray(ramp)
    ImageDraw.Draw(image).rectangle((95, 10, 97, 70), fill=(0, 0, 0))
    found = infer.stroke_width(np.asarray(image))
    assert found is not None
    assert found < 5


@pytest.mark.parametrize(
    ("size", "stroke", "expected"),
    [
        ((160, 60), 6, (64, 24)),  # two pixels would do at height 20
        ((160, 60), 4, (80, 30)),
        ((70, 30), 1, (76, 32)),  # not above the height of the images, but a multiple of 4
        ((200, 70), 1, (128, 44)),  # the cost is bounded
        ((400, 30), 1, (320, 24)),  # at least 24
    ],
)
def test_size_keeps_the_aspect_ratio_and_two_pixels_per_stroke(
    size: tuple[int, int], stroke: int, expected: tuple[int, int]
) -> None:
    found = from_images([drawing(*size, stroke)] * 3)
    assert found.width == pytest.approx(expected[0], abs=12)
    assert found.height == pytest.approx(expected[1], abs=4)
    assert found.width / found.height == pytest.approx(size[0] / size[1], rel=0.1)
    assert found.width % 4 == found.height % 4 == 0


def test_one_given_side_gives_the_other() -> None:
    assert from_images([drawing(160, 60, 4)], width=80).height == 32
    assert from_images([drawing(160, 60, 4)], height=24).width == 64


@pytest.mark.parametrize(
    ("image", "channels"),
    [
        (drawing(100, 40, 3), 1),
        (drawing(100, 40, 3, (90, 92, 95)), 1),
        (drawing(100, 40, 3, (200, 20, 20)), 3),
        (drawing(100, 40, 3, ground=(255, 255, 200)), 3),
    ],
)
def test_gray_images_have_one_channel(image: Image.Image, channels: int) -> None:
    assert from_images([image]).channels == channels


def test_equal_labels_give_an_equal_config_in_any_order() -> None:
    labels = [f"{n:03x}" for n in range(500)]
    assert from_labels(labels) == from_labels(labels[::-1])
    assert replace(from_labels(labels), case="keep") != from_labels(labels)
