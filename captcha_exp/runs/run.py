"""The run directory and its files.

run.json            status, times, host and process, SHA-256 of every file
config.yaml         the resolved config                      requested.yaml  the requested config
environment.json    versions, commit, machine                dataset.json    identity of the images
code.json           SHA-256 of each source file              code.diff       changes since the commit
metrics.jsonl       one line per epoch, each with a checksum
checkpoint/         train states to resume from
model.safetensors   the best weights, with the config as metadata
test.json           results on the test split
report/             figures
"""

import contextlib
import hashlib
import json
import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeAlias

from captcha_exp.config import Config, to_dict
from captcha_exp.errors import UserError
from captcha_exp.runs.files import hash_files
from captcha_exp.runtime.files import sha256_of, write_atomically, write_json
from captcha_exp.runtime.paths import root_dir

CHECKPOINT_DIR = "checkpoint"  # relative to the run directory
RUN_FORMAT = 2
"""Version of the layout of run directories, field `format` of run.json. Version 0.1 wrote no such field."""


Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

TypeSpec: TypeAlias = type | tuple[type, ...]
COMMON_FIELDS: dict[str, TypeSpec] = {
    "status": str,
    "host": str,
    "pid": int,
    "process_started": (int, float),
    "mlflow": (dict, NoneType),
}
"""Fields of both run.json and sweep.json."""
_REQUIRED_FIELDS = {**COMMON_FIELDS, "name": str, "started": str, "result": dict, "files": dict}
_OPTIONAL_FIELDS: dict[str, TypeSpec] = {"tags": dict, "warnings": list, "lineage": dict, "resumed": list}
"""Checked where present."""


@dataclass(frozen=True)
class MetricsRow:
    """Metrics of one step with their timestamp, by which MLflow recognizes a row that it already has."""

    step: int
    timestamp_ms: int
    metrics: Mapping[str, float]

    def to_line(self) -> str:
        text = json.dumps(asdict(self))
        return json.dumps({**asdict(self), "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}) + "\n"

    @staticmethod
    def from_line(line: str) -> "MetricsRow":
        """Parse a line of metrics.jsonl.

        Raises:
            ValueError: The line is truncated or does not match its checksum.
        """
        values = json.loads(line)
        try:
            row = MetricsRow(values["step"], values["timestamp_ms"], values["metrics"])
        except (KeyError, TypeError):
            raise ValueError(f"not a row of metrics.jsonl: {line[:60]!r}") from None
        if row.to_line() != line:
            raise ValueError(f"a row of metrics.jsonl does not match its checksum: {line[:60]!r}")
        return row


class Run:
    """A run that this process records."""

    def __init__(self, run_dir: Path, state: dict[str, Any]) -> None:
        """Write run.json with this content; called by `create_run` and `reopen_run`."""
        self.run_dir, self.state = run_dir, state
        self._rows = read_metrics_rows(run_dir)[0]
        self._write_state()

    @property
    def report_dir(self) -> Path:
        """Return the directory of the figures; created on first use."""
        report_dir = self.run_dir / "report"
        report_dir.mkdir(exist_ok=True)
        return report_dir

    @property
    def checkpoint_dir(self) -> Path:
        """Return the checkpoint directory; it exists once a checkpoint was saved."""
        return self.run_dir / CHECKPOINT_DIR

    def update(self, **state: Any) -> None:
        """Set fields of run.json."""
        self.state.update(state)
        self._write_state()

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file of the run atomically and return its path."""
        path = self.run_dir / name
        write_atomically(path, content.encode() if isinstance(content, str) else content)
        return path

    def write_json(self, name: str, content: Any) -> Path:
        """Write a JSON file of the run atomically and return its path."""
        write_json(self.run_dir / name, content)
        return self.run_dir / name

    def log_metrics(self, row: MetricsRow) -> bool:
        """Append a row to metrics.jsonl and flush it to disk.

        Returns False if the row is already there, as for an epoch that is repeated after an interruption. A
        repeated row with other values is appended, with a warning in run.json.
        """
        previous = next((r for r in reversed(self._rows) if _has_same_keys(row, r)), None)
        if previous is not None:
            old, new = _reproducible_metrics(previous), _reproducible_metrics(row)
            changed = [key for key in new if repr(old[key]) != repr(new[key])]  # repr: nan equals nan
            if not changed:
                return False
            key = changed[0]
            warning = f"epoch {row.step}: different result when repeated: {key} {old[key]} -> {new[key]}"
            self.update(warnings=[*self.state["warnings"], warning])
        self._rows.append(row)
        with (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8", newline="\n") as file:
            file.write(row.to_line())
            file.flush()
            os.fsync(file.fileno())
        return True

    def metrics_rows(self) -> list[MetricsRow]:
        """Return all rows logged so far."""
        return list(self._rows)

    def close(self, status: Status, error: str | None = None) -> None:
        """Write the final status, the end time, and the SHA-256 of every file."""
        self.update(
            status=status,
            error=error,
            ended=now_iso(),
            files=hash_files(self.run_dir),
        )

    def _write_state(self) -> None:
        self.write_json("run.json", self.state)


def now_iso() -> str:
    """Return the current time with its zone, as written to run.json."""
    return datetime.now().astimezone().isoformat(timespec="microseconds")


def _reproducible_metrics(row: MetricsRow) -> dict[str, float]:
    """Return the metrics of a row without memory and speed, which vary between processes."""
    return {key: v for key, v in row.metrics.items() if not key.startswith(("memory/", "speed/"))}


def _has_same_keys(row: MetricsRow, other: MetricsRow) -> bool:
    """Check for equal step and metrics; the last epoch and the test share a step but not their metrics."""
    return row.step == other.step and _reproducible_metrics(row).keys() == _reproducible_metrics(other).keys()


def config_sha256(requested: Config) -> str:
    """Return the SHA-256 of a requested config, without `train.max_minutes`.

    The time limit is left out, because a run that reached it may be resumed with another limit.
    """
    values = to_dict(requested)
    del values["train"]["max_minutes"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def list_runs(warn: Callable[[str], None] = lambda _: None) -> list[tuple[Path, dict[str, Any]]]:
    """Return (run_dir, content of run.json) of the runs in outputs/, oldest first; warns if unreadable."""
    found = []
    outputs = root_dir() / "outputs"
    for path in (*outputs.glob("*/*/run.json"), *outputs.glob("*/*/*/run.json")):  # and the jobs of sweeps
        try:
            found.append((path.parent, read_run_json(path)))
        except UserError as error:
            warn(str(error))
    return sorted(found, key=lambda item: datetime.fromisoformat(item[1]["started"]))


def find_run(name: str) -> Path:
    """Find a run by its directory, by a prefix of its MLflow run ID, or as `latest`.

    Raises:
        UserError: No run matches, or several do; `captcha-exp runs` lists them.
    """
    if run_dir := resolve_dir(name, "run.json"):
        read_run_json(run_dir / "run.json")
        return run_dir
    if sweep_dir := resolve_dir(name, "sweep.json"):
        first = min((path.parent.name for path in sweep_dir.glob("*/run.json")), default=None)
        example = f", e.g. {shlex.quote(str(sweep_dir / first))}" if first else " (none has started yet)"
        raise UserError(f"{name}: is a sweep, not a run; give the run directory of one of its jobs{example}")
    known = list_runs()
    if name == "latest":
        if not known:
            raise UserError(f"latest: no runs in {root_dir() / 'outputs'} yet; captcha-exp train creates one")
        return known[-1][0]
    matches = [run_dir for run_dir, state in known if name and _run_id(state).startswith(name)]
    if len(matches) > 1:
        raise UserError(f"{name!r} matches {len(matches)} MLflow run IDs; give a longer prefix")
    if not matches:
        raise UserError(
            f"{name!r} is not a run: give a run directory, a prefix of an MLflow run ID, or latest "
            "(captcha-exp runs lists all runs)"
        )
    return matches[0]


def find_linked(link: Mapping[str, Any], run_dir: Path) -> Path | None:
    """Return the directory of the run that an entry of `lineage` in `run_dir` refers to, or None.

    Both runs may have been copied to another place, so this searches the recorded path, the directories next
    to `run_dir`, and the MLflow run IDs of all runs.
    """
    recorded, run_id = Path(str(link.get("run_dir"))), link.get("run_id")
    candidates = (
        recorded,
        run_dir.parent.parent / recorded.parent.name / recorded.name,
        run_dir.parent / recorded.name,
    )
    for candidate in candidates:
        path = candidate / "run.json"
        if path.is_file() and run_id in (None, _run_id(read_run_json(path))):
            return candidate
    return next((directory for directory, state in list_runs() if run_id and _run_id(state) == run_id), None)


def resolve_dir(name: str, filename: str) -> Path | None:
    """Return the directory `name` that contains `filename`, relative to here, the root, or outputs/."""
    for candidate in (Path(name), root_dir() / name, root_dir() / "outputs" / name):
        with contextlib.suppress(OSError, ValueError):  # name too long, or with a null character
            if (candidate / filename).is_file():
                return candidate.resolve()
    return None


def _run_id(state: Mapping[str, Any]) -> str:
    return str((state["mlflow"] or {}).get("run_id") or "")


def read_metrics_rows(run_dir: Path) -> tuple[list[MetricsRow], list[int]]:
    """Return the valid rows of metrics.jsonl by step, and the line numbers of damaged ones, from 1.

    A process that is killed while writing leaves a truncated last line; the other rows remain valid.
    """
    path = run_dir / "metrics.jsonl"
    rows: list[MetricsRow] = []
    damaged_lines: list[int] = []
    if not path.exists():
        return rows, damaged_lines
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(MetricsRow.from_line(line))
            except (ValueError, RecursionError):
                damaged_lines.append(number)
    # An epoch whose row was damaged is trained again, so its row follows those of later epochs.
    return sorted(rows, key=lambda row: row.step), damaged_lines


def check_file_unchanged(run_dir: Path, name: str) -> None:
    """Check that a file still has the SHA-256 that was recorded when the run ended.

    Raises:
        UserError: The file was modified or deleted.
    """
    expected = read_run_json(run_dir / "run.json")["files"].get(name)
    path = run_dir / name
    if expected is not None and (not path.is_file() or sha256_of(path) != expected):
        raise UserError(f"{path}: was modified or deleted since the run ended (SHA-256 differs); restore it")


def read_run_json(path: Path) -> dict[str, Any]:
    """Read and check a run.json.

    Raises:
        UserError: The file is unreadable or invalid, or another version of captcha_exp wrote it.
    """
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = _REQUIRED_FIELDS.keys() - state.keys()
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if missing:
        raise UserError(f"{path}: is not a valid run.json: missing {', '.join(sorted(missing))}")
    check_run_format(path.parent, state)
    types = _REQUIRED_FIELDS | _OPTIONAL_FIELDS
    wrong = [key for key in types.keys() & state.keys() if not isinstance(state[key], types[key])]
    if wrong:
        key = min(wrong)
        value = repr(state[key])[:60]
        raise UserError(f"{path}: is not a valid run.json: {key}={value} has the wrong type")
    try:
        has_zone = datetime.fromisoformat(state["started"]).tzinfo is not None
    except ValueError:
        has_zone = False
    if not has_zone:
        raise UserError(f"{path}: started={state['started']!r} is not an ISO 8601 time with a zone")
    return state


def check_run_format(run_dir: Path, state: Mapping[str, Any]) -> None:
    """Check that this version of captcha_exp can read a run.

    Raises:
        UserError: Another version wrote the run; use that version, or train again.
    """
    run_format = state.get("format")
    if run_format is None:
        raise UserError(
            f"{run_dir}: was written by captcha_exp 0.1, which this version cannot read; "
            "train again, or use captcha_exp 0.1"
        )
    if run_format != RUN_FORMAT:
        raise UserError(
            f"{run_dir}: format={run_format!r} in run.json cannot be read by this version, which reads "
            f"{RUN_FORMAT}; use the version of captcha_exp that wrote it"
        )


def list_checkpoints(checkpoint_dir: Path) -> list[Path]:
    """Return the checkpoint files, newest first."""
    steps = {path: path.stem.removeprefix("step-") for path in checkpoint_dir.glob("step-*.safetensors")}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: -int(steps[path]))


def now_ms() -> int:
    """Return the current Unix time in ms, the unit of MLflow."""
    return time.time_ns() // 1_000_000
