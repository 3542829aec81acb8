"""The sequential test: fair bets, its false-alarm rate on exchangeable numbers, and what it finds."""

import itertools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy import integrate
from scipy import stats as scipy_stats

from captcha_exp.export import conformal
from captcha_exp.export.conformal import BETS, ConformalMartingale

Draw = Callable[[np.random.Generator, int], npt.NDArray[np.float64]]


class FixedRng:
    """Breaks each tie in the middle."""

    def random(self) -> float:
        return 0.5


def test_the_rank_of_a_number_is_uniform_over_all_orders() -> None:
    """Of four numbers in every order, the last has each rank equally often, whatever came before."""
    counts: Counter[tuple[float, float]] = Counter()
    for order in itertools.permutations([3.0, 1.0, 4.0, 1.5]):
        gambler = ConformalMartingale(order[:2], FixedRng())  # type: ignore[arg-type]  # all that is used
        counts[gambler.p_value(order[2]), gambler.p_value(order[3])] += 1
    thirds, quarters = [(k + 0.5) / 3 for k in range(3)], [(k + 0.5) / 4 for k in range(4)]
    assert dict.fromkeys(itertools.product(thirds, quarters), 2) == {
        min(itertools.product(thirds, quarters), key=lambda pair: math.dist(pair, key)): count
        for key, count in counts.items()
    }


def test_the_largest_number_has_the_smallest_p_value() -> None:
    gambler = ConformalMartingale([1.0, 2.0, 3.0], np.random.default_rng(0))
    assert gambler.p_value(9.0) <= 1 / 4
    assert gambler.p_value(0.0) > 4 / 5


def test_each_bet_is_fair() -> None:
    for bet, (a, b) in enumerate(BETS):
        scale, exponents = conformal._LOG_SCALE[bet], conformal._EXPONENTS[:, bet]
        for p in (0.01, 0.3, 0.9):
            density = math.exp(scale + exponents @ [math.log(p), math.log1p(-p)])
            assert density == pytest.approx(scipy_stats.beta.pdf(p, a, b))
    total, _ = integrate.quad(lambda p: scipy_stats.beta.pdf(p, 0.3, 0.3), 0, 1)
    assert total == pytest.approx(1, abs=1e-4)


def normal(rng: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
    return rng.normal(size=size)


def heavy_tails(rng: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
    return rng.standard_cauchy(size)


def ties(rng: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
    return rng.integers(0, 3, size).astype(float)


def alarm(values: npt.NDArray[np.float64], num_reference: int, alpha: float, seed: int) -> int | None:
    """Return after how many numbers the wealth reaches 1 / alpha."""
    gambler = ConformalMartingale(values[:num_reference].tolist(), np.random.default_rng([seed, 1]))
    for number, value in enumerate(values[num_reference:].tolist(), 1):
        if gambler.update(value) >= -math.log(alpha):
            return number
    return None


@pytest.mark.parametrize("distribution", [normal, heavy_tails, ties])
def test_false_alarms_are_as_rare_as_stated(distribution: Draw) -> None:
    """With a small reference, and a high alpha, where a test that is not valid at any time shows it."""
    trials, alpha = 200, 0.2
    alarms = 0
    for seed in range(trials):
        values = distribution(np.random.default_rng(seed), 15 + 80)
        alarms += alarm(values, 15, alpha, seed) is not None
    assert alarms <= scipy_stats.binom.ppf(0.999, trials, alpha)


def test_a_change_is_found_from_the_start_or_later() -> None:
    limit = 0.02 / 11
    for seed in range(8):
        rng = np.random.default_rng(seed)
        for before in (0, 1000):
            moved = np.concatenate([rng.normal(size=300 + before), rng.normal(size=60) + 2])
            assert before < (alarm(moved, 300, limit, seed) or 0) <= before + 60
        narrow = np.concatenate([rng.normal(size=300), rng.normal(size=100) / 10])
        assert alarm(narrow, 300, limit, seed) is not None
