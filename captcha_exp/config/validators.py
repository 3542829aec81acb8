"""Validation of single values that needs more than a type and limits."""

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
