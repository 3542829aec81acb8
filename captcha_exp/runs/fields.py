"""Access the values of a run by key: fields of run.json, keys of config.yaml, and metrics.

A metric has one row per epoch and is aggregated to one value: train/* and val/* of the best epoch (the last
one, if the run has no result), the maximum of memory/*, the median of speed/*, the only value of test/*.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from captcha_exp.config import flatten_mapping
from captcha_exp.errors import UserError, one_line
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
"""Keys of run.json. status: also "stale", for a running run whose process has exited; run_dir and sweep:
relative to outputs/; oom: whether the run ran out of memory"""

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
_NESTING_CHARS = "[{-?"  # without these, only indentation nests YAML


class RunFields:
    """The values of one run by key. Files are read on first use; `warn` reports unreadable ones."""

    def __init__(self, run_dir: Path, state: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        self.run_dir, self.state, self._warn = run_dir, state, warn
        self.short_name = short_name(run_dir)

    def __contains__(self, key: str) -> bool:
        return key in self._mapping_with(key)

    def __getitem__(self, key: str) -> Any:
        return self._mapping_with(key)[key]

    def get(self, key: str) -> Any:
        """Return the value of a key, or None if the run does not have it."""
        return self._mapping_with(key).get(key)

    def all_keys(self) -> list[str]:
        """Return all keys of the run; reads every file."""
        return [*self._run_json, *self._config, *self._metrics]

    def metrics(self) -> dict[str, float]:
        """Return metric -> aggregated value; warns of damaged lines.

        Raises:
            UserError: metrics.jsonl is missing or unreadable.
        """
        best = _as_mapping(self.state["result"]).get("best_epoch")
        values_by_step: dict[str, dict[int, float]] = {}
        for row in _iter_rows(self.run_dir / "metrics.jsonl", self._warn):
            for key, value in row.metrics.items():
                values_by_step.setdefault(key, {})[row.step] = value  # the last row of a repeated step counts
        values = {key: _aggregate(key, by_step, best) for key, by_step in values_by_step.items()}
        return {key: value for key, value in values.items() if value is not None}

    def _mapping_with(self, key: str) -> Mapping[str, Any]:
        if key in RUN_KEYS:
            return self._run_json
        return self._metrics if "/" in key else self._config

    @cached_property
    def _run_json(self) -> dict[str, Any]:
        state = self.state
        result = _as_mapping(state["result"])
        fields = {
            "name": state["name"],
            "status": "stale" if state["status"] == "RUNNING" and not is_alive(state) else state["status"],
            "started": state["started"],
            "run_dir": self.short_name,
            "run_id": _as_mapping(state["mlflow"]).get("run_id"),
        }
        fields |= {key: state[key] for key in ("error",) if key in state}
        fields |= {
            key: result[key] for key in ("epochs", "best_epoch", "seconds", "weights_sha256") if key in result
        }
        if "oom" in state:
            fields["oom"] = state["oom"] is not None
        if "sweep" in state:
            sweep_dir = _as_mapping(state["sweep"]).get("run_dir")
            fields["sweep"] = short_name(Path(sweep_dir)) if isinstance(sweep_dir, str) else None
        return fields

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
            return {}  # the run ended before its first epoch did
        try:
            return self.metrics()
        except UserError as error:
            self._warn(str(error))
            return {}


def short_name(run_dir: Path) -> str:
    """Return the path relative to outputs/, as `find_run` accepts it; the full path for other directories."""
    outputs = root_dir() / "outputs"
    return (run_dir.relative_to(outputs) if run_dir.is_relative_to(outputs) else run_dir).as_posix()


def read_flat_config(run_dir: Path) -> dict[str, Any]:
    """Return config.yaml flattened to `group.key` -> value; lists are not flattened.

    Raises:
        UserError: config.yaml is missing or not a valid config.
    """
    path = run_dir / "config.yaml"
    try:
        text = _read_bytes(path).decode()
        # The C parser is eight times faster, but crashes the process on deeply nested input.
        is_flat = len(text) < 100_000 and sum(map(text.count, _NESTING_CHARS)) < 1_000
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader) if is_flat else yaml.SafeLoader
        values = loader(text).get_single_data()
        _check_plain(values, set())
        return flatten_mapping(values)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: is not a valid config: {one_line(error)}") from None


def read_flat_environment(run_dir: Path) -> dict[str, Any]:
    """Return environment.json flattened to `device.threads` -> value.

    Raises:
        UserError: environment.json is missing or unreadable.
    """
    return _read_flat_json(run_dir / "environment.json")


def read_flat_dataset(run_dir: Path) -> dict[str, Any]:
    """Return the identifying fields of dataset.json, flattened: key, provenance, counts, and hashes.

    Raises:
        UserError: dataset.json is missing or unreadable.
    """
    values = _read_flat_json(run_dir / "dataset.json")
    rejected = values.get("rejected")
    chosen = {key: value for key, value in values.items() if key.partition(".")[0] in _DATASET_KEYS}
    return chosen | ({"rejected": len(rejected)} if isinstance(rejected, list) else {})


def _aggregate(key: str, by_step: Mapping[int, float], best_epoch: object) -> float | None:
    """Return the aggregated value; None if the best epoch has none."""
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
    text = _read_bytes(path).decode(errors="replace")  # a line of invalid UTF-8 fails its checksum
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            row = MetricsRow.from_line(line)
            values = row.metrics.values() if isinstance(row.metrics, dict) else [None]
            if not all(isinstance(value, int | float) for value in (row.step, *values)):
                raise ValueError("a step or a metric is not a number")
        except (ValueError, RecursionError) as error:
            warn(f"{path}, line {number}: skipped: {one_line(error)}")
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
        return flatten_mapping(json.loads(_read_bytes(path)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None


def _check_plain(node: Any, seen: set[int]) -> None:
    """Check that a config consists of plain values without aliases.

    Raises:
        ValueError: It contains an alias, with which a small file can expand without bound, or a value that
            JSON cannot represent.
    """
    if not isinstance(node, str | int | float | list | dict | None):
        raise ValueError(f"contains a value of type {type(node).__name__}")
    if isinstance(node, list | dict):
        if id(node) in seen:
            raise ValueError("contains an alias")
        seen.add(id(node))
        for inner in node.values() if isinstance(node, dict) else node:
            _check_plain(inner, seen)


def _as_mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
