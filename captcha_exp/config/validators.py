"""Validation of single values that needs more than a type and limits."""

import itertools
import os
import unicodedata
from pathlib import Path
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

ARITHMETIC_OPERATORS = "+-x*/"
ARITHMETIC_LENGTHS = (4, 8)  # 3+5= to 100+200=


class OrInferred:
    """Annotation of a value that may be `auto` until it is inferred from the images of a folder.

    The type does not have it: `dataset.inspect_dataset` returns the config with all values inferred.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.union_schema([core_schema.literal_schema(["auto"]), handler(source)])


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


def check_arithmetic(alphabet: str, min_length: int, length: int) -> None:
    """Check that sums can be written with an alphabet and lengths.

    Raises:
        ValueError: they cannot; the message says what to change.
    """
    if missing := "".join(c for c in "0123456789=" if c not in alphabet):
        raise ValueError(f"data.text=arithmetic: captcha.alphabet={alphabet} lacks {missing}; add them")
    if not set(ARITHMETIC_OPERATORS) & set(alphabet):
        raise ValueError(
            f"data.text=arithmetic: captcha.alphabet={alphabet} has no operator; add one or more of "
            f"{' '.join(ARITHMETIC_OPERATORS)}"
        )
    shortest, longest = ARITHMETIC_LENGTHS
    if min_length < shortest or length > longest:
        raise ValueError(
            f"data.text=arithmetic: has {shortest} to {longest} characters, but "
            f"captcha.min_length={min_length} and captcha.length={length}"
        )


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


def absolute_paths(paths: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Return a path, or each of a list of folders, as an absolute path.

    Raises:
        ValueError: a path has a circular symbolic link, or a folder is in another one, or the same.
    """
    if not isinstance(paths, str):
        absolute = tuple(str(absolute_paths(path)) for path in paths)
        for one, other in itertools.permutations(absolute, 2):
            if Path(one).is_relative_to(other):
                what = (
                    "is there twice" if one == other else f"is in {other}, of which subfolders are read, too"
                )
                raise ValueError(f"{one}: {what}; leave out one of them")
        return absolute
    try:
        return str(Path(paths).resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{paths}: {error}") from None
