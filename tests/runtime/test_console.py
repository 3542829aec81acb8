"""Test the output on standard error: log records, and progress bars on a terminal and in a file."""

import io
import json
import logging
import subprocess
import sys
from typing import TextIO

import pytest
from rich.console import Console
from rich.text import Text

from captcha_exp.cli.output import get_console, make_table, to_json
from captcha_exp.runtime import console as module
from captcha_exp.runtime.console import get_log_level, progress_bar, set_up_logging

logger = logging.getLogger("captcha_exp.some.module")
LONG_LINE = "[red]100%[/red] of /data/1 " * 20

Capture = pytest.CaptureFixture[str]


def log_everything() -> None:
    logger.debug("a cause")
    logger.info("a status")
    logger.warning("a problem")


# -- log records ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (logging.DEBUG, ["captcha_exp.some.module: a cause", "a status", "warning: a problem"]),
        (logging.INFO, ["a status", "warning: a problem"]),
        (logging.WARNING, ["warning: a problem"]),
    ],
)
def test_the_level_decides_what_is_printed(level: int, expected: list[str], capsys: Capture) -> None:
    set_up_logging(level)
    log_everything()
    captured = capsys.readouterr()
    assert (captured.out, captured.err.splitlines()) == ("", expected)
    assert get_log_level() == level


def test_lines_are_not_wrapped_and_have_no_markup(capsys: Capture) -> None:
    set_up_logging()
    logger.info(LONG_LINE)
    logger.warning("a name of two\nlines")
    logger.info("a:smile:b.png")
    assert capsys.readouterr().err == f"{LONG_LINE}\nwarning: a name of two\\nlines\na:smile:b.png\n"


def test_only_warnings_are_yellow_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    terminal = Console(stderr=True, force_terminal=True, color_system="standard", highlight=False)
    monkeypatch.setattr(module, "console", terminal)
    set_up_logging()
    log_everything()
    assert capsys.readouterr().err == "a status\n\x1b[33mwarning: a problem\x1b[0m\n"


def test_lines_are_printed_once_however_often_logging_is_set_up(
    package_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    set_up_logging()
    set_up_logging()
    # As a library may do.
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler(sys.stderr)])
    log_everything()
    assert capsys.readouterr().err == "a status\nwarning: a problem\n"
    assert len(package_logger.handlers) == 1


def test_an_error_of_the_terminal_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    set_up_logging()
    monkeypatch.setattr(module.console, "print", fail)
    with pytest.raises(OSError, match="no space left"):
        logger.info("a status")


def test_without_set_up_logging_only_warnings_are_printed() -> None:
    script = (
        "import logging; from captcha_exp.runtime.console import progress_bar;"
        "logger = logging.getLogger('captcha_exp.data'); logger.info('a status');"
        "logger.warning('a problem')\n"
        "with progress_bar('training', 10) as bar: bar.advance(5)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "a problem\n")


# -- progress bars -------------------------------------------------------------------------------------------


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


class Terminal(io.StringIO):
    """The text that a terminal received."""

    def isatty(self) -> bool:
        return True


def forced_console(file: TextIO | None = None) -> Console:
    """Return a console that takes any file for a terminal, as FORCE_COLOR does."""
    return Console(file=file, stderr=True, force_terminal=True, color_system=None, width=160)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Let the console write to a terminal."""
    terminal = Terminal()
    monkeypatch.setattr(module, "console", forced_console(terminal))
    return terminal


def test_a_file_gets_the_remaining_time_once_a_minute(clock: Clock, capsys: Capture) -> None:
    set_up_logging()

    with progress_bar("training", 1000) as bar:
        for _ in range(99):
            clock.now += 3
            bar.advance(10, "loss 0.5")

    assert capsys.readouterr().err.splitlines() == [
        "training: 5%, about 5 min left  loss 0.5",
        "training: 25%, about 4 min left  loss 0.5",
        "training: 45%, about 3 min left  loss 0.5",
        "training: 65%, about 2 min left  loss 0.5",
        "training: 85%, about 45 s left  loss 0.5",
    ]


def test_a_file_with_colors_gets_no_bar(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, capsys: Capture
) -> None:
    monkeypatch.setattr(module, "console", forced_console())
    set_up_logging()

    with progress_bar("training", 1000) as bar:
        clock.now += 16
        bar.advance(500)

    assert capsys.readouterr().err == "training: 50%, about 16 s left\n"


def test_a_file_gets_no_line_for_short_or_finished_work(clock: Clock, capsys: Capture) -> None:
    set_up_logging()

    with progress_bar("decoding", 10) as bar:
        clock.now += 5
        bar.advance(9)
        clock.now += 100
        bar.advance(1)
    with progress_bar("nothing", 0) as bar:
        clock.now += 100
        bar.advance(0)

    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_bar_with_the_remaining_time(terminal: Terminal) -> None:
    set_up_logging()

    with progress_bar("training", 10) as bar:
        bar.advance(5, "loss 0.5")

    shown = terminal.getvalue()
    assert "training" in shown
    assert "5/10" in shown
    assert "0:00:0" in shown


def test_a_line_logged_meanwhile_is_printed_above_the_bar(terminal: Terminal) -> None:
    set_up_logging()

    with progress_bar("training", 10):
        terminal.truncate(0)
        logger.info("a status")
        shown = terminal.getvalue()

    assert shown.index("\x1b[2K") < shown.index("a status\n") < shown.index("training")


def test_quiet_shows_no_bar(terminal: Terminal, clock: Clock) -> None:
    set_up_logging(logging.WARNING)

    with progress_bar("training", 10) as bar:
        clock.now += 100
        bar.advance(5)
        logger.warning("a problem")

    assert terminal.getvalue() == "warning: a problem\n"


HOSTILE = "\x1b[2J\x07a\u202e\x9b31mb"


def test_nothing_that_is_printed_has_control_characters(capsys: Capture) -> None:
    set_up_logging()
    out = get_console()
    out.print(HOSTILE, Text.assemble((HOSTILE, "bold"), "end"), markup=False)
    out.print(make_table([HOSTILE], [[HOSTILE]], HOSTILE))
    out.print("two\nlines")
    logger.warning(HOSTILE)
    captured = capsys.readouterr()
    assert all(c.isprintable() or c == "\n" for c in captured.out + captured.err)
    assert captured.out.count("\\x1b[2J") == 5
    assert "two\nlines\n" in captured.out


def test_json_has_escapes_for_control_characters_and_is_the_same_value() -> None:
    for value in (HOSTILE, "\udc80", "é\t"):
        text = to_json({"a": value}, indent=2)
        assert all(c.isprintable() or c == "\n" for c in text)
        assert json.loads(text) == {"a": value}
