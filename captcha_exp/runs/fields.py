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
from captcha_exp.runtime.paths import root
from captcha_exp.runtime.process import is_alive

FACTS = (
    "name",
    "status",
    "started",
    "folder",
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

_DATASET = (
    "key",
    "made_from",
    "pictures",
    "distinct_labels",
    "lengths",
    "splits",
    "images_sha256",
    "labels_sha256",
)
_OPENING = "[{-?"  # without one of these, a YAML text goes deeper by indentation alone


class Facts:
    """What one run says. A file is read when a key first needs it, and what cannot be read is told then."""

    def __init__(self, folder: Path, state: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        self.folder, self.state, self._tell = folder, state, tell
        self.label = label(folder)

    def __contains__(self, key: str) -> bool:
        return key in self._holding(key)

    def __getitem__(self, key: str) -> Any:
        return self._holding(key)[key]

    def get(self, key: str) -> Any:
        """The value; None also where there is no such key."""
        return self._holding(key).get(key)

    def all_keys(self) -> list[str]:
        """All that can be asked for; every file is read."""
        return [*self._record, *self._config, *self._metrics]

    def metrics(self) -> dict[str, float]:
        """Metric -> its one value; damaged lines are told.

        Raises:
            UserError: there is no metrics.jsonl, or it cannot be read.
        """
        best = _mapping(self.state["result"]).get("best_epoch")
        steps: dict[str, dict[int, float]] = {}
        for row in _rows(self.folder / "metrics.jsonl", self._tell):
            for key, value in row.metrics.items():
                steps.setdefault(key, {})[row.step] = value  # a step that was done again counts as done last
        values = {key: _one_value(key, by_step, best) for key, by_step in steps.items()}
        return {key: value for key, value in values.items() if value is not None}

    def _holding(self, key: str) -> Mapping[str, Any]:
        if key in FACTS:
            return self._record
        return self._metrics if "/" in key else self._config

    @cached_property
    def _record(self) -> dict[str, Any]:
        state = self.state
        result = _mapping(state["result"])
        facts = {
            "name": state["name"],
            "status": "died" if state["status"] == "RUNNING" and not is_alive(state) else state["status"],
            "started": state["started"],
            "folder": self.label,
            "run_id": _mapping(state["mlflow"]).get("run_id"),
        }
        facts |= {key: state[key] for key in ("error",) if key in state}
        facts |= {
            key: result[key] for key in ("epochs", "best_epoch", "seconds", "weights_sha256") if key in result
        }
        if "oom" in state:
            facts["oom"] = state["oom"] is not None
        if "sweep" in state:
            folder = _mapping(state["sweep"]).get("folder")
            facts["sweep"] = label(Path(folder)) if isinstance(folder, str) else None
        return facts

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        try:
            return config_leaves(self.folder)
        except UserError as error:
            self._tell(str(error))
            return {}

    @cached_property
    def _metrics(self) -> Mapping[str, float]:
        if not (self.folder / "metrics.jsonl").exists():
            return {}  # it ended before its first epoch did
        try:
            return self.metrics()
        except UserError as error:
            self._tell(str(error))
            return {}


def label(folder: Path) -> str:
    """The path below outputs/, as `find` takes it; of a folder elsewhere the whole path."""
    outputs = root() / "outputs"
    return (folder.relative_to(outputs) if folder.is_relative_to(outputs) else folder).as_posix()


def config_leaves(folder: Path) -> dict[str, Any]:
    """Every leaf of config.yaml as `group.key` -> value; a list is one leaf.

    Raises:
        UserError: it is not there, or cannot be read; the line says which.
    """
    path = folder / "config.yaml"
    try:
        text = _content(path).decode()
        # The C parser is eight times as fast, and ends the process where a text is nested too deep.
        flat = len(text) < 100_000 and sum(map(text.count, _OPENING)) < 1_000
        safe = getattr(yaml, "CSafeLoader", yaml.SafeLoader) if flat else yaml.SafeLoader
        values = safe(text).get_single_data()
        _check_plain(values, set())
        return dict(_leaves(values))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as a config: {_one_line(error)}") from None


def environment_leaves(folder: Path) -> dict[str, Any]:
    """Every leaf of environment.json, as `device.threads` -> value.

    Raises:
        UserError: it is not there, or cannot be read; the line says which.
    """
    return _json_leaves(folder / "environment.json")


def dataset_leaves(folder: Path) -> dict[str, Any]:
    """Which pictures: key, what they were made from, how many there are of what, and their SHA-256.

    Raises:
        UserError: dataset.json is not there, or cannot be read; the line says which.
    """
    found = _json_leaves(folder / "dataset.json")
    refused = found.get("refused")
    chosen = {key: value for key, value in found.items() if key.partition(".")[0] in _DATASET}
    return chosen | ({"refused": len(refused)} if isinstance(refused, list) else {})


def _one_value(key: str, by_step: Mapping[int, float], best: object) -> float | None:
    """The value that stands for all; None where the best epoch has none."""
    match key.partition("/")[0]:
        case "train" | "val" if isinstance(best, int):
            return by_step.get(best)
        case "memory":
            return max(by_step.values())
        case "speed":
            return statistics.median(by_step.values())
        case _:
            return by_step[max(by_step)]


def _rows(path: Path, tell: Callable[[str], None]) -> Iterator[MetricsRow]:
    text = _content(path).decode(errors="replace")  # a line that is no UTF-8 fails its own checksum
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            row = MetricsRow.from_line(line)
            values = row.metrics.values() if isinstance(row.metrics, dict) else [None]
            if not all(isinstance(value, int | float) for value in (row.step, *values)):
                raise ValueError("a step or a metric is no number")
        except (ValueError, RecursionError) as error:
            tell(f"{path}, line {number}: is left out: {_one_line(error)}")
            continue
        yield row


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path.parent}: has no {path.name}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _json_leaves(path: Path) -> dict[str, Any]:
    try:
        return dict(_leaves(json.loads(_content(path))))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {_one_line(error)}") from None


def flat(node: object) -> dict[str, Any]:
    """Every leaf of plain values as `group.key` -> value; a list is one leaf.

    Raises:
        ValueError: it holds no keys.
    """
    return dict(_leaves(node))


def _leaves(node: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(`group.key`, value) of everything that is no group."""
    if not isinstance(node, Mapping):
        raise ValueError("it holds no keys")
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
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


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
