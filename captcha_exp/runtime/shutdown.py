"""Graceful shutdown: on a signal or time limit, training stops between two steps after saving a checkpoint.

Signals are SIGINT (Ctrl-C) and SIGTERM. A second Ctrl-C quits immediately: the record then still says
RUNNING, and the next command closes it.

SIGTERM, step by step:

1. `cli.main.main` installs a handler that raises SystemExit(143). While the loop `training.train.fit` runs,
   `trap_signals` replaces it by one that prints a notice and stores the signal.
2. After the current step `check_stop` raises StopRequested; `fit` saves a checkpoint and calls `exit`, which
   raises SystemExit(143).
3. `training.recorder.record_outcome` marks the run KILLED, in the run directory first, then in the tracker.
4. Leaving the ShutdownHandler restores the handlers, and the process exits with code 143.

A sweep trains in worker processes: its parent is interrupted at once, writes STOP to the worker (which then
stops as above), and kills it after 15 s (`sweep.supervisor`).
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NoReturn, TypeAlias

from captcha_exp.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
StopReason: TypeAlias = Literal["SIGINT", "SIGTERM", "time limit", "killed"]
"""Why a run is KILLED; killed: its process has exited without closing it"""

_STOP_NOTICE = b"\nStopping after the current step (resumable)."
_SECOND_SIGINT_HINT = b" Press Ctrl-C again to quit immediately."


class StopRequested(BaseException):
    """Raised between two steps to stop training; not an Exception, so no handler treats it as an error."""


class TimeLimitReached(UserError):
    """train.max_minutes have passed; the run can be resumed."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


STOPPED = (KeyboardInterrupt, SystemExit, TimeLimitReached)
"""exceptions that end a run early, without an error"""


def stop_reason(error: BaseException) -> StopReason:
    """Return the reason that an exception of `STOPPED` stands for."""
    if isinstance(error, KeyboardInterrupt):
        return "SIGINT"
    return "SIGTERM" if isinstance(error, SystemExit) else "time limit"


class ShutdownHandler:
    """Context manager of a training run that handles stop requests until its final state is saved."""

    def __init__(self, max_minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the time limit."""
        self._clock = clock
        self._deadline = None if max_minutes is None else clock() + 60 * max_minutes
        self._received: int | None = None
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "ShutdownHandler":
        return self

    def __exit__(self, *exc: object) -> None:
        _restore(self._previous_handlers)

    @contextlib.contextmanager
    def trap_signals(self) -> Iterator[None]:
        """Keep signals pending until `check_stop` is called."""
        previous = _install(self._on_signal)
        try:
            yield
        finally:
            if self._received is None:
                _restore(previous)
            else:  # a second Ctrl-C must also interrupt the final saving
                self._previous_handlers = previous

    def _on_signal(self, number: int, _: object) -> None:
        self._received = number
        notice = _STOP_NOTICE
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            notice += _SECOND_SIGINT_HINT
        with contextlib.suppress(OSError):
            os.write(2, notice + b"\n")  # print may be interrupted while it holds a lock

    def check_stop(self) -> None:
        """Check for a stop request.

        Raises:
            StopRequested: a signal was received or the time limit is reached; save, then call `exit`.
        """
        self.check_signal()
        if self._deadline is not None and self._clock() >= self._deadline:
            raise StopRequested

    def check_signal(self) -> None:
        """Check for a signal, ignoring the time limit.

        Used during evaluation, which restarts from zero: a limit shorter than one evaluation would never make
        progress.

        Raises:
            StopRequested: a signal was received.
        """
        if self._received is not None:
            raise StopRequested

    def exit(self) -> NoReturn:
        """End the process as the received signal would have done.

        Raises:
            TimeLimitReached: the time limit is the reason; the same command resumes the run.
        """
        if self._received == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received is not None:
            raise SystemExit(128 + self._received)
        raise TimeLimitReached(
            "train.max_minutes: time limit reached; saved a checkpoint; the same command resumes the run"
        )


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Delay signals until the context ends, while files are written; a second Ctrl-C is not delayed."""
    received: list[int] = []

    def on_signal(number: int, _: object) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    previous = _install(on_signal)
    try:
        yield
    finally:
        _restore(previous)
    if received:
        signal.raise_signal(received[0])


def _install(new_handler: Callable[[int, object], None]) -> dict[int, Any]:
    """Install a handler and return the previous ones by signal.

    Two handlers are left in place: SIG_IGN, since the parent process has chosen to ignore the signal, and
    SIG_DFL of SIGINT, which is installed after the first Ctrl-C and lets the second one end the process.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        return {}
    current: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    replaced = {
        number: handler
        for number, handler in current.items()
        if handler not in (signal.SIG_IGN, None) and (number, handler) != (signal.SIGINT, signal.SIG_DFL)
    }
    for number in replaced:
        signal.signal(number, new_handler)
    return replaced


def _restore(previous_handlers: dict[int, Any]) -> None:
    for number, handler in previous_handlers.items():
        signal.signal(number, handler)
