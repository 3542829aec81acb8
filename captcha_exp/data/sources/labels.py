"""Where the labels of a folder's pictures stand: in the file names, or in a table beside them.

Tables are read with nothing converted: 00123 stays 00123, and NA is a label like any other.
"""

import csv
import json
import os
import re
import unicodedata
from collections import defaultdict
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
    """A file that may be a picture of the set."""

    name: str  # its path inside the folder, with /
    label: str
    reason: str = ""  # why it cannot be used
    sha256: str = ""  # of its content, where it could be read


def from_filenames(names: list[str], pattern: re.Pattern[str]) -> list[Candidate]:
    """Candidates whose label stands in the file name."""
    candidates = []
    for name in names:
        match = pattern.fullmatch(PurePosixPath(name).stem)
        label = (match and match["label"]) or ""
        reason = "" if label else f"has no label in its name (data.filename_pattern is {pattern.pattern})"
        candidates.append(Candidate(name, label, reason))
    return candidates


def find_table(data: FolderConfig, folder: Path) -> Path | None:
    """The file that the labels stand in, or None if they stand in the file names."""
    if data.labels == "names":
        return None
    if data.labels is None:
        there = [path for path in folder.iterdir() if path.name.lower() in TABLE_NAMES and path.is_file()]
        if len(there) > 1:
            names = " and ".join(sorted(path.name for path in there))
            raise UserError(f"data.labels=null: {names} are in {folder}; say which one, as data.labels=NAME")
        return there[0] if there else None
    if not (folder / data.labels).is_file():
        raise UserError(f"data.labels={data.labels}: there is no such file in {folder}")
    return folder / data.labels


def from_table(folder: Path, table: Path, names: list[str]) -> list[Candidate]:
    """Candidates whose label stands in a table; rows without a picture, and pictures without a row, too."""
    labels: dict[str, set[str]] = defaultdict(set)
    written = {unicodedata.normalize("NFC", name): name for name in names}  # macOS takes names apart
    refused = []
    for row, name, label in _read_rows(table):
        where = f"{table.name}, row {row}"
        name = PurePosixPath(name).as_posix()
        if not os.path.lexists(folder / name):
            slashed = unicodedata.normalize("NFC", name.replace("\\", "/"))  # as Windows writes a path
            name = written.get(slashed, name)
        if not name or name == ".":
            refused.append(Candidate(where, label, "names no file"))
        elif name.startswith("/") or ".." in PurePosixPath(name).parts:
            refused.append(
                Candidate(where, label, f"names {escape_unprintable(name)}, which is outside the folder")
            )
        elif not os.path.lexists(folder / name):
            refused.append(Candidate(where, label, f"names {escape_unprintable(name)}, which is not there"))
        else:
            labels[name].add(label)
    for name in names:
        labels[name] |= set()
    for name, given in labels.items():
        if len(given) > 1:
            several = " and ".join(repr(label) for label in sorted(given))
            refused.append(Candidate(name, "", f"has two labels in {table.name}: {several}"))
        elif not given or not min(given):
            refused.append(Candidate(name, "", f"has no label in {table.name}"))
    return refused + [
        Candidate(name, min(given)) for name, given in labels.items() if len(given) == 1 and min(given)
    ]


def _read_rows(table: Path) -> Iterator[tuple[int, str, str]]:
    """(number of the row, file, label) of a table.

    Raises:
        UserError: it cannot be read, or a column is missing.
    """
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if table.suffix.lower() == ".jsonl":
                lines = (
                    (n, _parse_json_row(table, n, line)) for n, line in enumerate(file, 1) if line.strip()
                )
            else:
                header = file.readline()
                file.seek(0)
                separators = "\t,;" if table.suffix.lower() == ".tsv" else ",;\t"  # German Excel: ;
                reader = csv.DictReader(file, delimiter=max(separators, key=header.count), strict=True)
                lines = ((reader.line_num, row) for row in reader)
            for number, row in lines:
                yield (
                    number,
                    _get_cell(table, number, row, FILE_COLUMNS),
                    _get_cell(table, number, row, LABEL_COLUMNS),
                )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table}: cannot be read as a table of labels: {error}") from None


def _parse_json_row(table: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{table}, row {number}: is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{table}, row {number}: is no JSON object with the keys file and label")
    return row


def _get_cell(table: Path, number: int, row: dict[Any, Any], columns: tuple[str, ...]) -> str:
    """The text under the first of these columns that there is."""
    there = {key.strip().lower(): key for key in row if isinstance(key, str)}
    for column in columns:
        if column in there:
            value = row[there[column]]
            if value is not None and not isinstance(value, str):
                raise UserError(
                    f"{table}, row {number}: {column} is {value!r}, which is no text; write it in "
                    "quotes, so that 00123 stays what it is"
                )
            return (value or "").strip()
    has = ", ".join(escape_unprintable(key) for key in there.values())[:200] or "none"
    wanted = f"{columns[0]} (or {', '.join(columns[1:])})"
    raise UserError(f"{table}, row {number}: has no column {wanted}; its columns are {has}")
