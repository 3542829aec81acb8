"""Test that seeds are reproducible, independent and unchanged between versions."""

import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captcha_exp.runtime.seeding import derive_seed, hash_to_unit, rng

SEEDS = st.integers(0, 2**63 - 1)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ((0, "weights"), 2_039_098_572_050_236_917),
        ((0, "order", 1), 610_367_673_687_440_295),
        ((42, "picture", 3, 7), 3_385_136_406_249_040_879),
    ],
)
def test_derive_seed_is_unchanged(key: tuple[int, str, *tuple[int, ...]], expected: int) -> None:
    assert derive_seed(*key) == expected


def test_hash_to_unit_is_unchanged() -> None:
    assert hash_to_unit(0, "split", "0123") == 0.8620141707309567
    assert hash_to_unit(1, "split", "0123") == 0.903812797422914


def test_rng_is_unchanged() -> None:
    assert rng(0, "order", 1).sample(range(10), 10) == [3, 9, 7, 1, 5, 4, 2, 8, 0, 6]


@given(SEEDS, st.text(), st.lists(st.integers(0, 10**9), max_size=3))
def test_a_derived_seed_fits_every_generator(seed: int, purpose: str, index: list[int]) -> None:
    assert 0 <= derive_seed(seed, purpose, *index) < 2**63


def test_draws_do_not_depend_on_earlier_draws() -> None:
    keys = list(product(range(3), ["order", "weights"], range(5)))
    expected = {key: rng(*key).random() for key in keys}
    random.seed(1)
    assert {key: rng(*key).random() for key in reversed(keys)} == expected


def test_draws_do_not_use_the_global_generator() -> None:
    before = random.getstate()
    rng(0, "order").random()
    assert random.getstate() == before


def test_seeds_differ_by_seed_purpose_and_index() -> None:
    indices = [(), (0,), (1,), (10,), (0, 1), (1, 0)]
    keys = list(product((0, 1), ("a", "b"), indices))
    assert len({derive_seed(seed, purpose, *index) for seed, purpose, index in keys}) == len(keys)


@given(SEEDS, st.text(), st.text())
def test_hash_to_unit_is_in_0_to_1(seed: int, purpose: str, text: str) -> None:
    assert 0 <= hash_to_unit(seed, purpose, text) < 1


def test_hash_to_unit_is_uniform() -> None:
    tenths = [0] * 10
    for number in range(10_000):
        tenths[int(10 * hash_to_unit(0, "split", f"{number:04}"))] += 1
    assert all(abs(count - 1000) < 150 for count in tenths)  # 5 standard deviations


def test_another_seed_gives_another_split() -> None:
    chosen = [{n for n in range(1000) if hash_to_unit(seed, "split", str(n)) < 0.1} for seed in (0, 1)]
    assert len(chosen[0] & chosen[1]) < 30  # 10 are expected
