"""Alignment of labels with predicted texts."""

import functools
import random

import pytest

from captcha_exp.data.alphabet import END
from captcha_exp.model.alignment import align


@functools.cache
def edit_distance(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(
        edit_distance(a[1:], b[1:]) + (a[0] != b[0]),
        edit_distance(a[1:], b) + 1,
        edit_distance(a, b[1:]) + 1,
    )


def test_equal_lengths_are_compared_by_position() -> None:
    assert align([1, 2, 3], [2, 3, 1]) == [(1, 2), (2, 3), (3, 1)]


@pytest.mark.parametrize(
    ("label", "predicted", "expected"),
    [
        ([1, 2, 3], [1, 3], [(1, 1), (2, END), (3, 3)]),
        ([1, 3], [1, 2, 3], [(1, 1), (END, 2), (3, 3)]),
        ([1, 1, 2], [1, 2], [(1, END), (1, 1), (2, 2)]),
        ([1], [2, 3], [(END, 2), (1, 3)]),
    ],
)
def test_missing_and_added_characters(
    label: list[int], predicted: list[int], expected: list[tuple[int, int]]
) -> None:
    assert align(label, predicted) == expected


@pytest.mark.parametrize("seed", range(50))
def test_other_lengths_have_the_smallest_edit_distance(seed: int) -> None:
    rng = random.Random(seed)
    label, predicted = (rng.choices(range(3), k=rng.randint(1, 6)) for _ in range(2))
    pairs = align(label, predicted)
    assert [t for t, _ in pairs if t != END] == label
    assert [p for _, p in pairs if p != END] == predicted
    if len(label) != len(predicted):
        assert sum(t != p for t, p in pairs) == edit_distance(tuple(label), tuple(predicted))
