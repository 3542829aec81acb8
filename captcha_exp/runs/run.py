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
from pathlib import Path
from typing import Any

from captcha_exp.config import Config, to_dict
from captcha_exp.errors import UserError
from captcha_exp.runs.info import RecordedDir, RunInfo, RunLink
from captcha_exp.runtime.files import sha256_of, write_atomically, write_json
from captcha_exp.runtime.paths import root_dir

CHECKPOINT_DIR = "checkpoint"  # relative to the run directory


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
            ValueError: The line is truncated, has other values, or does not match its checksum.
        """
        values = json.loads(line)
        with contextlib.suppress(KeyError, TypeError):
            row = MetricsRow(values["step"], values["timestamp_ms"], values["metrics"])
            if row.to_line() == line:
                return row
        raise ValueError(f"not a row of metrics.jsonl that matches its checksum: {line[:60]!r}")


class Run(RecordedDir[RunInfo]):
    """A run that this process records."""

    def __init__(self, run_dir: Path, info: RunInfo) -> None:
        """Write run.json with this content; called by `create_run` and `reopen_run`."""
        super().__init__(run_dir, info)
        self._rows = read_metrics_rows(run_dir)[0]
        self.save()

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

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the run atomically."""
        write_atomically(self.run_dir / name, content)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file of the run atomically."""
        write_json(self.run_dir / name, content)

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
            self.add_warning(warning)
        self._rows.append(row)
        with (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8", newline="\n") as file:
            file.write(row.to_line())
            file.flush()
            os.fsync(file.fileno())
        return True

    def add_warning(self, warning: str) -> None:
        """Add a warning to run.json, once."""
        if warning not in self.info.warnings:
            self.update(warnings=[*self.info.warnings, warning])

    def metrics_rows(self) -> list[MetricsRow]:
        """Return all rows logged so far."""
        return list(self._rows)


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


def list_runs(warn: Callable[[str], None] = lambda _: None) -> list[RecordedDir[RunInfo]]:
    """Return the runs in outputs/, oldest first; warns if unreadable."""
    found = []
    outputs = root_dir() / "outputs"
    for path in (*outputs.glob("*/*/run.json"), *outputs.glob("*/*/*/run.json")):  # and the jobs of sweeps
        try:
            found.append(RecordedDir(path.parent, RunInfo.load(path.parent)))
        except UserError as error:
            warn(str(error))
    return sorted(found, key=lambda run: run.info.started)


def find_run(name: str) -> Path:
    """Find a run by its directory, by a prefix of its MLflow run ID, or as `latest`.

    Raises:
        UserError: No run matches, or several do; `captcha-exp runs` lists them.
    """
    if run_dir := resolve_dir(name, "run.json"):
        RunInfo.load(run_dir)  # rejects a damaged or older record
        return run_dir
    if sweep_dir := resolve_dir(name, "sweep.json"):
        first = min((path.parent.name for path in sweep_dir.glob("*/run.json")), default=None)
        example = f", e.g. {shlex.quote(str(sweep_dir / first))}" if first else " (none has started yet)"
        raise UserError(f"{name}: is a sweep, not a run; give the run directory of one of its jobs{example}")
    known = list_runs()
    if name == "latest":
        if not known:
            raise UserError(f"latest: no runs in {root_dir() / 'outputs'} yet; captcha-exp train creates one")
        return known[-1].run_dir
    matches = [run.run_dir for run in known if name and (run.info.run_id or "").startswith(name)]
    if len(matches) > 1:
        raise UserError(f"{name!r} matches {len(matches)} MLflow run IDs; give a longer prefix")
    if not matches:
        raise UserError(
            f"{name!r} is not a run: give a run directory, a prefix of an MLflow run ID, or latest "
            "(captcha-exp runs lists all runs)"
        )
    return matches[0]


def find_linked(link: RunLink, run_dir: Path) -> Path | None:
    """Return the directory of the run that a link in the record of `run_dir` refers to, or None.

    Both runs may have been copied to another place, so this searches the recorded path, the directories next
    to `run_dir`, and the MLflow run IDs of all runs.
    """
    recorded, run_id = Path(str(link.run_dir)), link.run_id
    candidates = (
        recorded,
        run_dir.parent.parent / recorded.parent.name / recorded.name,
        run_dir.parent / recorded.name,
    )
    for candidate in candidates:
        is_run = (candidate / RunInfo.filename).is_file()
        if is_run and run_id in (None, RunInfo.load(candidate).run_id):
            return candidate
    return next((run.run_dir for run in list_runs() if run_id and run.info.run_id == run_id), None)


def resolve_dir(name: str, filename: str) -> Path | None:
    """Return the directory `name` that contains `filename`, relative to here, the root, or outputs/."""
    for candidate in (Path(name), root_dir() / name, root_dir() / "outputs" / name):
        with contextlib.suppress(OSError, ValueError):  # name too long, or with a null character
            if (candidate / filename).is_file():
                return candidate.resolve()
    return None


def read_metrics_rows(run_dir: Path) -> tuple[list[MetricsRow], dict[int, str]]:
    """Return the valid rows of metrics.jsonl by step, and the damage by line number, from 1.

    A process that is killed while writing leaves a truncated last line; the other rows remain valid.
    """
    path = run_dir / "metrics.jsonl"
    rows: list[MetricsRow] = []
    damaged_lines: dict[int, str] = {}
    if not path.exists():
        return rows, damaged_lines
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(MetricsRow.from_line(line))
            except (ValueError, RecursionError) as error:
                damaged_lines[number] = str(error)
    # An epoch whose row was damaged is trained again, so its row follows those of later epochs.
    return sorted(rows, key=lambda row: row.step), damaged_lines


def check_file_unchanged(run_dir: Path, name: str) -> None:
    """Check that a file still has the SHA-256 that was recorded when the run ended.

    Raises:
        UserError: The file was modified or deleted.
    """
    expected = RunInfo.load(run_dir).files.get(name)
    path = run_dir / name
    if expected is not None and (not path.is_file() or sha256_of(path) != expected):
        raise UserError(f"{path}: was modified or deleted since the run ended (SHA-256 differs); restore it")


def list_checkpoints(checkpoint_dir: Path) -> list[Path]:
    """Return the checkpoint files, newest first."""
    steps = {path: path.stem.removeprefix("step-") for path in checkpoint_dir.glob("step-*.safetensors")}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: -int(steps[path]))


def now_ms() -> int:
    """Return the current Unix time in ms, the unit of MLflow."""
    return time.time_ns() // 1_000_000
