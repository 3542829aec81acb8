"""Signals and time limits: heard between two steps, and never in the middle of last words."""

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
    """Those of Python's own start, whatever a test before has set; and none is left behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def press(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "ends", "code"),
    [(signal.SIGINT, KeyboardInterrupt, ()), (signal.SIGTERM, SystemExit, (143,))],
)
def test_a_signal_waits_until_somebody_looks(number: int, ends: type[BaseException], code: object) -> None:
    before = signal.getsignal(number)
    with ShutdownHandler(None) as leaving:
        with leaving.trap_signals():
            leaving.check_stop()
            press(number)
            with pytest.raises(StopRequested):
                leaving.check_stop()
        with pytest.raises(ends) as caught:
            leaving.exit()
        assert caught.value.args == code
    assert signal.getsignal(number) is before


def test_outside_of_the_loop_a_signal_does_what_it_did() -> None:
    with ShutdownHandler(None) as leaving:
        with leaving.trap_signals():
            pass
        with pytest.raises(KeyboardInterrupt):
            press(signal.SIGINT)


def test_time_is_up_at_the_minute() -> None:
    clock = iter([100.0, 219.9, 220.0])
    with ShutdownHandler(2.0, lambda: next(clock)) as leaving:
        leaving.check_stop()
        with pytest.raises(StopRequested):
            leaving.check_stop()
        with pytest.raises(TimeLimitReached, match=r"^train\.max_minutes: the time is up") as caught:
            leaving.exit()
    assert caught.value.exit_code == 75


def test_amid_what_cannot_be_gone_on_with_only_a_signal_counts() -> None:
    with ShutdownHandler(0.0) as leaving, leaving.trap_signals():
        leaving.check_signal()
        press(signal.SIGTERM)
        with pytest.raises(StopRequested):
            leaving.check_signal()


def test_what_is_ignored_stays_ignored() -> None:
    """The process of a sweep's point leaves Ctrl-C to who supervises it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with ShutdownHandler(None) as leaving, leaving.trap_signals():
        press(signal.SIGINT)
        leaving.check_stop()
        with defer_signals():
            press(signal.SIGINT)


def test_in_another_thread_nothing_is_touched() -> None:
    """Only the main thread may: a training can run in any."""
    found: list[object] = []

    def work() -> None:
        with ShutdownHandler(None) as leaving, leaving.trap_signals(), defer_signals():
            leaving.check_stop()
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


PRESSED_TWICE = """
import os, signal, sys
from captcha_exp.leaving import Asked, Leaving, undisturbed
with Leaving(None) as leaving:
    {first}
    print("reached")
"""
FIRST = {
    "in a step": "with leaving.listening():\n        press(); press()",
    "in the last words": (
        "try:\n        with leaving.listening():\n            press(); leaving.look()\n"
        "    except Asked:\n        with undisturbed():\n            press()"
    ),
    "in last words of its own": "with undisturbed():\n        press(); press()",
}


@pytest.mark.parametrize("when", FIRST)
def test_a_second_ctrl_c_leaves_at_once(when: str) -> None:
    script = "import os, signal\ndef press(): os.kill(os.getpid(), signal.SIGINT)\n"
    script += PRESSED_TWICE.format(first=FIRST[when])
    done = subprocess.run([sys.executable, "-c", script, ""], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == ""
    said = "" if when == "in last words of its own" else "Ctrl-C once more leaves at once"
    assert said in done.stderr


def test_last_words_are_said_before_a_signal_acts() -> None:
    said = []

    def speak() -> None:
        with defer_signals():
            press(signal.SIGINT)
            said.append("last words")

    with pytest.raises(KeyboardInterrupt):
        speak()
    assert said == ["last words"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
