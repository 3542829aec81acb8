"""Terminal output of long operations: progress bars, status lines and warnings, on standard error.

Results go to standard output.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

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


class ProgressBar(Protocol):
    """A progress bar of one operation."""

    def advance(self, amount: int, status: str = "") -> None: ...


class Display(Protocol):
    """Where long operations report to."""

    def info(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def progress_bar(self, description: str, total: int) -> AbstractContextManager[ProgressBar]: ...


class NullDisplay:
    """A display that prints only warnings, to standard error."""

    def info(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)

    def progress_bar(self, description: str, total: int) -> AbstractContextManager[ProgressBar]:  # noqa: ARG002 - shows no bar
        return nullcontext(_NullProgressBar())


class _NullProgressBar:
    def advance(self, amount: int, status: str = "") -> None:
        pass


class RichDisplay:
    """A display with progress bars on a terminal; in a file or pipe, a status line once a minute."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def info(self, text: str) -> None:
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False)

    @contextmanager
    def progress_bar(self, description: str, total: int) -> Iterator[ProgressBar]:
        if not self.console.is_terminal:
            yield _LineProgressBar(self, description, total)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield _RichProgressBar(progress, description, total)


class _LineProgressBar:
    """Prints the progress and the remaining time after 15 seconds and then every minute."""

    FIRST_SECONDS, INTERVAL_SECONDS = 15.0, 60.0

    def __init__(self, display: RichDisplay, description: str, total: int) -> None:
        self._display, self._description, self._total = display, description, total
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
        self._display.info(f"{text}  {status}".rstrip())


class _RichProgressBar:
    def __init__(self, progress: Progress, description: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total, status="")

    def advance(self, amount: int, status: str = "") -> None:
        self._progress.update(self._task, advance=amount, status=status)


def preview(names: Sequence[str], max_names: int = 3) -> str:
    """Return the first names, as in "a.png, b.png, c.png and 7 more"."""
    more = f" and {len(names) - max_names:,} more" if len(names) > max_names else ""
    return ", ".join(map(escape_unprintable, names[:max_names])) + more


def escape_unprintable(name: str) -> str:
    """Escape the characters of a file name that a terminal cannot print, including invalid UTF-8."""
    try:
        text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can contain
        text = name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
