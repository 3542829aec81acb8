"""Close stale runs and sweeps: those with status RUNNING whose process has exited.

A process that is killed (SIGKILL, out of memory, power loss) leaves the status RUNNING. The next process that
starts marks the run KILLED, holding a lock in outputs/. run.json and sweep.json are handled alike.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from captcha_exp.errors import UserError
from captcha_exp.runs.info import InfoT, Record, RecordedDir, RunInfo, SweepInfo, list_run_files, now
from captcha_exp.runtime.files import is_abandoned_part
from captcha_exp.runtime.paths import root_dir

LOCK_TIMEOUT_SECONDS = 2.0
SENDING_TIME = timedelta(minutes=2)  # a process may still send a run to MLflow that has ended


class StaleRun(RecordedDir[InfoT]):
    """A run or sweep of another process."""

    @staticmethod
    def load(kind: type[InfoT], run_dir: Path) -> "StaleRun[InfoT] | None":
        """Read the record of this kind in a directory; returns None if there is no valid one."""
        try:
            return StaleRun(run_dir, kind.load(run_dir))
        except UserError:
            return None

    @property
    def needs_sync(self) -> bool:
        """Check whether MLflow lacks the end of the run."""
        return self.info.mlflow is not None and not self.info.mlflow.closed

    def is_stale(self) -> bool:
        """Check whether the process has exited, and the run is not closed here or in MLflow.

        A process that continues after the end of a run, such as a notebook, no longer sends it to MLflow.
        """
        ended = self.info.ended
        has_left = not self.info.is_running and ended is not None and now() - ended > SENDING_TIME
        return (self.info.is_running or self.needs_sync) and (has_left or not self.info.is_alive())

    def reload(self) -> "StaleRun[InfoT] | None":
        """Read the record again; returns None if it is no longer stale.

        The process may have written its own end between the first read and its exit.
        """
        current = StaleRun.load(type(self.info), self.run_dir)
        return current if current is not None and current.is_stale() else None

    def remove_partial_files(self) -> None:
        """Remove the temporary files of writes that the process did not finish."""
        for path in list_run_files(self.run_dir):
            if is_abandoned_part(path, self.info.pid):
                path.unlink()

    def finalize(self, error: str | None = None) -> None:
        """Close as FAILED with this error, or as KILLED without; it ended at the newest modification time."""
        ended = datetime.fromtimestamp(_latest_mtime(self.run_dir)).astimezone()
        self.remove_partial_files()
        self.update_mlflow(closed=False)
        if error is None:
            self.close("KILLED", stop_reason="killed", ended=ended)
        else:
            self.close("FAILED", error, ended=ended)


def find_stale() -> list[StaleRun[Any]]:
    """Return the runs and sweeps of exited processes of this host that are not closed here or in MLflow.

    A sweep precedes its jobs, because closing the jobs changes the newest modification time in its directory.
    """
    outputs = root_dir() / "outputs"
    kinds: tuple[tuple[type[Record], str], ...] = ((SweepInfo, "*/*"), (RunInfo, "*/*"), (RunInfo, "*/*/*"))
    found = (
        StaleRun.load(kind, path.parent)
        for kind, parents in kinds
        for path in sorted(outputs.glob(f"{parents}/{kind.filename}"))
    )
    return [stale for stale in found if stale is not None and stale.is_stale()]


def stale_in(run_dir: Path) -> StaleRun[RunInfo] | None:
    """Return the run in this directory if its process has exited and it is not closed here or in MLflow.

    A run that this process claimed (`claim.claim`) counts as exited, since another process trains it.
    """
    stale = StaleRun.load(RunInfo, run_dir)
    if stale is None or not (stale.info.is_running or stale.needs_sync):
        return None
    return stale if stale.info.pid == os.getpid() or stale.is_stale() else None


@contextlib.contextmanager
def stale_lock(timeout: float = LOCK_TIMEOUT_SECONDS) -> Iterator[bool]:
    """Hold the lock for writing to stale runs; yields False if not acquired within `timeout` seconds."""
    import filelock

    lock = filelock.FileLock(root_dir() / "outputs" / ".closing.lock", timeout=timeout)
    try:
        held = lock.acquire()
    except filelock.Timeout:
        yield False
        return
    with held:
        yield True


def _latest_mtime(run_dir: Path) -> float:
    times = []
    for path in run_dir.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a job of the sweep may still be writing
            if path.is_file():
                times.append(path.stat().st_mtime)
    return max(times)
