"""How files are written: a reader sees the old file or the new one, never a part of one."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """The file with this content, on the disk itself when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # a full disk does not say at which file, and nobody knows the other name
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _fsync_dir(path.parent)


def write_json(path: Path, content: Any) -> None:
    """The file with this content as JSON, written atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # A byte of a file name that is no UTF-8 is half a character to Python; JSON can write that too.
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def _fsync_dir(folder: Path) -> None:
    """Make a rename in this folder last; Windows cannot open a folder and needs no such step."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_run_files(run_dir: Path) -> list[Path]:
    """Every file of a run's or a sweep's folder, by name; those of a sweep's points belong to the points."""
    points = {record.parent for record in run_dir.glob("*/run.json")}
    return sorted(p for p in run_dir.rglob("*") if p.is_file() and points.isdisjoint(p.parents))


def hash_files(run_dir: Path) -> dict[str, str]:
    """The SHA-256 of every file of a run's folder but run.json, which holds them."""
    files = (path for path in list_run_files(run_dir) if path.name != "run.json")
    return {path.relative_to(run_dir).as_posix(): sha256_of(path) for path in files}
