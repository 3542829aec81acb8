"""Read, check and write the JSON file of a GPU session."""

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


class SessionError(Exception):
    """A file or an argument cannot be used; the message says what to change, in one line."""


def read_session(path: Path) -> dict[str, Any]:
    """Return the session in a file.

    Raises:
        SessionError: the file cannot be read or is not a session. Name another file.
    """
    try:
        session = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SessionError(f"{path}: cannot be read: {error.strerror or error}; name another file") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are among these
        reason = " ".join(str(error).split())
        raise SessionError(
            f"{path}: not a JSON file ({reason}); name another file, this one is unchanged"
        ) from None
    if not _is_session(session):
        raise SessionError(
            f"{path}: not a session of benchmarks/gpu_session.py; name another file, this one is unchanged"
        )
    result: dict[str, Any] = session
    return result


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file.

    Raises:
        SessionError: the file is not writable, or another session is writing it. Wait, or name another file.
    """
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise SessionError(f"{path}: cannot be written: {reason}; name another file with --out") from None
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    lock = filelock.FileLock(Path(tempfile.gettempdir()) / f"gpu-session-{name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise SessionError(
            f"{path}: another session is writing it; wait until it ends, or give another --out"
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
    """Check that new figures may be added to those in a file.

    Raises:
        SessionError: the GPU, the version of torch or --dry-run differs. Give another --out.
    """
    measured = [
        name for name, part in session["parts"].items() if name != "predictions" and "figures" in part
    ]
    if not measured:
        return
    previous, current = (
        f"{about.get('gpu') or 'no GPU'}, torch {about.get('torch')}{', dry run' if dry else ''}"
        for about, dry in ((session["machine"], session.get("dry_run", False)), (machine, dry_run))
    )
    if previous != current:
        raise SessionError(
            f"{path}: holds figures of {previous}; this is {current}; give another file with --out"
        )


def load_predictions(path: Path, session: Mapping[str, Any], code_sha256: str) -> dict[str, Any] | None:
    """Return the predictions in a session's file, or None if it has none.

    Raises:
        SessionError: they were made by other code. Make them again.
    """
    part: dict[str, Any] = session["parts"].get("predictions", {})
    figures = part.get("figures")
    if not figures:
        return None
    sha256 = str(figures.get("code_sha256") if isinstance(figures, dict) else None)
    if sha256 != code_sha256:
        raise SessionError(
            f"{path}: its predictions belong to other code (code_sha256 {sha256[:12]}, this code is "
            f"{code_sha256[:12]}); make them again: {PREDICT}; then give --out NEW.json"
        )
    return part


def to_text(session: Mapping[str, Any]) -> str:
    """Return the session as JSON with one line per part."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in session.items() if key != "parts"]
    parts = [f"{json.dumps(name)}: {json.dumps(part)}" for name, part in session["parts"].items()]
    return ",\n".join(["{\n" + lines[0], *lines[1:], '"parts": {\n' + ",\n".join(parts) + "\n}"]) + "\n}\n"


def write_session(path: Path, session: Mapping[str, Any]) -> str | None:
    """Write the session to its file atomically; return the error message if that fails.

    A full disk must not end a session: the file is written again after the next part.
    """
    try:
        write_atomically(path, to_text(session).encode())
    except OSError as error:
        return f"{path}: cannot be written: {error.strerror or error}"
    return None


def save_to_temp_file(session: Mapping[str, Any]) -> Path:
    """Write the session to a new temporary file and return its path."""
    with tempfile.NamedTemporaryFile(prefix="gpu-session-", suffix=".json", delete=False) as file:
        file.write(to_text(session).encode())
    return Path(file.name)
