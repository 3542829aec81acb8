"""Which process is at work on a record, and whether it is still there.

A number of a process is given again to another one, and a clock that is set makes times of the day worthless.
Linux counts a process's start from the machine's start, so that number, start and the machine's start name a
process as long as the disk lives. In a container the same number is another process.
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
_START_TIME_FIELD = 22  # field of /proc/PID/stat: when the process started, in ticks since the machine did


def process_identity(pid: int | None = None) -> dict[str, Any]:
    """What a record says of the process that works on it: this one, or another of this machine.

    Raises:
        psutil.NoSuchProcess: there is none of this number.
    """
    number = os.getpid() if pid is None else pid
    return {
        "host": platform.node(),
        "boot_id": _boot_id(),
        "pid_namespace": _pid_namespace(),
        "pid": number,
        "process_started": _start_time(number),
    }


def is_alive(state: Mapping[str, Any]) -> bool:
    """Whether the process that works on this record is there; unknown, and so True, if it runs elsewhere."""
    if is_remote(state):
        return True
    if state.get("boot_id") != _boot_id():
        return False  # the machine has started since
    try:
        started = _start_time(state["pid"])
        if psutil.Process(state["pid"]).status() == psutil.STATUS_ZOMBIE:
            return False
    except psutil.Error:
        return False
    return started == float(state["process_started"])


def is_remote(state: Mapping[str, Any]) -> bool:
    """Whether it is a process that cannot be seen from here: another machine's, or a container's."""
    if state["host"] != platform.node():
        return True
    return state.get("boot_id") == _boot_id() and state.get("pid_namespace") != _pid_namespace()


def _start_time(pid: int) -> float:
    """Seconds from the machine's start on Linux, and from 1970 elsewhere, where the clock is read once."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return float(psutil.Process(pid).create_time())
    after_name = text.rpartition(")")[2].split()  # a name may have spaces and brackets
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
