"""Sources of labeled images: captcha generators (`generators`, `rendering`) and folders (`folder`, `labels`).

A source is first scanned for its labels, which creates nothing, and then loads its images.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from captcha_exp.config import CaptchaConfig, DataConfig, FolderConfig, GeneratorConfig, to_dict
from captcha_exp.data import images
from captcha_exp.data.sources import decoder, folder
from captcha_exp.data.sources.decoder import ScanResult as ScanResult
from captcha_exp.data.sources.files import folder_number as folder_number
from captcha_exp.data.sources.files import unwrap
from captcha_exp.data.sources.generators import check_glyphs as check_glyphs
from captcha_exp.data.sources.generators import check_rendering as check_rendering
from captcha_exp.data.sources.generators import font_files as font_files
from captcha_exp.data.sources.generators import generate_labels as generate_labels
from captcha_exp.data.sources.generators import get_renderer_spec as get_renderer_spec
from captcha_exp.data.sources.generators import rendering_dependencies as rendering_dependencies
from captcha_exp.data.sources.infer import Inference
from captcha_exp.data.sources.rendering import render_images as render_images

IMAGE_INDEPENDENT_KEYS = (  # keys of the data group that do not affect pixels
    *("cache", "workers", "split_seed", "validation_fraction", "test_fraction", "folds", "fold"),
    *("path", "shares", "labels", "match_by", "filename_pattern", "split_by", "apply_corrections"),
    *("on_invalid", "on_conflict", "on_duplicate"),  # of a folder, only its content counts
)


class GeneratorSource:
    """The images of a captcha generator."""

    def __init__(self, data: GeneratorConfig, captcha: CaptchaConfig) -> None:
        check_glyphs(data, captcha)
        self._data, self.captcha = data, captcha
        self.inferences: list[Inference] = []
        """the values of the captcha group that were `auto`; not part of the scan result"""
        self.provenance = {"source": _image_config(data), "dependencies": rendering_dependencies(data)}
        """everything that the pixels depend on, except the captcha group of the config"""
        self.ignored: list[str] = []
        """names of files that are not images; not part of the scan result"""
        self.corrections: list[dict[str, Any]] = []
        """the corrections of labels that were applied; not part of the scan result"""
        self.advice: list[str] = []
        """what is odd about the labels, and what to do about it; not part of the scan result, either"""

    def scan(self) -> ScanResult:
        """Return the labels, without loading images of a generator."""
        return ScanResult(generate_labels(self._data, self.captcha))

    def load_images(self) -> npt.NDArray[np.uint8]:
        """Return the images (N, H, W, C) in the order of the labels."""
        return render_images(self._data, self.captcha, range(self._data.count))

    def load_originals(self, _scan: ScanResult, indices: Sequence[int]) -> list[npt.NDArray[np.uint8]]:
        """Return the images (H, W, 3) of these indices before grayscale and resize."""
        captcha = replace(self.captcha, width=self._data.width, height=self._data.height, channels=3)
        return list(render_images(self._data, captcha, indices))


class FolderSource:
    """The images of a folder; a scan decodes them and keeps them until they are loaded."""

    def __init__(self, data: FolderConfig, captcha: CaptchaConfig) -> None:
        self._folder_scan = folder.scan_folder(data, captcha)
        self.captcha, self.inferences = self._folder_scan.captcha, list(self._folder_scan.inferences)
        self.ignored, self.advice = list(self._folder_scan.ignored), list(self._folder_scan.advice)
        self.corrections = [each.to_json() for each in self._folder_scan.corrections]
        self._images: npt.NDArray[np.uint8] | None = None
        self._keep_duplicates = data.on_duplicate == "keep"
        source = {
            **_image_config(data),
            "duplicates": "keep" if self._keep_duplicates else "drop",
            "files_sha256": self._folder_scan.sha256,
        }
        self.provenance = {"source": source, "dependencies": decoder.decoding_dependencies()}

    def scan(self) -> ScanResult:
        self._images, scan = decoder.decode_folder(self._folder_scan, self._keep_duplicates)
        return scan

    def load_images(self) -> npt.NDArray[np.uint8]:
        """Return the images (N, H, W, C) in the order of the labels."""
        if self._images is None:
            self._images, _ = decoder.decode_folder(self._folder_scan, self._keep_duplicates)
        decoded, self._images = self._images, None
        return decoded

    def load_originals(self, scan: ScanResult, indices: Sequence[int]) -> list[npt.NDArray[np.uint8]]:
        """Return the images (H, W, 3) of these indices before grayscale and resize."""
        names = [scan.files[n][0] for n in indices]
        found = {
            name: images.to_array(images.decode(unwrap(content)).image, 3)
            for name, content in self._folder_scan.files.read(names)
        }
        return [found[name] for name in names]


Source: TypeAlias = GeneratorSource | FolderSource


def make_source(data: DataConfig, captcha: CaptchaConfig) -> Source:
    """Return the data source of a resolved config, without rendering or decoding images.

    Raises:
        UserError: a font lacks characters of the alphabet, or a folder cannot be used; the line says why.
    """
    if isinstance(data, FolderConfig):
        return FolderSource(data, captcha)
    return GeneratorSource(data, captcha)


def _image_config(data: DataConfig) -> dict[str, Any]:
    """Return the keys of the data group that affect pixels."""
    return {key: value for key, value in to_dict(data).items() if key not in IMAGE_INDEPENDENT_KEYS}
