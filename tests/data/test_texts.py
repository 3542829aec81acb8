"""Sampled texts of generated images."""

import random
import re
from collections import Counter
from typing import Any

import pytest

from captcha_exp import compose, load
from captcha_exp.config import CaptchaConfig
from captcha_exp.data.sources.texts import sample_text
from captcha_exp.errors import ConfigError


def captcha(alphabet: str, length: int, min_length: int | None = None) -> CaptchaConfig:
    sizes: dict[str, Any] = {"width": 56, "height": 24, "channels": 3}
    return CaptchaConfig(**sizes, alphabet=alphabet, length=length, min_length=min_length, case="fold")


def test_texts_of_one_length_draw_only_their_characters() -> None:
    assert sample_text("characters", captcha("abc", 5), random.Random(1)) == "".join(
        random.Random(1).choices("abc", k=5)
    )


def test_lengths_are_uniform() -> None:
    rng = random.Random(0)
    lengths = Counter(len(sample_text("characters", captcha("abc", 6, 3), rng)) for _ in range(4000))
    assert set(lengths) == {3, 4, 5, 6}
    assert all(900 <= count <= 1100 for count in lengths.values())


@pytest.mark.parametrize(("min_length", "length"), [(4, 7), (4, 4), (5, 8), (8, 8)])
def test_sums_have_two_numbers_an_operator_and_an_equals_sign(min_length: int, length: int) -> None:
    rng = random.Random(0)
    texts = [
        sample_text("arithmetic", captcha("0123456789+-=", length, min_length), rng) for _ in range(2000)
    ]
    assert {len(text) for text in texts} == set(range(min_length, length + 1))
    assert all(re.fullmatch(r"(0|[1-9]\d{0,2})[+-](0|[1-9]\d{0,2})=", text) for text in texts)
    assert {text[0] for text in texts} >= set("123456789")
    assert {"+", "-"} <= set("".join(texts))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("captcha.alphabet=0123456789+",), "captcha.alphabet=0123456789+ lacks =; add them"),
        (("captcha.alphabet=0123456789=",), "has no operator; add one or more of + - x * /"),
        (
            ("captcha.alphabet=0123456789=x", "captcha.length=3"),
            "has 4 to 8 characters, but captcha.min_length=3",
        ),
    ],
)
def test_sums_need_digits_operators_and_room(overrides: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)):
        load(compose("data.text=arithmetic", *overrides))
