"""Load the reference run: its config, manifests and results, and whether files were modified since."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors

from captcha_exp.config import Config, flatten_mapping, load
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.model.weights import config_from_metadata
from captcha_exp.runs import RunInfo, RunLink, find_linked, read_metrics_rows
from captcha_exp.runs.fields import changed_values, read_flat_config, read_json
from captcha_exp.runs.info import list_run_files
from captcha_exp.runtime.files import sha256_of

REQUIRED_FILES = ("config.yaml", "run.json", "dataset.json", "environment.json", "metrics.jsonl", "test.json")
READ_FILES = (*REQUIRED_FILES, "model.safetensors", "code.json", "code.diff")
"""files read here; code.json and code.diff are optional"""


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
    """source file -> SHA-256; empty if the run has no code.json"""
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
    config_edits: Mapping[str, tuple[Any, Any]]
    """key of config.yaml edited after the run finished -> (original, edited)"""
    changed_files: tuple[str, ...]
    """files modified or removed after the run finished"""
    has_unknown_edits: bool
    """whether config.yaml was edited, but its original values are not known"""

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
    info = RunInfo.load(run_dir)
    if info.status != "FINISHED":
        raise UserError(f"{run_dir}: status {info.status}; only a FINISHED run can be reproduced")
    if info.oom is not None:
        raise UserError(f"{run_dir}: the run ran out of memory and has no weights to compare with")
    if info.result is None:
        raise UserError(f"{run_dir}: the run has no result to compare with")
    for name in REQUIRED_FILES:
        if not (run_dir / name).is_file():
            raise UserError(f"{run_dir}: {name} is missing; it is required to reproduce the run")
    changed_files = _find_changed_files(run_dir, info.files)
    saved = read_flat_config(run_dir)
    trained = _config_of_weights(run_dir / "model.safetensors")
    edits = {} if trained is None else changed_values(trained, saved)
    initial_sha256 = info.configs.get("config.yaml")
    edited_early = initial_sha256 not in (None, sha256_of(run_dir / "config.yaml"))
    edited_late = "config.yaml" in changed_files
    # If the file was edited during the run, the weights contain the edited values and prove nothing.
    is_unproven = trained is None or not edited_late
    return ReferenceRun(
        run_dir=run_dir,
        store_uri=store_uri,
        info=info,
        config=_load_config(run_dir, "config.yaml" in changed_files),
        result=load_result(run_dir, info),
        config_edits=edits,
        changed_files=changed_files,
        has_unknown_edits=not edits and (edited_early or edited_late) and is_unproven,
    )


def load_result(run_dir: Path, info: RunInfo) -> RunResult:
    """Load the results of the run in a directory.

    Raises:
        UserError: a file of the run is damaged.
    """
    assert info.result is not None  # the run has finished
    rows, broken = read_metrics_rows(run_dir)
    if broken or not rows:
        reason = f"line {', '.join(map(str, broken))} is damaged" if broken else "no metrics"
        raise UserError(f"{run_dir / 'metrics.jsonl'}: {reason}; the run cannot be compared")
    metrics_by_epoch: dict[int, dict[str, float]] = {}
    for row in rows:
        metrics_by_epoch.setdefault(row.step, {}).update(row.metrics)
    dataset, test = read_json(run_dir / "dataset.json"), read_json(run_dir / "test.json")
    code_file = run_dir / "code.json"
    try:
        return RunResult(
            metrics_by_epoch=metrics_by_epoch,
            dataset=_check_manifest(dataset),
            environment=read_json(run_dir / "environment.json"),
            misreads={
                str(misread["image"]): (str(misread["label"]), str(misread["predicted"]))
                for misread in test["misreads"]
            },
            num_test_images=int(test["images"]),
            code_hashes=read_json(code_file) if code_file.is_file() else {},
            weights_sha256=info.result.weights_sha256,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{run_dir}: damaged run record ({type(error).__name__}: {error}); the run cannot be compared"
        ) from None


def _check_manifest(dataset: dict[str, Any]) -> dict[str, Any]:
    """Return the dataset manifest if it has every value that is read from it.

    Raises:
        KeyError: a value is missing.
        TypeError, AttributeError: a value has the wrong type.
    """
    needed = [dataset[key] for key in ("images_sha256", "labels_sha256", "splits")]
    needed += [file[key] for file in dataset.get("files", []) for key in ("file", "sha256", "label")]
    needed += [file["file"] for file in dataset.get("rejected", [])]
    needed += dataset.get("provenance", {}).get("dependencies", {}).items()
    if None in needed:
        raise TypeError("null in dataset.json where a value is required")
    return dataset


def _load_config(run_dir: Path, is_changed: bool) -> Config:
    path = run_dir / "config.yaml"
    try:
        config = load(path)
        return replace(config, train=replace(config.train, max_minutes=None))
    except ConfigError as error:
        hint = (
            "it was edited after the run finished; restore it"
            if is_changed
            else "it was saved by other code; use that version (see environment.json)"
        )
        raise UserError(*error.lines, f"{path}: invalid for the current code: {hint}") from None


def _find_changed_files(run_dir: Path, files: Mapping[str, str]) -> tuple[str, ...]:
    """List files modified since the run finished, and removed ones of `READ_FILES`."""
    paths = {path.relative_to(run_dir).as_posix(): path for path in list_run_files(run_dir)}
    return tuple(
        name
        for name, sha256 in files.items()
        if (sha256_of(paths[name]) != sha256 if name in paths else name in READ_FILES)
    )


def _config_of_weights(path: Path) -> dict[str, Any] | None:
    """Return the flat config stored in the weights file; None if the file is missing or damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return flatten_mapping(config_from_metadata(file.metadata() or {}))
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None
