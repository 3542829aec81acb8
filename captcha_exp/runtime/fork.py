"""Compute a value in a child process, so that a command uses a second core."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def run_in_child(function: Callable[[], T]) -> Iterator[Callable[[], T]]:
    """Start a function, and yield one that waits for its value, which JSON must be able to hold.

    The child is a fork, and has ended when the context does. Without a second core, or where a fork is not
    safe, the function runs when its value is asked for; so it does after a failure in the child, so that its
    error is raised here.
    """
    if not _can_fork():
        yield function
        return
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(function, sender), daemon=True)
    process.start()
    sender.close()

    def wait() -> T:
        with contextlib.suppress(EOFError):
            value: T = json.loads(receiver.recv_bytes())
            return value
        return function()

    try:
        yield wait
    finally:
        receiver.close()
        process.kill()  # its value has been received, or is not needed
        process.join()
        process.close()


def _can_fork() -> bool:
    """Return whether there is another core, and no thread of this process that a child would lack."""
    if sys.platform != "linux" or threading.active_count() > 1:
        return False
    return len(os.sched_getaffinity(0)) > 1


def _send_result(function: Callable[[], T], sender: Connection) -> None:
    """Send the value of the function; in the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by the parent, which ends this process
    with contextlib.suppress(Exception):
        sender.send_bytes(json.dumps(function()).encode())
