"""Names of files in messages: shortened lists, and characters that a terminal cannot print."""

from collections.abc import Sequence


def preview(names: Sequence[str], max_names: int = 3) -> str:
    """Return the first names, as in "a.png, b.png, c.png and 7 more"."""
    more = f" and {len(names) - max_names:,} more" if len(names) > max_names else ""
    return ", ".join(map(escape_unprintable, names[:max_names])) + more


def escape_unprintable(name: str) -> str:
    """Escape the characters of a file name that a terminal cannot print, including invalid UTF-8."""
    try:
        text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can contain
        text = name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
