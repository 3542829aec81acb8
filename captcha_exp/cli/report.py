"""The command `report`: write the page of a run or of a sweep."""

import argparse
import contextlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captcha_exp import runs
from captcha_exp.cli.output import get_console
from captcha_exp.errors import UserError, one_line
from captcha_exp.runs import SweepInfo, check_has_no_links
from captcha_exp.runtime.files import sha256_of

if TYPE_CHECKING:
    from captcha_exp.data.dataset import Dataset
    from captcha_exp.model.evaluate import Evaluation

logger = logging.getLogger(__name__)

GENERATOR = b'<meta name="generator" content="captcha-exp">'
HEAD_BYTES = 2048  # of a page, which have the generator


@dataclass(frozen=True)
class Report:
    """A page that was written, or kept."""

    kind: str
    """run or sweep"""
    run_dir: Path
    path: Path
    missing: tuple[str, ...]
    """parts that the page lacks, a line each"""

    def to_json(self) -> dict[str, Any]:
        """Return the values of `report --json`."""
        return {
            "kind": self.kind,
            "run_dir": str(self.run_dir),
            "path": str(self.path),
            "bytes": self.path.stat().st_size,
            "missing": list(self.missing),
        }


def report(arguments: argparse.Namespace) -> Report:
    """Write the page, by default into the directory of the run or sweep.

    Raises:
        UserError: no such run or sweep exists, or the page cannot be written there; the line says why.
    """
    output = None if arguments.output is None else Path(arguments.output)
    if output is not None:
        _check_output(output)
    sweep_dir = runs.resolve_dir(arguments.run, SweepInfo.filename)
    if sweep_dir is not None:
        return _report_sweep(sweep_dir, output)
    return _report_run(runs.find_run(arguments.run, finished=True), output)


def print_report(written: Report) -> None:
    """Print the path of the page."""
    get_console().print(str(written.path), markup=False)


def _report_run(run_dir: Path, output: Path | None) -> Report:
    from captcha_exp.report.run_page import RUN_PAGE, write_page

    run, path = runs.load(run_dir), run_dir / RUN_PAGE
    evaluation, data, missing = _evaluate(run)
    if output is None:
        check_has_no_links(run_dir)
        if missing and _is_recorded(run, RUN_PAGE):
            logger.warning(
                f"{path}: is kept as the training made it, as a new page would lack images; "
                "--output FILE writes that one"
            )
            return Report("run", run_dir, path, ())
        path.parent.mkdir(exist_ok=True)
    found = write_page(run, evaluation, data, path if output is None else output, missing)
    if output is None:
        _record_hash(run_dir, RUN_PAGE)
    _warn(found)
    return Report("run", run_dir, path if output is None else output, tuple(found))


def _evaluate(run: runs.SavedRun) -> "tuple[Evaluation | None, Dataset | None, list[str]]":
    """Return the predictions on the test split and the dataset, or why there are none."""
    if run.info.result is None:
        return None, None, []
    from captcha_exp.model.saved import evaluate_run

    logger.info(f"Evaluating {run.run_dir} on its test split")
    try:
        return *evaluate_run(run.run_dir, "test"), []
    except UserError as error:
        more = f" (and {len(error.lines) - 1} more)" if len(error.lines) > 1 else ""
        reason = one_line(error.lines[0]) + more
        parts = "images, confusion matrix and confidences"
        return None, None, [f"{parts}: the test split could not be evaluated again: {reason}"]


def _report_sweep(sweep_dir: Path, output: Path | None) -> Report:
    from captcha_exp.sweep.page import SWEEP_PAGE, write_page
    from captcha_exp.sweep.record import Sweep
    from captcha_exp.sweep.results import collect_results
    from captcha_exp.sweep.summary import SweepSummary

    sweep = Sweep(sweep_dir)
    if output is None:
        check_has_no_links(sweep_dir)
    summary = SweepSummary(collect_results(sweep), sweep.info.parallelism)
    path = sweep_dir / SWEEP_PAGE if output is None else output
    found = write_page(sweep, summary, path)
    _warn(found)
    return Report("sweep", sweep_dir, path, tuple(found))


def _check_output(output: Path) -> None:
    """Check that a page can be written to a path without losing anything.

    Raises:
        UserError: its directory does not exist, or another file is there; choose another name.
    """
    try:
        if not output.parent.is_dir():
            raise UserError(f"--output {output}: the directory {output.parent} does not exist")
        if output.is_dir():
            raise UserError(f"--output {output}: is a directory; name a file in it")
        is_page = not output.exists() or (output.is_file() and _is_page(output))
    except OSError as error:  # a name that is too long, or a file that may not be read
        raise UserError(f"--output {output}: cannot be used: {error.strerror}") from None
    if not is_page:
        raise UserError(f"--output {output}: exists, and is not a page of captcha-exp; choose another name")


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return GENERATOR in file.read(HEAD_BYTES)


def _is_recorded(run: runs.SavedRun, name: str) -> bool:
    """Return whether a file of the run is the one that the training wrote."""
    with contextlib.suppress(UserError):
        return run.path(name).is_file()
    return False


def _record_hash(run_dir: Path, name: str) -> None:
    """Record the SHA-256 of a file that was written again, if run.json had one of it."""
    run = runs.load(run_dir)
    digest = sha256_of(run_dir / name)
    if run.info.files.get(name, digest) != digest and not run.info.has_live_process():
        run.update(files=run.info.files | {name: digest})


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        logger.warning(f"not on the page: {line}")
