"""Test that signals and time limits stop training between two steps, and do not interrupt saving."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from captcha_exp.runtime.shutdown import ShutdownHandler, StopRequested, TimeLimitReached, defer_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Install Python's default handlers, and restore the previous ones afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send_signal(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "ends", "code"),
    [(signal.SIGINT, KeyboardInterrupt, ()), (signal.SIGTERM, SystemExit, (143,))],
)
def test_a_signal_is_pending_until_check_stop(number: int, ends: type[BaseException], code: object) -> None:
    before = signal.getsignal(number)
    with ShutdownHandler(None) as shutdown:
        with shutdown.trap_signals():
            shutdown.check_stop()
            send_signal(number)
            with pytest.raises(StopRequested):
                shutdown.check_stop()
        with pytest.raises(ends) as caught:
            shutdown.exit()
        assert caught.value.args == code
    assert signal.getsignal(number) is before


def test_signals_are_not_trapped_outside_of_the_context() -> None:
    with ShutdownHandler(None) as shutdown:
        with shutdown.trap_signals():
            pass
        with pytest.raises(KeyboardInterrupt):
            send_signal(signal.SIGINT)


def test_the_time_limit_is_reached_after_max_minutes() -> None:
    clock = iter([100.0, 219.9, 220.0])
    with ShutdownHandler(2.0, lambda: next(clock)) as shutdown:
        shutdown.check_stop()
        with pytest.raises(StopRequested):
            shutdown.check_stop()
        with pytest.raises(TimeLimitReached, match=r"^train\.max_minutes: time limit reached") as caught:
            shutdown.exit()
    assert caught.value.exit_code == 75


def test_check_signal_ignores_the_time_limit() -> None:
    with ShutdownHandler(0.0) as shutdown, shutdown.trap_signals():
        shutdown.check_signal()
        send_signal(signal.SIGTERM)
        with pytest.raises(StopRequested):
            shutdown.check_signal()


def test_ignored_signals_stay_ignored() -> None:
    """A job of a sweep leaves Ctrl-C to its supervisor."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with ShutdownHandler(None) as shutdown, shutdown.trap_signals():
        send_signal(signal.SIGINT)
        shutdown.check_stop()
        with defer_signals():
            send_signal(signal.SIGINT)


def test_handlers_are_not_changed_in_other_threads() -> None:
    """Python allows it only in the main thread, but training may run in any."""
    found: list[object] = []

    def work() -> None:
        with ShutdownHandler(None) as shutdown, shutdown.trap_signals(), defer_signals():
            shutdown.check_stop()
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


TWO_SIGNALS = """
import os, signal
from captcha_exp.runtime.shutdown import ShutdownHandler, StopRequested, defer_signals
def ctrl_c(): os.kill(os.getpid(), signal.SIGINT)
with ShutdownHandler(None) as shutdown:
    {body}
    print("not stopped")
"""
BODIES = {
    "in a step": "with shutdown.trap_signals():\n        ctrl_c(); ctrl_c()",
    "while saving after a stop request": (
        "try:\n        with shutdown.trap_signals():\n            ctrl_c(); shutdown.check_stop()\n"
        "    except StopRequested:\n        with defer_signals():\n            ctrl_c()"
    ),
    "while saving": "with defer_signals():\n        ctrl_c(); ctrl_c()",
}


@pytest.mark.parametrize("when", BODIES)
def test_a_second_ctrl_c_quits_immediately(when: str) -> None:
    script = TWO_SIGNALS.format(body=BODIES[when])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == ""
    notice = "" if when == "while saving" else "Press Ctrl-C again to quit immediately."
    assert notice in done.stderr


def test_sigterm_prints_that_training_stops_after_the_step(capfd: pytest.CaptureFixture[str]) -> None:
    with ShutdownHandler(None) as shutdown, shutdown.trap_signals():
        send_signal(signal.SIGTERM)
    assert capfd.readouterr().err == "\nStopping after the current step (resumable).\n"


def test_a_deferred_signal_is_raised_after_the_context() -> None:
    saved = []

    def save() -> None:
        with defer_signals():
            send_signal(signal.SIGINT)
            saved.append("state")

    with pytest.raises(KeyboardInterrupt):
        save()
    assert saved == ["state"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
