"""Conversion between labels and class ids.

The order of the alphabet is the order of the classes, and part of every trained model.
"""

from collections.abc import Iterable
from dataclasses import dataclass

END = -1  # class id of the positions after the last character of a label
NO_CHARACTER = "∅"  # shown where a character is missing in a prediction, or was added by it


@dataclass(frozen=True)
class Alphabet:
    """The characters of the labels in class order: `characters[k]` has class id k."""

    characters: str

    def __post_init__(self) -> None:
        from captcha_exp.config.validators import check_alphabet  # the package config imports pydantic

        try:
            check_alphabet(self.characters)
        except ValueError as error:
            raise ValueError(f"alphabet {self.characters!r}: {error}") from None

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Convert a text to class ids.

        Raises:
            ValueError: a character is not in the alphabet; add it to captcha.alphabet, or fix the label.
        """
        ids = [self.characters.find(character) for character in text]
        if -1 in ids:
            unknown = text[ids.index(-1)]
            raise ValueError(f"{unknown!r} in {text!r} is not in the alphabet {self.characters!r}")
        return ids

    def encode_padded(self, text: str, length: int) -> list[int]:
        """Convert a text to `length` class ids, with END after its last character.

        Raises:
            ValueError: a character is not in the alphabet; add it to captcha.alphabet, or fix the label.
        """
        return self.encode(text) + [END] * (length - len(text))

    def fold_case(self, text: str) -> str:
        """Convert each letter to the other case if the alphabet has only that one."""
        return "".join(
            c
            if c in self.characters
            else next((o for o in (c.lower(), c.upper()) if o in set(self.characters)), c)
            for c in text
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Convert class ids to text; END is not a character."""
        return "".join(self.characters[k] for k in ids if k != END)
