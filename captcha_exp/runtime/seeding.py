"""Chance: every random draw is a function of (seed, purpose, epoch or index), and of nothing else.

Not of how many workers there are, which launcher is used, or what was drawn before: whoever knows the key can
repeat the draw alone. A seed for any generator is the first eight bytes of SHA-256 over the key.
"""

import hashlib
import random
from collections.abc import Callable, Iterable


def derive_seed(seed: int, purpose: str, *index: int) -> int:
    """A seed in [0, 2**63) for one purpose, independent of the seeds of all other purposes and indices."""
    key = ":".join([str(seed), purpose, *map(str, index)])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def make_seed_fn(seed: int, purpose: str) -> Callable[[int], int]:
    """Return `derive` for one seed and purpose as a function of the index, hashing the prefix once."""
    prefix = hashlib.sha256(f"{seed}:{purpose}:".encode())

    def seed_of(index: int) -> int:
        digest = prefix.copy()
        digest.update(b"%d" % index)
        return int.from_bytes(digest.digest()[:8], "big") >> 1

    return seed_of


def rng(seed: int, purpose: str, *index: int) -> random.Random:
    """A stream of random numbers of its own for one purpose and index."""
    return random.Random(derive_seed(seed, purpose, *index))


def hash_many_to_unit(seed: int, purpose: str, texts: Iterable[str]) -> list[float]:
    """Return `fraction` of every text, each distinct one hashed once."""
    prefix, known, found = hashlib.sha256(f"{seed}:{purpose}:".encode()), dict[str, float](), []
    for text in texts:
        if (number := known.get(text)) is None:
            digest = prefix.copy()
            digest.update(text.encode())
            number = known[text] = int.from_bytes(digest.digest()[:8], "big") / 2**64
        found.append(number)
    return found


def hash_to_unit(seed: int, purpose: str, text: str) -> float:
    """A number in [0, 1) that belongs to a text: the same whenever and wherever it is asked for."""
    digest = hashlib.sha256(f"{seed}:{purpose}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
