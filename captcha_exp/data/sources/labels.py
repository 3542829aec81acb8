"""Labels of the images of a folder or archive, from file names, folder names or tables; and their splits."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from captcha_exp.config import FolderConfig
from captcha_exp.data import images
from captcha_exp.data.sources import tables
from captcha_exp.data.sources.files import TABLE_SUFFIXES, Files, Listing
from captcha_exp.errors import UserError
from captcha_exp.runtime.text import escape_unprintable

TABLE_NAMES = tuple(f"{stem}{suffix}" for stem in ("labels", "metadata") for suffix in TABLE_SUFFIXES)
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""a folder, or a text in the column split -> the split"""

_ADDRESS_END = re.compile(rf"(?i)({'|'.join(map(re.escape, images.SUFFIXES))})(?![a-z0-9]).*|\?\w+=.*")
"""what follows the name in the last part of an address, as in 5874.png?t=1"""
_COLUMNS = (tables.FILE_COLUMNS, tables.LABEL_COLUMNS, tables.SPLIT_COLUMNS)


@dataclass(frozen=True)
class Candidate:
    """A file of a folder that may be used as an image."""

    name: str  # path relative to the folder, with /
    label: str
    reason: str = ""  # why it cannot be used
    sha256: str = ""  # of its content; empty if it cannot be read
    split: str = ""  # that is given; empty if none is

    @property
    def is_row(self) -> bool:
        """Whether this is not a file but a row of a table that names none."""
        return is_row(self.name)


def is_row(name: str) -> bool:
    """Return whether the name is that of a row of a table, as in "labels.csv, row 2"."""
    return name.rpartition(", row ")[2].isdigit()


def stem(name: str) -> str:
    """Return the name of an image without folders, suffix and what follows it in an address."""
    path = PurePosixPath(name)
    if path.suffix.lower() in images.SUFFIXES:
        return path.stem
    return _ADDRESS_END.sub("", path.name) if _ADDRESS_END.search(path.name) else path.stem


def from_filenames(names: list[str], pattern: re.Pattern[str]) -> list[Candidate]:
    """Return a candidate per file, labeled by its file name."""
    candidates = []
    for name in names:
        match = pattern.fullmatch(stem(name))
        label = (match and match["label"]) or ""
        reason = "" if label else f"has no label in its name (data.filename_pattern is {pattern.pattern})"
        candidates.append(Candidate(name, label, reason))
    return candidates


def from_folder_names(names: list[str]) -> list[Candidate]:
    """Return a candidate per file, labeled by the name of the folder that it is in."""
    candidates = []
    for name in names:
        label = PurePosixPath(name).parent.name
        reason = "" if label else "is not in a folder whose name is its label (data.labels=folders)"
        candidates.append(Candidate(name, label, reason))
    return candidates


def with_splits(candidates: Sequence[Candidate], split_by: str) -> list[Candidate]:
    """Return the candidates with the splits that are given, by tables or by folders; without any for "label".

    Folders give splits if all images are in folders named like splits, of which one is the training split.
    """
    if split_by == "label":
        return [replace(each, split="") for each in candidates]
    if any(each.split for each in candidates):
        return list(candidates)
    of_folders = {
        each.name: SPLIT_NAMES.get(PurePosixPath(each.name).parts[0].lower(), "")
        for each in candidates
        if not each.is_row
    }
    found = set(of_folders.values())
    if "" in found or len(found) < 2 or "train" not in found:
        return list(candidates)
    return [replace(each, split=of_folders.get(each.name, "")) for each in candidates]


def find_tables(data: FolderConfig, files: Files, listing: Listing) -> dict[Path, str]:
    """Return the label table of a folder, or one per split folder; none if labels are in the names.

    Each is mapped to the start of the names of the files that it is for.

    Raises:
        UserError: data.labels does not exist, or is null and several tables exist; set data.labels=NAME.
    """
    if data.labels in ("names", "folders"):
        return {}
    if data.labels is not None:
        if not files.is_table(files.path / data.labels):
            raise UserError(f"data.labels={data.labels}: no such file in {files.path}")
        return {files.path / data.labels: ""}
    by_folder: dict[str, list[Path]] = defaultdict(list)
    for name in listing.ignored:
        path = PurePosixPath(name)
        if path.name.lower() in TABLE_NAMES and files.is_table(files.path / name):
            by_folder[path.parent.as_posix()].append(files.path / name)
    folders = ["."] if "." in by_folder else [each for each in by_folder if each.lower() in SPLIT_NAMES]
    for folder in folders:
        if len(by_folder[folder]) > 1:
            names = " and ".join(sorted(path.name for path in by_folder[folder]))
            where = files.path / folder
            raise UserError(f"data.labels=null: {where} has {names}; choose one with data.labels=NAME")
    return {by_folder[folder][0]: "" if folder == "." else f"{folder}/" for folder in folders}


@dataclass
class _Row:
    """What the rows of a table say about a file."""

    labels: set[str] = field(default_factory=set)
    splits: set[str] = field(default_factory=set)


def from_table(
    files: Files, table: Path, names: list[str], match_by: str = "path"
) -> tuple[list[Candidate], list[str]]:
    """Return a candidate per file, labeled by a table; and what to do about rows that name no file, if any.

    Rows without a file and files without a row are candidates with a reason. A row that names no file by its
    path is matched by its file name alone with `match_by="name"`.
    """
    found = {name: _Row() for name in names}
    by_nfc_name = {unicodedata.normalize("NFC", name): name for name in names}
    find_by_name = index_by_name(names)
    candidates, num_rows, shown = [], 0, tables.display_name(files, table)
    unmatched: list[tuple[int, str, str | None]] = []  # row, name, file of that name
    for row, (named, label, split) in tables.read_rows(files, table, *_COLUMNS):
        num_rows += 1
        name = tables.find_file(files, table, named, by_nfc_name)
        by_name = find_by_name(named) if name is None else None
        if match_by == "name":
            name = name or by_name
        if name is not None:
            said = found.setdefault(name, _Row())
            said.labels.add(label)
            said.splits.add(split)
            continue
        unmatched.append((row, named, by_name))
        normalized = PurePosixPath(named).as_posix()
        reason = f"names {escape_unprintable(normalized)!r}, which is not a file in the folder"
        candidates.append(Candidate(f"{shown}, row {row}", label, reason))
    offered = [(row, named, file) for row, named, file in unmatched if file and not found[file].labels]
    has_splits = any(split for said in found.values() for split in said.splits)
    candidates += [_from_row(name, said, shown, has_splits) for name, said in found.items()]
    if not unmatched:
        return candidates, []
    row, named, file = (offered or unmatched)[0]
    advice = f"{len(unmatched):,} of the {num_rows:,} rows of {shown} name no file in the folder: "
    advice += f"row {row} names {escape_unprintable(named)!r}"
    if file and offered:
        advice += f", and {escape_unprintable(file)!r} is there; "
        advice += f"to find {len(offered):,} of them by the file name alone, add data.match_by=name"
    return candidates, [advice]


def _from_row(name: str, said: _Row, table: str, has_splits: bool) -> Candidate:
    """Return the candidate of a file for what a table says about it."""
    for kind, texts in (("labels", said.labels), ("splits", said.splits)):
        if len(texts) > 1:
            quoted = " and ".join(repr(text) for text in sorted(texts))
            return Candidate(name, "", f"has several {kind} in {table}: {quoted}")
    label, split = "".join(said.labels), "".join(said.splits)
    if not label:
        return Candidate(name, "", f"has no label in {table}")
    if has_splits and split.lower() not in SPLIT_NAMES:
        given = f"the split {split!r}" if split else "no split"
        return Candidate(name, label, f"has {given} in {table}; write train, validation or test")
    return Candidate(name, label, split=SPLIT_NAMES.get(split.lower(), ""))


def index_by_name(names: Sequence[str]) -> Callable[[str], str | None]:
    """Return a function that finds the only file with the name of a path, or with its name without suffix."""
    index: dict[str, set[str]] = defaultdict(set)

    def keys(name: str) -> tuple[str, str]:
        last = re.split(r"[\\/]", unicodedata.normalize("NFC", name))[-1]
        return last.casefold(), stem(last).casefold()

    for name in names:
        for key in keys(name):
            index[key].add(name)

    def find(name: str) -> str | None:
        found = next((index[key] for key in keys(name) if key in index), set())
        return next(iter(found)) if len(found) == 1 else None

    return find
