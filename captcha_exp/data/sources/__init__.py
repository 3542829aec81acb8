"""Labelled pictures: drawn by a generator (`generators`, `drawing`), or read from a folder (`folder`,
`labels`).

A source says first what it will give, cheaply and with nothing created, and then gives it.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from captcha_exp.config import CaptchaConfig, DataConfig, FolderConfig, GeneratorConfig, to_dict
from captcha_exp.data.sources import folder
from captcha_exp.data.sources.generators import check_glyphs as check_glyphs
from captcha_exp.data.sources.generators import font_files as font_files
from captcha_exp.data.sources.generators import generate_label as generate_label
from captcha_exp.data.sources.generators import generate_labels
from captcha_exp.data.sources.generators import get_renderer_spec as get_renderer_spec
from captcha_exp.data.sources.generators import rendering_dependencies as rendering_dependencies
from captcha_exp.data.sources.rendering import render_images as render_images
from captcha_exp.runtime.console import Display

IMAGE_INDEPENDENT_KEYS = (  # what a picture does not depend on
    *("cache", "workers", "split_seed", "validation_fraction", "test_fraction"),
    *("path", "labels", "pattern", "on_invalid"),  # of a folder: its content is what counts
)


@dataclass(frozen=True)
class ScanResult:
    """Which pictures a source has, and what became of the others; plain values, kept in the cache."""

    labels: list[str]  # N
    files: list[tuple[str, str]] = field(default_factory=list)  # N (name, SHA-256); none for drawn pictures
    refused: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)
    notes: dict[str, list[str]] = field(default_factory=dict)  # what to know of pictures in use -> names
    sizes: dict[str, int] = field(default_factory=dict)  # "WxH" in the files -> pictures


class Source(Protocol):
    """Where pictures come from."""

    provenance: dict[str, Any]
    """everything that the bytes of the pictures depend on, beside the size and alphabet of the config"""
    ignored: list[str]
    """names of files that are no pictures; not in the verdict, which is that of the pictures alone"""

    def scan(self, display: Display) -> ScanResult:
        """Which pictures there are."""
        ...

    def load_images(self, display: Display) -> npt.NDArray[np.uint8]:
        """(N, H, W, C), as long as the verdict's labels."""
        ...


class _GeneratorSource:
    """Pictures of a generator."""

    def __init__(self, data: GeneratorConfig, captcha: CaptchaConfig) -> None:
        check_glyphs(data, captcha)
        self._data, self._captcha = data, captcha
        self.provenance = {"source": _image_config(data), "origin": rendering_dependencies(data)}
        self.ignored: list[str] = []

    def scan(self, display: Display) -> ScanResult:  # noqa: ARG002 - too quick for a bar
        return ScanResult(generate_labels(self._data, self._captcha))

    def load_images(self, display: Display) -> npt.NDArray[np.uint8]:
        return render_images(self._data, self._captcha, range(self._data.count), display)


class _FolderSource:
    """Pictures of a folder; decoded when their verdict is not known yet, and kept until they are fetched."""

    def __init__(self, data: FolderConfig, captcha: CaptchaConfig, display: Display) -> None:
        self._captcha = captcha
        self._folder_scan = folder.scan_folder(data, captcha, display)
        self.ignored = list(self._folder_scan.ignored)
        self._decoded: folder.DecodedFolder | None = None
        asked = {**_image_config(data), "files_sha256": self._folder_scan.sha256}
        self.provenance = {"source": asked, "origin": folder.decoding_dependencies()}

    def scan(self, display: Display) -> ScanResult:
        read = self._decoded = folder.decode_folder(self._folder_scan, self._captcha, display)
        return ScanResult(
            labels=[candidate.label for candidate in read.accepted],
            files=[(candidate.name, candidate.sha256) for candidate in read.accepted],
            refused=[(candidate.name, candidate.reason) for candidate in read.rejected],
            notes=read.remarks,
            sizes=read.sizes,
        )

    def load_images(self, display: Display) -> npt.NDArray[np.uint8]:
        read = self._decoded or folder.decode_folder(self._folder_scan, self._captcha, display)
        self._decoded = None
        return read.images


def make_source(data: DataConfig, captcha: CaptchaConfig, display: Display) -> Source:
    """The source of a resolved config; nothing is drawn or decoded yet.

    Raises:
        UserError: a font cannot draw the alphabet, or a folder cannot be used; the line says what to do.
    """
    return (
        _FolderSource(data, captcha, display)
        if isinstance(data, FolderConfig)
        else _GeneratorSource(data, captcha)
    )


def _image_config(data: DataConfig) -> dict[str, Any]:
    return {key: value for key, value in to_dict(data).items() if key not in IMAGE_INDEPENDENT_KEYS}
