"""`captcha-exp reproduce`: which run is meant, and what became of it in words."""

import argparse
import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table
from rich.text import Text

from captcha_exp import runs
from captcha_exp.cli.hydra_config import overridden
from captcha_exp.cli.output import console
from captcha_exp.cli.runs import print_whole
from captcha_exp.config import Config, Machine
from captcha_exp.errors import UserError
from captcha_exp.reproduce.changes import text
from captcha_exp.reproduce.reference import USED, original
from captcha_exp.reproduce.rerun import Reproduction
from captcha_exp.reproduce.rerun import reproduce as run_again
from captcha_exp.runtime.console import Display, shown
from captcha_exp.runtime.paths import root
from captcha_exp.training.recorder import Tracker

EXIT_CODES = {"identical": 0, "equivalent": 3, "different": 4}
COLOURS = {"identical": "bold green", "equivalent": "bold yellow", "different": "bold red"}


def reproduce(arguments: argparse.Namespace, machine: Machine, display: Display) -> Reproduction:
    """The named run, run again.

    Raises:
        UserError: there is no such run, or it cannot be run again; the line says why.
        RunFailed: the new run failed.
    """

    def tracker(config: Config) -> Tracker:
        from captcha_exp.tracking import tracker_of

        return tracker_of(config, display, {})

    with _folder(arguments.run, display) as (folder, store):
        first = original(folder, store)
        wanted = overridden(first.config, arguments.overrides)
        return run_again(first, wanted, machine, tracker, display)


def tell(made: Reproduction) -> None:
    """The verdict in a line, what changed around the run, and where the new one is."""
    out = console()
    out.print()
    out.print(Text(shown(made.sentence), COLOURS[made.verdict]))
    if made.verdict == "identical":
        weights = f"weights (SHA-256 {made.weights_sha256[:12]})"
        out.print(Text(f"{made.epochs} epochs, {made.tested:,} predictions and {weights}: the same bits"))
    else:
        differing = len(made.differences)
        out.print(f"{differing:,} figure{'s differ' if differing > 1 else ' differs'} in all")
    told = [each for each in made.judged if each.drift.headline or each.role != "cleared"]
    if told:
        table = Table("changed", "then", "now", "is", title="what is not as it was", title_justify="left")
        for each in told:
            drift = each.drift
            cells = (drift.what, *("" if drift.is_bare else text(value) for value in (drift.then, drift.now)))
            table.add_row(*(Text(shown(cell)) for cell in (*cells, each.role)))
        print_whole(table)
    out.print(f"run     {made.of}", markup=False)
    out.print(f"again   {made.folder}", markup=False)


@contextlib.contextmanager
def _folder(name: str, display: Display) -> Iterator[tuple[Path, str | None]]:
    """The folder of a run; of one that only MLflow has, a temporary one with its files, and the store."""
    try:
        found = runs.find(name)
    except UserError:
        if not re.fullmatch(r"[0-9a-f]{32}", name):
            raise
        with tempfile.TemporaryDirectory() as folder:
            store = _fetched(name, Path(folder), display)
            if store is None:
                raise
            try:
                yield Path(folder), store
            except UserError as error:  # nobody knows the folder, nor will it be there
                lines = (line.replace(folder, f"MLflow run {name} of {store}") for line in error.lines)
                raise type(error)(*lines) from error
        return
    yield found, None


def _fetched(run_id: str, folder: Path, display: Display) -> str | None:
    """The store that has the run, as it can be told; its files are in the folder then."""
    from captcha_exp.tracking import fetch

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root() / 'mlruns' / 'mlflow.db'}"
    if not fetch(run_id, uri, USED, folder):
        return None
    told = re.sub(r"://[^/@]*@", "://", uri)  # without a password
    display.line(f"run {run_id} from {told}")
    return told
