"""Collect files and records of trainings as comparable values, independently of the package."""

import hashlib
import json
import sqlite3
from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from safetensors import safe_open

TIMES = ("memory/", "speed/")
COUNTERS = ("speed/cores_", "speed/cpu_pressure", "speed/disturbed")  # which a short interval lacks
"""Prefixes of metrics that differ between processes"""


def reached(stem: str) -> int:
    """Return the step in a checkpoint's name, also of a partly written one."""
    return int("".join(filter(str.isdigit, stem.partition("step-")[2].partition(".")[0])))


def run_snapshot(root: Path) -> dict[str, Any]:
    """Return everything that the trainings in this root wrote, except times and memory."""
    folders = [path for path in (root / "outputs").glob("*/*") if path.is_dir()]
    runs = [path for path in folders if (path / "run.json").exists()]
    return {
        "runs": [_in_folder(path) for path in runs],
        "other folders": [path.name for path in folders if path not in runs],
        "partial files": sorted(str(path.relative_to(root)) for path in root.rglob("*.part")),
        "MLflow": _in_mlflow(root / "mlruns" / "mlflow.db"),
    }


def _in_folder(folder: Path) -> dict[str, Any]:
    state = json.loads((folder / "run.json").read_text())
    # code.diff exists only while the checkout has changes, which may be committed during the benchmark.
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "code.diff")
    found: dict[str, Any] = {
        "status": state["status"],
        "error": state["error"],
        "stop reason": state["stop_reason"],
        "files": [path.relative_to(folder).as_posix() for path in files],
        "files with a SHA-256": sorted(state["files"].keys() - {"code.diff"}),
        "result": _timeless(state["result"] or {}),
        "rows": _rows(folder),
    }
    for path in files:
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            found[name] = _tensors(path)
        if path.suffix == ".png" or name in ("test.json", "dataset.json"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _rows(folder: Path) -> list[tuple[int, str, str]]:
    """Return (step, metric, value) for each metric in metrics.jsonl, except times and memory."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return sorted(
        (row["step"], key, repr(value))
        for row in rows
        for key, value in row["metrics"].items()
        if not key.startswith(TIMES)
    )


def _tensors(path: Path) -> dict[str, Any]:
    """Return all tensors of a safetensors file and the counters of a checkpoint, without its config."""
    with safe_open(path, "np") as file:
        found: dict[str, Any] = {
            name: (value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).hexdigest())
            for name in file.keys()  # noqa: SIM118 - not a mapping
            for value in [file.get_tensor(name)]
        }
        if "state" in file.metadata():
            found["counters"] = _timeless(json.loads(file.metadata()["state"]))
    return found


def _timeless(values: Mapping[str, Any]) -> dict[str, Any]:
    """Remove times, memory and checksums that cover them."""
    return {
        key: _timeless(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in ("seconds", "chunks", "process_peak_mib", "speed_disturbed", "sha256")
    }


def _in_mlflow(path: Path) -> dict[str, Any]:
    """Return the runs of a store and all recorded metric values, including duplicates."""
    if not path.exists():
        return {}
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        query = "SELECT status FROM runs WHERE lifecycle_stage = 'active' ORDER BY start_time"
        statuses = [status for (status,) in database.execute(query)]
        metrics: dict[str, list[Any]] = defaultdict(list)
        for key, step, value in database.execute("SELECT key, step, value FROM metrics ORDER BY key, step"):
            if not key.startswith(COUNTERS):
                metrics[key].append((step, None if key.startswith(TIMES) else value))
        for (key,) in database.execute("SELECT key FROM params"):
            metrics["params"].append(key)
    return {"runs": statuses, **metrics}


def differences(expected: Any, found: Any, path: str = "") -> list[str]:
    """Return one line for each difference between two values."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return [
            line
            for key in sorted(expected.keys() | found.keys(), key=str)
            for line in differences(expected.get(key), found.get(key), f"{path} {key}".strip())
        ]
    if repr(expected) == repr(found):
        return []
    if isinstance(expected, list) and isinstance(found, list):
        if len(expected) == len(found) == 1:
            return differences(expected[0], found[0], path)
        missing = [each for each in expected if each not in found]
        unexpected = [each for each in found if each not in expected]
        return [
            f"{path}: missing {_short(missing)}, unexpected {_short(unexpected)}, "
            f"{len(found)} instead of {len(expected)}"
        ]
    return [f"{path}: {_short(found)} instead of {_short(expected)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
