"""What a run's folder says, by key: facts of run.json, leaves of config.yaml, metrics.

A metric has a row for each epoch; one rule makes one value of them: train/* and val/* are those of the best
epoch (of the last one, in a run without a result), memory/* the maximum, speed/* the median, and test/* the
only one there is.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from captcha_exp.errors import UserError
from captcha_exp.runs.run import MetricsRow
from captcha_exp.runtime.paths import root_dir
from captcha_exp.runtime.process import is_alive

RUN_KEYS = (
    "name",
    "status",
    "started",
    "run_dir",
    "run_id",
    "error",
    "epochs",
    "best_epoch",
    "seconds",
    "weights_sha256",
    "oom",
    "sweep",
)
"""Keys of run.json. status: also died, for a run whose process is gone; folder and sweep: below outputs/;
oom: whether memory was too little"""

_DATASET_KEYS = (
    "key",
    "provenance",
    "images",
    "distinct_labels",
    "lengths",
    "splits",
    "images_sha256",
    "labels_sha256",
)
_NESTING_CHARS = "[{-?"  # without one of these, a YAML text goes deeper by indentation alone


class RunFields:
    """What one run says. A file is read when a key first needs it, and what cannot be read is told then."""

    def __init__(self, run_dir: Path, state: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        self.run_dir, self.state, self._warn = run_dir, state, warn
        self.short_name = short_name(run_dir)

    def __contains__(self, key: str) -> bool:
        return key in self._mapping_with(key)

    def __getitem__(self, key: str) -> Any:
        return self._mapping_with(key)[key]

    def get(self, key: str) -> Any:
        """The value; None also where there is no such key."""
        return self._mapping_with(key).get(key)

    def all_keys(self) -> list[str]:
        """All that can be asked for; every file is read."""
        return [*self._run_json, *self._config, *self._metrics]

    def metrics(self) -> dict[str, float]:
        """Metric -> its one value; damaged lines are told.

        Raises:
            UserError: there is no metrics.jsonl, or it cannot be read.
        """
        best = _as_mapping(self.state["result"]).get("best_epoch")
        steps: dict[str, dict[int, float]] = {}
        for row in _iter_rows(self.run_dir / "metrics.jsonl", self._warn):
            for key, value in row.metrics.items():
                steps.setdefault(key, {})[row.step] = value  # a step that was done again counts as done last
        values = {key: _aggregate(key, by_step, best) for key, by_step in steps.items()}
        return {key: value for key, value in values.items() if value is not None}

    def _mapping_with(self, key: str) -> Mapping[str, Any]:
        if key in RUN_KEYS:
            return self._run_json
        return self._metrics if "/" in key else self._config

    @cached_property
    def _run_json(self) -> dict[str, Any]:
        state = self.state
        result = _as_mapping(state["result"])
        facts = {
            "name": state["name"],
            "status": "died" if state["status"] == "RUNNING" and not is_alive(state) else state["status"],
            "started": state["started"],
            "run_dir": self.short_name,
            "run_id": _as_mapping(state["mlflow"]).get("run_id"),
        }
        facts |= {key: state[key] for key in ("error",) if key in state}
        facts |= {
            key: result[key] for key in ("epochs", "best_epoch", "seconds", "weights_sha256") if key in result
        }
        if "oom" in state:
            facts["oom"] = state["oom"] is not None
        if "sweep" in state:
            folder = _as_mapping(state["sweep"]).get("run_dir")
            facts["sweep"] = short_name(Path(folder)) if isinstance(folder, str) else None
        return facts

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        try:
            return read_flat_config(self.run_dir)
        except UserError as error:
            self._warn(str(error))
            return {}

    @cached_property
    def _metrics(self) -> Mapping[str, float]:
        if not (self.run_dir / "metrics.jsonl").exists():
            return {}  # it ended before its first epoch did
        try:
            return self.metrics()
        except UserError as error:
            self._warn(str(error))
            return {}


def short_name(run_dir: Path) -> str:
    """The path below outputs/, as `find` takes it; of a folder elsewhere the whole path."""
    outputs = root_dir() / "outputs"
    return (run_dir.relative_to(outputs) if run_dir.is_relative_to(outputs) else run_dir).as_posix()


def read_flat_config(run_dir: Path) -> dict[str, Any]:
    """Every leaf of config.yaml as `group.key` -> value; a list is one leaf.

    Raises:
        UserError: it is not there, or cannot be read; the line says which.
    """
    path = run_dir / "config.yaml"
    try:
        text = _read_bytes(path).decode()
        # The C parser is eight times as fast, and ends the process where a text is nested too deep.
        flat = len(text) < 100_000 and sum(map(text.count, _NESTING_CHARS)) < 1_000
        safe = getattr(yaml, "CSafeLoader", yaml.SafeLoader) if flat else yaml.SafeLoader
        values = safe(text).get_single_data()
        _check_plain(values, set())
        return dict(_iter_leaves(values))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as a config: {_one_line(error)}") from None


def read_flat_environment(run_dir: Path) -> dict[str, Any]:
    """Every leaf of environment.json, as `device.threads` -> value.

    Raises:
        UserError: it is not there, or cannot be read; the line says which.
    """
    return _read_flat_json(run_dir / "environment.json")


def read_flat_dataset(run_dir: Path) -> dict[str, Any]:
    """Which pictures: key, what they were made from, how many there are of what, and their SHA-256.

    Raises:
        UserError: dataset.json is not there, or cannot be read; the line says which.
    """
    found = _read_flat_json(run_dir / "dataset.json")
    refused = found.get("rejected")
    chosen = {key: value for key, value in found.items() if key.partition(".")[0] in _DATASET_KEYS}
    return chosen | ({"rejected": len(refused)} if isinstance(refused, list) else {})


def _aggregate(key: str, by_step: Mapping[int, float], best_epoch: object) -> float | None:
    """The value that stands for all; None where the best epoch has none."""
    match key.partition("/")[0]:
        case "train" | "val" if isinstance(best_epoch, int):
            return by_step.get(best_epoch)
        case "memory":
            return max(by_step.values())
        case "speed":
            return statistics.median(by_step.values())
        case _:
            return by_step[max(by_step)]


def _iter_rows(path: Path, warn: Callable[[str], None]) -> Iterator[MetricsRow]:
    text = _read_bytes(path).decode(errors="replace")  # a line that is no UTF-8 fails its own checksum
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            row = MetricsRow.from_line(line)
            values = row.metrics.values() if isinstance(row.metrics, dict) else [None]
            if not all(isinstance(value, int | float) for value in (row.step, *values)):
                raise ValueError("a step or a metric is no number")
        except (ValueError, RecursionError) as error:
            warn(f"{path}, line {number}: is left out: {_one_line(error)}")
            continue
        yield row


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path.parent}: has no {path.name}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _read_flat_json(path: Path) -> dict[str, Any]:
    try:
        return dict(_iter_leaves(json.loads(_read_bytes(path))))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {_one_line(error)}") from None


def flatten(node: object) -> dict[str, Any]:
    """Every leaf of plain values as `group.key` -> value; a list is one leaf.

    Raises:
        ValueError: it holds no keys.
    """
    return dict(_iter_leaves(node))


def _iter_leaves(node: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(`group.key`, value) of everything that is no group."""
    if not isinstance(node, Mapping):
        raise ValueError("it holds no keys")
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _iter_leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_plain(node: Any, seen: set[int]) -> None:
    """Nothing, if this is what a config is made of.

    Raises:
        ValueError: it holds an alias, which can make a small file endless, or what JSON cannot write.
    """
    if not isinstance(node, str | int | float | list | dict | None):
        raise ValueError(f"it holds a {type(node).__name__}")
    if isinstance(node, list | dict):
        if id(node) in seen:
            raise ValueError("it holds an alias")
        seen.add(id(node))
        for inner in node.values() if isinstance(node, dict) else node:
            _check_plain(inner, seen)


def _as_mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
