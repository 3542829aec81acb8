import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captcha_exp.config.validators import alphabet_error
from captcha_exp.data.alphabet import Alphabet

DIGITS = Alphabet("0123456789")
VISIBLE = st.characters(categories=["L", "N", "P", "S"])
ALPHABETS = st.lists(VISIBLE, min_size=2, max_size=80, unique=True).map("".join)


@settings(deadline=None)
@given(st.data(), ALPHABETS)
def test_any_text_of_any_alphabet_survives_encode_and_decode(data: st.DataObject, characters: str) -> None:
    alphabet = Alphabet(characters)
    text = data.draw(st.text(st.sampled_from(characters)))
    assert alphabet.decode(alphabet.encode(text)) == text


@settings(deadline=None)
@given(ALPHABETS)
def test_the_class_id_of_a_character_is_its_place_in_the_alphabet(characters: str) -> None:
    assert Alphabet(characters).encode(characters) == list(range(len(Alphabet(characters))))


def test_a_label_keeps_its_leading_zeros() -> None:
    assert DIGITS.decode(DIGITS.encode("0070")) == "0070"


def test_upper_and_lower_case_are_different_classes() -> None:
    assert Alphabet("aA").encode("Aa") == [1, 0]


def test_a_character_outside_the_alphabet_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^'x' in '12x4' is not in the alphabet '0123456789'$"):
        DIGITS.encode("12x4")


@pytest.mark.parametrize(
    ("characters", "text", "folded"),
    [
        ("abc0", "aBC0", "abc0"),
        ("ABC0", "aBC0", "ABC0"),
        ("aAbc", "aABC", "aAbc"),  # both cases are classes of their own; B and C are not
        ("äöü", "ÄÖü", "äöü"),
        ("abc", "xX1-", "xX1-"),  # what the alphabet has in no case stays what it is
        (
            "FISX",
            "\N{LATIN SMALL LIGATURE FI}x",
            "\N{LATIN SMALL LIGATURE FI}X",
        ),  # its upper case is two letters
        ("ab", "", ""),
    ],
)
def test_fold_takes_a_letter_for_the_only_case_that_there_is(characters: str, text: str, folded: str) -> None:
    assert Alphabet(characters).fold_case(text) == folded


@settings(deadline=None)
@given(ALPHABETS, st.text())
def test_fold_changes_nothing_but_the_case_of_strangers(characters: str, text: str) -> None:
    alphabet = Alphabet(characters)
    folded = alphabet.fold_case(text)
    assert len(folded) == len(text)
    assert alphabet.fold_case(folded) == folded
    for before, after in zip(text, folded, strict=True):
        assert before == after or (before not in characters and after in characters)
        assert before == after or after in (before.lower(), before.upper())


@pytest.mark.parametrize("class_id", [10, 99])
def test_a_class_id_beyond_the_alphabet_is_refused(class_id: int) -> None:
    with pytest.raises(IndexError):
        DIGITS.decode([class_id])


@pytest.mark.parametrize(
    ("characters", "words"),
    [
        ("aab", "'a' occurs more than once"),
        ("abcabc", "'a', 'b', 'c' occurs more than once"),
        ("", "at least two characters"),
        ("a", "at least two characters"),
        ("a b", "' ' cannot be seen"),
        ("ab\n", r"'\n' cannot be seen"),
        ("ab\N{NO-BREAK SPACE}", r"'\xa0' cannot be seen"),
        ("ab\N{ZERO WIDTH SPACE}", r"'\u200b' cannot be seen"),
        ("ab\N{COMBINING ACUTE ACCENT}", "cannot be seen as a character of its own"),
    ],
)
def test_an_alphabet_that_cannot_be_read_off_a_picture_is_refused(characters: str, words: str) -> None:
    assert words in (alphabet_error(characters) or "")
    with pytest.raises(ValueError, match=r"^alphabet "):
        Alphabet(characters)


@pytest.mark.parametrize("characters", ["01", "+-=x", "äöü", "你好", "o0O"])
def test_an_alphabet_of_visible_characters_is_accepted(characters: str) -> None:
    assert alphabet_error(characters) is None


def test_two_alphabets_with_the_same_characters_are_one_value() -> None:
    assert hash(Alphabet("ab")) == hash(Alphabet("ab"))
    assert Alphabet("ab") == Alphabet("ab")
    assert Alphabet("ab") != Alphabet("ba")
