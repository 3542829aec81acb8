"""Validation of single values that needs more than a type and limits."""

import os
import unicodedata


def check_alphabet(characters: str) -> str:
    """Return a valid alphabet unchanged.

    Raises:
        ValueError: it is invalid; the message has the problem and its fix.
    """
    repeated = sorted({c for c in characters if characters.count(c) > 1})
    if repeated:
        names = ", ".join(repr(c) for c in repeated)
        raise ValueError(f"{names} occurs more than once; write each character once")
    if len(characters) < 2:
        raise ValueError("an alphabet needs at least two characters")
    invisible = [c for c in characters if unicodedata.category(c)[0] in "CZM"]
    if invisible:
        raise ValueError(f"{invisible[0]!r} is not a visible character; remove it")
    return characters


def expand_user(path: str) -> str:
    """Return a path with `~` or `~user` at its start replaced by the home directory.

    Raises:
        ValueError: the home directory is not known.
    """
    expanded = os.path.expanduser(path)  # noqa: PTH111 - returns text, and does not raise
    if expanded.startswith("~"):
        raise ValueError(
            "the home directory of this user is not known; write the whole path (./~ for a file whose name "
            "begins with ~)"
        )
    return expanded
