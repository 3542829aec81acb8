"""Close stale runs and sweeps: those with status RUNNING whose process has exited.

A process that is killed (SIGKILL, out of memory, power loss) leaves the status RUNNING. The next process that
starts marks the run KILLED, holding a lock in outputs/. run.json and sweep.json are handled alike.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from captcha_exp.runs.files import hash_files, list_run_files
from captcha_exp.runs.run import COMMON_FIELDS, RUN_FORMAT, Status, read_metrics_rows
from captcha_exp.runtime.files import write_json
from captcha_exp.runtime.paths import root_dir
from captcha_exp.runtime.process import is_alive

KILLED_ERROR = "the process exited without closing the run: killed (SIGKILL, out of memory) or power loss"
LOCK_TIMEOUT_SECONDS = 2.0


@dataclass(frozen=True)
class StaleRun:
    """A run or sweep of another process, with the content of its run.json or sweep.json."""

    path: Path
    state: dict[str, Any]

    @property
    def run_dir(self) -> Path:
        return self.path.parent

    @property
    def is_running(self) -> bool:
        """Check whether the recorded status is RUNNING."""
        return bool(self.state["status"] == "RUNNING")

    @property
    def needs_sync(self) -> bool:
        """Check whether MLflow lacks the end of the run.

        Without the field `closed`, a run that has ended counts as synced.
        """
        mlflow = self.state["mlflow"]
        return mlflow is not None and not mlflow.get("closed", not self.is_running)

    def reload(self) -> "StaleRun | None":
        """Read the record again; returns None if it is no longer stale.

        The process may have written its own end between the first read and its exit.
        """
        current = read_stale_run(self.path)
        return current if current is not None and _is_stale(current) else None

    def update(self, **state: Any) -> None:
        """Set fields of the record."""
        self.state.update(state)
        write_json(self.path, self.state)

    def remove_partial_files(self) -> None:
        """Remove the temporary files of writes that the process did not finish."""
        for path in list_run_files(self.run_dir):
            if _is_abandoned_part(path, self.state["pid"]):
                path.unlink()

    def close(self, status: Status = "KILLED", error: str = KILLED_ERROR) -> None:
        """Write the final status, the newest modification time as end time, and the SHA-256 of each file."""
        ended = datetime.fromtimestamp(_latest_mtime(self.run_dir)).astimezone()
        self.remove_partial_files()
        fields: dict[str, Any] = {
            "status": status,
            "error": error,
            "ended": ended.isoformat(timespec="microseconds"),
        }
        rows, damaged_lines = read_metrics_rows(self.run_dir)
        if damaged_lines:
            lines = ", ".join(map(str, damaged_lines))
            warning = f"metrics.jsonl: skipped damaged line {lines}; {len(rows)} valid rows"
            fields["warnings"] = [*self.state.get("warnings", ()), warning]
        if self.state["mlflow"] is not None:
            fields["mlflow"] = {**self.state["mlflow"], "closed": False}
        if "files" in self.state:
            fields["files"] = hash_files(self.run_dir)
        self.update(**fields)


def find_stale() -> list[StaleRun]:
    """Return the runs and sweeps of exited processes of this host that are not closed here or in MLflow.

    A sweep precedes its jobs, because closing the jobs changes the newest modification time in its directory.
    """
    outputs = root_dir() / "outputs"
    names = ("*/*/sweep.json", "*/*/run.json", "*/*/*/run.json")
    paths = (path for name in names for path in sorted(outputs.glob(name)))
    return [stale for path in paths if (stale := read_stale_run(path)) is not None and _is_stale(stale)]


def stale_in(run_dir: Path) -> StaleRun | None:
    """Return the run in this directory if its process has exited and it is not closed here or in MLflow.

    A run that this process claimed (`resume.claim`) counts as exited, since another process trains it.
    """
    stale = read_stale_run(run_dir / "run.json")
    if stale is None or not (stale.is_running or stale.needs_sync):
        return None
    return stale if stale.state["pid"] == os.getpid() or not is_alive(stale.state) else None


@contextlib.contextmanager
def stale_lock(timeout: float = LOCK_TIMEOUT_SECONDS) -> Iterator[bool]:
    """Hold the lock for writing to stale runs; yields False if not acquired within `timeout` seconds."""
    import filelock

    lock = filelock.FileLock(root_dir() / "outputs" / ".closing.lock", timeout=timeout)
    try:
        lock.acquire()
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def read_stale_run(path: Path) -> StaleRun | None:
    """Read a run.json or sweep.json; returns None if it is invalid or written by captcha_exp 0.1."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "run.json" and state.get("format") != RUN_FORMAT:
            return None
        is_valid = (
            all(isinstance(state[key], kinds) for key, kinds in COMMON_FIELDS.items()) and state["pid"] > 0
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return StaleRun(path, state) if is_valid else None


def _is_stale(stale: StaleRun) -> bool:
    return (stale.is_running or stale.needs_sync) and not is_alive(stale.state)


def _latest_mtime(run_dir: Path) -> float:
    times = []
    for path in run_dir.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a job of the sweep may still be writing
            if path.is_file():
                times.append(path.stat().st_mtime)
    return max(times)


def _is_abandoned_part(path: Path, pid: int) -> bool:
    """Check for a temporary file (`files.write_atomically`) of this or another exited process."""
    prefix, _, writer = path.name.removesuffix(".part").rpartition(".")
    if not (path.name.endswith(".part") and prefix.startswith(".") and writer.isdecimal()):
        return False
    return int(writer) == pid or not psutil.pid_exists(int(writer))
