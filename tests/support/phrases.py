"""Count phrases of unidiomatic English in prose: Markdown, and the strings and comments of Python files.

At most `LIMIT` of them per 1,000 words are accepted. A phrase that is right in its place may stay.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

LIMIT = 2.0  # phrases per 1,000 words
MIN_WORDS = 4  # of a string constant that counts as prose
PHRASES = re.compile(
    "|".join(
        (
            r"\b(?:tells?|told|foretold|foretell\w*|untold)\b",
            r"\bwhat (?:is|was|are|were|has|stands|can|runs|there|it|a|the)\b",
            r"\b(?:stands?|stood)\b",
            r"\b(?:gone on|goes on|go on|going on)\b",
            r"\b(?:is gone|are gone|there is no|there are no)\b",
            r"\b(?:nobody|somebody|whoever)\b",
            r"\b(?:so that|so many|just so|so much)\b",
            r"\b(?:is|are|was|were) to (?:be|have|end|go|stop|get|take|show)\b",
            r"\b(?:amid|beside|anew|mend|mended|spare[sd]?|borne|hears?|heard|hearing)\b",
            r"\b(?:looks?|looked|looking)\b",
        )
    ),
    re.IGNORECASE,
)


@dataclass(frozen=True)
class PhraseCount:
    """Words of a text, and the phrases found in it."""

    words: int
    phrases: tuple[str, ...]

    def __add__(self, other: "PhraseCount") -> "PhraseCount":
        return PhraseCount(self.words + other.words, self.phrases + other.phrases)

    @property
    def per_thousand(self) -> float:
        """Phrases per 1,000 words."""
        return 1000 * len(self.phrases) / self.words if self.words else 0.0


def count_text(text: str) -> PhraseCount:
    """Count the words and phrases of a text."""
    return PhraseCount(
        words=len(re.findall(r"\w+", text)),
        phrases=tuple(found.group() for found in PHRASES.finditer(text)),
    )


def prose_of_python(source: str) -> str:
    """Return the comments and the longer string constants, docstrings included, of a Python source."""
    comments = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    strings = [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and len(node.value.split()) >= MIN_WORDS
    ]
    return "\n".join([*comments, *strings])


def count_file(path: Path) -> PhraseCount:
    """Count the phrases of a Python file's prose, or of the whole text of any other file."""
    text = path.read_text(encoding="utf-8")
    return count_text(prose_of_python(text) if path.suffix == ".py" else text)


def count_files(paths: Iterable[Path]) -> PhraseCount:
    """Count the phrases of several files together."""
    total = PhraseCount(0, ())
    for path in paths:
        total += count_file(path)
    return total
