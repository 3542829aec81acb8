"""The identity of a process, stored in a record to check later whether the process is still running.

A PID alone is not enough: PIDs are reused, and are different in each container. On Linux the start time of a
process counts from boot, which unlike the time of day never jumps; boot ID, PID namespace, PID and start time
together identify a process.
"""

import os
import platform
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, PositiveInt

_PROC = Path("/proc")
_BOOT_ID = _PROC / "sys/kernel/random/boot_id"
_PID_NAMESPACE = _PROC / "self/ns/pid"
_START_TIME_FIELD = 22  # field of /proc/PID/stat: start time in clock ticks since boot


class ProcessIdentity(BaseModel):
    """A process of this or another machine."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    host: str
    boot_id: str | None = None
    pid_namespace: str | None = None
    pid: PositiveInt
    process_started: float
    """seconds since boot on Linux, since 1970 elsewhere"""

    def is_alive(self) -> bool:
        """Return whether the process is running; True if it is remote, since that is unknown."""
        if self.is_remote():
            return True
        if self.boot_id != _boot_id():
            return False  # rebooted since
        try:
            started = _start_time(self.pid)
            if psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE:
                return False
        except psutil.Error:
            return False
        return started == self.process_started

    def is_remote(self) -> bool:
        """Return whether the process is on another machine or in another PID namespace."""
        if self.host != platform.node():
            return True
        return self.boot_id == _boot_id() and self.pid_namespace != _pid_namespace()


def identify_process(pid: int | None = None) -> ProcessIdentity:
    """Return the identity of a process of this machine, by default of this one.

    Raises:
        psutil.NoSuchProcess: No process has this PID.
    """
    pid = pid or os.getpid()
    return ProcessIdentity(
        host=platform.node(),
        boot_id=_boot_id(),
        pid_namespace=_pid_namespace(),
        pid=pid,
        process_started=_start_time(pid),
    )


def parent_pids() -> list[int]:
    """Return the PIDs of the parent of this process, of its parent, and so on."""
    return [process.pid for process in psutil.Process().parents()]


def _start_time(pid: int) -> float:
    """Return the start time of a process in seconds: since boot on Linux, since 1970 elsewhere."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return float(psutil.Process(pid).create_time())
    after_name = text.rpartition(")")[2].split()  # the name may contain spaces and parentheses
    return int(after_name[_START_TIME_FIELD - 3]) / os.sysconf("SC_CLK_TCK")


def _boot_id() -> str | None:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return None


def _pid_namespace() -> str | None:
    try:
        return str(_PID_NAMESPACE.readlink())
    except OSError:
        return None
