"""Tables that name the files of a folder: CSV, TSV or JSON lines, in UTF-8.

Values are not converted: 00123 stays 00123, and NA is an ordinary label.
"""

import csv
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from captcha_exp.data.sources.files import Files
from captcha_exp.errors import UserError
from captcha_exp.runtime.text import escape_unprintable

FILE_COLUMNS = ("file", "file_name", "filename", "image", "path")
LABEL_COLUMNS = ("label", "text", "code")
SPLIT_COLUMNS = ("split", "")


def read_rows(files: Files, table: Path, *columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Yield for each row of a table its number and the texts of these columns.

    A column is given by its possible names; a last name "" makes it optional, with "" as text.

    Raises:
        UserError: the table cannot be read, or a column is missing; the line says which are supported.
    """
    number = 1
    try:
        with files.open(table) as content, io.TextIOWrapper(content, "utf-8-sig", newline="") as file:
            rows: Iterator[tuple[int, Any]]
            if table.suffix.lower() == ".jsonl":
                rows = ((n, line) for n, line in enumerate(file, 1) if line.strip())
            else:
                header = file.readline()
                file.seek(0)
                separators = "\t,;" if table.suffix.lower() == ".tsv" else ",;\t"  # Excel in Germany writes ;
                reader = csv.DictReader(file, delimiter=max(separators, key=header.count), strict=True)
                _check_header(reader.fieldnames or ())
                rows = ((reader.line_num, row) for row in reader)
            for number, row in rows:
                cells = json.loads(row) if isinstance(row, str) else row
                if not isinstance(cells, dict):
                    raise ValueError("not a JSON object with the keys file and label")
                yield number, [_get_cell(cells, names) for names in columns]
    except UnicodeDecodeError:
        raise UserError(f"{table}: is not UTF-8 text; save it as UTF-8 (in Excel: CSV UTF-8)") from None
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{table}, row {number}: {error}") from None


def _check_header(names: Sequence[str]) -> None:
    """Check that no column occurs twice.

    Raises:
        ValueError: One does; its values would be those of the last one.
    """
    counts = Counter(name.strip().lower() for name in names)
    if repeated := [name for name, count in counts.items() if name and count > 1]:
        raise ValueError(f"has the column {escape_unprintable(repeated[0])} twice; remove or rename one")


def _get_cell(row: Mapping[Any, Any], columns: tuple[str, ...]) -> str:
    """Return the text in the first of these columns that exists.

    Raises:
        ValueError: There is none, or it does not have a text.
    """
    found = {key.strip().lower(): key for key in row if isinstance(key, str)}
    for column in columns:
        if column in found:
            value = row[found[column]]
            if value is not None and not isinstance(value, str):
                raise ValueError(f'{column} is {value!r}, not text; put it in quotes, as in "0012"')
            return value or "" if columns is FILE_COLUMNS else (value or "").strip()
    if not columns[-1]:
        return ""
    names = ", ".join(escape_unprintable(key) for key in found.values())[:200] or "none"
    others = f" (or {', '.join(columns[1:])})" if len(columns) > 1 else ""
    raise ValueError(f"has no column {columns[0]}{others}; its columns are {names}")


def find_file(files: Files, table: Path, named: str, by_nfc_name: Mapping[str, str]) -> str | None:
    """Return the name of the file that a row names; None if there is none.

    `by_nfc_name` has the names of the images by their composed form, as macOS stores decomposed ones.
    """
    for spaced in dict.fromkeys((named, named.strip())):
        for text in (spaced, spaced.replace("\\", "/")):  # Windows path separators
            name = unicodedata.normalize("NFC", PurePosixPath(text).as_posix())
            if name in by_nfc_name:
                return by_nfc_name[name]
        if found := files.locate(spaced, table):
            return found
    return None


def display_name(files: Files, table: Path) -> str:
    """Return how a message names a table: relative to its source if it is in there."""
    inside = table.is_relative_to(files.path)
    return escape_unprintable(table.relative_to(files.path).as_posix() if inside else table.name)
