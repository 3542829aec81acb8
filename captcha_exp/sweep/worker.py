"""The process of one training, as `supervise` starts it.

It is told in one line of JSON on its standard input what to train. A second line asks it to stop: it closes
its record and ends. When its standard input ends, whoever started it is gone, and so it goes too, at once.
"""

import _thread
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

STOP = b"stop"


def worker_main() -> None:
    """Train what standard input says; the record in the run's folder is the answer."""
    words = _read_lines()
    order = json.loads(next(words))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; who supervises decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    threading.Thread(target=_watch_stdin, args=(words,), daemon=True).start()

    from captcha_exp.config import load
    from captcha_exp.errors import UserError
    from captcha_exp.runtime.console import RichDisplay
    from captcha_exp.runtime.shutdown import ShutdownHandler
    from captcha_exp.tracking import make_tracker
    from captcha_exp.training.train import resume, train

    config, display = load(order["config"]), RichDisplay()
    tracker = make_tracker(config, display, order["choices"], order["name"], order["parent"])
    try:
        start_from = order["start_from"] and Path(order["start_from"])
        folder, links = Path(order["run_dir"]), order["lineage"]
        leaving = ShutdownHandler(order["leave_at"] and (order["leave_at"] - time.time()) / 60)
        if (folder / "run.json").exists():
            resume(folder, tracker, display, extend_from=start_from, shutdown=leaving)
        else:
            train(
                config,
                tracker,
                display,
                run_dir=folder,
                lineage=links,
                extend_from=start_from,
                shutdown=leaving,
            )
    except UserError as error:
        sys.stderr.writelines(f"{line}\n" for line in error.lines)
        sys.exit(error.exit_code)


def _watch_stdin(lines: Iterator[bytes]) -> None:
    if next(lines, None) == STOP:
        if hasattr(signal, "pthread_kill"):  # ends a wait for a server or for drawn pictures, too
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        else:
            _thread.interrupt_main(signal.SIGTERM)
    for _ in lines:
        pass
    os._exit(1)


def _read_lines() -> Iterator[bytes]:
    """The lines of standard input, past Python's own buffer: a thread that waits in it keeps an interpreter
    from ending."""
    rest = b""
    while more := os.read(0, 65536):
        *lines, rest = (rest + more).split(b"\n")
        yield from lines
