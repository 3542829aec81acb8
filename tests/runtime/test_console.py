"""Test the progress output on a terminal and in a file."""

import io

import pytest
from rich.console import Console

from captcha_exp.runtime.console import RichDisplay


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("captcha_exp.runtime.console.time.monotonic", clock)
    return clock


def make_display() -> tuple[RichDisplay, io.StringIO]:
    """Return a display that writes to a file, and the file."""
    display, file = RichDisplay(), io.StringIO()
    display.console = Console(file=file, soft_wrap=True)
    return display, file


def test_a_file_gets_the_remaining_time_once_a_minute(clock: Clock) -> None:
    display, file = make_display()

    with display.progress_bar("training", 1000) as bar:
        for _ in range(99):
            clock.now += 3
            bar.advance(10, "loss 0.5")

    assert file.getvalue().splitlines() == [
        "training: 5%, about 5 min left  loss 0.5",
        "training: 25%, about 4 min left  loss 0.5",
        "training: 45%, about 3 min left  loss 0.5",
        "training: 65%, about 2 min left  loss 0.5",
        "training: 85%, about 45 s left  loss 0.5",
    ]


def test_a_file_gets_no_line_for_short_or_finished_work(clock: Clock) -> None:
    display, file = make_display()

    with display.progress_bar("decoding", 10) as bar:
        clock.now += 5
        bar.advance(9)
        clock.now += 100
        bar.advance(1)
    with display.progress_bar("nothing", 0) as bar:
        clock.now += 100
        bar.advance(0)

    assert file.getvalue() == ""


def test_a_terminal_shows_a_bar_with_the_remaining_time() -> None:
    display, file = make_display()
    display.console = Console(file=file, force_terminal=True, width=160)

    with display.progress_bar("training", 10) as bar:
        bar.advance(5, "loss 0.5")

    shown = file.getvalue()
    assert "training" in shown
    assert "5/10" in shown
    assert "0:00:0" in shown
