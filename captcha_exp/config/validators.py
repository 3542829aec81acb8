"""Checks of single settings that need more than a type and limits."""

import unicodedata


def alphabet_error(characters: str) -> str | None:
    """What is wrong with an alphabet and what to do about it, or None."""
    repeated = sorted({c for c in characters if characters.count(c) > 1})
    if repeated:
        named = ", ".join(repr(c) for c in repeated)
        return f"{named} occurs more than once; write each character once"
    if len(characters) < 2:
        return "an alphabet needs at least two characters"
    unseen = [c for c in characters if unicodedata.category(c)[0] in "CZM"]
    if unseen:
        return f"{unseen[0]!r} cannot be seen as a character of its own; leave it out"
    return None
