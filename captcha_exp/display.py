"""What a person sees while long work runs: bars, lines and warnings, on standard error.

Results go to standard output, so that a pipe gets results alone.
"""

import sys
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
    """Bars where a terminal can show them, else lines alone."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Bar]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as progress:
            yield _RichBar(progress, what, total)


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
