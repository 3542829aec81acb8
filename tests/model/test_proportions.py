"""Intervals and tests of proportions, compared with the definitions, brute force and SciPy."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from captcha_exp.model.proportions import fisher_p, mcnemar_p, wilson_interval

# -- the interval --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 2, 10, 37, 400])
def test_the_wilson_interval_inverts_the_score_test(total: int) -> None:
    """It contains p if |correct/total - p| is at most 1.96 standard deviations under p."""
    grid = np.linspace(0, 1, 20_001)
    for correct in {0, 1, total // 3, total // 2, total - 1, total}:
        accepted = grid[np.abs(correct / total - grid) <= 1.959964 * np.sqrt(grid * (1 - grid) / total)]
        low, high = wilson_interval(correct, total)
        assert low == pytest.approx(accepted.min(), abs=1e-4)
        assert high == pytest.approx(accepted.max(), abs=1e-4)


def test_the_wilson_interval_has_published_values() -> None:
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@given(total=st.integers(1, 10**6), fraction=st.floats(0, 1))
def test_the_wilson_interval_contains_the_proportion(total: int, fraction: float) -> None:
    correct = round(fraction * total)
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= correct / total <= high <= 1
    assert low < high
    assert wilson_interval(total - correct, total) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize("total", [1, 3, 49, 1000])
def test_the_wilson_interval_ends_exactly_at_0_and_1(total: int) -> None:
    assert wilson_interval(0, total)[0] == 0.0
    assert wilson_interval(total, total)[1] == 1.0


# -- tests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", range(11))
def test_mcnemar_counts_the_outcomes_of_fair_tosses(total: int) -> None:
    outcomes = [sum(tosses) for tosses in itertools.product((0, 1), repeat=total)]
    for lost in range(total + 1):
        expected = sum(heads >= lost for heads in outcomes) / len(outcomes)
        assert mcnemar_p(lost, total - lost) == expected


@pytest.mark.parametrize(("lost", "gained"), [(5, 0), (40, 20), (600, 500), (0, 700)])
def test_mcnemar_is_that_of_scipy(lost: int, gained: int) -> None:
    expected = stats.binomtest(lost, lost + gained, alternative="greater").pvalue
    assert mcnemar_p(lost, gained) == pytest.approx(expected, rel=1e-9)


@given(data=st.tuples(*[st.integers(1, 60)] * 2, *[st.floats(0, 1)] * 2))
def test_fisher_is_that_of_scipy(data: tuple[int, int, float, float]) -> None:
    before, now = data[:2]
    correct = [round(total * share) for total, share in zip((before, now), data[2:], strict=True)]
    table = [[correct[1], now - correct[1]], [correct[0], before - correct[0]]]
    expected = stats.fisher_exact(table, alternative="less").pvalue
    assert fisher_p(correct[0], before, correct[1], now) == pytest.approx(expected, rel=1e-6)
