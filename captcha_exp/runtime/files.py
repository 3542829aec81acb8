"""Atomic writes, reads that a damaged or hostile file cannot harm, and hashes."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import psutil


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically: readers see the old content or the new, never a part.

    The content is on the disk when this returns.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.unlink(missing_ok=True)  # of an earlier process with this number
        with temporary.open("xb") as file:  # does not write through a symbolic link
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


def describe_broken_link(path: Path) -> str | None:
    """Return the part of a path that is a symbolic link to nothing, with the remedy; None without one."""
    for part in (path, *path.parents):
        if os.path.islink(part) and not os.path.exists(part):  # noqa: PTH110, PTH114 - pathlib's raise on long names
            problem = f"{part}: is a symbolic link to {part.readlink()}, which does not exist"
            return f"{problem}; mount its disk, or remove the link"
    return None


def write_json(path: Path, content: Any) -> None:
    """Write a value as JSON, atomically."""
    write_atomically(path, json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """Return a value as the content of a JSON file."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # A file name that is not valid UTF-8 has lone surrogates; they are escaped, as JSON allows.
    return text.encode("utf-8", "backslashreplace")


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
