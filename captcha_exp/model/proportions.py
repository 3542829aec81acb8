"""Proportions of correct images: an interval, and exact tests whether one is lower than another.

All are of whole numbers alone, and import nothing that takes time.
"""

import math
from collections.abc import Iterator


def wilson_interval(num_correct: int, num_total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return (low, high) of the Wilson score interval of a proportion; z is the 97.5% normal quantile.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22
    (1927).
    """
    accuracy = num_correct / num_total
    center = accuracy + z * z / (2 * num_total)
    spread = z * math.sqrt(accuracy * (1 - accuracy) / num_total + z * z / (4 * num_total * num_total))
    scale = 1 + z * z / num_total
    # At the ends the exact bounds are 0 and 1, which rounding must not miss.
    low = 0.0 if num_correct == 0 else (center - spread) / scale
    high = 1.0 if num_correct == num_total else (center + spread) / scale
    return low, high


def mcnemar_p(num_lost: int, num_gained: int) -> float:
    """Return the exact one-sided p-value that paired results have become worse.

    That is the probability of at least `num_lost` heads in as many fair tosses as results have changed.

    Source: Q. McNemar, Note on the sampling error of the difference between correlated proportions,
    Psychometrika 12 (1947), with the exact binomial distribution.
    """
    total = num_lost + num_gained
    tail = sum(count for k, count in enumerate(_binomials(total)) if k >= num_lost)
    return tail / (1 << total)


def fisher_p(correct_before: int, total_before: int, correct_now: int, total_now: int) -> float:
    """Return the exact one-sided p-value that a proportion is lower than that of another sample.

    That is the probability of at most `correct_now` correct results among those of the second sample, if all
    correct results were spread over both at random.

    Source: R. A. Fisher, The logic of inductive inference, JRSS 98 (1935).
    """
    correct = correct_before + correct_now
    before, now = list(_binomials(total_before)), list(_binomials(total_now))
    tail = sum(
        now[k] * before[correct - k] for k in range(correct_now + 1) if 0 <= correct - k <= total_before
    )
    return tail / math.comb(total_before + total_now, correct)


def _binomials(n: int) -> Iterator[int]:
    """Yield n over k for k from 0 to n."""
    value = 1
    for k in range(n + 1):
        yield value
        value = value * (n - k) // (k + 1)
