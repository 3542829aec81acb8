"""Folders or archives of labeled images.

Every file is used, rejected with a reason, or reported as ignored because it is not an image. The format is
detected from the content, not from the name; labels are in the names of files or folders, or in a table.
"""

import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from captcha_exp.config import CaptchaConfig, FolderConfig
from captcha_exp.data import images
from captcha_exp.data.alphabet import Alphabet
from captcha_exp.data.resize import resize
from captcha_exp.data.sources import corrections, infer, labels
from captcha_exp.data.sources.advice import advise
from captcha_exp.data.sources.archive import open_files
from captcha_exp.data.sources.corrections import Correction
from captcha_exp.data.sources.files import (
    Files,
    FolderFiles,
    ImageFiles,
    JoinedFiles,
    Listing,
    joined_name,
    unwrap,
)
from captcha_exp.data.sources.infer import Inference
from captcha_exp.data.sources.labels import Candidate
from captcha_exp.errors import UserError
from captcha_exp.runtime.console import progress_bar
from captcha_exp.runtime.text import preview

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderScan:
    """The files of folders or archives, before decoding."""

    files: ImageFiles
    candidates: tuple[Candidate, ...]
    ignored: tuple[str, ...]  # names of files that are not images
    captcha: CaptchaConfig  # without any `auto`
    inferences: tuple[Inference, ...] = ()
    corrections: tuple[Correction, ...] = ()
    advice: tuple[str, ...] = ()  # what is odd about the labels, and what to do about it

    @property
    def sha256(self) -> str:
        """Hash of names, labels, splits and contents; independent of the path of the folder."""
        lines = [[c.name, c.label, c.split, c.sha256 or c.reason] for c in self.candidates]
        return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def scan_folder(data: FolderConfig, captcha: CaptchaConfig) -> FolderScan:
    """List the candidates of a folder, sorted by name, with labels and hashes; infer the captcha group.

    Raises:
        UserError: the folder does not exist or has no images, or a table cannot be read.
    """
    folders = [read_labels(data, Path(path)) for path in data.paths]
    folder, files = (
        (folders[0], folders[0].files)
        if len(folders) == 1
        else (_join(folders), JoinedFiles([each.files for each in folders]))
    )
    captcha, inferences = _infer(files, folder.candidates, captcha)
    advice = []
    for each in folders:
        where = "" if len(folders) == 1 else f"{each.files.path}: "
        advice += [f"{where}{line}" for line in each.advice + _advise(data, each, captcha)]
    alphabet = Alphabet(captcha.alphabet)
    characters = set(captcha.alphabet)
    checked = []
    with progress_bar(f"Scanning {len(folder.candidates):,} files", len(folder.candidates)) as bar:
        for candidate in sorted(folder.candidates, key=lambda c: c.name):
            checked.append(_check_candidate(files, candidate, alphabet, characters, captcha))
            bar.advance(1)
    return FolderScan(
        files,
        tuple(checked),
        tuple(folder.ignored),
        captcha,
        tuple(inferences),
        tuple(folder.corrections),
        tuple(advice),
    )


@dataclass(frozen=True)
class LabeledFolder:
    """A folder or archive with the labels of its images."""

    files: Files
    candidates: list[Candidate]
    ignored: list[str]
    corrections: list[Correction]
    advice: list[str]
    has_tables: bool  # the labels are from tables, not from names


def read_labels(data: FolderConfig, path: Path) -> LabeledFolder:
    """Find the labels of a folder or archive, with corrections.

    Raises:
        UserError: it does not exist or has no images, or a table cannot be read.
    """
    files = open_files(path)
    listing = files.list()
    candidates, tables, advice = _find_labels(data, files, listing)
    if not candidates:
        raise UserError(f"data.path={path}: {describe_no_images(listing.ignored)}")
    corrected: list[Correction] = []
    correction_table = corrections.find_corrections(files) if data.apply_corrections else None
    if correction_table is not None:
        candidates, corrected = corrections.apply_corrections(files, correction_table, candidates)
    used = {*tables, correction_table}
    ignored = [name for name in listing.ignored if files.path / name not in used]
    return LabeledFolder(files, candidates, ignored, corrected, advice, bool(tables))


def _join(folders: Sequence[LabeledFolder]) -> LabeledFolder:
    """Return the images of several folders as those of one, named by `JoinedFiles`."""
    numbered = list(enumerate(folders, 1))
    return replace(
        folders[0],
        candidates=[replace(c, name=joined_name(n, c.name)) for n, each in numbered for c in each.candidates],
        ignored=[joined_name(n, ignored) for n, each in numbered for ignored in each.ignored],
        corrections=[
            replace(c, file=joined_name(n, c.file)) for n, each in numbered for c in each.corrections
        ],
    )


def _advise(data: FolderConfig, folder: LabeledFolder, captcha: CaptchaConfig) -> list[str]:
    """Return what is odd about the labels of a folder, and what to do about it."""
    if data.labels == "folders":
        return []
    may_have_tables = isinstance(folder.files, FolderFiles) and not folder.has_tables and not data.labels
    others = folder.ignored if may_have_tables else None
    pattern = None if folder.has_tables else re.compile(data.filename_pattern)
    return advise(folder.files, folder.candidates, pattern, others, captcha)


def _find_labels(
    data: FolderConfig, files: Files, listing: Listing
) -> tuple[list[Candidate], list[Path], list[str]]:
    """Return the candidates with their labels and splits, the tables these are from, and advice."""
    names, advice = listing.images, list[str]()
    tables = labels.find_tables(data, files, listing)
    candidates: list[Candidate] = []
    if data.labels == "folders":
        candidates = labels.from_folder_names(names)
    elif not tables:
        candidates = labels.from_filenames(names, re.compile(data.filename_pattern))
    for table, start in tables.items():
        inside = [name for name in names if name.startswith(start)]
        found, advised = labels.from_table(files, table, inside, data.match_by)
        candidates, advice = candidates + found, advice + advised
    known = {candidate.name for candidate in candidates}
    reasons = listing.unreadable | dict.fromkeys(names, "is in no folder with a table of labels")
    candidates += [Candidate(name, "", reason) for name, reason in reasons.items() if name not in known]
    return labels.with_splits(candidates, data.split_by), list(tables), advice


def _infer(
    files: ImageFiles, candidates: Sequence[Candidate], captcha: CaptchaConfig
) -> tuple[CaptchaConfig, list[Inference]]:
    """Infer the values of the captcha group that are `auto`."""
    if not captcha.inferred_keys:
        return captcha, []
    usable = [each for each in candidates if not each.reason]
    captcha, of_labels = infer.infer_labels(captcha, [each.label for each in usable])
    sample = {}
    chosen = [each.name for each in usable[:: max(1, len(usable) // infer.NUM_SAMPLED)]]
    for name, content in files.read(chosen):
        try:
            sample[name] = images.decode(unwrap(content)).image
        except images.InvalidImage:
            continue
    in_order = [sample[name] for name in chosen if name in sample]
    captcha, of_images = infer.infer_images(captcha, in_order)
    return captcha, of_labels + of_images


def list_images(folder: Path) -> list[Path]:
    """List the images of a folder and its subfolders, sorted by name.

    Raises:
        UserError: there is none, or the folder cannot be read.
    """
    listing = FolderFiles(folder).list()
    if not listing.images:
        raise UserError(f"{folder}: {describe_no_images(listing.ignored)}")
    return [folder / name for name in sorted(listing.images)]


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
    if images.is_blank(array):
        raise images.InvalidImage("is blank: all pixels are equal")
    return decoded, resize(array[None], captcha.height, captcha.width)[0]


def _check_candidate(
    files: ImageFiles, candidate: Candidate, alphabet: Alphabet, characters: set[str], captcha: CaptchaConfig
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
            sha256 = files.sha256(candidate.name)
        except images.InvalidImage as error:
            reason = str(error)
    return replace(candidate, label=label, reason=reason, sha256=sha256)
