"""Parse overrides: key=value in Hydra's grammar, and text that the grammar cannot read.

A value that Hydra can read keeps Hydra's meaning. Some text needs quotes inside those of the shell, as Hydra
reserves blanks, brackets, commas, quotes and `=` and knows no letters but ASCII: `~/captchas`, an alphabet, a
regular expression. It is quoted here: commas outside of brackets separate the values of a sweep; [...], {...}
and Hydra's functions keep their structure; each item that Hydra cannot read is text, exactly as typed.
"""

import os
import re
import shlex
from functools import cache
from typing import TYPE_CHECKING, Any

from captcha_exp.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override

_CLOSING = {"(": ")", "[": "]", "{": "}"}
_TOKEN = re.compile(  # a quoted item, an escaped character, a bracket or a comma
    r"""(?:^|(?<=[\[({,:=]))[ \t]*(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")[ \t]*(?=[\])},:]|\Z)"""
    r"|\\.|[][(){},]",
    re.DOTALL,
)
_CONTAINER = re.compile(r"(\[|\{|[a-z]+ *\()(.*)[])}]", re.DOTALL)


def parse_override(text: str, loader: "ConfigLoader | None" = None) -> "Override":
    """Parse an override; its `input_line` is the text in Hydra's grammar.

    Raises:
        ConfigError: it has no key, or its meaning is not clear; the line has the word to type.
    """
    key, equals, value = text.partition("=")
    if not key.lstrip("+~") or not _can_read(f"{key}=0" if equals else text):
        hint = "write key=value, as in train.epochs=3"
        if re.search(r"[/\\~]", text) or os.path.isdir(text):  # noqa: PTH112 - Path.is_dir raises on long names
            hint = f"for a folder of images write data=folder {as_typed('data.path', text)}"
        raise ConfigError(f"{text!r}: invalid override; {hint}")
    readable = _in_grammar(key, value) if equals else text
    if problem := _problem(readable):
        raise ConfigError(f"{text}: {problem}; write {as_typed(key, value)} for this text")
    override = _parser().parse_overrides([readable])[0]
    override.config_loader = loader
    return override


def _in_grammar(key: str, value: str) -> str:
    """Return key=value with quotes around the items that the grammar cannot read."""
    text = f"{key}={value}"
    return text if _can_read(text) else f"{key}={_quote_items(value)}"


def plain_value(override: "Override") -> Any:
    r"""Return the value of an override, with `\\${` for `${` as in OmegaConf.

    Raises:
        ConfigError: it has an interpolation, and there is no config to look in.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values: Any = OmegaConf.to_container(OmegaConf.create([override.value()]), resolve=True)
    except OmegaConfBaseException:
        raise ConfigError(f"{override.input_line}: must be a value, without ${{...}}") from None
    return values[0]


def as_typed(key: str, value: str) -> str:
    """Return the word to type in a shell that sets a key to a text."""
    word = f"{key}={value}"
    readable = _in_grammar(key, value)
    is_plain = _can_read(readable) and _parser().parse_overrides([readable])[0].value() == value
    if not is_plain:
        mark = '"' if "'" in value else "'"
        word = f"{key}={quote(value, mark)}"
    return shlex.quote(word) if re.search(r'["$`\\!]', word) or is_plain else f'"{word}"'


def quote(text: str, mark: str = "'", *, interpolations: bool = False) -> str:
    r"""Quote text for Hydra's grammar and OmegaConf. Both keep backslashes, except before a quote and `${`.

    With `interpolations`, `${...}` keeps its meaning.
    """
    text = re.sub(r"(\\*)\$\{" + (r"(?![^}]+\})" if interpolations else ""), r"\1\1\\${", text)
    escaped = re.sub(
        rf"(\\*)({mark}|\Z)", lambda match: match[1] * 2 + ("\\" + mark if match[2] else ""), text
    )
    return f"{mark}{escaped}{mark}"


def _quote_items(text: str) -> str:
    """Quote each item of a value that the grammar cannot read."""
    items = _split(text)
    if items is None:  # a bracket without its counterpart: one text, unless a comma could separate two
        return text if "," in text else quote(text.strip(" \t"), interpolations=True)
    return ",".join(map(_quote_item, items))


def _quote_item(text: str) -> str:
    text = text.strip(" \t")
    if _can_read(f"k={text}") or text[:1] in ("'", '"'):
        return text
    match = _CONTAINER.fullmatch(text)
    items = None if match is None else _split(match[2])
    if match is None or items is None:
        return quote(text, interpolations=True)
    opening = match[1]
    if opening == "{":
        pairs = [item.partition(":") for item in items]
        if all(colon and _can_read(f"k={{{key}:0}}") for key, colon, _ in pairs):
            return "{" + ",".join(f"{key}:{_quote_item(value)}" for key, _, value in pairs) + "}"
    elif opening == "[" or opening.rstrip(" (") in _parser().functions.functions:
        return opening + ",".join(map(_quote_item, items)) + _CLOSING[opening[-1]]
    return quote(text, interpolations=True)


def _split(text: str) -> list[str] | None:
    """Split at the commas outside of brackets and quoted items; None if the brackets do not match."""
    items, start = [], 0
    expected: list[str] = []
    for match in _TOKEN.finditer(text):
        if (mark := match[0]) in _CLOSING:
            expected.append(_CLOSING[mark])
        elif mark in _CLOSING.values() and (not expected or expected.pop() != mark):
            return None
        elif mark == "," and not expected:
            items.append(text[start : match.start()])
            start = match.end()
    return None if expected else [*items, text[start:]]


@cache
def _parser() -> "OverridesParser":
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


def _can_read(text: str) -> bool:
    return not _problem(text)


def _problem(text: str) -> str:
    """Return why the grammar cannot read an override; an empty string if it can."""
    from hydra.errors import HydraException

    try:
        _parser().parse_overrides([text])
    except HydraException as error:
        reason = re.search(r" while evaluating '.*': (.*)", str(error))
        return reason[1] if reason else "its brackets, commas or quotes could mean several things"
    return ""
