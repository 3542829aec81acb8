"""Labelled pictures: drawn by a generator (`generators`, `drawing`), or read from a folder (`folder`,
`labels`).

A source says first what it will give, cheaply and with nothing created, and then gives it.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from captcha_exp.config import Captcha, Data, Folder, Generator, to_dict
from captcha_exp.data.sources import folder
from captcha_exp.data.sources.generators import check_glyphs as check_glyphs
from captcha_exp.data.sources.generators import font_files as font_files
from captcha_exp.data.sources.generators import label as label
from captcha_exp.data.sources.generators import labels
from captcha_exp.data.sources.generators import library as library
from captcha_exp.data.sources.generators import origin as origin
from captcha_exp.data.sources.rendering import draw as draw
from captcha_exp.runtime.console import Display

INDIFFERENT = (  # what a picture does not depend on
    *("cache", "workers", "split_seed", "validation_fraction", "test_fraction"),
    *("path", "labels", "pattern", "on_bad"),  # of a folder: its content is what counts
)


@dataclass(frozen=True)
class Verdict:
    """Which pictures a source has, and what became of the others; plain values, kept in the cache."""

    labels: list[str]  # N
    files: list[tuple[str, str]] = field(default_factory=list)  # N (name, SHA-256); none for drawn pictures
    refused: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)
    notes: dict[str, list[str]] = field(default_factory=dict)  # what to know of pictures in use -> names
    sizes: dict[str, int] = field(default_factory=dict)  # "WxH" in the files -> pictures


class Source(Protocol):
    """Where pictures come from."""

    made_from: dict[str, Any]
    """everything that the bytes of the pictures depend on, beside the size and alphabet of the config"""
    others: list[str]
    """names of files that are no pictures; not in the verdict, which is that of the pictures alone"""

    def verdict(self, display: Display) -> Verdict:
        """Which pictures there are."""
        ...

    def pictures(self, display: Display) -> npt.NDArray[np.uint8]:
        """(N, H, W, C), as long as the verdict's labels."""
        ...


class _Drawn:
    """Pictures of a generator."""

    def __init__(self, data: Generator, captcha: Captcha) -> None:
        check_glyphs(data, captcha)
        self._data, self._captcha = data, captcha
        self.made_from = {"source": _asked(data), "origin": origin(data)}
        self.others: list[str] = []

    def verdict(self, display: Display) -> Verdict:  # noqa: ARG002 - too quick for a bar
        return Verdict(labels(self._data, self._captcha))

    def pictures(self, display: Display) -> npt.NDArray[np.uint8]:
        return draw(self._data, self._captcha, range(self._data.count), display)


class _Folder:
    """Pictures of a folder; decoded when their verdict is not known yet, and kept until they are fetched."""

    def __init__(self, data: Folder, captcha: Captcha, display: Display) -> None:
        self._captcha = captcha
        self._found = folder.find(data, captcha, display)
        self.others = list(self._found.others)
        self._read: folder.Read | None = None
        asked = {**_asked(data), "files_sha256": self._found.sha256}
        self.made_from = {"source": asked, "origin": folder.origin()}

    def verdict(self, display: Display) -> Verdict:
        read = self._read = folder.read(self._found, self._captcha, display)
        return Verdict(
            labels=[candidate.label for candidate in read.used],
            files=[(candidate.name, candidate.sha256) for candidate in read.used],
            refused=[(candidate.name, candidate.reason) for candidate in read.refused],
            notes=read.notes,
            sizes=read.sizes,
        )

    def pictures(self, display: Display) -> npt.NDArray[np.uint8]:
        read = self._read or folder.read(self._found, self._captcha, display)
        self._read = None
        return read.pictures


def source(data: Data, captcha: Captcha, display: Display) -> Source:
    """The source of a resolved config; nothing is drawn or decoded yet.

    Raises:
        UserError: a font cannot draw the alphabet, or a folder cannot be used; the line says what to do.
    """
    return _Folder(data, captcha, display) if isinstance(data, Folder) else _Drawn(data, captcha)


def _asked(data: Data) -> dict[str, Any]:
    return {key: value for key, value in to_dict(data).items() if key not in INDIFFERENT}
