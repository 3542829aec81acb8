"""Load the reference run: its config, manifests and results."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from captcha_exp.config import Config
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.runs import RunInfo, RunLink, SavedRun, find_linked, load

READ_FILES = (
    *("run.json", "config.yaml", "dataset.json", "environment.json", "metrics.jsonl", "test.json"),
    *("code.json", "code.diff"),
)
"""files that are read to reproduce a run; code.diff is optional"""


@dataclass(frozen=True)
class RunResult:
    """Results and manifests of a run."""

    metrics_by_epoch: Mapping[int, Mapping[str, float]]
    """epoch -> metrics; the last epoch includes those of the test split"""
    dataset: Mapping[str, Any]
    environment: Mapping[str, Any]
    misreads: Mapping[str, tuple[str, str]]
    """image of the test split -> (label, prediction), for wrong predictions"""
    num_test_images: int
    code_hashes: Mapping[str, str]
    """source file -> SHA-256"""
    weights_sha256: str


@dataclass(frozen=True)
class ReferenceRun:
    """A finished run to reproduce."""

    run_dir: Path
    store_uri: str | None
    """MLflow store that the run was downloaded from; None for a local run directory"""
    info: RunInfo
    config: Config
    """without train.max_minutes, which limited one process"""
    result: RunResult

    @property
    def location(self) -> str:
        """The run directory, or the MLflow run and its store."""
        if self.store_uri is None:
            return str(self.run_dir)
        return f"MLflow run {self.info.run_id} of {self.store_uri}"

    @property
    def link(self) -> RunLink:
        """Reference to this run for the record of another run."""
        run_dir = str(self.run_dir) if self.store_uri is None else None
        return RunLink(run_dir=run_dir, run_id=self.info.run_id, store=self.store_uri)

    def find_extended_run(self) -> Path | None:
        """Return the directory of the run that this one extends; None if it started from fresh weights.

        Raises:
            UserError: the extended run is missing; copy it back.
        """
        link = self.info.lineage.extends
        if link is None:
            return None
        run_dir = find_linked(link, self.run_dir)
        if run_dir is None:
            raise UserError(
                f"{self.location}: extends {link.run_dir} (MLflow run "
                f"{link.run_id or 'none'}), which was not found; copy it back, or next to this run"
            )
        return run_dir


def load_reference(run_dir: Path, store_uri: str | None = None) -> ReferenceRun:
    """Load the finished run in a directory, which may be a download from an MLflow store.

    Raises:
        UserError: the run has no result to compare with, or a file is missing or damaged.
    """
    run = load(run_dir)
    info = run.info
    if info.status != "FINISHED":
        raise UserError(f"{run_dir}: status {info.status}; only a FINISHED run can be reproduced")
    if info.oom is not None:
        raise UserError(f"{run_dir}: the run ran out of memory and has no weights to compare with")
    if info.result is None:
        raise UserError(f"{run_dir}: the run has no result to compare with")
    try:
        config = run.config()
    except ConfigError as error:
        hint = "it was saved by other code; use that version (see environment.json)"
        raise UserError(
            *error.lines, f"{run_dir / 'config.yaml'}: invalid for the current code: {hint}"
        ) from None
    return ReferenceRun(
        run_dir=run_dir,
        store_uri=store_uri,
        info=info,
        config=replace(config, train=replace(config.train, max_minutes=None)),
        result=load_result(run),
    )


def load_result(run: SavedRun) -> RunResult:
    """Load the results of a run that has finished.

    Raises:
        UserError: a file of the run is damaged.
    """
    assert run.info.result is not None  # the run has finished
    metrics_by_epoch: dict[int, dict[str, float]] = {}
    for row in run.metrics_rows():
        metrics_by_epoch.setdefault(row.step, {}).update(row.metrics)
    if not metrics_by_epoch:
        raise UserError(f"{run.run_dir / 'metrics.jsonl'}: no metrics; the run cannot be compared")
    test = run.read_json("test.json")
    return RunResult(
        metrics_by_epoch=metrics_by_epoch,
        dataset=run.read_json("dataset.json"),
        environment=run.read_json("environment.json"),
        misreads={each["image"]: (each["label"], each["predicted"]) for each in test["misreads"]},
        num_test_images=test["images"],
        code_hashes=run.read_json("code.json"),
        weights_sha256=run.info.result.weights_sha256,
    )
