"""What a person sees while long work runs: bars, lines and warnings, on standard error.

Results go to standard output, so that a pipe gets results alone.
"""

import sys
import time
from collections.abc import Iterator
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
    """One piece of long work."""

    def advance(self, amount: int, status: str = "") -> None: ...


class Display(Protocol):
    """Where long work reports to."""

    def info(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def progress_bar(self, description: str, total: int) -> AbstractContextManager[ProgressBar]: ...


class NullDisplay:
    """Says nothing; warnings alone go to standard error."""

    def info(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)

    def progress_bar(self, description: str, total: int) -> AbstractContextManager[ProgressBar]:  # noqa: ARG002 - shows nothing
        return nullcontext(_NullProgressBar())


class _NullProgressBar:
    def advance(self, amount: int, status: str = "") -> None:
        pass


class RichDisplay:
    """Bars where a terminal can show them; in a file or a pipe a line now and then, with the time left."""

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
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield _RichProgressBar(progress, description, total)


class _LineProgressBar:
    """Tells how far it is, soon after the beginning and then every minute."""

    FIRST_SECONDS, INTERVAL_SECONDS = 15.0, 60.0  # seconds

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
        left = (now - self._start_time) * (self._total - self._done) / self._done
        spoken = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
        text = f"{self._description}: {self._done / self._total:.0%}, about {spoken} left"
        self._display.info(f"{text}  {status}".rstrip())


class _RichProgressBar:
    def __init__(self, progress: Progress, description: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total, note="")

    def advance(self, amount: int, status: str = "") -> None:
        self._progress.update(self._task, advance=amount, note=status)


def escape_unprintable(name: str) -> str:
    """A file's name as a terminal can show it, whatever bytes are in it."""
    try:
        text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character, as JSON can write it
        text = name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
