"""Validation of single values that needs more than a type and limits."""

import unicodedata


def alphabet_error(characters: str) -> str | None:
    """Return the problem of an alphabet and its fix, or None if it is valid."""
    repeated = sorted({c for c in characters if characters.count(c) > 1})
    if repeated:
        names = ", ".join(repr(c) for c in repeated)
        return f"{names} occurs more than once; write each character once"
    if len(characters) < 2:
        return "an alphabet needs at least two characters"
    invisible = [c for c in characters if unicodedata.category(c)[0] in "CZM"]
    if invisible:
        return f"{invisible[0]!r} is not a visible character; remove it"
    return None
