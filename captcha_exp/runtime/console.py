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


class Bar(Protocol):
    """One piece of long work."""

    def advance(self, amount: int, note: str = "") -> None: ...


class Display(Protocol):
    """Where long work reports to."""

    def line(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def bar(self, what: str, total: int) -> AbstractContextManager[Bar]: ...


class Silent:
    """Says nothing; warnings alone go to standard error."""

    def line(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)

    def bar(self, what: str, total: int) -> AbstractContextManager[Bar]:  # noqa: ARG002 - shows nothing
        return nullcontext(_NoBar())


class _NoBar:
    def advance(self, amount: int, note: str = "") -> None:
        pass


class Terminal:
    """Bars where a terminal can show them; in a file or a pipe a line now and then, with the time left."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Bar]:
        if not self.console.is_terminal:
            yield _LineBar(self, what, total)
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
            yield _RichBar(progress, what, total)


class _LineBar:
    """Tells how far it is, soon after the beginning and then every minute."""

    FIRST, NEXT = 15.0, 60.0  # seconds

    def __init__(self, terminal: Terminal, what: str, total: int) -> None:
        self._terminal, self._what, self._total = terminal, what, total
        self._done = 0
        self._began = time.monotonic()
        self._due = self._began + self.FIRST

    def advance(self, amount: int, note: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now < self._due or not 0 < self._done < self._total:
            return
        self._due = now + self.NEXT
        left = (now - self._began) * (self._total - self._done) / self._done
        spoken = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
        text = f"{self._what}: {self._done / self._total:.0%}, about {spoken} left"
        self._terminal.line(f"{text}  {note}".rstrip())


class _RichBar:
    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=total, note="")

    def advance(self, amount: int, note: str = "") -> None:
        self._progress.update(self._task, advance=amount, note=note)


def shown(name: str) -> str:
    """A file's name as a terminal can show it, whatever bytes are in it."""
    try:
        text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character, as JSON can write it
        text = name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
