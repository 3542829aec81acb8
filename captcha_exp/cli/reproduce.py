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
from captcha_exp.cli.hydra_config import apply_overrides
from captcha_exp.cli.output import get_console
from captcha_exp.cli.runs import print_table
from captcha_exp.config import Config, Machine
from captcha_exp.errors import UserError
from captcha_exp.reproduce.changes import to_short_text
from captcha_exp.reproduce.reference import READ_FILES, load_reference
from captcha_exp.reproduce.rerun import Reproduction
from captcha_exp.reproduce.rerun import reproduce as run_again
from captcha_exp.runtime.console import Display, escape_unprintable
from captcha_exp.runtime.paths import root_dir
from captcha_exp.training.recorder import Tracker

EXIT_CODES = {"identical": 0, "equivalent": 3, "different": 4}
COLORS = {"identical": "bold green", "equivalent": "bold yellow", "different": "bold red"}


def reproduce(arguments: argparse.Namespace, machine: Machine, display: Display) -> Reproduction:
    """The named run, run again.

    Raises:
        UserError: there is no such run, or it cannot be run again; the line says why.
        RunFailed: the new run failed.
    """

    def tracker(config: Config) -> Tracker:
        from captcha_exp.tracking import make_tracker

        return make_tracker(config, display, {})

    with _find_run_dir(arguments.run, display) as (folder, store):
        first = load_reference(folder, store)
        wanted = apply_overrides(first.config, arguments.overrides)
        return run_again(first, wanted, machine, tracker, display)


def print_reproduction(reproduction: Reproduction) -> None:
    """The verdict in a line, what changed around the run, and where the new one is."""
    out = get_console()
    out.print()
    out.print(Text(escape_unprintable(reproduction.summary), COLORS[reproduction.verdict]))
    if reproduction.verdict == "identical":
        weights = f"weights (SHA-256 {reproduction.weights_sha256[:12]})"
        out.print(
            Text(
                f"{reproduction.num_epochs} epochs, {reproduction.num_test_images:,} predictions "
                f"and {weights}: the same bits"
            )
        )
    else:
        differing = len(reproduction.differences)
        out.print(f"{differing:,} figure{'s differ' if differing > 1 else ' differs'} in all")
    told = [
        each
        for each in reproduction.attributed_changes
        if each.change.is_headline or each.role != "ruled_out"
    ]
    if told:
        table = Table("changed", "then", "now", "is", title="what is not as it was", title_justify="left")
        for each in told:
            drift = each.change
            cells = (
                drift.name,
                *(
                    "" if drift.is_name_only else to_short_text(value)
                    for value in (drift.before, drift.after)
                ),
            )
            table.add_row(*(Text(escape_unprintable(cell)) for cell in (*cells, each.role)))
        print_table(table)
    out.print(f"run     {reproduction.reference}", markup=False)
    out.print(f"again   {reproduction.run_dir}", markup=False)


@contextlib.contextmanager
def _find_run_dir(name: str, display: Display) -> Iterator[tuple[Path, str | None]]:
    """The folder of a run; of one that only MLflow has, a temporary one with its files, and the store."""
    try:
        found = runs.find_run(name)
    except UserError:
        if not re.fullmatch(r"[0-9a-f]{32}", name):
            raise
        with tempfile.TemporaryDirectory() as folder:
            store = _download_run(name, Path(folder), display)
            if store is None:
                raise
            try:
                yield Path(folder), store
            except UserError as error:  # nobody knows the folder, nor will it be there
                lines = (line.replace(folder, f"MLflow run {name} of {store}") for line in error.lines)
                raise type(error)(*lines) from error
        return
    yield found, None


def _download_run(run_id: str, folder: Path, display: Display) -> str | None:
    """The store that has the run, as it can be told; its files are in the folder then."""
    from captcha_exp.tracking import download_artifacts

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root_dir() / 'mlruns' / 'mlflow.db'}"
    if not download_artifacts(run_id, uri, READ_FILES, folder):
        return None
    told = re.sub(r"://[^/@]*@", "://", uri)  # without a password
    display.info(f"run {run_id} from {told}")
    return told
