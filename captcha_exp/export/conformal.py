"""A sequential test of exchangeability: does a sequence of numbers continue a reference, or has it changed?

Each new number gets its conformal p-value: its rank among the reference and the numbers before it. As long as
all are exchangeable, these p-values are independent and uniform, whatever the distribution of the numbers. A
gambler bets against that; as the game is fair, the wealth exceeds C with a probability of at most 1 / C, at
any time: the wealth may be checked after each number, and the game be ended whenever one likes.

The bets are densities on [0, 1] of several shapes (small ranks, large ones, both, neither), one of which
never bets; in each round, a share of the wealth is spread over all of them, which finds a change after any
number of rounds without one.

Of several statistics of the same images, each has a wealth of its own. Their mean would not do: p-values of
one statistic are independent of each other, but not of those of all others, and a rule that depends on all
wealths may stop when one of them is unfairly high. Therefore each has to reach K / alpha, K being the number
of statistics: the bound of the union.

Source: V. Vovk, A. Gammerman, G. Shafer, Algorithmic learning in a random world, 2nd ed. (2022), part III:
conformal test martingales, and the inequality of Ville. M. Herbster and M. Warmuth, Tracking the best expert,
Machine Learning 32 (1998): the fixed share. Y. J. Choe and A. Ramdas, Combining evidence across filtrations
(2024): why wealths of different histories must not be averaged.
"""

import bisect
import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

SHARED = 0.005  # of the wealth, spread over all bets in each round
BETS = (  # (a, b) of beta densities; (1, 1) never bets
    *((1.0, 1.0), (1.0, 1.0), (1.0, 1.0)),
    *((0.1, 1.0), (0.3, 1.0), (0.6, 1.0)),
    *((1.0, 0.1), (1.0, 0.3), (1.0, 0.6)),
    *((0.3, 0.3), (0.6, 0.6), (3.0, 3.0)),
)
_LOG_SCALE = np.array([math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) for a, b in BETS])
_EXPONENTS = np.array(BETS).T - 1  # (2, bets)
_TINY = 1e-12


class ConformalMartingale:
    """The wealth of a gambler against the exchangeability of a reference and the numbers that follow it."""

    def __init__(self, reference: Iterable[float], rng: np.random.Generator) -> None:
        self._sorted = sorted(reference)
        self._rng = rng
        self._weights: npt.NDArray[np.float64] = np.full(len(BETS), 1 / len(BETS))
        self.log_wealth = 0.0  # natural logarithm; at the start, the wealth is 1

    def p_value(self, value: float) -> float:
        """Return the conformal p-value of the next number, in (0, 1], and add it to the reference.

        It is near 0 for the largest number so far and near 1 for the smallest; ties are broken at random.
        """
        first, last = bisect.bisect_left(self._sorted, value), bisect.bisect_right(self._sorted, value)
        num_larger, num_equal = len(self._sorted) - last, last - first + 1  # equal to itself, too
        self._sorted.insert(last, value)
        return (num_larger + (1 - self._rng.random()) * num_equal) / len(self._sorted)

    def update(self, value: float) -> float:
        """Bet on the next number, and return the logarithm of the wealth."""
        p = min(max(self.p_value(value), _TINY), 1 - _TINY)
        logs = np.array([math.log(p), math.log1p(-p)])
        self._weights *= np.exp(_LOG_SCALE + logs @ _EXPONENTS)
        total = float(self._weights.sum())
        self.log_wealth += math.log(total)
        self._weights = (1 - SHARED) * self._weights / total + SHARED / len(BETS)
        return self.log_wealth
