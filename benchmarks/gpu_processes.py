"""Run each part of gpu_session in its own child process with a time limit.

The session's process imports torch and the package once and forks one child per part. A child can start CUDA
only if its parent never did, and a fork copies one thread only: `reason_not_to_fork` checks both. Where
forking is not possible, each part is started as a new Python process, which imports everything again.

`tests/support/fork_server.py` serves another purpose: it runs the command line and interrupts it.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
OUTPUT_CHARACTERS = 3000  # kept from the end of a failed part's output
POLL_SECONDS = 0.02
PARTIAL = "GPU_SESSION_PARTIAL"  # environment variable: file for the partial figures of a running part
SHARED_DIR = "GPU_SESSION_SHARED_DIR"  # environment variable: directory shared by the parts of one call
_PR_SET_PDEATHSIG = 1  # Source: linux/prctl.h
_BACKGROUND_THREADS = {"jemalloc_bg_thd"}  # of an allocator that handles forks


class Task(NamedTuple):
    """The name of a part and the function that a child process calls for it."""

    name: str
    function: Callable[[], Any]


def reason_not_to_fork() -> str | None:
    """Return why a forked child could not start CUDA, or None if it can."""
    if not hasattr(os, "fork"):
        return "this system has no fork"
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("[0-9]*/comm")}
    count = len(list(Path("/proc/self/task").glob("[0-9]*")))
    if count > 1 + len(threads & _BACKGROUND_THREADS):
        return f"this process has {count} threads"
    opened = []
    for link in Path("/proc/self/fd").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the descriptor of the listing itself is closed by now
            opened.append(str(link.readlink()))
    if any(name.startswith("/dev/nvidia") for name in opened):
        return "this process has opened the GPU"
    return None


def run(
    task: Task,
    limit: float,
    environment: Mapping[str, str],
    fresh_arguments: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Run a part in a child process and return its figures or its error, with its start time and duration.

    Fork a child that calls `task.function`, or, with `fresh_arguments`, start a new Python process. At the
    limit the child is killed together with all processes that it started.
    """
    part: dict[str, Any] = {"began": datetime.now(UTC).isoformat(timespec="milliseconds")}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gpu-part-") as directory:
        root = Path(directory)
        values = os.environ | {"CAPTCHA_EXP_ROOT": directory, PARTIAL: str(root / "partial.json")}
        values |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), values.get("PYTHONPATH")]))}
        values |= dict(environment)
        result, output = root / "result.json", root / "output.txt"
        if fresh_arguments is None:
            code = _forked(task, values, result, output, limit)
        else:
            command = [sys.executable, str(HERE / "gpu_session.py"), "--one", task.name]
            code = _started([*command, "--result", str(result), *fresh_arguments], values, output, limit)
        part["wall_seconds"] = round(time.perf_counter() - began, 1)
        if code == 0 and result.exists():
            return part | {"figures": json.loads(result.read_text())}
        if (root / "partial.json").exists():
            part["partial"] = json.loads((root / "partial.json").read_text())
        if code is None:
            return part | {"error": f"took more than {limit:.0f} s"}
        text = output.read_text(errors="replace")[-OUTPUT_CHARACTERS:]
        return part | {"error": text or f"ended with exit code {code} and no output", "exit_code": code}


def write_result(function: Callable[[], Any], result: Path) -> None:
    """Call the function and write its return value to the file `result` atomically."""
    _write(result, function())


def keep_partial(figures: Any) -> None:
    """Save the partial figures of the running part, which are kept if it is killed."""
    if path := os.environ.get(PARTIAL):
        _write(Path(path), figures)


def _write(path: Path, values: Any) -> None:
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(values))
    draft.replace(path)


# -- children ------------------------------------------------------------------------------------------------


def _forked(
    task: Task, environment: Mapping[str, str], result: Path, output: Path, limit: float
) -> int | None:
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with _blocked_signals():  # between fork and wait a signal would lose the child
        pid = os.fork()
        if pid == 0:
            _child(task, environment, result, output, parent)
        with contextlib.suppress(OSError):  # the child does the same: avoids a race
            os.setpgid(pid, pid)
        return _wait(pid, limit)


def _child(
    task: Task, environment: Mapping[str, str], result: Path, output: Path, parent: int
) -> None:  # never returns
    code = 1
    try:
        os.setpgid(0, 0)
        exit_with_parent(parent)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.clear()
        os.environ.update(environment)
        write_result(task.function, result)
        code = 0
    except SystemExit as error:
        print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # skips the cleanup handlers of the parent


def _started(
    command: Sequence[str], environment: Mapping[str, str], output: Path, limit: float
) -> int | None:
    with output.open("wb") as file, _blocked_signals():
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        code = _wait(process.pid, limit)
        process.returncode = -signal.SIGKILL if code is None else code  # already reaped by _wait
        return code


_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Deliver SIGTERM, SIGINT and SIGHUP while `_wait` sleeps, and not between fork and wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(pid: int, limit: float) -> int | None:
    """Return the child's exit code, below 0 for a signal; None if it was killed at the limit.

    The child's whole process group is killed in every case, including when this process is interrupted.
    """
    deadline = time.perf_counter() + limit
    ended = False
    try:
        while not (ended := _has_ended(pid)) and time.perf_counter() < deadline:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            time.sleep(POLL_SECONDS)
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    finally:
        with contextlib.suppress(OSError):  # the group is empty, or this system allows no signal to zombies
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status) if ended else None


def _has_ended(pid: int) -> bool:
    """Return whether the child has ended; its process number stays reserved until `waitpid`."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def exit_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent exits, even by SIGKILL. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)
