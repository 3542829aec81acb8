"""Start the worker process of a job: on Linux a child of a fork server, elsewhere a new process."""

import atexit
import os
import subprocess
import sys
import threading
from pathlib import Path

from captcha_exp.runtime import fork_server
from captcha_exp.runtime.fork_server import ForkedProcess, ForkServer

_lock = threading.Lock()  # a launcher may run jobs in threads
_server: tuple[object, ForkServer] | None = None  # and what it was started with


def start_worker(captures_output: bool, uses_mlflow: bool) -> "ForkedProcess | subprocess.Popen[bytes]":
    """Start a process that reads a job from its standard input.

    Its output goes to `stdout` of the process, or to standard error of this one.

    Raises:
        OSError: It cannot be started, for example because the memory is full.
    """
    source_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [source_root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8:replace"}
    # -P: do not import packages from the working directory.
    command = [sys.executable, "-P", "-X", "faulthandler", "-m", "captcha_exp.sweep"]
    if fork_server.is_supported():
        modules = ["mlflow"] if uses_mlflow else []  # which count in the memory of a job
        with _lock:
            return _get_server([*command, "serve", *modules], environment).fork(captures_output)
    return subprocess.Popen(  # each job pays for its imports: several seconds
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if captures_output else 2,  # standard output is reserved for results
        stderr=subprocess.STDOUT if captures_output else None,
        env=environment,
    )


def _get_server(command: list[str], environment: dict[str, str]) -> ForkServer:
    """Return a server whose children have this environment and the working directory of this process."""
    global _server
    directory = os.stat(".")  # noqa: PTH116 - it may have been deleted
    key = command, environment, (directory.st_dev, directory.st_ino)
    if _server is not None and (_server[0] != key or _server[1].has_exited()):
        _server[1].close()
        _server = None
    if _server is None:
        _server = key, ForkServer(command, environment)
    return _server[1]


@atexit.register
def _close_server() -> None:
    if _server is not None:
        _server[1].close()
