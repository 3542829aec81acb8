"""The texts of generated images: random characters, or sums."""

import random

from captcha_exp.config import CaptchaConfig, TextKind
from captcha_exp.config.validators import ARITHMETIC_OPERATORS


def sample_text(kind: TextKind, captcha: CaptchaConfig, rng: random.Random) -> str:
    """Sample a text of the alphabet and the lengths of a config."""
    length = sample_length(captcha, rng)
    if kind == "arithmetic":
        return _sample_arithmetic(captcha.alphabet, length, rng)
    return "".join(rng.choices(captcha.alphabet, k=length))


def sample_length(captcha: CaptchaConfig, rng: random.Random) -> int:
    """Sample a length uniformly; draws nothing if there is only one."""
    shortest, longest = captcha.shortest_length, captcha.length
    return longest if shortest == longest else rng.randint(shortest, longest)


def _sample_arithmetic(alphabet: str, length: int, rng: random.Random) -> str:
    """Sample two numbers of one to three digits with an operator between and = after them."""
    num_digits = length - 2
    first = rng.randint(max(1, num_digits - 3), min(3, num_digits - 1))
    numbers = [_sample_number(count, rng) for count in (first, num_digits - first)]
    operator = rng.choice([c for c in ARITHMETIC_OPERATORS if c in alphabet])
    return f"{numbers[0]}{operator}{numbers[1]}="


def _sample_number(num_digits: int, rng: random.Random) -> int:
    """Sample a number of so many digits; one of several digits does not start with 0."""
    return rng.randrange(0 if num_digits == 1 else 10 ** (num_digits - 1), 10**num_digits)
