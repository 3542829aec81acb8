"""Seeds for random number generators: functions of (seed, purpose, epoch or index) alone.

Random numbers therefore do not depend on the number of workers, the launcher, or previous draws. A seed is
the first eight bytes of the SHA-256 of its key.
"""

import hashlib
import random


def derive_seed(seed: int, purpose: str, *index: int) -> int:
    """Return a seed in [0, 2**63), independent of the seeds of other purposes and indices."""
    key = ":".join([str(seed), purpose, *map(str, index)])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def rng(seed: int, purpose: str, *index: int) -> random.Random:
    """Return a generator for one purpose and index."""
    return random.Random(derive_seed(seed, purpose, *index))


def hash_to_unit(seed: int, purpose: str, text: str) -> float:
    """Return a number in [0, 1) that depends only on seed, purpose and text."""
    digest = hashlib.sha256(f"{seed}:{purpose}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
