"""Labels of the images of a folder, from file names or from a table.

Values of a table are not converted: 00123 stays 00123, and NA is an ordinary label.
"""

import csv
import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from captcha_exp.config import FolderConfig
from captcha_exp.errors import UserError
from captcha_exp.runtime.console import escape_unprintable

TABLE_NAMES = ("labels.csv", "labels.tsv", "labels.jsonl")
FILE_COLUMNS = ("file", "file_name", "filename", "image", "path")
LABEL_COLUMNS = ("label", "text", "code")

IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".webp"),
    *(".tif", ".tiff", ".ico", ".avif", ".heic", ".jp2"),  # not supported, and reported as such
)
_ADDRESS_END = re.compile(rf"(?i)({'|'.join(map(re.escape, IMAGE_SUFFIXES))})(?![a-z0-9]).*|\?\w+=.*")
"""what follows the name in the last part of an address, as in 5874.png?t=1"""


@dataclass(frozen=True)
class Candidate:
    """A file of a folder that may be used as an image."""

    name: str  # path relative to the folder, with /
    label: str
    reason: str = ""  # why it cannot be used
    sha256: str = ""  # of its content; empty if it cannot be read

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
    if path.suffix.lower() in IMAGE_SUFFIXES:
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


def find_table(data: FolderConfig, folder: Path) -> Path | None:
    """Return the label table of a folder, or None if labels are in the file names.

    Raises:
        UserError: data.labels does not exist, or is null and several tables exist; set data.labels=NAME.
    """
    if data.labels == "names":
        return None
    if data.labels is None:
        tables = [path for path in folder.iterdir() if path.name.lower() in TABLE_NAMES and path.is_file()]
        if len(tables) > 1:
            names = " and ".join(sorted(path.name for path in tables))
            raise UserError(f"data.labels=null: {folder} has {names}; choose one with data.labels=NAME")
        return tables[0] if tables else None
    if not (folder / data.labels).is_file():
        raise UserError(f"data.labels={data.labels}: no such file in {folder}")
    return folder / data.labels


def from_table(
    folder: Path, table: Path, names: list[str], match_by: str = "path"
) -> tuple[list[Candidate], list[str]]:
    """Return a candidate per file, labeled by a table; and what to do about rows that name no file, if any.

    Rows without a file and files without a row are candidates with a reason. A row that names no file by its
    path is matched by its file name alone with `match_by="name"`.
    """
    labels: dict[str, set[str]] = {name: set() for name in names}
    by_nfc_name = {unicodedata.normalize("NFC", name): name for name in names}  # macOS stores NFD names
    find_by_name = index_by_name(names)
    candidates, num_rows = [], 0
    unmatched: list[tuple[int, str, str | None]] = []  # row, name, file of that name
    for row, named, label in read_rows(table):
        num_rows += 1
        name = _find_file(folder, table, named, by_nfc_name)
        by_name = find_by_name(named) if name is None else None
        if match_by == "name":
            name = name or by_name
        if name is not None:
            labels.setdefault(name, set()).add(label)
            continue
        unmatched.append((row, named, by_name))
        normalized = PurePosixPath(named).as_posix()
        reason = f"names {escape_unprintable(normalized)!r}, which is not a file in the folder"
        candidates.append(Candidate(f"{table.name}, row {row}", label, reason))
    offered = [(row, named, file) for row, named, file in unmatched if file and not labels[file]]
    for name, found in labels.items():
        if len(found) > 1:
            quoted = " and ".join(repr(label) for label in sorted(found))
            candidates.append(Candidate(name, "", f"has several labels in {table.name}: {quoted}"))
        elif label := next(iter(found), ""):
            candidates.append(Candidate(name, label))
        else:
            candidates.append(Candidate(name, "", f"has no label in {table.name}"))
    if not unmatched:
        return candidates, []
    row, named, file = (offered or unmatched)[0]
    advice = f"{len(unmatched):,} of the {num_rows:,} rows of {table.name} name no file in the folder: "
    advice += f"row {row} names {escape_unprintable(named)!r}"
    if file and offered:
        advice += f", and {escape_unprintable(file)!r} is there; "
        advice += f"to find {len(offered):,} of them by the file name alone, add data.match_by=name"
    return candidates, [advice]


def _find_file(folder: Path, table: Path, named: str, by_nfc_name: dict[str, str]) -> str | None:
    """Return the name of the file that a row names: relative to the folder or the table, or absolute."""
    for text in (named, named.replace("\\", "/")):  # Windows path separators
        name = PurePosixPath(text).as_posix()
        for known in (name, by_nfc_name.get(unicodedata.normalize("NFC", name), name)):
            is_inside = not known.startswith("/") and ".." not in PurePosixPath(known).parts
            if known != "." and is_inside and os.path.lexists(folder / known):
                return known
        for path in (folder / text, table.parent / text):
            try:
                path = Path(os.path.realpath(path.parent), path.name)  # a link to an image keeps its name
            except ValueError:  # a NUL in the name
                break
            if path != folder and path.is_relative_to(folder) and os.path.lexists(path):
                return path.relative_to(folder).as_posix()
    return None


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


def read_rows(table: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (row number, file, label) for each row of a table.

    Raises:
        UserError: the table cannot be read, or a column is missing; the line says which are supported.
    """
    number = 1
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows: Iterator[tuple[int, Any]]
            if table.suffix.lower() == ".jsonl":
                rows = ((n, line) for n, line in enumerate(file, 1) if line.strip())
            else:
                header = file.readline()
                file.seek(0)
                separators = "\t,;" if table.suffix.lower() == ".tsv" else ",;\t"  # Excel in Germany writes ;
                reader = csv.DictReader(file, delimiter=max(separators, key=header.count), strict=True)
                rows = ((reader.line_num, row) for row in reader)
            for number, row in rows:
                cells = json.loads(row) if isinstance(row, str) else row
                yield number, _get_cell(cells, FILE_COLUMNS), _get_cell(cells, LABEL_COLUMNS)
    except UnicodeDecodeError:
        raise UserError(f"{table}: is not UTF-8 text; save it as UTF-8 (in Excel: CSV UTF-8)") from None
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{table}, row {number}: {error}") from None


def _get_cell(row: object, columns: tuple[str, ...]) -> str:
    """Return the text in the first of these columns that exists.

    Raises:
        ValueError: There is none, or it does not have a text.
    """
    if not isinstance(row, dict):
        raise ValueError("not a JSON object with the keys file and label")
    found = {key.strip().lower(): key for key in row if isinstance(key, str)}
    for column in columns:
        if column in found:
            value = row[found[column]]
            if value is not None and not isinstance(value, str):
                raise ValueError(f'{column} is {value!r}, not text; put it in quotes, as in "0012"')
            return (value or "").strip()
    names = ", ".join(escape_unprintable(key) for key in found.values())[:200] or "none"
    expected = f"{columns[0]} (or {', '.join(columns[1:])})"
    raise ValueError(f"has no column {expected}; its columns are {names}")
