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
from captcha_exp.runs import MetricsRow, linked, read_rows
from captcha_exp.runs.fields import config_leaves, flat
from captcha_exp.runtime.files import own_files, sha256_of

NEEDED = ("config.yaml", "run.json", "dataset.json", "environment.json", "metrics.jsonl", "test.json")
USED = (*NEEDED, "model.safetensors", "code.json", "code.diff")
"""files of a run that are read here; older runs have no code.json, those of a clean checkout no code.diff"""

ConfigFile: TypeAlias = Literal["as it was", "other words", "other values, maybe"]

ABSENT = "not there"
"""the value of a key, a file or a variable that one side lacks"""


@dataclass(frozen=True)
class Outcome:
    """What a run gave."""

    epochs: Mapping[int, Mapping[str, float]]
    """epoch -> metrics; those of the test split are of the last epoch"""
    dataset: Mapping[str, Any]
    environment: Mapping[str, Any]
    readings: Mapping[str, tuple[str, str]]
    """picture of the test split that was read wrong -> label, and what was read"""
    tested: int
    """pictures of the test split"""
    code: Mapping[str, str]
    """source file -> SHA-256; nothing where the run has not kept them"""
    weights_sha256: str


@dataclass(frozen=True)
class Original:
    """A finished run."""

    folder: Path
    store: str | None
    """of MLflow, where the folder is a copy for the moment, made from there"""
    state: Mapping[str, Any]
    config: Config
    """without a limit of time, which was its process's"""
    outcome: Outcome
    edits: Mapping[str, tuple[Any, Any]]
    """key of config.yaml that was changed after the end -> its value then and now"""
    changed: tuple[str, ...]
    """files that are not those that the run ended with"""
    config_file: ConfigFile
    """what config.yaml is, where no edit can be named"""

    @property
    def run_id(self) -> str | None:
        """In MLflow."""
        found = _mapping(self.state["mlflow"]).get("run_id")
        return found if isinstance(found, str) else None

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return str(self.folder) if self.store is None else f"MLflow run {self.run_id} of {self.store}"

    @property
    def link(self) -> dict[str, str | None]:
        """To it, for the record of another run."""
        if self.store is None:
            return {"folder": str(self.folder), "run_id": self.run_id}
        return {"folder": None, "run_id": self.run_id, "store": self.store}

    def began_from(self) -> Path | None:
        """The folder of the run from whose last state it began; None for one that began with fresh weights.

        Raises:
            UserError: that run is not there any more; the line says which.
        """
        link = self.continues
        if link is None:
            return None
        found = linked(link, self.folder)
        if found is None:
            raise UserError(
                f"{self.place}: began from the state of {link.get('folder')} (MLflow run "
                f"{link.get('run_id') or 'none'}), which is not there; bring it back, or beside this one"
            )
        return found

    @property
    def continues(self) -> Mapping[str, Any] | None:
        """The link to the run from whose last state it began."""
        link = _mapping(self.state.get("links")).get("continues")
        return None if link is None else _mapping(link)


def original(folder: Path, store: str | None = None) -> Original:
    """The finished run in a folder, or in one to which it was copied from a store of MLflow.

    Raises:
        UserError: it has nothing to compare with, or its record is damaged; the line says what.
    """
    state = _json(folder / "run.json")
    if state.get("status") != "FINISHED":
        raise UserError(
            f"{folder}: is {state.get('status')}; only a FINISHED run has a result to compare with"
        )
    if state.get("oom") is not None:
        raise UserError(f"{folder}: ran out of memory: it has no weights to compare with")
    for name in NEEDED:
        if not (folder / name).is_file():
            raise UserError(f"{folder}: has no {name}, without which it cannot be run again and compared")
    changed = _changed(folder, _mapping(state.get("files")))
    saved = config_leaves(folder)
    trained = _config_of_weights(folder / "model.safetensors")
    edits: dict[str, tuple[Any, Any]] = {}
    if trained is not None:
        for key in dict.fromkeys([*trained, *saved]):
            pair = trained.get(key, ABSENT), saved.get(key, ABSENT)
            if json.dumps(pair[0]) != json.dumps(pair[1]):
                edits[key] = pair
    at_begin = _mapping(state.get("configs")).get("config.yaml")
    began_otherwise = at_begin is not None and at_begin != sha256_of(folder / "config.yaml")
    config_file: ConfigFile = "as it was"
    if not edits and (began_otherwise or "config.yaml" in changed):
        # Where it is as it ended, the weights have the values of the changed one, and prove nothing.
        proven = trained is not None and "config.yaml" in changed
        config_file = "other words" if proven else "other values, maybe"
    return Original(
        folder=folder,
        store=store,
        state=state,
        config=_config(folder, "config.yaml" in changed),
        outcome=outcome(folder, state),
        edits=edits,
        changed=changed,
        config_file=config_file,
    )


def outcome(folder: Path, state: Mapping[str, Any]) -> Outcome:
    """What the run in a folder gave.

    Raises:
        UserError: a file of its record is damaged; the line says which.
    """
    rows, broken = read_rows(folder)
    if broken or not rows:
        lines = ", ".join(map(str, broken)) or "none at all"
        raise UserError(f"{folder / 'metrics.jsonl'}: is damaged (line {lines}): there is nothing to compare")
    dataset, test = _json(folder / "dataset.json"), _json(folder / "test.json")
    code = folder / "code.json"
    try:
        return Outcome(
            epochs=_epochs(rows),
            dataset=_whole(dataset),
            environment=_json(folder / "environment.json"),
            readings={
                str(error["picture"]): (str(error["label"]), str(error["read"])) for error in test["errors"]
            },
            tested=int(test["pictures"]),
            code=_json(code) if code.is_file() else {},
            weights_sha256=str(_mapping(state["result"])["weights_sha256"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder}: its record is damaged ({type(error).__name__}: {error}): there is nothing to compare"
        ) from None


def _epochs(rows: Sequence[MetricsRow]) -> dict[int, dict[str, float]]:
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


def _whole(dataset: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the pictures, with all that is read of it.

    Raises:
        KeyError: something is missing.
        TypeError: something is of another kind.
    """
    needed = [dataset[key] for key in ("images_sha256", "labels_sha256", "splits")]
    needed += [file[fact] for file in dataset.get("files", []) for fact in ("file", "sha256", "label")]
    needed += [file["file"] for file in dataset.get("refused", [])]
    if None in needed:
        raise TypeError("null stands in dataset.json where a value is needed")
    return dataset


def _config(folder: Path, changed: bool) -> Config:
    try:
        config = load(folder / "config.yaml")
        return replace(config, train=replace(config.train, stop_after_minutes=None))
    except ConfigError as error:
        why = (
            "it was changed after the run ended: put it right"
            if changed
            else "it was saved by other code: take that (its commit and version stand in environment.json)"
        )
        path = folder / "config.yaml"
        raise UserError(*error.lines, f"{path}: today's code does not take it; {why}") from None


def _changed(folder: Path, files: Mapping[str, Any]) -> tuple[str, ...]:
    """Files that are there and not those that the run ended with; of those that are used also the missing."""
    there = {path.relative_to(folder).as_posix(): path for path in own_files(folder)}
    return tuple(
        name
        for name, sha256 in files.items()
        if (sha256_of(there[name]) != sha256 if name in there else name in USED)
    )


def _config_of_weights(path: Path) -> dict[str, Any] | None:
    """The leaves of the config that is kept inside the weights; None where they are gone or damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return flat(json.loads((file.metadata() or {})["config"]))
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path.parent}: has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no keys; it is no record of a run")
    return values


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
