"""Decode the images of a folder that was scanned, and find those that are the same."""

import hashlib
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import features

from captcha_exp.data import images
from captcha_exp.data.duplicates import DuplicateGroup, find_duplicates
from captcha_exp.data.sources.folder import FolderScan, decode_image, read_bytes
from captcha_exp.data.sources.labels import Candidate
from captcha_exp.errors import UserError
from captcha_exp.runtime.console import escape_unprintable, progress_bar

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScanResult:
    """The images that a source has and those it rejected; plain values, stored in the cache file."""

    labels: list[str]  # N
    files: list[tuple[str, str]] = field(default_factory=list)  # N (name, SHA-256); empty for a generator
    rejected: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)
    conflicts: list[str] = field(default_factory=list)  # names of those with another label for their pixels
    repeated: list[str] = field(default_factory=list)  # names of those that data.on_duplicate rejects
    duplicates: list[DuplicateGroup] = field(default_factory=list)  # of the images that are left
    remarks: dict[str, list[str]] = field(default_factory=dict)  # remark -> names of used images
    sizes: dict[str, int] = field(default_factory=dict)  # original "WxH" -> number of images, most first
    formats: dict[str, int] = field(default_factory=dict)  # such as "PNG RGBA", likewise

    def kind_of(self, name: str) -> str:
        """Return the kind of a rejected image: invalid, conflict or duplicate."""
        if name in self.conflicts:
            return "conflict"
        return "duplicate" if name in self.repeated else "invalid"


def decoding_dependencies() -> dict[str, Any]:
    """Return the versions of the decoders that the pixels depend on."""
    return {
        "pillow": version("pillow"),
        "jpeg": features.version("libjpeg_turbo") or features.version("jpg"),
        "webp": features.version("webp"),
    }


def decode_folder(scan: FolderScan, keep_duplicates: bool = True) -> tuple[npt.NDArray[np.uint8], ScanResult]:
    """Decode the images of a folder and resize them to (N, H, W, C), the size of the config.

    Of images with equal pixels, only the first is used unless `keep_duplicates`.
    """
    start_time, captcha = time.perf_counter(), scan.captcha
    arrays, accepted, rejected = [], [], []
    sizes, formats = [], []
    remarks: dict[str, list[str]] = defaultdict(list)
    with progress_bar(f"Decoding {len(scan.candidates):,} images", len(scan.candidates)) as bar:
        for candidate in scan.candidates:
            bar.advance(1)
            if candidate.reason:
                rejected.append(candidate)
                continue
            try:
                decoded, array = decode_image(_read_unchanged(scan.folder, candidate), captcha)
            except images.InvalidImage as reason:
                rejected.append(replace(candidate, reason=str(reason)))
                continue
            arrays.append(array)
            accepted.append(candidate)
            sizes.append(f"{decoded.image.width}x{decoded.image.height}")
            formats.append(decoded.format)
            for remark in decoded.remarks:
                remarks[remark].append(candidate.name)
    hashes = [hashlib.sha256(array.tobytes()).digest() for array in arrays]
    conflicts, repeated = _find_equal_pixels(hashes, accepted)
    dropped = conflicts if keep_duplicates else conflicts | repeated
    keep = [n for n, candidate in enumerate(accepted) if candidate.name not in dropped]
    kept_images = np.array([arrays[n] for n in keep], np.uint8)
    kept_images = kept_images.reshape(-1, captcha.height, captcha.width, captcha.channels)
    rejected = sorted([*rejected, *dropped.values()], key=lambda c: c.name)
    kept_remarks = {
        remark: kept for remark, names in remarks.items() if (kept := [n for n in names if n not in dropped])
    }
    groups = find_duplicates([accepted[n].sha256 for n in keep], [hashes[n] for n in keep], kept_images)
    logger.info(f"Decoded {len(keep):,} images in {time.perf_counter() - start_time:.1f} s")
    return kept_images, ScanResult(
        labels=[accepted[n].label for n in keep],
        files=[(accepted[n].name, accepted[n].sha256) for n in keep],
        rejected=[(candidate.name, candidate.reason) for candidate in rejected],
        conflicts=sorted(conflicts),
        repeated=[] if keep_duplicates else sorted(repeated),
        duplicates=groups,
        remarks=kept_remarks,
        sizes=dict(Counter(sizes[n] for n in keep).most_common()),
        formats=dict(Counter(formats[n] for n in keep).most_common()),
    )


def _read_unchanged(folder: Path, candidate: Candidate) -> bytes:
    """Read the content of a candidate and check it against its hash, which is part of the cache key.

    Raises:
        UserError: the file has changed since it was hashed.
    """
    try:
        content = read_bytes(folder / candidate.name)
    except images.InvalidImage:
        content = b""
    if hashlib.sha256(content).hexdigest() != candidate.sha256:
        name = escape_unprintable(candidate.name)
        raise UserError(f"data.path={folder}: {name} changed while it was read; run the command again")
    return content


def _find_equal_pixels(
    hashes: Sequence[bytes], accepted: Sequence[Candidate]
) -> tuple[dict[str, Candidate], dict[str, Candidate]]:
    """Return by name, with the reason, images with the pixels of another label, and repetitions of others."""
    by_hash: dict[bytes, list[Candidate]] = defaultdict(list)
    for pixels, candidate in zip(hashes, accepted, strict=True):
        by_hash[pixels].append(candidate)
    conflicts: dict[str, Candidate] = {}
    repeated: dict[str, Candidate] = {}
    for first, *others in by_hash.values():
        labels = {candidate.label for candidate in (first, *others)}
        if len(labels) == 1:
            reason = f"is the same image as {escape_unprintable(first.name)}"
            repeated |= {each.name: replace(each, reason=reason) for each in others}
            continue
        for candidate in (first, *others):
            other = next(each for each in (first, *others) if each.label != candidate.label)
            name = escape_unprintable(other.name)
            reason = f"is the same image as {name}, which is labeled {other.label!r}"
            conflicts[candidate.name] = replace(candidate, reason=reason)
    return conflicts, repeated
