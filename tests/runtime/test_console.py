"""What is told while long work runs, at a terminal and in a file."""

import io

import pytest
from rich.console import Console

from captcha_exp.runtime.console import RichDisplay


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("captcha_exp.runtime.console.time.monotonic", clock)
    return clock


def into_a_file() -> tuple[RichDisplay, io.StringIO]:
    terminal, file = RichDisplay(), io.StringIO()
    terminal.console = Console(file=file, soft_wrap=True)
    return terminal, file


def test_in_a_file_the_time_left_is_told_soon_and_then_every_minute(clock: Clock) -> None:
    terminal, file = into_a_file()

    with terminal.progress_bar("training", 1000) as bar:
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


def test_in_a_file_short_work_and_finished_work_say_nothing(clock: Clock) -> None:
    terminal, file = into_a_file()

    with terminal.progress_bar("reading", 10) as bar:
        clock.now += 5
        bar.advance(9)
        clock.now += 100
        bar.advance(1)
    with terminal.progress_bar("nothing", 0) as bar:
        clock.now += 100
        bar.advance(0)

    assert file.getvalue() == ""


def test_at_a_terminal_there_is_a_bar_with_the_time_left() -> None:
    terminal, file = into_a_file()
    terminal.console = Console(file=file, force_terminal=True, width=160)

    with terminal.progress_bar("training", 10) as bar:
        bar.advance(5, "loss 0.5")

    shown = file.getvalue()
    assert "training" in shown
    assert "5/10" in shown
    assert "0:00:0" in shown
