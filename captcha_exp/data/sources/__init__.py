"""Sources of labeled images: captcha generators (`generators`, `rendering`) and folders (`folder`, `labels`).

A source is first scanned for its labels, which creates nothing, and then loads its images.
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

IMAGE_INDEPENDENT_KEYS = (  # keys of the data group that do not affect pixels
    *("cache", "workers", "split_seed", "validation_fraction", "test_fraction"),
    *("path", "labels", "filename_pattern", "on_invalid"),  # of a folder, only its content counts
)


@dataclass(frozen=True)
class ScanResult:
    """The images that a source has and those it rejected; plain values, stored in the cache file."""

    labels: list[str]  # N
    files: list[tuple[str, str]] = field(default_factory=list)  # N (name, SHA-256); empty for a generator
    rejected: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)
    remarks: dict[str, list[str]] = field(default_factory=dict)  # remark -> names of used images
    sizes: dict[str, int] = field(default_factory=dict)  # original "WxH" -> number of images


class Source(Protocol):
    """A source of labeled images."""

    provenance: dict[str, Any]
    """everything that the pixels depend on, except the captcha group of the config"""
    ignored: list[str]
    """names of files that are not images; not part of the scan result"""

    def scan(self) -> ScanResult:
        """Return the labels, without loading images of a generator."""
        ...

    def load_images(self) -> npt.NDArray[np.uint8]:
        """Return the images (N, H, W, C) in the order of the labels."""
        ...


class _GeneratorSource:
    """The images of a captcha generator."""

    def __init__(self, data: GeneratorConfig, captcha: CaptchaConfig) -> None:
        check_glyphs(data, captcha)
        self._data, self._captcha = data, captcha
        self.provenance = {"source": _image_config(data), "dependencies": rendering_dependencies(data)}
        self.ignored: list[str] = []

    def scan(self) -> ScanResult:
        return ScanResult(generate_labels(self._data, self._captcha))

    def load_images(self) -> npt.NDArray[np.uint8]:
        return render_images(self._data, self._captcha, range(self._data.count))


class _FolderSource:
    """The images of a folder; a scan decodes them and keeps them until they are loaded."""

    def __init__(self, data: FolderConfig, captcha: CaptchaConfig) -> None:
        self._captcha = captcha
        self._folder_scan = folder.scan_folder(data, captcha)
        self.ignored = list(self._folder_scan.ignored)
        self._decoded: folder.DecodedFolder | None = None
        source = {**_image_config(data), "files_sha256": self._folder_scan.sha256}
        self.provenance = {"source": source, "dependencies": folder.decoding_dependencies()}

    def scan(self) -> ScanResult:
        decoded = self._decoded = folder.decode_folder(self._folder_scan, self._captcha)
        return ScanResult(
            labels=[candidate.label for candidate in decoded.accepted],
            files=[(candidate.name, candidate.sha256) for candidate in decoded.accepted],
            rejected=[(candidate.name, candidate.reason) for candidate in decoded.rejected],
            remarks=decoded.remarks,
            sizes=decoded.sizes,
        )

    def load_images(self) -> npt.NDArray[np.uint8]:
        decoded = self._decoded or folder.decode_folder(self._folder_scan, self._captcha)
        self._decoded = None
        return decoded.images


def make_source(data: DataConfig, captcha: CaptchaConfig) -> Source:
    """Return the data source of a resolved config, without rendering or decoding images.

    Raises:
        UserError: a font lacks characters of the alphabet, or a folder cannot be used; the line says why.
    """
    return _FolderSource(data, captcha) if isinstance(data, FolderConfig) else _GeneratorSource(data, captcha)


def _image_config(data: DataConfig) -> dict[str, Any]:
    """Return the keys of the data group that affect pixels."""
    return {key: value for key, value in to_dict(data).items() if key not in IMAGE_INDEPENDENT_KEYS}
