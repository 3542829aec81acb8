"""Leaving in order: a training that is asked to end does so between two steps, with all that it has reached
saved.

Who asks is a signal, Ctrl-C (SIGINT) or SIGTERM, or a limit of time. A second Ctrl-C leaves at once, whatever
is at hand: the record then says RUNNING, and the next start closes it.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from captcha_exp.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STOP_NOTICE = b"\nending after this step, to be gone on with; Ctrl-C once more leaves at once\n"


class StopRequested(BaseException):
    """Raised between two steps; no `except Exception` on the way takes it for an error."""


class TimeLimitReached(UserError):
    """train.max_minutes have passed; the run can be gone on with."""

    exit_code = 75  # that of sysexits.h for "try again later"


class ShutdownHandler:
    """Whether a training has been asked to end; entered for as long as it and its last words take."""

    def __init__(self, max_minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Minutes are counted from here."""
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
        """A signal waits for `look`."""
        before = _install(self._on_signal)
        try:
            yield
        finally:
            if self._received is None:
                _restore(before)
            else:  # a second Ctrl-C is to end the last words, too
                self._previous_handlers = before

    def _on_signal(self, number: int, _: object) -> None:
        self._received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            with contextlib.suppress(OSError):
                os.write(2, _STOP_NOTICE)  # a console may be in the middle of a line

    def check_stop(self) -> None:
        """Nothing, unless it has been asked to end.

        Raises:
            Asked: it has; what was reached is to be saved, and then `leave` to be called.
        """
        self.check_signal()
        if self._deadline is not None and self._clock() >= self._deadline:
            raise StopRequested

    def check_signal(self) -> None:
        """As `look`, amid what begins anew when it is interrupted: with a limit of time that is too short for
        it, no start would ever get past it.

        Raises:
            Asked: a signal has come.
        """
        if self._received is not None:
            raise StopRequested

    def exit(self) -> NoReturn:
        """End as the signal would have ended it.

        Raises:
            TimeIsUp: the time is; the same command goes on.
        """
        if self._received == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received is not None:
            raise SystemExit(128 + self._received)
        raise TimeLimitReached(
            "train.max_minutes: the time is up; all is saved, and the same command goes on"
        )


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """A signal waits until what is written here is written, and then does what it does; a second Ctrl-C does
    not wait."""
    heard: list[int] = []

    def hear(number: int, _: object) -> None:
        heard.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = _install(hear)
    try:
        yield
    finally:
        _restore(before)
    if heard:
        signal.raise_signal(heard[0])


def _install(new_handler: Callable[[int, object], None]) -> dict[int, Any]:
    """What heard the signals before. One that is ignored stays so, and so does a Ctrl-C that ends the process
    at once: it has been pressed before."""
    if threading.current_thread() is not threading.main_thread():  # no other hears them
        return {}
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    taken = {
        number: handler
        for number, handler in before.items()
        if handler not in (signal.SIG_IGN, None) and (number, handler) != (signal.SIGINT, signal.SIG_DFL)
    }
    for number in taken:
        signal.signal(number, new_handler)
    return taken


def _restore(previous_handlers: dict[int, Any]) -> None:
    for number, handler in previous_handlers.items():
        signal.signal(number, handler)
