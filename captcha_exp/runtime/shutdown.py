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
_HEARD = b"\nending after this step, to be gone on with; Ctrl-C once more leaves at once\n"


class Asked(BaseException):
    """Raised between two steps; no `except Exception` on the way takes it for an error."""


class TimeIsUp(UserError):
    """train.stop_after_minutes have passed; the run can be gone on with."""

    exit_code = 75  # that of sysexits.h for "try again later"


class Leaving:
    """Whether a training has been asked to end; entered for as long as it and its last words take."""

    def __init__(self, minutes: float | None, now: Callable[[], float] = time.monotonic) -> None:
        """Minutes are counted from here."""
        self._now = now
        self._deadline = None if minutes is None else now() + 60 * minutes
        self._heard: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Leaving":
        return self

    def __exit__(self, *exc: object) -> None:
        _put_back(self._before)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """A signal waits for `look`."""
        before = _let_hear(self._hear)
        try:
            yield
        finally:
            if self._heard is None:
                _put_back(before)
            else:  # a second Ctrl-C is to end the last words, too
                self._before = before

    def _hear(self, number: int, _: object) -> None:
        self._heard = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            with contextlib.suppress(OSError):
                os.write(2, _HEARD)  # a console may be in the middle of a line

    def look(self) -> None:
        """Nothing, unless it has been asked to end.

        Raises:
            Asked: it has; what was reached is to be saved, and then `leave` to be called.
        """
        self.look_for_signal()
        if self._deadline is not None and self._now() >= self._deadline:
            raise Asked

    def look_for_signal(self) -> None:
        """As `look`, amid what begins anew when it is interrupted: with a limit of time that is too short for
        it, no start would ever get past it.

        Raises:
            Asked: a signal has come.
        """
        if self._heard is not None:
            raise Asked

    def leave(self) -> NoReturn:
        """End as the signal would have ended it.

        Raises:
            TimeIsUp: the time is; the same command goes on.
        """
        if self._heard == signal.SIGINT:
            raise KeyboardInterrupt
        if self._heard is not None:
            raise SystemExit(128 + self._heard)
        raise TimeIsUp("train.stop_after_minutes: the time is up; all is saved, and the same command goes on")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """A signal waits until what is written here is written, and then does what it does; a second Ctrl-C does
    not wait."""
    heard: list[int] = []

    def hear(number: int, _: object) -> None:
        heard.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = _let_hear(hear)
    try:
        yield
    finally:
        _put_back(before)
    if heard:
        signal.raise_signal(heard[0])


def _let_hear(hear: Callable[[int, object], None]) -> dict[int, Any]:
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
        signal.signal(number, hear)
    return taken


def _put_back(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
