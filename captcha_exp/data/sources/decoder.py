"""Decode the images of a folder that was scanned, and find those that are the same."""

import contextlib
import hashlib
import logging
import math
import mmap
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import features

from captcha_exp.config import CaptchaConfig
from captcha_exp.data import images
from captcha_exp.data.duplicates import DuplicateGroup, find_duplicates
from captcha_exp.data.sources.files import Content, ImageFiles
from captcha_exp.data.sources.folder import FolderScan, decode_image
from captcha_exp.data.sources.labels import Candidate
from captcha_exp.errors import UserError
from captcha_exp.runtime.console import ProgressBar, progress_bar
from captcha_exp.runtime.fork import count_usable_cores, run_in_child
from captcha_exp.runtime.text import escape_unprintable

logger = logging.getLogger(__name__)

MIN_PART = 100  # images for which a process is worth its start


@dataclass(frozen=True)
class ScanResult:
    """The images that a source has and those it rejected; plain values, stored in the cache file."""

    labels: list[str]  # N
    files: list[tuple[str, str]] = field(default_factory=list)  # N (name, SHA-256); empty for a generator
    rejected: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)
    conflicts: list[str] = field(default_factory=list)  # names of those with another label for their pixels
    repeated: list[str] = field(default_factory=list)  # names of those that data.on_duplicate rejects
    duplicates: list[DuplicateGroup] = field(default_factory=list)  # of the images that are left
    splits: list[str] = field(default_factory=list)  # N, as given by the source; empty if it gives none
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
    usable = {candidate.name: candidate for candidate in scan.candidates if not candidate.reason}
    rejected = [candidate for candidate in scan.candidates if candidate.reason]
    pixels, found = _decode_in_parts(scan.files, list(usable.values()), captcha)
    rejected += [replace(usable[name], reason=each) for name, each in found.items() if isinstance(each, str)]
    rows, accepted, facts = [], list[Candidate](), list[_Facts]()
    for row, name in enumerate(usable):
        if not isinstance(each := found[name], str):
            rows.append(row)
            accepted.append(usable[name])
            facts.append(each)
    hashes = [hashlib.sha256(pixels[row].data).digest() for row in rows]
    conflicts, repeated = _find_equal_pixels(hashes, accepted)
    dropped = conflicts if keep_duplicates else conflicts | repeated
    keep = [n for n, candidate in enumerate(accepted) if candidate.name not in dropped]
    kept_images = pixels[[rows[n] for n in keep]]
    rejected = sorted([*rejected, *dropped.values()], key=lambda c: c.name)
    remarks: dict[str, list[str]] = defaultdict(list)
    for n in keep:
        for remark in facts[n].remarks:
            remarks[remark].append(accepted[n].name)
    groups = find_duplicates([accepted[n].sha256 for n in keep], [hashes[n] for n in keep], kept_images)
    logger.info(f"Decoded {len(keep):,} images in {time.perf_counter() - start_time:.1f} s")
    return kept_images, ScanResult(
        labels=[accepted[n].label for n in keep],
        files=[(accepted[n].name, accepted[n].sha256) for n in keep],
        rejected=[(candidate.name, candidate.reason) for candidate in rejected],
        conflicts=sorted(conflicts),
        repeated=[] if keep_duplicates else sorted(repeated),
        duplicates=groups,
        splits=[accepted[n].split for n in keep] if any(each.split for each in accepted) else [],
        remarks=dict(remarks),
        sizes=dict(Counter(facts[n].size for n in keep).most_common()),
        formats=dict(Counter(facts[n].format for n in keep).most_common()),
    )


class _Facts(NamedTuple):
    """Size, format and remarks of a decoded image."""

    size: str  # of the original, "WxH"
    format: str
    remarks: Sequence[str]


def _decode_in_parts(
    files: ImageFiles, candidates: Sequence[Candidate], captcha: CaptchaConfig
) -> tuple[npt.NDArray[np.uint8], dict[str, _Facts | str]]:
    """Decode images in a process per core; returns them (N, H, W, C), and by name why one cannot be used.

    Raises:
        UserError: a file has changed since it was hashed.
    """
    shape = len(candidates), captcha.height, captcha.width, captcha.channels
    memory = mmap.mmap(-1, max(1, math.prod(shape)))  # shared with the children, which write to it
    pixels = np.frombuffer(memory, np.uint8, math.prod(shape)).reshape(shape)
    num_parts = max(1, min(count_usable_cores(), len(candidates) // MIN_PART))
    size = -(-len(candidates) // num_parts)

    def decode_part(part: int, bar: ProgressBar | None = None) -> dict[str, _Facts | str]:
        rows = {candidates[row].name: row for row in range(len(candidates))[part * size : (part + 1) * size]}
        found: dict[str, _Facts | str] = {}
        for name, content in files.read(rows):
            content = _check_unchanged(candidates[rows[name]], content)
            try:
                decoded, pixels[rows[name]] = decode_image(content, captcha)
            except images.InvalidImage as reason:
                found[name] = str(reason)
            else:
                width, height = decoded.image.size
                found[name] = _Facts(f"{width}x{height}", decoded.format, decoded.remarks)
            if bar is not None:
                bar.advance(num_parts)
        return found

    with contextlib.ExitStack() as children:  # before the progress bar, which may start a thread
        waits = [children.enter_context(run_in_child(partial(decode_part, n))) for n in range(1, num_parts)]
        with progress_bar(f"Decoding {len(candidates):,} images", len(candidates)) as bar:
            found = decode_part(0, bar)
        for wait in waits:
            found |= {n: each if isinstance(each, str) else _Facts(*each) for n, each in wait().items()}
    return pixels, found


def _check_unchanged(candidate: Candidate, content: Content) -> bytes:
    """Return the content of a candidate, checked against its hash, which is part of the cache key.

    Raises:
        UserError: the file has changed since it was hashed.
    """
    if not isinstance(content, bytes) or hashlib.sha256(content).hexdigest() != candidate.sha256:
        name = escape_unprintable(candidate.name)
        raise UserError(f"data.path: {name} changed while it was read; run the command again")
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
