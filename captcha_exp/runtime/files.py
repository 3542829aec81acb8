"""Atomic writes, reads that a damaged or hostile file cannot harm, and hashes."""

import hashlib
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import psutil

MAX_FILE_BYTES = 256 * 2**20  # of a file that is read as a whole
MAX_DEPTH = 64  # nesting of JSON; Python's own limit differs between its parser, its writer and pydantic
MAX_DIGITS = 19  # of an integer in JSON, as in 64 bits


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically: readers see the old content or the new, never a part.

    The content is on the disk when this returns.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # name the file itself, not the temporary one
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _fsync_dir(path.parent)


def is_abandoned_part(path: Path, pid: int | None = None) -> bool:
    """Check for a temporary file of `write_atomically` whose process is the given one or has exited."""
    match = re.fullmatch(r"\..*\.(\d+)\.part", path.name)
    if match is None:
        return False
    return int(match[1]) == pid or not psutil.pid_exists(int(match[1]))


def write_json(path: Path, content: Any) -> None:
    """Write a value as JSON, atomically."""
    write_atomically(path, json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """Return a value as the content of a JSON file."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # A file name that is not valid UTF-8 has lone surrogates; they are escaped, as JSON allows.
    return text.encode("utf-8", "backslashreplace")


def read_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return the content of a regular file, which is opened once.

    Raises:
        OSError: The file is missing or cannot be read.
        ValueError: It is not a regular file, or too large.
    """
    # O_NONBLOCK: opening a FIFO would wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > max_bytes:
            raise ValueError(f"{status.st_size:,} bytes, at most {max_bytes:,} are read")
        return file.read(max_bytes)


def parse_json(content: bytes | str) -> Any:
    """Return the value of JSON text, whose numbers and nesting are limited.

    Raises:
        ValueError: It is not valid UTF-8 or JSON, nested too deeply, or has a number out of range.
    """
    text = content.decode("utf-8") if isinstance(content, bytes) else content
    try:
        value = json.loads(text, parse_int=_parse_int, parse_float=_parse_float)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _elements(outer)]
        if not level:
            return value
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _elements(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _parse_int(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"integer of {len(text):,} digits")
    return int(text)


def _parse_float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"number out of range: {text[:20]}")
    return value


def sha256_of_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys and its layout in a file."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _fsync_dir(directory: Path) -> None:
    """Flush a rename in a directory to disk; Windows cannot open directories and does not need it."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
