"""The record of a process that is gone, and the end that it could not write.

A process that is killed (kill -9, too little memory, a power cut) leaves status RUNNING. Nobody writes into
its folder any more, so that another process can write the end: one at a time, under a lock in outputs/. A
sweep's sweep.json and the run.json of a run are closed alike.
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
from captcha_exp.runs.run import COMMON_FIELDS, Status, read_metrics_rows
from captcha_exp.runtime.files import write_json
from captcha_exp.runtime.paths import root_dir
from captcha_exp.runtime.process import is_alive

KILLED_ERROR = (
    "its process ended without a word: killed (kill -9, too little memory), or the machine went down"
)
LOCK_TIMEOUT_SECONDS = 2.0


@dataclass(frozen=True)
class StaleRun:
    """What a process left: its run.json or sweep.json, as read."""

    path: Path
    state: dict[str, Any]

    @property
    def run_dir(self) -> Path:
        return self.path.parent

    @property
    def is_running(self) -> bool:
        """Whether it says that it goes on."""
        return bool(self.state["status"] == "RUNNING")

    @property
    def needs_sync(self) -> bool:
        """Whether MLflow lacks its end.

        A run notes "closed" from its start on; an older one, without the word, is believed if it has ended.
        """
        mlflow = self.state["mlflow"]
        return mlflow is not None and not mlflow.get("closed", not self.is_running)

    def reload(self) -> "StaleRun | None":
        """As it stands now; None if there is no more to write, or somebody to write it.

        Read after its process was seen to be gone: what stands there now is its last word.
        """
        now = read_stale_run(self.path)
        return now if now is not None and _is_stale(now) else None

    def update(self, **state: Any) -> None:
        """Facts in the record."""
        self.state.update(state)
        write_json(self.path, self.state)

    def remove_partial_files(self) -> None:
        """Without what its process was writing when it was killed."""
        for path in list_run_files(self.run_dir):
            if _is_abandoned_part(path, self.state["pid"]):
                path.unlink()

    def close(self, status: Status = "KILLED", error: str = KILLED_ERROR) -> None:
        """The end, at the time of the newest file, and the SHA-256 of each file of a run."""
        ended = datetime.fromtimestamp(_latest_mtime(self.run_dir)).astimezone()
        self.remove_partial_files()
        facts: dict[str, Any] = {
            "status": status,
            "error": error,
            "ended": ended.isoformat(timespec="microseconds"),
        }
        rows, broken = read_metrics_rows(self.run_dir)
        if broken:
            lines = ", ".join(map(str, broken))
            torn = f"metrics.jsonl: no whole row in line {lines}; the other {len(rows)} are read"
            facts["warnings"] = [*self.state.get("warnings", ()), torn]
        if self.state["mlflow"] is not None:
            facts["mlflow"] = {**self.state["mlflow"], "closed": False}
        if "files" in self.state:
            facts["files"] = hash_files(self.run_dir)
        self.update(**facts)


def find_stale() -> list[StaleRun]:
    """The records of this host's processes that are gone, without their end here or in MLflow.

    A sweep comes before its points: the newest file of its folder is sought before theirs are written to.
    """
    outputs = root_dir() / "outputs"
    names = ("*/*/sweep.json", "*/*/run.json", "*/*/*/run.json")
    paths = (path for name in names for path in sorted(outputs.glob(name)))
    return [left for path in paths if (left := read_stale_run(path)) is not None and _is_stale(left)]


def stale_in(run_dir: Path) -> StaleRun | None:
    """The record of the run in this folder, if its process is gone without its end here or in MLflow.

    This process itself is none of a run that it only held for another (`unfinished.held`).
    """
    left = read_stale_run(run_dir / "run.json")
    if left is None or not (left.is_running or left.needs_sync):
        return None
    return left if left.state["pid"] == os.getpid() or not is_alive(left.state) else None


@contextlib.contextmanager
def stale_lock(timeout: float = LOCK_TIMEOUT_SECONDS) -> Iterator[bool]:
    """The right to write into what others left, held by one process; False where another has it for longer
    than these seconds."""
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
    """What this run.json or sweep.json says; None for what is no such record: `runs` tells of it."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        right = (
            all(isinstance(state[key], kinds) for key, kinds in COMMON_FIELDS.items()) and state["pid"] > 0
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return StaleRun(path, state) if right else None


def _is_stale(stale: StaleRun) -> bool:
    return (stale.is_running or stale.needs_sync) and not is_alive(stale.state)


def _latest_mtime(folder: Path) -> float:
    times = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # of a sweep, a point may still be writing
            if path.is_file():
                times.append(path.stat().st_mtime)
    return max(times)


def _is_abandoned_part(path: Path, pid: int) -> bool:
    """Whether it is a part of a file (`files.write_atomically`) that nobody will finish."""
    begin, _, writer = path.name.removesuffix(".part").rpartition(".")
    if not (path.name.endswith(".part") and begin.startswith(".") and writer.isdecimal()):
        return False
    return int(writer) == pid or not psutil.pid_exists(int(writer))
