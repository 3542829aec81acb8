"""Text <-> class ids. The order of the alphabet is the order of the classes, and part of every trained
model."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass


def alphabet_mistake(characters: str) -> str | None:
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


@dataclass(frozen=True)
class Alphabet:
    """The characters of the labels, in class order: the class id of `characters[k]` is k."""

    characters: str

    def __post_init__(self) -> None:
        if mistake := alphabet_mistake(self.characters):
            raise ValueError(f"alphabet {self.characters!r}: {mistake}")

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Class ids of a text.

        Raises:
            ValueError: a character is not in the alphabet; add it to captcha.alphabet, or mend the label.
        """
        ids = [self.characters.find(character) for character in text]
        if -1 in ids:
            stranger = text[ids.index(-1)]
            raise ValueError(f"{stranger!r} in {text!r} is not in the alphabet {self.characters!r}")
        return ids

    def fold(self, text: str) -> str:
        """The text with each letter that the alphabet has in the other case alone in that case."""
        return "".join(
            c
            if c in self.characters
            else next((o for o in (c.lower(), c.upper()) if o in set(self.characters)), c)
            for c in text
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text that the class ids spell."""
        return "".join(self.characters[k] for k in ids)
