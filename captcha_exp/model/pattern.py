r"""A pattern of texts: a mask such as `[0-9]{2}[A-Z]{3}`, within the lengths of a model. Imports no torch.

A mask is a sequence of characters, `.` for any, sets `[a-z0-9]` and `[^0-9]`, each optionally repeated:
`{3}`, `{2,4}` or `?`. A backslash takes the meaning from the next character. It describes the whole text.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from captcha_exp.errors import UserError

NO_STATE = -1
MAX_ELEMENTS = 64  # characters of the longest text of a mask
_REPEAT = re.compile(r"\{([0-9]{1,3})(?:,([0-9]{1,3}))?\}|\?")


@dataclass(frozen=True)
class Pattern:
    """A deterministic automaton over class ids, without cycles; state 0 is that of the empty text."""

    next_state: npt.NDArray[np.int64]  # (Q, K), NO_STATE where a character leaves the pattern
    is_final: npt.NDArray[np.bool_]  # (Q,) whether a text may end in a state


class _Element(NamedTuple):
    """One character of a mask."""

    allowed: frozenset[int]  # class ids
    is_optional: bool


@functools.lru_cache(maxsize=64)
def compile_pattern(alphabet: str, min_length: int, max_length: int, mask: str | None) -> Pattern:
    """Return the pattern of the texts of these lengths that a mask, if there is one, allows.

    Raises:
        UserError: the mask is not one, or allows no text of these lengths.
    """
    if mask is None:
        any_character = frozenset(range(len(alphabet)))
        elements = [_Element(any_character, n >= min_length) for n in range(max_length)]
    else:
        elements = list(_parse(mask, alphabet))
    states: dict[tuple[int, frozenset[int]], int] = {}
    transitions: list[dict[int, tuple[int, frozenset[int]]]] = []
    start = (0, _skip_optional(elements, frozenset([0])))
    waiting = [start]
    states[start] = 0
    for length, positions in waiting:  # grows while it is read
        row = {}
        for character in range(len(alphabet)) if length < max_length else ():
            here = (n for n in positions if n < len(elements) and character in elements[n].allowed)
            if following := frozenset(n + 1 for n in here):
                target = (length + 1, _skip_optional(elements, following))
                row[character] = target
                if target not in states:
                    states[target] = len(states)
                    waiting.append(target)
        transitions.append(row)
    next_state = np.full((len(states), len(alphabet)), NO_STATE, np.int64)
    for number, row in enumerate(transitions):
        for character, target in row.items():
            next_state[number, character] = states[target]
    is_final = np.array([n >= min_length and len(elements) in positions for n, positions in states])
    if not is_final.any():
        lengths = f"{min_length} to {max_length}" if min_length < max_length else str(max_length)
        raise UserError(f"--mask {mask}: allows no text of {lengths} characters, which the model predicts")
    next_state.flags.writeable = is_final.flags.writeable = False  # cached, and shared by all callers
    return Pattern(next_state, is_final)


def _skip_optional(elements: Sequence[_Element], positions: frozenset[int]) -> frozenset[int]:
    """Return the positions in a mask, and those after optional elements that follow them."""
    found, waiting = set(positions), list(positions)
    while waiting:
        n = waiting.pop()
        if n < len(elements) and elements[n].is_optional and n + 1 not in found:
            found.add(n + 1)
            waiting.append(n + 1)
    return frozenset(found)


def _parse(mask: str, alphabet: str) -> Iterator[_Element]:
    """Yield the elements of a mask.

    Raises:
        UserError: it is not a mask; the line says where.
    """
    start = total = 0
    while start < len(mask):
        characters, end = _parse_characters(mask, start, alphabet)
        allowed = frozenset(k for k, c in enumerate(alphabet) if c in characters)
        if not allowed:
            raise UserError(
                f"--mask {mask}: {mask[start:end]} has none of the model's characters, {alphabet}"
            )
        low = high = 1
        if repeat := _REPEAT.match(mask, end):
            end = repeat.end()
            low = 0 if repeat[0] == "?" else int(repeat[1])
            high = 1 if repeat[0] == "?" else int(repeat[2] or low)
            if low > high:
                raise UserError(f"--mask {mask}: {repeat[0]}: the first number must not be the larger one")
        total += high
        if total > MAX_ELEMENTS:
            raise UserError(f"--mask {mask}: has more than {MAX_ELEMENTS} characters")
        for n in range(high):
            yield _Element(allowed, n >= low)
        start = end


def _parse_characters(mask: str, start: int, alphabet: str) -> tuple[set[str], int]:
    """Return the characters that a position of a mask allows, and where the next one begins.

    Raises:
        UserError: a sign has no meaning there; the line says where.
    """
    character = mask[start]
    if character == ".":
        return set(alphabet), start + 1
    if character == "[":
        return _parse_set(mask, start, alphabet)
    if character in "]{}?*+()|^$":
        raise UserError(
            f"--mask {mask}: {character} at character {start + 1}: a mask has characters, ., [a-z], {{2}}, "
            f"{{2,4}} and ?; write \\{character} for the character itself"
        )
    literal, end = _parse_literal(mask, start)
    return {literal}, end


def _parse_literal(mask: str, start: int) -> tuple[str, int]:
    """Return the character at a position of a mask, perhaps after a backslash, and where the next one begins.

    Raises:
        UserError: a backslash is the last character.
    """
    if mask[start] != "\\":
        return mask[start], start + 1
    if start + 1 == len(mask):
        raise UserError(f"--mask {mask}: ends with a backslash; write \\\\ for a backslash")
    return mask[start + 1], start + 2


def _parse_set(mask: str, start: int, alphabet: str) -> tuple[set[str], int]:
    """Return the characters of the set that begins at a position of a mask, and where the next one begins.

    Raises:
        UserError: the set does not end, or a range in it is reversed.
    """
    is_negated = mask.startswith("^", start + 1)
    position = start + 1 + is_negated
    members: set[str] = set()
    while position < len(mask) and mask[position] != "]":
        first, position = _parse_literal(mask, position)
        last = first
        if mask.startswith("-", position) and position + 1 < len(mask) and mask[position + 1] != "]":
            last, position = _parse_literal(mask, position + 1)
        if last < first:
            raise UserError(f"--mask {mask}: {first}-{last} has its ends in the wrong order")
        members.update(c for c in alphabet if first <= c <= last)
    if position >= len(mask):
        raise UserError(f"--mask {mask}: the set that begins at character {start + 1} has no ]")
    return set(alphabet) - members if is_negated else members, position + 1
