"""Compute a value in a forked child process, on another core."""

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
    """Call a function in a forked child, and yield a function that waits for its result.

    The result must be serializable as JSON. The child ends with the context. If there is no second core, if a
    fork is not safe, or if the child fails, the yielded function calls the function in this process instead,
    which also raises its exceptions here.
    """
    if count_usable_cores() == 1:
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
            process.join()
            return value
        return function()

    try:
        yield wait
    finally:
        receiver.close()
        process.kill()  # the result has been received or is not needed
        process.join()
        process.close()


def count_usable_cores() -> int:
    """Return on how many cores this process and forked children can run; 1 if a fork is not safe.

    It is not if this process has other threads, which a fork would lose.
    """
    if sys.platform != "linux" or threading.active_count() > 1:
        return 1
    return len(os.sched_getaffinity(0))


def _send_result(function: Callable[[], T], sender: Connection) -> None:
    """Call the function in the child and send its result to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and kills this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the handler of the parent would report it twice
    with contextlib.suppress(Exception):
        sender.send_bytes(json.dumps(function()).encode())
