"""The identity of a process, stored in a record to check later whether the process is still running.

A PID alone is not enough: PIDs are reused, and are different in each container. On Linux the start time of a
process counts from boot, which unlike the time of day never jumps; boot ID, PID namespace, PID and start time
together identify a process.
"""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

_PROC = Path("/proc")
_BOOT_ID = _PROC / "sys/kernel/random/boot_id"
_PID_NAMESPACE = _PROC / "self/ns/pid"
_START_TIME_FIELD = 22  # field of /proc/PID/stat: start time in clock ticks since boot


def process_identity(pid: int | None = None) -> dict[str, Any]:
    """Return the identity of this process, or of another process of this machine, for a record.

    Raises:
        psutil.NoSuchProcess: no process has this PID.
    """
    if pid is None:
        pid = os.getpid()
    return {
        "host": platform.node(),
        "boot_id": _boot_id(),
        "pid_namespace": _pid_namespace(),
        "pid": pid,
        "process_started": _start_time(pid),
    }


def is_alive(state: Mapping[str, Any]) -> bool:
    """Return whether the process of a record is running; True if it is remote, since that is unknown."""
    if is_remote(state):
        return True
    if state.get("boot_id") != _boot_id():
        return False  # rebooted since
    try:
        started = _start_time(state["pid"])
        if psutil.Process(state["pid"]).status() == psutil.STATUS_ZOMBIE:
            return False
    except psutil.Error:
        return False
    return started == float(state["process_started"])


def is_remote(state: Mapping[str, Any]) -> bool:
    """Return whether the process of a record is on another machine or in another PID namespace."""
    if state["host"] != platform.node():
        return True
    return state.get("boot_id") == _boot_id() and state.get("pid_namespace") != _pid_namespace()


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
