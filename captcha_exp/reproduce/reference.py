"""The run that is to be had again: its saved config, its manifests, its results, and whether they are still
those that it ended with."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import safetensors

from captcha_exp.config import Config, load
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.model.weights import config_from_metadata
from captcha_exp.runs import MetricsRow, find_linked, read_metrics_rows
from captcha_exp.runs.fields import flatten, read_flat_config
from captcha_exp.runs.files import list_run_files
from captcha_exp.runtime.files import sha256_of

REQUIRED_FILES = ("config.yaml", "run.json", "dataset.json", "environment.json", "metrics.jsonl", "test.json")
READ_FILES = (*REQUIRED_FILES, "model.safetensors", "code.json", "code.diff")
"""files of a run that are read here; older runs have no code.json, those of a clean checkout no code.diff"""

ConfigFileStatus: TypeAlias = Literal["as it was", "other words", "other values, maybe"]

ABSENT = "not there"
"""the value of a key, a file or a variable that one side lacks"""


@dataclass(frozen=True)
class RunResult:
    """What a run gave."""

    metrics_by_epoch: Mapping[int, Mapping[str, float]]
    """epoch -> metrics; those of the test split are of the last epoch"""
    dataset: Mapping[str, Any]
    environment: Mapping[str, Any]
    misreads: Mapping[str, tuple[str, str]]
    """picture of the test split that was read wrong -> label, and what was read"""
    num_test_images: int
    """pictures of the test split"""
    code_hashes: Mapping[str, str]
    """source file -> SHA-256; nothing where the run has not kept them"""
    weights_sha256: str


@dataclass(frozen=True)
class ReferenceRun:
    """A finished run."""

    run_dir: Path
    store_uri: str | None
    """of MLflow, where the folder is a copy for the moment, made from there"""
    state: Mapping[str, Any]
    config: Config
    """without a limit of time, which was its process's"""
    result: RunResult
    config_edits: Mapping[str, tuple[Any, Any]]
    """key of config.yaml that was changed after the end -> its value then and now"""
    changed_files: tuple[str, ...]
    """files that are not those that the run ended with"""
    config_file_status: ConfigFileStatus
    """what config.yaml is, where no edit can be named"""

    @property
    def run_id(self) -> str | None:
        """In MLflow."""
        found = _as_mapping(self.state["mlflow"]).get("run_id")
        return found if isinstance(found, str) else None

    @property
    def location(self) -> str:
        """Where it is, in words."""
        return (
            str(self.run_dir) if self.store_uri is None else f"MLflow run {self.run_id} of {self.store_uri}"
        )

    @property
    def link(self) -> dict[str, str | None]:
        """To it, for the record of another run."""
        if self.store_uri is None:
            return {"run_dir": str(self.run_dir), "run_id": self.run_id}
        return {"run_dir": None, "run_id": self.run_id, "store": self.store_uri}

    def find_extended_run(self) -> Path | None:
        """The folder of the run from whose last state it began; None for one that began with fresh weights.

        Raises:
            UserError: that run is not there any more; the line says which.
        """
        link = self.extends
        if link is None:
            return None
        found = find_linked(link, self.run_dir)
        if found is None:
            raise UserError(
                f"{self.location}: began from the state of {link.get('folder')} (MLflow run "
                f"{link.get('run_id') or 'none'}), which is not there; bring it back, or beside this one"
            )
        return found

    @property
    def extends(self) -> Mapping[str, Any] | None:
        """The link to the run from whose last state it began."""
        link = _as_mapping(self.state.get("lineage")).get("extends")
        return None if link is None else _as_mapping(link)


def load_reference(run_dir: Path, store_uri: str | None = None) -> ReferenceRun:
    """The finished run in a folder, or in one to which it was copied from a store of MLflow.

    Raises:
        UserError: it has nothing to compare with, or its record is damaged; the line says what.
    """
    state = _read_json(run_dir / "run.json")
    if state.get("status") != "FINISHED":
        raise UserError(
            f"{run_dir}: is {state.get('status')}; only a FINISHED run has a result to compare with"
        )
    if state.get("oom") is not None:
        raise UserError(f"{run_dir}: ran out of memory: it has no weights to compare with")
    for name in REQUIRED_FILES:
        if not (run_dir / name).is_file():
            raise UserError(f"{run_dir}: has no {name}, without which it cannot be run again and compared")
    changed = _find_changed_files(run_dir, _as_mapping(state.get("files")))
    saved = read_flat_config(run_dir)
    trained = _config_of_weights(run_dir / "model.safetensors")
    edits: dict[str, tuple[Any, Any]] = {}
    if trained is not None:
        for key in dict.fromkeys([*trained, *saved]):
            pair = trained.get(key, ABSENT), saved.get(key, ABSENT)
            if json.dumps(pair[0]) != json.dumps(pair[1]):
                edits[key] = pair
    at_begin = _as_mapping(state.get("configs")).get("config.yaml")
    began_otherwise = at_begin is not None and at_begin != sha256_of(run_dir / "config.yaml")
    config_file: ConfigFileStatus = "as it was"
    if not edits and (began_otherwise or "config.yaml" in changed):
        # Where it is as it ended, the weights have the values of the changed one, and prove nothing.
        proven = trained is not None and "config.yaml" in changed
        config_file = "other words" if proven else "other values, maybe"
    return ReferenceRun(
        run_dir=run_dir,
        store_uri=store_uri,
        state=state,
        config=_load_config(run_dir, "config.yaml" in changed),
        result=load_result(run_dir, state),
        config_edits=edits,
        changed_files=changed,
        config_file_status=config_file,
    )


def load_result(run_dir: Path, state: Mapping[str, Any]) -> RunResult:
    """What the run in a folder gave.

    Raises:
        UserError: a file of its record is damaged; the line says which.
    """
    rows, broken = read_metrics_rows(run_dir)
    if broken or not rows:
        lines = ", ".join(map(str, broken)) or "none at all"
        raise UserError(
            f"{run_dir / 'metrics.jsonl'}: is damaged (line {lines}): there is nothing to compare"
        )
    dataset, test = _read_json(run_dir / "dataset.json"), _read_json(run_dir / "test.json")
    code = run_dir / "code.json"
    try:
        return RunResult(
            metrics_by_epoch=_metrics_by_epoch(rows),
            dataset=_check_manifest(dataset),
            environment=_read_json(run_dir / "environment.json"),
            misreads={
                str(misread["image"]): (str(misread["label"]), str(misread["predicted"]))
                for misread in test["misreads"]
            },
            num_test_images=int(test["images"]),
            code_hashes=_read_json(code) if code.is_file() else {},
            weights_sha256=str(_as_mapping(state["result"])["weights_sha256"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{run_dir}: its record is damaged ({type(error).__name__}: {error}): there is nothing to compare"
        ) from None


def _metrics_by_epoch(rows: Sequence[MetricsRow]) -> dict[int, dict[str, float]]:
    """Epoch -> metrics.

    Raises:
        TypeError: they are no numbers.
    """
    epochs: dict[int, dict[str, float]] = {}
    for row in rows:
        if not all(isinstance(value, int | float) for value in (row.step, *row.metrics.values())):
            raise TypeError("a step or a metric is no number")
        epochs.setdefault(row.step, {}).update(row.metrics)
    return epochs


def _check_manifest(dataset: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the pictures, with all that is read of it.

    Raises:
        KeyError: something is missing.
        TypeError: something is of another kind.
    """
    needed = [dataset[key] for key in ("images_sha256", "labels_sha256", "splits")]
    needed += [file[fact] for file in dataset.get("files", []) for fact in ("file", "sha256", "label")]
    needed += [file["file"] for file in dataset.get("rejected", [])]
    if None in needed:
        raise TypeError("null stands in dataset.json where a value is needed")
    return dataset


def _load_config(folder: Path, changed: bool) -> Config:
    try:
        config = load(folder / "config.yaml")
        return replace(config, train=replace(config.train, max_minutes=None))
    except ConfigError as error:
        why = (
            "it was changed after the run ended: put it right"
            if changed
            else "it was saved by other code: take that (its commit and version stand in environment.json)"
        )
        path = folder / "config.yaml"
        raise UserError(*error.lines, f"{path}: today's code does not take it; {why}") from None


def _find_changed_files(folder: Path, files: Mapping[str, Any]) -> tuple[str, ...]:
    """Files that are there and not those that the run ended with; of those that are used also the missing."""
    there = {path.relative_to(folder).as_posix(): path for path in list_run_files(folder)}
    return tuple(
        name
        for name, sha256 in files.items()
        if (sha256_of(there[name]) != sha256 if name in there else name in READ_FILES)
    )


def _config_of_weights(path: Path) -> dict[str, Any] | None:
    """The leaves of the config that is kept inside the weights; None where they are gone or damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return flatten(config_from_metadata(file.metadata() or {}))
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path.parent}: has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no keys; it is no record of a run")
    return values


def _as_mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
