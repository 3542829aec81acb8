"""The JSON file of a GPU session: read, checked, and written after each part."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from captcha_exp.runtime.files import write_atomically

BENCHMARK = "gpu_session"
PREDICT = "python benchmarks/gpu_session.py --parts predictions --out NEW.json"


class Refused(Exception):
    """The user has to change something first; the message says what, in one line."""


def read_session(path: Path) -> dict[str, Any]:
    """Return the session in a file.

    Raises:
        Refused: the file cannot be read or holds something else. Name another file; this one is unchanged.
    """
    try:
        session = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"{path}: cannot be read: {error.strerror or error}; name another file") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are among these
        reason = " ".join(str(error).split())
        raise Refused(
            f"{path}: not a JSON file ({reason}); name another file, this one is unchanged"
        ) from None
    if not _is_session(session):
        raise Refused(
            f"{path}: not a session of benchmarks/gpu_session.py; name another file, this one is unchanged"
        )
    found: dict[str, Any] = session
    return found


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Keep the file to this session until the end of the block.

    Raises:
        Refused: the file cannot be written, or another session is writing it. Wait, or name another file.
    """
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise Refused(f"{path}: cannot be written: {reason}; name another file with --out") from None
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    lock = filelock.FileLock(Path(tempfile.gettempdir()) / f"gpu-session-{name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise Refused(
            f"{path}: another session is writing it; wait for its end, or give another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _is_session(values: Any) -> bool:
    return (
        isinstance(values, dict)
        and values.get("benchmark") == BENCHMARK
        and isinstance(values.get("machine"), dict)
        and isinstance(values.get("parts"), dict)
        and all(isinstance(part, dict) for part in values["parts"].values())
    )


def check_same_machine(
    path: Path, session: Mapping[str, Any], machine: Mapping[str, Any], dry_run: bool
) -> None:
    """Check that the figures in a file and those to be added can share it.

    Raises:
        Refused: they are of another GPU, another torch or of a dry run. Give another --out.
    """
    measured = [
        name for name, part in session["parts"].items() if name != "predictions" and "figures" in part
    ]
    if not measured:
        return
    there, here = (
        f"{about.get('gpu') or 'no GPU'}, torch {about.get('torch')}{', dry run' if dry else ''}"
        for about, dry in ((session["machine"], session.get("dry_run", False)), (machine, dry_run))
    )
    if there != here:
        raise Refused(f"{path}: holds figures of {there}; this is {here}; give another file with --out")


def carried_predictions(path: Path, session: Mapping[str, Any], code_sha256: str) -> dict[str, Any] | None:
    """Return the predictions in a session's file, or None if it has none.

    Raises:
        Refused: other code made them, so that they say nothing about this one. Make them again.
    """
    part: dict[str, Any] = session["parts"].get("predictions", {})
    figures = part.get("figures")
    if not figures:
        return None
    found = str(figures.get("code_sha256") if isinstance(figures, dict) else None)
    if found != code_sha256:
        raise Refused(
            f"{path}: its predictions belong to other code (code_sha256 {found[:12]}, this code is "
            f"{code_sha256[:12]}); make them again: {PREDICT}; then give --out NEW.json"
        )
    return part


def as_text(session: Mapping[str, Any]) -> str:
    """Return the session as JSON with one line per part, so that long lists do not take a line per number."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in session.items() if key != "parts"]
    parts = [f"{json.dumps(name)}: {json.dumps(part)}" for name, part in session["parts"].items()]
    return ",\n".join(["{\n" + lines[0], *lines[1:], '"parts": {\n' + ",\n".join(parts) + "\n}"]) + "\n}\n"


def write_session(path: Path, session: Mapping[str, Any]) -> str | None:
    """Write the session to its file, complete or not at all; return what is wrong if that fails.

    A full disk must not end a session whose next parts still have a GPU: the next call tries again.
    """
    try:
        write_atomically(path, as_text(session).encode())
    except OSError as error:
        return f"{path}: cannot be written: {error.strerror or error}"
    return None


def save_elsewhere(session: Mapping[str, Any]) -> Path:
    """Write the session to a new file in the folder for temporary files, and return it."""
    with tempfile.NamedTemporaryFile(prefix="gpu-session-", suffix=".json", delete=False) as file:
        file.write(as_text(session).encode())
    return Path(file.name)
