"""Labels of the images of a folder, from file names or from a table.

Values of a table are not converted: 00123 stays 00123, and NA is an ordinary label.
"""

import csv
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from captcha_exp.config import FolderConfig
from captcha_exp.errors import UserError
from captcha_exp.runtime.console import escape_unprintable

TABLE_NAMES = ("labels.csv", "labels.tsv", "labels.jsonl")
FILE_COLUMNS = ("file", "file_name", "filename", "image", "path")
LABEL_COLUMNS = ("label", "text", "code")


@dataclass(frozen=True)
class Candidate:
    """A file of a folder that may be used as an image."""

    name: str  # path relative to the folder, with /
    label: str
    reason: str = ""  # why it cannot be used
    sha256: str = ""  # of its content; empty if it cannot be read


def from_filenames(names: list[str], pattern: re.Pattern[str]) -> list[Candidate]:
    """Return a candidate per file, labeled by its file name."""
    candidates = []
    for name in names:
        match = pattern.fullmatch(PurePosixPath(name).stem)
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


def from_table(folder: Path, table: Path, names: list[str]) -> list[Candidate]:
    """Return a candidate per file, labeled by a table.

    Rows without a file and files without a row are candidates with a reason.
    """
    labels: dict[str, set[str]] = {name: set() for name in names}
    by_nfc_name = {unicodedata.normalize("NFC", name): name for name in names}  # macOS stores NFD names
    candidates = []
    for row, name, label in _read_rows(table):
        name = PurePosixPath(name).as_posix()
        if not os.path.lexists(folder / name):
            nfc_name = unicodedata.normalize("NFC", name.replace("\\", "/"))  # Windows path separators
            name = by_nfc_name.get(nfc_name, name)
        is_inside = not name.startswith("/") and ".." not in PurePosixPath(name).parts
        if name != "." and is_inside and os.path.lexists(folder / name):
            labels.setdefault(name, set()).add(label)
            continue
        reason = f"names {escape_unprintable(name)!r}, which is not a file in the folder"
        candidates.append(Candidate(f"{table.name}, row {row}", label, reason))
    for name, found in labels.items():
        if len(found) > 1:
            quoted = " and ".join(repr(label) for label in sorted(found))
            candidates.append(Candidate(name, "", f"has several labels in {table.name}: {quoted}"))
        elif label := next(iter(found), ""):
            candidates.append(Candidate(name, label))
        else:
            candidates.append(Candidate(name, "", f"has no label in {table.name}"))
    return candidates


def _read_rows(table: Path) -> Iterator[tuple[int, str, str]]:
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
