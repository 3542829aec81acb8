"""Access the values of a run by key: fields of run.json, keys of config.yaml, and metrics.

A metric has one row per epoch and is aggregated to one value: train/* and val/* of the best epoch (the last
one, if the run has no result), the maximum of memory/*, the median of speed/*, the only value of test/*.
"""

import json
import logging
import re
import statistics
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from captcha_exp.config import flatten_mapping
from captcha_exp.errors import DamagedFile
from captcha_exp.runs.info import RunInfo, SweepInfo
from captcha_exp.runs.saved import SavedRun
from captcha_exp.runtime.paths import root_dir

logger = logging.getLogger(__name__)

_RESULT_KEYS = ("epochs", "best_epoch", "seconds", "weights_sha256", "speed_disturbed")
RUN_KEYS = (
    *("name", "status", "started", "run_dir", "run_id", "error", "stop_reason"),
    *(*_RESULT_KEYS, "oom", "sweep"),
)
"""Keys of run.json. status: also "stale", for a running run whose process has exited, and "skipped", for a
job of a sweep that was not trained; run_dir and sweep: relative to outputs/; oom: whether the run ran out of
memory"""

_PER_IMAGE_KEYS = ("files", "remarks", "sizes")  # of dataset.json
ABSENT = "absent"
"""value of a key that one of two runs does not have"""


class RunFields:
    """The values of one run by key. Files are read on first use; unreadable ones are logged."""

    def __init__(self, run: SavedRun) -> None:
        self.run, self.run_dir, self.info = run, run.run_dir, run.info
        self.short_name = short_name(run.run_dir)

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
        """Return metric -> aggregated value.

        Raises:
            DamagedFile: metrics.jsonl is damaged.
        """
        best = None if self.info.result is None else self.info.result.best_epoch
        values_by_step: dict[str, dict[int, float]] = {}
        for row in self.run.metrics_rows():
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
        info, sweep_dir = self.info, self.run_dir.parent
        fields = {
            "name": info.name,
            "status": _status(info),
            "started": info.started.isoformat(timespec="microseconds"),
            "run_dir": self.short_name,
            "run_id": info.run_id,
            "error": info.error,
            "stop_reason": info.stop_reason,
            "oom": info.oom is not None,
        }
        if info.result is not None:
            fields |= info.result.model_dump(include=set(_RESULT_KEYS))
        if (sweep_dir / SweepInfo.filename).is_file():
            fields["sweep"] = short_name(sweep_dir)
        return fields

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        return _or_empty(self.run.flat_config)

    @cached_property
    def _metrics(self) -> Mapping[str, Any]:
        return _or_empty(self.metrics)


def _status(info: RunInfo) -> str:
    if info.skipped is not None:
        return "skipped"
    return "stale" if info.is_running and not info.has_live_process() else info.status


def _or_empty(read: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the values of a file, or none, with a warning, if it is damaged."""
    try:
        return read()
    except DamagedFile as error:
        logger.warning(str(error))
        return {}


def short_name(run_dir: Path) -> str:
    """Return the path relative to outputs/, as `find_run` accepts it; the full path for other directories."""
    outputs = root_dir() / "outputs"
    return (run_dir.relative_to(outputs) if run_dir.is_relative_to(outputs) else run_dir).as_posix()


def read_flat_dataset(run: SavedRun) -> dict[str, Any]:
    """Return dataset.json flattened: key, provenance, counts, and hashes; lists of files as their length.

    Raises:
        DamagedFile: dataset.json is missing or damaged.
    """
    values = {k: v for k, v in run.read_json("dataset.json").items() if k not in _PER_IMAGE_KEYS}
    return flatten_mapping({k: len(v) if isinstance(v, list) else v for k, v in values.items()})


def changed_values(
    old: Mapping[str, Any], new: Mapping[str, Any], missing: Any = ABSENT
) -> dict[str, tuple[Any, Any]]:
    """Return key -> (old, new value) for each key whose values are not exactly equal; NaN equals NaN."""
    pairs = {key: (old.get(key, missing), new.get(key, missing)) for key in (*old, *new)}
    return {key: pair for key, pair in pairs.items() if repr(pair[0]) != repr(pair[1])}


def to_short_text(value: Any) -> str:
    """Return a value on one line in the notation of JSON; of a SHA-256, the first 12 characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:12]
    return text if len(text) <= 100 else f"{text[:100]}..."


def _aggregate(key: str, by_step: Mapping[int, float], best_epoch: int | None) -> float | None:
    """Return the aggregated value; None if the best epoch has none."""
    match key.partition("/")[0]:
        case "train" | "val" if best_epoch is not None:
            return by_step.get(best_epoch)
        case "memory":
            return max(by_step.values())
        case "speed":
            return statistics.median(by_step.values())
        case _:
            return by_step[max(by_step)]
