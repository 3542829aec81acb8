"""`captcha-exp reproduce`: find the run, reproduce it, and print the verdict."""

import argparse
import contextlib
import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.text import Text

from captcha_exp import runs
from captcha_exp.cli.hydra_config import apply_overrides
from captcha_exp.cli.output import get_console, make_table, print_table
from captcha_exp.config import Config, Machine, local_store_uri
from captcha_exp.errors import UserError
from captcha_exp.reproduce import rerun
from captcha_exp.reproduce.reference import READ_FILES, load_reference
from captcha_exp.reproduce.rerun import Reproduction
from captcha_exp.runtime.paths import root_dir, tracking_uri_variable
from captcha_exp.runtime.text import escape_unprintable
from captcha_exp.tracking import check_tracking
from captcha_exp.training.recorder import Tracker

logger = logging.getLogger(__name__)

EXIT_CODES = {"identical": 0, "equivalent": 3, "different": 4}
COLORS = {"identical": "bold green", "equivalent": "bold yellow", "different": "bold red"}


def reproduce(arguments: argparse.Namespace, machine: Machine) -> Reproduction:
    """Train the named run again and compare the results.

    Raises:
        UserError: there is no such run, or it cannot be reproduced; the line says why.
        RunFailed: the new run failed.
    """

    def tracker(config: Config) -> Tracker:
        from captcha_exp.tracking import make_tracker

        return make_tracker(config, {})

    with _find_run_dir(arguments.run) as (run_dir, store):
        reference = load_reference(run_dir, store)
        requested = apply_overrides(reference.config, arguments.overrides)
        check_tracking(rerun.with_overrides(reference.config, requested, machine)[0])
        return rerun.reproduce(reference, requested, machine, tracker)


def print_reproduction(reproduction: Reproduction) -> None:
    """Print the verdict, the changes since the reference run, and both run directories."""
    out = get_console()
    out.print()
    out.print(Text(escape_unprintable(reproduction.summary), COLORS[reproduction.verdict]))
    if reproduction.verdict == "identical":
        result = reproduction.result
        num_epochs = len(result.metrics_by_epoch)
        counts = f"{num_epochs} epoch{'s' if num_epochs != 1 else ''}, {result.num_test_images:,} predictions"
        out.print(f"{counts} and weights (SHA-256 {result.weights_sha256[:12]}): bit-identical")
    else:
        differing = len(reproduction.differences)
        out.print(f"{differing:,} value{'s differ' if differing > 1 else ' differs'} in total")
    changes = [each for each in reproduction.changes if each.affects != "nothing" or each.is_input]
    if rows := [(each.name, *each.values, each.role) for each in changes]:
        print_table(make_table(("changed", "before", "now", "role"), rows, "changes"))
    out.print(f"reference  {reproduction.reference}", markup=False)
    out.print(f"new run    {reproduction.run_dir}", markup=False)


@contextlib.contextmanager
def _find_run_dir(name: str) -> Iterator[tuple[Path, str | None]]:
    """Yield the run directory and None; for a run that only MLflow has, a temporary copy and the store."""
    try:
        run_dir = runs.find_run(name, finished=True, warns=False)
    except UserError:
        if not re.fullmatch(r"[0-9a-f]{32}", name):
            raise
        with tempfile.TemporaryDirectory() as temporary_dir:
            store = _download_run(name, Path(temporary_dir))
            if store is None:
                raise
            try:
                yield Path(temporary_dir), store
            except UserError as error:  # the temporary directory means nothing to the user
                lines = (line.replace(temporary_dir, f"MLflow run {name} of {store}") for line in error.lines)
                raise type(error)(*lines) from error
        return
    yield run_dir, None


def _download_run(run_id: str, directory: Path) -> str | None:
    """Download the files of a run from the store of MLFLOW_TRACKING_URI, or from that of this root directory.

    Returns the store's URI without its password, or None if neither has the run.

    Raises:
        UserError: a store cannot be read, and no other one has the run.
    """
    from captcha_exp.tracking.download import download_artifacts

    failures: list[str] = []
    for uri in dict.fromkeys(filter(None, (tracking_uri_variable(), local_store_uri(root_dir())))):
        public_uri = re.sub(r"://[^/@]*@", "://", uri)
        try:
            is_found = download_artifacts(run_id, uri, READ_FILES, directory)
        except UserError as error:
            failures += (line.replace(uri, public_uri) for line in error.lines)
            continue
        if is_found:
            logger.info(f"Downloaded run {run_id} from {public_uri}")
            return public_uri
    if failures:
        raise UserError(*failures)
    return None
