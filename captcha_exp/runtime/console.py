"""Output of long operations on standard error: log records and progress bars. Results go to standard output.

Modules log with `logging.getLogger(__name__)`. A process that a user watches calls `set_up_logging`; without
it, as in a notebook, `logging` itself prints the warnings, and no bar is drawn.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from captcha_exp.runtime.text import escape_unprintable

logger = logging.getLogger(__name__)


class SafeConsole(Console):
    """Escapes the control characters in the texts that it prints, which may be names from files of others."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as `rich.console.Console.print`."""
        super().print(*map(_escaped, objects), **options)


def _escaped(renderable: Any) -> Any:
    if isinstance(renderable, str):
        return "\n".join(map(escape_unprintable, renderable.split("\n")))
    if isinstance(renderable, Text):
        renderable = renderable.copy()
        renderable.plain = _escaped(renderable.plain)
    return renderable


console = SafeConsole(stderr=True, highlight=False, soft_wrap=True, emoji=False)
"""prints to what `sys.stderr` is at the time; lines that it prints appear above a progress bar"""

_PACKAGE_LOGGER = logging.getLogger("captcha_exp")


class _ConsoleHandler(logging.Handler):
    """Prints warnings in yellow, status lines unchanged, and debug lines after the name of their logger."""

    def emit(self, record: logging.LogRecord) -> None:
        # An error of the console, such as a closed terminal, is raised: main() turns it into an exit code.
        text, style = escape_unprintable(record.getMessage()), None  # on one line
        if record.levelno >= logging.WARNING:
            text, style = f"warning: {text}", "yellow"
        elif record.levelno <= logging.DEBUG:
            text = f"{record.name}: {text}"
        console.print(text, style=style, markup=False)


_HANDLER = _ConsoleHandler()


def set_up_logging(level: int = logging.INFO) -> None:
    """Print the package's log records from this level on; draw progress bars unless INFO is off.

    A further call only changes the level.
    """
    _PACKAGE_LOGGER.addHandler(_HANDLER)  # once, however often it is called
    _PACKAGE_LOGGER.setLevel(level)
    _PACKAGE_LOGGER.propagate = False  # a handler that a library adds to the root logger would print it again


def get_log_level() -> int:
    """Return the level from which on records are printed, to be passed to `set_up_logging` of a child."""
    return _PACKAGE_LOGGER.getEffectiveLevel()


class ProgressBar:
    """The progress of one operation; this one shows nothing."""

    def advance(self, amount: int, status: str = "") -> None:
        """Add to the progress, and show the status beside it."""


class _LineProgressBar(ProgressBar):
    """Logs the progress and the remaining time after 15 seconds and then every minute."""

    FIRST_SECONDS, INTERVAL_SECONDS = 15.0, 60.0

    def __init__(self, description: str, total: int) -> None:
        self._description, self._total = description, total
        self._done = 0
        self._start_time = time.monotonic()
        self._next_update = self._start_time + self.FIRST_SECONDS

    def advance(self, amount: int, status: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now < self._next_update or not 0 < self._done < self._total:
            return
        self._next_update = now + self.INTERVAL_SECONDS
        seconds = (now - self._start_time) * (self._total - self._done) / self._done
        remaining = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
        text = f"{self._description}: {self._done / self._total:.0%}, about {remaining} left"
        logger.info(f"{text}  {status}".rstrip())


class _RichProgressBar(ProgressBar):
    def __init__(self, progress: Progress, description: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total, status="")

    def advance(self, amount: int, status: str = "") -> None:
        self._progress.update(self._task, advance=amount, status=status)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[ProgressBar]:
    """Draw a progress bar on a terminal; in a file or pipe, log a status line once a minute."""
    if _HANDLER not in _PACKAGE_LOGGER.handlers or not _PACKAGE_LOGGER.isEnabledFor(logging.INFO):
        yield ProgressBar()
    elif not (console.is_terminal and console.file.isatty()):  # FORCE_COLOR sets only the first
        yield _LineProgressBar(description, total)
    else:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            yield _RichProgressBar(progress, description, total)
