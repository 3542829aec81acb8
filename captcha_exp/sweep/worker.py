"""Worker process that trains one job; see `supervisor`.

The first line on its standard input is the job as JSON. A second line asks it to stop: it closes its run and
exits. At the end of standard input its parent has exited, and it exits immediately.
"""

import _thread
import atexit
import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from captcha_exp.runtime.fork_server import serve

STOP = b"stop"

IMPORTS = ("captcha_exp.training.train", "numpy.ctypeslib")
MLFLOW_IMPORTS = (
    "captcha_exp.tracking.store",
    "captcha_exp.tracking.tracker",
    "alembic.command",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    "sqlalchemy.dialects.sqlite",
)
"""modules that a job has imported before its peak memory is read; others, as matplotlib, would add to it"""


def worker_main() -> None:
    """Train the job read from standard input; with the argument `serve`, in a child of a fork server.

    The result is the record in its run directory.
    """
    exit_code = [1]
    atexit.register(_exit_at_once, exit_code)  # called last, as the first one registered
    if sys.argv[1:2] == ["serve"]:
        modules, sys.argv[1:] = sys.argv[2:], []
        serve(lambda: preload("mlflow" in modules))
    try:
        _train_job()
        exit_code[0] = 0
    except SystemExit as error:
        exit_code[0] = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise


def _train_job() -> None:
    lines = _read_lines()
    first = next(lines, None)
    if first is None:  # the parent has exited
        sys.exit(1)
    job = json.loads(first)
    # Ctrl-C reaches the process group; the supervisor handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    threading.Thread(target=_watch_stdin, args=(lines,), daemon=True).start()

    from captcha_exp.config import load
    from captcha_exp.errors import UserError
    from captcha_exp.runs import Lineage, RunInfo
    from captcha_exp.runtime.console import set_up_logging
    from captcha_exp.runtime.shutdown import ShutdownHandler
    from captcha_exp.tracking import make_tracker, registered_name
    from captcha_exp.training.train import resume, train

    set_up_logging(job["log_level"])
    config = load(job["requested"])
    tracker = make_tracker(config, job["choices"], job["name"])
    run_dir = Path(job["run_dir"])
    extend_from = job["extend_from"] and Path(job["extend_from"])
    stop = ShutdownHandler(job["deadline"] and (job["deadline"] - time.time()) / 60)
    try:
        if (run_dir / RunInfo.filename).exists():
            resume(run_dir, tracker, extend_from=extend_from, shutdown=stop)
        else:
            lineage = Lineage.model_validate(job["lineage"])
            train(config, tracker, run_dir=run_dir, lineage=lineage, extend_from=extend_from, shutdown=stop)
        if registered_name(config) is not None:
            from captcha_exp.export.register import register_after_training

            register_after_training(run_dir)
    except UserError as error:
        sys.stderr.writelines(f"{line}\n" for line in error.lines)
        sys.exit(error.exit_code)


def _exit_at_once(exit_code: Sequence[int]) -> NoReturn:
    """Exit without clearing thousands of modules one by one, which takes half a second."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed
            stream.flush()
    os._exit(exit_code[0])


def preload(uses_mlflow: bool) -> None:
    """Import what a job imports, also late; one that cannot be imported fails in the job, which has a log."""
    from captcha_exp.runs.source_code import keep_source_info

    keep_source_info()
    for name in [*IMPORTS, *(MLFLOW_IMPORTS if uses_mlflow else ())]:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _watch_stdin(lines: Iterator[bytes]) -> None:
    """Raise SIGTERM in the main thread on `STOP`, and exit at the end of standard input."""
    if next(lines, None) == STOP:
        if hasattr(signal, "pthread_kill"):  # also interrupts a blocking wait for a server or for images
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        else:
            _thread.interrupt_main(signal.SIGTERM)
    for _ in lines:
        pass
    os._exit(1)


def _read_lines() -> Iterator[bytes]:
    """Read lines from standard input, unbuffered: a thread blocked in `sys.stdin` would keep the interpreter
    from exiting."""
    rest = b""
    while more := os.read(0, 65536):
        *lines, rest = (rest + more).split(b"\n")
        yield from lines
