"""Test the conversion between labels and class ids, and the validation of alphabets."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captcha_exp.config.validators import check_alphabet
from captcha_exp.data.alphabet import Alphabet

DIGITS = Alphabet("0123456789")
VISIBLE = st.characters(categories=["L", "N", "P", "S"])
ALPHABETS = st.lists(VISIBLE, min_size=2, max_size=80, unique=True).map("".join)


@settings(deadline=None)
@given(st.data(), ALPHABETS)
def test_decode_inverts_encode(data: st.DataObject, characters: str) -> None:
    alphabet = Alphabet(characters)
    text = data.draw(st.text(st.sampled_from(characters)))
    assert alphabet.decode(alphabet.encode(text)) == text


@settings(deadline=None)
@given(ALPHABETS)
def test_class_id_is_the_index_in_the_alphabet(characters: str) -> None:
    assert Alphabet(characters).encode(characters) == list(range(len(Alphabet(characters))))


def test_leading_zeros_are_kept() -> None:
    assert DIGITS.decode(DIGITS.encode("0070")) == "0070"


def test_upper_and_lower_case_are_different_classes() -> None:
    assert Alphabet("aA").encode("Aa") == [1, 0]


def test_encode_rejects_a_character_outside_the_alphabet() -> None:
    with pytest.raises(ValueError, match=r"^'x' in '12x4' is not in the alphabet '0123456789'$"):
        DIGITS.encode("12x4")


@pytest.mark.parametrize(
    ("characters", "text", "folded"),
    [
        ("abc0", "aBC0", "abc0"),
        ("ABC0", "aBC0", "ABC0"),
        ("aAbc", "aABC", "aAbc"),  # both cases are separate classes; B and C are not
        ("äöü", "ÄÖü", "äöü"),
        ("abc", "xX1-", "xX1-"),  # in the alphabet in neither case: unchanged
        (
            "FISX",
            "\N{LATIN SMALL LIGATURE FI}x",
            "\N{LATIN SMALL LIGATURE FI}X",
        ),  # its upper case has two letters
        ("ab", "", ""),
    ],
)
def test_fold_case_converts_to_the_case_in_the_alphabet(characters: str, text: str, folded: str) -> None:
    assert Alphabet(characters).fold_case(text) == folded


@settings(deadline=None)
@given(ALPHABETS, st.text())
def test_fold_case_changes_only_characters_outside_the_alphabet(characters: str, text: str) -> None:
    alphabet = Alphabet(characters)
    folded = alphabet.fold_case(text)
    assert len(folded) == len(text)
    assert alphabet.fold_case(folded) == folded
    for before, after in zip(text, folded, strict=True):
        assert before == after or (before not in characters and after in characters)
        assert before == after or after in (before.lower(), before.upper())


@pytest.mark.parametrize("class_id", [10, 99])
def test_decode_rejects_a_class_id_beyond_the_alphabet(class_id: int) -> None:
    with pytest.raises(IndexError):
        DIGITS.decode([class_id])


@pytest.mark.parametrize(
    ("characters", "message"),
    [
        ("aab", "'a' occurs more than once"),
        ("abcabc", "'a', 'b', 'c' occurs more than once"),
        ("", "at least two characters"),
        ("a", "at least two characters"),
        ("a b", "' ' is not a visible"),
        ("ab\n", r"'\n' is not a visible"),
        ("ab\N{NO-BREAK SPACE}", r"'\xa0' is not a visible"),
        ("ab\N{ZERO WIDTH SPACE}", r"'\u200b' is not a visible"),
        ("ab\N{COMBINING ACUTE ACCENT}", "is not a visible character"),
    ],
)
def test_invalid_alphabets_are_rejected(characters: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_alphabet(characters)
    with pytest.raises(ValueError, match=r"^alphabet "):
        Alphabet(characters)


@pytest.mark.parametrize("characters", ["01", "+-=x", "äöü", "你好", "o0O"])
def test_valid_alphabets_are_accepted(characters: str) -> None:
    assert check_alphabet(characters) == characters


def test_alphabets_with_the_same_characters_are_equal() -> None:
    assert hash(Alphabet("ab")) == hash(Alphabet("ab"))
    assert Alphabet("ab") == Alphabet("ab")
    assert Alphabet("ab") != Alphabet("ba")
