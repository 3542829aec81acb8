"""A folder of labeled images.

Every file is used, rejected with a reason, or reported as ignored because it is not an image. The format is
detected from the content, not from the name; labels are in the file names or in a table.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from captcha_exp.config import CaptchaConfig, FolderConfig
from captcha_exp.data import images
from captcha_exp.data.alphabet import Alphabet
from captcha_exp.data.sources import infer, labels
from captcha_exp.data.sources.advice import advise
from captcha_exp.data.sources.infer import Inference
from captcha_exp.data.sources.labels import Candidate
from captcha_exp.errors import UserError
from captcha_exp.runtime.console import preview, progress_bar
from captcha_exp.runtime.paths import root_dir

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class FolderScan:
    """The files of a folder, before decoding."""

    folder: Path
    candidates: tuple[Candidate, ...]
    ignored: tuple[str, ...]  # names of files that are not images
    captcha: CaptchaConfig  # without any `auto`
    inferences: tuple[Inference, ...] = ()
    advice: tuple[str, ...] = ()  # what is odd about the labels, and what to do about it

    @property
    def sha256(self) -> str:
        """Hash of names, labels and contents; independent of the path of the folder."""
        lines = [[c.name, c.label, c.sha256 or c.reason] for c in self.candidates]
        return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def scan_folder(data: FolderConfig, captcha: CaptchaConfig) -> FolderScan:
    """List the candidates of a folder, sorted by name, with labels and hashes; infer the captcha group.

    Raises:
        UserError: the folder does not exist or has no images, or its label table cannot be read.
    """
    folder = Path(data.path)
    names, ignored, unreadable = _list_files(folder)
    table = labels.find_table(data, folder)
    pattern = re.compile(data.filename_pattern)
    advice: list[str] = []
    if table:
        candidates, advice = labels.from_table(folder, table, names, data.match_by)
    else:
        candidates = labels.from_filenames(names, pattern)
    known = {candidate.name for candidate in candidates}
    candidates += [candidate for candidate in unreadable if candidate.name not in known]
    if not candidates:
        raise UserError(f"data.path={data.path}: {describe_no_images(ignored)}")
    captcha, inferences = _infer(folder, candidates, captcha)
    advice += advise(
        folder, candidates, None if table else pattern, None if table or data.labels else ignored, captcha
    )
    alphabet = Alphabet(captcha.alphabet)
    characters = set(captcha.alphabet)
    checked = []
    with progress_bar(f"Scanning {len(candidates):,} files", len(candidates)) as bar:
        for candidate in sorted(candidates, key=lambda c: c.name):
            checked.append(_check_candidate(folder, candidate, alphabet, characters, captcha))
            bar.advance(1)
    if table and table.is_relative_to(folder):
        known.add(_relative_name(folder, table))
    not_images = tuple(name for name in ignored if name not in known)
    return FolderScan(folder, tuple(checked), not_images, captcha, tuple(inferences), tuple(advice))


def _infer(
    folder: Path, candidates: Sequence[Candidate], captcha: CaptchaConfig
) -> tuple[CaptchaConfig, list[Inference]]:
    """Infer the values of the captcha group that are `auto`."""
    if not captcha.inferred_keys:
        return captcha, []
    usable = [each for each in candidates if not each.reason]
    captcha, of_labels = infer.infer_labels(captcha, [each.label for each in usable])
    sample = []
    for candidate in usable[:: max(1, len(usable) // infer.NUM_SAMPLED)]:
        with contextlib.suppress(images.InvalidImage):
            sample.append(images.decode(read_bytes(folder / candidate.name)).image)
    captcha, of_images = infer.infer_images(captcha, sample)
    return captcha, of_labels + of_images


def list_images(folder: Path) -> list[Path]:
    """List the images of a folder and its subfolders, sorted by name.

    Raises:
        UserError: there is none, or the folder cannot be read.
    """
    names, ignored, _ = _list_files(folder)
    if not names:
        raise UserError(f"{folder}: {describe_no_images(ignored)}")
    return [folder / name for name in sorted(names)]


def describe_no_images(ignored: Sequence[str]) -> str:
    """Return what a folder without images has instead."""
    others = [name for name in ignored if not name.startswith(".")]
    only = f"; only {preview(others)}" if others else ""
    return f"has no images ({', '.join(images.FORMATS)}){only}"


def decode_image(content: bytes, captcha: CaptchaConfig) -> tuple[images.DecodedImage, npt.NDArray[np.uint8]]:
    """Decode the bytes of an image file; returns the image and its (H, W, C) uint8 in the size of the config.

    Raises:
        InvalidImage: the image cannot be decoded, or is blank.
    """
    decoded = images.decode(content)
    array = images.to_array(decoded.image, captcha.channels)
    if array.min() == array.max():
        raise images.InvalidImage("is blank: all pixels are equal")
    return decoded, images.resize(array[None], captcha.height, captcha.width)[0]


def read_bytes(path: Path) -> bytes:
    """Read a regular file of limited size; not a device or pipe, which might block.

    Raises:
        InvalidImage: the file cannot be read.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise images.InvalidImage(
                "is a folder" if stat.S_ISDIR(state.st_mode) else "is not a regular file"
            )
        if state.st_size > MAX_FILE_BYTES:
            size = f"{state.st_size / 2**20:,.0f} MiB"
            raise images.InvalidImage(f"has {size}; the maximum is {MAX_FILE_BYTES / 2**20:.0f} MiB")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a NUL in the name raises ValueError
        reason = getattr(error, "strerror", None) or error
        raise images.InvalidImage(f"cannot be read: {reason}") from None


# -- listing files -------------------------------------------------------------------------------------------


def _list_files(folder: Path) -> tuple[list[str], list[str], list[Candidate]]:
    """Return the names of images, the names of other files, and the folders that are not read."""
    names: list[str] = []
    ignored: list[str] = []
    unreadable: list[Candidate] = []
    output_dirs = {root_dir() / "outputs", root_dir() / "mlruns"}  # inside the folder with data.path=.

    def on_error(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise UserError(f"data.path={folder}: cannot be read as a folder: {error.strerror}")
        reason = f"is a folder that cannot be read: {error.strerror}"
        unreadable.append(Candidate(_relative_name(folder, Path(error.filename)), "", reason))

    for parent, subfolders, files in os.walk(folder, onerror=on_error):
        here = Path(parent)
        for name in list(subfolders):
            if (here / name).is_symlink():
                reason = "is a symbolic link to a folder, which is not followed"
                unreadable.append(Candidate(_relative_name(folder, here / name), "", reason))
                subfolders.remove(name)
            elif name.startswith(".") or here / name in output_dirs:
                ignored.append(_relative_name(folder, here / name) + "/")
                subfolders.remove(name)
        for name in files:
            is_image = not name.startswith(".") and _is_image(here / name)
            (names if is_image else ignored).append(_relative_name(folder, here / name))
    return names, sorted(ignored), unreadable


def _is_image(path: Path) -> bool:
    """Return whether the name or, without an image suffix, the content of a file is that of an image."""
    if path.suffix.lower() in labels.IMAGE_SUFFIXES:
        return True
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe might block
            return False
        with path.open("rb") as file:
            return images.has_signature(file.read(images.SIGNATURE_BYTES))
    except OSError:
        return False


def _relative_name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


# -- checking files ------------------------------------------------------------------------------------------


def _check_candidate(
    folder: Path, candidate: Candidate, alphabet: Alphabet, characters: set[str], captcha: CaptchaConfig
) -> Candidate:
    """Set the label in the case of the alphabet and the hash of the content, or the reason for rejection."""
    if candidate.reason:
        return candidate
    label = candidate.label
    if set(label) - characters:  # macOS stores file names in NFD
        label = unicodedata.normalize("NFC", label)
    if captcha.case == "fold":
        label = alphabet.fold_case(label)
    sha256 = reason = ""
    if unknown := sorted(set(label) - characters):
        reason = f"label {label!r} has {', '.join(map(repr, unknown))}, not in captcha.alphabet"
    elif not captcha.shortest_length <= len(label) <= captcha.length:
        limits = f"captcha.length is {captcha.length}"
        if captcha.shortest_length < captcha.length:
            limits = f"captcha.min_length is {captcha.shortest_length} and {limits}"
        reason = f"label {label!r} has {len(label)} characters; {limits}"
    else:
        try:
            sha256 = hashlib.sha256(read_bytes(folder / candidate.name)).hexdigest()
        except images.InvalidImage as error:
            reason = str(error)
    return Candidate(candidate.name, label, reason, sha256)
