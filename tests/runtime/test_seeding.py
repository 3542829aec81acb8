import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captcha_exp.runtime.seeding import derive_seed, hash_many_to_unit, hash_to_unit, make_seed_fn, rng

SEEDS = st.integers(0, 2**63 - 1)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ((0, "weights"), 2_039_098_572_050_236_917),
        ((0, "order", 1), 610_367_673_687_440_295),
        ((42, "picture", 3, 7), 3_385_136_406_249_040_879),
    ],
)
def test_the_formula_of_derive_is_the_one_that_old_runs_used(
    key: tuple[int, str, *tuple[int, ...]], expected: int
) -> None:
    assert derive_seed(*key) == expected


def test_the_formula_of_fraction_is_the_one_that_old_splits_used() -> None:
    assert hash_to_unit(0, "split", "0123") == 0.8620141707309567
    assert hash_to_unit(1, "split", "0123") == 0.903812797422914


def test_the_stream_is_the_one_that_old_runs_used() -> None:
    assert rng(0, "order", 1).sample(range(10), 10) == [3, 9, 7, 1, 5, 4, 2, 8, 0, 6]


@settings(deadline=None)
@given(SEEDS, st.text(), st.lists(st.integers(0, 10**9), max_size=3))
def test_a_derived_seed_fits_every_generator(seed: int, purpose: str, index: list[int]) -> None:
    assert 0 <= derive_seed(seed, purpose, *index) < 2**63


def test_a_draw_depends_neither_on_earlier_draws_nor_on_their_order() -> None:
    keys = list(product(range(3), ["order", "weights"], range(5)))
    forwards = {key: rng(*key).random() for key in keys}
    random.seed(1)
    assert {key: rng(*key).random() for key in reversed(keys)} == forwards


def test_a_draw_leaves_the_global_generator_alone() -> None:
    before = random.getstate()
    rng(0, "order").random()
    assert random.getstate() == before


def test_seeds_purposes_and_indices_all_give_different_streams() -> None:
    indices = [(), (0,), (1,), (10,), (0, 1), (1, 0)]
    keys = list(product((0, 1), ("a", "b"), indices))
    assert len({derive_seed(seed, purpose, *index) for seed, purpose, index in keys}) == len(keys)


@settings(deadline=None)
@given(SEEDS, st.text(), st.text())
def test_a_fraction_is_at_least_0_and_below_1(seed: int, purpose: str, text: str) -> None:
    assert 0 <= hash_to_unit(seed, purpose, text) < 1


def test_fractions_are_spread_evenly() -> None:
    tenths = [0] * 10
    for number in range(10_000):
        tenths[int(10 * hash_to_unit(0, "split", f"{number:04}"))] += 1
    assert all(abs(count - 1000) < 150 for count in tenths)  # 5 standard deviations


def test_another_seed_splits_otherwise() -> None:
    chosen = [{n for n in range(1000) if hash_to_unit(seed, "split", str(n)) < 0.1} for seed in (0, 1)]
    assert len(chosen[0] & chosen[1]) < 30  # 10 are expected


@given(st.integers(-(2**70), 2**70), st.text(max_size=5), st.integers(0, 10**9))
def test_seeds_are_those_of_derive(seed: int, purpose: str, index: int) -> None:
    assert make_seed_fn(seed, purpose)(index) == derive_seed(seed, purpose, index)


@given(st.integers(-(2**70), 2**70), st.lists(st.text(max_size=5)))
def test_fractions_are_those_of_fraction(seed: int, texts: list[str]) -> None:
    assert hash_many_to_unit(seed, "split", [*texts, *texts]) == [
        hash_to_unit(seed, "split", text) for text in [*texts, *texts]
    ]
