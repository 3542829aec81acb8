"""Test patterns and the search for the most likely texts, against the enumeration of all."""

import itertools
import re

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from captcha_exp.errors import UserError
from captcha_exp.model.pattern import NO_STATE, Pattern, compile_pattern
from captcha_exp.model.search import find_texts, make_scorer

MASKS = (None, "[ab]?.{0,2}.", "[^a]{1,3}", "ab?.{0,3}", "[a-b]{2}.{0,2}", "a{2}.{0,2}", "b")
Floats = npt.NDArray[np.float64]


def all_texts(alphabet: str, min_length: int, max_length: int, mask: str | None) -> list[str]:
    """Return all texts of a pattern, by the regular expressions of Python."""
    lengths = range(min_length, max_length + 1)
    texts = ("".join(each) for n in lengths for each in itertools.product(alphabet, repeat=n))
    return [text for text in texts if mask is None or re.fullmatch(mask, text)]


def accepts(pattern: Pattern, alphabet: str, text: str) -> bool:
    state = 0
    for character in text:
        state = int(pattern.next_state[state, alphabet.index(character)])
        if state == NO_STATE:
            return False
    return bool(pattern.is_final[state])


@given(mask=st.sampled_from(MASKS), lengths=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_a_pattern_allows_what_the_regular_expression_matches(
    mask: str | None, lengths: tuple[int, int]
) -> None:
    low, high = sorted(lengths)
    expected = set(all_texts("abc", low, high, mask))
    assume(expected)
    pattern = compile_pattern("abc", low, high, mask)
    every = all_texts("abc", 1, 4, None)
    assert {text for text in every if accepts(pattern, "abc", text)} == expected


@pytest.mark.parametrize(
    ("mask", "allowed", "refused"),
    [
        (r"\[\]", ["[]"], ["ab", "[["]),
        (r"[\]\-x]{2}", ["]-", "xx"], ["ab"]),
        ("[+-]=", ["+=", "-="], ["==", "a="]),
        ("[^-+]{2}", ["a=", "[]"], ["a+", "-a"]),
        (".{2}", ["+-"], ["+", "+++"]),
    ],
)
def test_a_mask_may_have_signs(mask: str, allowed: list[str], refused: list[str]) -> None:
    alphabet = "abx+-=[]"
    pattern = compile_pattern(alphabet, 1, 3, mask)
    assert [accepts(pattern, alphabet, text) for text in allowed + refused] == (
        [True] * len(allowed) + [False] * len(refused)
    )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("[0-9", "--mask [0-9: the set that begins at character 1 has no ]"),
        (
            "a*",
            r"--mask a*: * at character 2: a mask has characters, ., [a-z], {2}, {2,4} and ?; write \* for",
        ),
        ("(ab)", "--mask (ab): ( at character 1: a mask has"),
        ("[z-a]", "--mask [z-a]: z-a has its ends in the wrong order"),
        ("a{3,2}", "--mask a{3,2}: {3,2}: the first number must not be the larger one"),
        ("[A-Z]{2}", "--mask [A-Z]{2}: [A-Z] has none of the model's characters, abc"),
        ("a{5}", "--mask a{5}: allows no text of 2 to 3 characters, which the model predicts"),
        ("a{65}", "--mask a{65}: has more than 64 characters"),
        ("ab\\", "--mask ab\\: ends with a backslash"),
        ("", "--mask : allows no text of 2 to 3 characters"),
    ],
)
def test_what_is_no_mask_is_refused(mask: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        compile_pattern("abc", 2, 3, mask)


def probability(head: str, log_probs: Floats, ids: list[int]) -> float:
    """Return the probability of a text by definition; for CTC, summed over all alignments."""
    num_rows, num_classes = log_probs.shape
    if head != "ctc":
        total = sum(log_probs[n, k] for n, k in enumerate(ids))
        return float(np.exp(total + (log_probs[len(ids), -1] if len(ids) < num_rows else 0.0)))
    blank = num_classes - 1
    return sum(
        float(np.exp(log_probs[np.arange(num_rows), alignment].sum()))
        for alignment in itertools.product(range(num_classes), repeat=num_rows)
        if [k for k, _ in itertools.groupby(alignment) if k != blank] == ids
    )


@settings(max_examples=60)
@given(
    head=st.sampled_from(["position", "grouped_softmax", "end_class", "ctc"]),
    mask=st.sampled_from(MASKS),
    alphabet=st.sampled_from(["a", "ab", "abc"]),
    lengths=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 2**32 - 1),
    sharpness=st.sampled_from([0.0, 1.0, 5.0, 40.0]),
)
def test_the_most_likely_texts_are_found(
    head: str, mask: str | None, alphabet: str, lengths: tuple[int, int], seed: int, sharpness: float
) -> None:
    low, high = sorted(lengths)
    if head in ("position", "grouped_softmax"):
        low = high
    texts = all_texts(alphabet, low, high, mask)
    assume(texts and (mask is None or {"b"} <= set(alphabet)))
    rng = np.random.default_rng(seed)
    shape = (2 * high - 1 + seed % 2, len(alphabet) + 1) if head == "ctc" else (high, len(alphabet))
    if head == "end_class":
        shape = (high, len(alphabet) + 1)
    logits = rng.normal(size=shape) * sharpness
    log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    expected = {
        text: probability(head, log_probs, [alphabet.index(character) for character in text])
        for text in texts
    }

    pattern = compile_pattern(alphabet, low, high, mask)
    found, log_total = find_texts(make_scorer(head, log_probs, pattern), pattern, 4)
    assert np.exp(log_total) == pytest.approx(sum(expected.values()), rel=1e-9)
    assert [np.exp(each.log_probability) for each in found] == pytest.approx(
        sorted(expected.values(), reverse=True)[:4], rel=1e-9
    )
    named = ["".join(alphabet[k] for k in each.ids) for each in found]
    assert len(set(named)) == len(named)
    for text, each in zip(named, found, strict=True):
        assert np.exp(each.log_probability) == pytest.approx(expected[text], rel=1e-9)
        for n, conditional in enumerate(each.log_conditionals, 1):
            mass, of_prefix = (
                sum(p for other, p in expected.items() if other.startswith(text[:m])) for m in (n, n - 1)
            )
            assert np.exp(conditional) == pytest.approx(mass / of_prefix, rel=1e-6)


def test_a_text_that_is_hardly_possible_is_found() -> None:
    # The head is certain of "aaaa" in nine columns; the mask wants something else of very small probability.
    logits = np.full((9, 3), -60.0)
    logits[::2, 0] = logits[1::2, 2] = 0.0
    log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    pattern = compile_pattern("ab", 4, 4, "b{4}")
    (found,), log_total = find_texts(make_scorer("ctc", log_probs, pattern), pattern, 3)
    assert found.ids == (1, 1, 1, 1)
    assert found.log_probability == pytest.approx(log_total)
    assert -300 < log_total < -295
