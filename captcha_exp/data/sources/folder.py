"""A folder of labelled pictures, as people have them.

Every file ends in one of three ways: it is used, it is refused with a reason, or it is named as something
that is no picture. What is a picture is told by the content, never by the name; the label stands in the file
name, or in a table beside the pictures.
"""

import hashlib
import json
import os
import re
import stat
import time
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from captcha_exp.config import CaptchaConfig, FolderConfig
from captcha_exp.data import images
from captcha_exp.data.alphabet import Alphabet
from captcha_exp.data.sources import labels
from captcha_exp.data.sources.labels import Candidate
from captcha_exp.errors import UserError
from captcha_exp.runtime.console import Display, escape_unprintable
from captcha_exp.runtime.paths import root_dir

IMAGE_SUFFIXES = {
    ".png",
    ".apng",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".gif",
    ".bmp",
    ".webp",
    ".tif",
    ".tiff",
    ".ico",
    ".avif",
    ".heic",
    ".jp2",
}
MAX_FILE_BYTES = 64 * 2**20  # bytes of one file


@dataclass(frozen=True)
class FolderScan:
    """What there is in a folder, before any picture is decoded."""

    folder: Path
    candidates: tuple[Candidate, ...]
    ignored: tuple[str, ...]  # names of files that are no pictures by their names

    @property
    def sha256(self) -> str:
        """Over names, labels and contents: another folder with the same has the same."""
        lines = [[c.name, c.label, c.sha256 or c.reason] for c in self.candidates]
        return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


@dataclass(frozen=True)
class DecodedFolder:
    """What came out of the candidates."""

    images: npt.NDArray[np.uint8]  # (N, H, W, C)
    accepted: list[Candidate]  # N
    rejected: list[Candidate]
    remarks: dict[
        str, list[str]
    ]  # what a person may want to know -> names of the files that are used with it
    sizes: dict[str, int]  # "WxH" as it stood in the files -> pictures


def decoding_dependencies() -> dict[str, Any]:
    """The packages that the pixels of a folder depend on."""
    from PIL import features

    return {
        "pillow": version("pillow"),
        "jpeg": features.version("libjpeg_turbo") or features.version("jpg"),
        "webp": features.version("webp"),
    }


def scan_folder(data: FolderConfig, captcha: CaptchaConfig, display: Display) -> FolderScan:
    """The candidates of a folder, ordered by name, with their labels and the hashes of their contents.

    Raises:
        UserError: there is no such folder, nothing in it, or its table of labels cannot be read.
    """
    folder = _check_folder(data.path)
    names, others, lost = _list_files(folder)
    table = labels.find_table(data, folder)
    pattern = re.compile(data.filename_pattern)
    candidates = labels.from_table(folder, table, names) if table else labels.from_filenames(names, pattern)
    named = {candidate.name for candidate in candidates}
    candidates += [candidate for candidate in lost if candidate.name not in named]
    if not candidates:
        raise UserError(f"data.path={data.path}: no picture in it ({', '.join(images.FORMATS.values())})")
    alphabet = Alphabet(captcha.alphabet)
    checked = []
    with display.progress_bar(f"looking through {len(candidates):,} files", len(candidates)) as bar:
        for candidate in sorted(candidates, key=lambda c: c.name):
            checked.append(_add_hash(folder, _normalize_label(candidate, alphabet, captcha)))
            bar.advance(1)
    if table and table.is_relative_to(folder):
        named.add(_relative_name(folder, table))
    return FolderScan(folder, tuple(checked), tuple(name for name in others if name not in named))


def decode_folder(scan: FolderScan, captcha: CaptchaConfig, display: Display) -> DecodedFolder:
    """The pictures of a folder, decoded and brought to the size of the config."""
    began = time.perf_counter()
    arrays, used, refused, sizes = [], [], [], []
    notes: dict[str, list[str]] = defaultdict(list)
    with display.progress_bar(f"reading {len(scan.candidates):,} pictures", len(scan.candidates)) as bar:
        for candidate in scan.candidates:
            bar.advance(1)
            if candidate.reason:
                refused.append(candidate)
                continue
            try:
                decoded, array = decode_image(_read_unchanged(scan.folder, candidate), captcha)
            except images.InvalidImage as reason:
                refused.append(replace(candidate, reason=str(reason)))
                continue
            arrays.append(array)
            used.append(candidate)
            sizes.append(f"{decoded.image.width}x{decoded.image.height}")
            for note in (*decoded.remarks, *_suffix_remarks(candidate.name, decoded.format)):
                notes[note].append(candidate.name)
    keep, contradicted = _drop_label_conflicts(arrays, used)
    refused = sorted(refused + contradicted, key=lambda c: c.name)
    used = [used[n] for n in keep]
    shape = (len(keep), captcha.height, captcha.width, captcha.channels)
    pictures = np.stack([arrays[n] for n in keep]) if keep else np.empty(shape, np.uint8)
    names = {c.name for c in used}
    left = {note: [name for name in which if name in names] for note, which in notes.items()}
    display.info(f"read {len(keep):,} pictures in {time.perf_counter() - began:.1f} s")
    counts = dict(Counter(sizes[n] for n in keep))
    return DecodedFolder(pictures, used, refused, {n: w for n, w in left.items() if w}, counts)


def list_images(folder: Path) -> list[Path]:
    """The files of a folder, and of those inside it, that are pictures by their names; ordered by name."""
    return [folder / name for name in sorted(_list_files(folder)[0])]


def decode_image(content: bytes, captcha: CaptchaConfig) -> tuple[images.DecodedImage, npt.NDArray[np.uint8]]:
    """The picture of a file, as it was and as (H, W, C) uint8 of the config's size.

    Raises:
        Unusable: it is no whole picture, or shows nothing.
    """
    decoded = images.decode(content)
    array = images.to_array(decoded.image, captcha.channels)
    if array.min() == array.max():
        raise images.InvalidImage("shows nothing: every pixel is the same")
    return decoded, images.resize(array[None], captcha.height, captcha.width)[0]


def read_bytes(path: Path) -> bytes:
    """The bytes of a file; of none that would never end or never come.

    Raises:
        Unusable: it cannot be read.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise images.InvalidImage("is a folder" if stat.S_ISDIR(state.st_mode) else "is no regular file")
        if state.st_size > MAX_FILE_BYTES:
            size = f"{state.st_size / 2**20:,.0f} MiB"
            raise images.InvalidImage(f"is {size}; at most {MAX_FILE_BYTES / 2**20:.0f} MiB are read")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a name with a NUL in it is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise images.InvalidImage(f"cannot be read: {reason}") from None


# -- which files ---------------------------------------------------------------------------------------------


def _check_folder(path: str) -> Path:
    """The folder of data.path.

    Raises:
        UserError: it is none, or cannot be looked at.
    """
    try:
        state = Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"data.path={path}: there is no such folder") from None
    except OSError as error:
        raise UserError(f"data.path={path}: cannot be looked at: {error.strerror}") from None
    if not stat.S_ISDIR(state.st_mode):
        raise UserError(f"data.path={path}: is a file; give the folder that it is in")
    return Path(path)


def _list_files(folder: Path) -> tuple[list[str], list[str], list[Candidate]]:
    """Names of pictures, names of other files, and folders that are not looked into, with the reason."""
    names, others, lost = [], [], []
    own = {root_dir() / "outputs", root_dir() / "mlruns"}  # with data.path=. the reports of runs lie inside

    def fail(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise UserError(f"data.path={folder}: cannot be read: {error.strerror}")
        reason = f"is a folder that cannot be read: {error.strerror}"
        lost.append(Candidate(_relative_name(folder, Path(error.filename)), "", reason))

    for place, folders, files in os.walk(folder, onerror=fail):
        here = Path(place)
        for name in list(folders):
            if (here / name).is_symlink():
                reason = "is a link to a folder, which is not followed"
                lost.append(Candidate(_relative_name(folder, here / name), "", reason))
                folders.remove(name)
            elif name.startswith(".") or here / name in own:
                others.append(_relative_name(folder, here / name) + "/")
                folders.remove(name)
            elif Path(name).suffix.lower() in IMAGE_SUFFIXES:
                names.append(_relative_name(folder, here / name))  # so that it is refused by its name
        for name in files:
            is_picture = not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
            (names if is_picture else others).append(_relative_name(folder, here / name))
    return names, sorted(others), lost


def _relative_name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


# -- whether they can be used --------------------------------------------------------------------------------


def _normalize_label(candidate: Candidate, alphabet: Alphabet, captcha: CaptchaConfig) -> Candidate:
    """The candidate with its label as the alphabet writes it, or with the reason why that cannot be."""
    if candidate.reason:
        return candidate
    label = candidate.label
    if set(label) - set(alphabet.characters):  # macOS takes the characters of file names apart
        label = unicodedata.normalize("NFC", label)
    if captcha.case == "fold":
        label = alphabet.fold_case(label)
    strangers = sorted(set(label) - set(alphabet.characters))
    reason = ""
    if strangers:
        reason = f"label {label!r} has {', '.join(map(repr, strangers))}, not in captcha.alphabet"
    elif len(label) != captcha.length:
        reason = f"label {label!r} has {len(label)} characters; captcha.length is {captcha.length}"
    return replace(candidate, label=label, reason=reason)


def _add_hash(folder: Path, candidate: Candidate) -> Candidate:
    """The candidate with the hash of its content, or with the reason why it cannot be read."""
    if candidate.reason:
        return candidate
    try:
        found = read_bytes(folder / candidate.name)
    except images.InvalidImage as reason:
        return replace(candidate, reason=str(reason))
    return replace(candidate, sha256=hashlib.sha256(found).hexdigest())


def _read_unchanged(folder: Path, candidate: Candidate) -> bytes:
    """The bytes of a candidate, which are still those that its hash was taken of.

    Raises:
        UserError: they have changed since; the cache is named after them.
    """
    try:
        found = read_bytes(folder / candidate.name)
    except images.InvalidImage:
        found = b""
    if hashlib.sha256(found).hexdigest() != candidate.sha256:
        name = escape_unprintable(candidate.name)
        raise UserError(f"data.path={folder}: {name} has changed while it was read; start again")
    return found


def _suffix_remarks(name: str, format_name: str) -> list[str]:
    ending = PurePosixPath(name).suffix.lower().removeprefix(".")
    usual = {"JPEG": ("jpg", "jpeg", "jpe", "jfif"), "PNG": ("png", "apng")}.get(
        format_name, (format_name.lower(),)
    )
    return [] if ending in usual else [f"is a {format_name}, whatever its name says"]


def _drop_label_conflicts(
    arrays: list[npt.NDArray[np.uint8]], accepted: list[Candidate]
) -> tuple[list[int], list[Candidate]]:
    """Numbers of the pictures that stay, and those that the same picture contradicts by another label."""
    same: dict[bytes, list[int]] = defaultdict(list)
    for number, array in enumerate(arrays):
        same[hashlib.sha256(array.tobytes()).digest()].append(number)
    contradicted = []
    for numbers in same.values():
        if len({accepted[n].label for n in numbers}) > 1:
            for n in numbers:
                other = next(accepted[m] for m in numbers if accepted[m].label != accepted[n].label)
                name = escape_unprintable(other.name)
                reason = f"is the same image as {name}, which is labeled {other.label!r}"
                contradicted.append(replace(accepted[n], reason=reason))
    out = {candidate.name for candidate in contradicted}
    return [n for n, candidate in enumerate(accepted) if candidate.name not in out], contradicted
