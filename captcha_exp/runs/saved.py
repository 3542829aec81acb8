"""Read a recorded run. `load` is the only way in: it verifies everything that it returns.

run.json has a checksum of itself and the SHA-256 of the files, recorded before each was written: a file is
missing, if the process was killed in between, or has this content. The rows of metrics.jsonl, the weights and
the checkpoints, which change while a run is running, contain checksums of their own.
"""

import contextlib
import hashlib
import io
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from captcha_exp.config import Config, MlflowConfig, flatten_mapping, with_moved_store
from captcha_exp.config import load as load_config
from captcha_exp.config.documents import MAX_BYTES, parse_json, parse_yaml, read_document
from captcha_exp.errors import DamagedFile, one_line
from captcha_exp.runs.content import check_content
from captcha_exp.runs.info import WEIGHTS, RecordedDir, RunInfo
from captcha_exp.runtime.files import sha256_of
from captcha_exp.runtime.paths import root_dir

METRICS = "metrics.jsonl"  # relative to the run directory
_SELF_CHECKED = (WEIGHTS, METRICS)

ValueT = TypeVar("ValueT")


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
        values = parse_json(line)
        with contextlib.suppress(KeyError, TypeError):
            row = MetricsRow(values["step"], values["timestamp_ms"], values["metrics"])
            numbers = (row.step, row.timestamp_ms, *row.metrics.values())
            is_valid = all(type(number) in (int, float) for number in numbers)
            if is_valid and type(row.step) is int and row.to_line() == line:
                return row
        raise ValueError(f"not a row of metrics.jsonl that matches its checksum: {line[:60]!r}")


class SavedRun(RecordedDir[RunInfo]):
    """A recorded run; every method verifies what it returns."""

    def path(self, name: str, max_bytes: int = MAX_BYTES) -> Path:
        """Return the path of a file of the run that has its recorded SHA-256.

        Raises:
            DamagedFile: The file is missing or has another content; a larger one is not read.
        """
        path = self.run_dir / name
        expected = self.info.files.get(name)
        if not path.is_file():
            raise self._damaged(name, "is missing" if not path.exists() else "is not a regular file")
        if expected is None and name not in _SELF_CHECKED:
            raise self._damaged(
                name, f"is not a file of this run ({self.info.filename} has no SHA-256 of it)"
            )
        try:
            if path.stat().st_size > max_bytes:
                raise self._damaged(name, f"is larger than {max_bytes:,} bytes")
            if expected is not None and sha256_of(path) != expected:
                reason = f"was edited, or is damaged (its SHA-256 is not that in {self.info.filename})"
                raise self._damaged(name, reason)
        except OSError as error:
            raise self._damaged(name, f"cannot be read: {error.strerror}") from None
        return path

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object in a JSON file of the run, whose keys are those in `content`.

        Raises:
            DamagedFile: As `path`, or the file has something else.
        """

        def parse(content: bytes) -> dict[str, Any]:
            values = parse_json(content)
            if not isinstance(values, dict):
                raise ValueError("not an object with keys and values")
            check_content(name, values)
            return values

        return self._parse(name, parse)

    def config(self, name: str = "config.yaml") -> Config:
        """Return the config of the run; `requested.yaml` has the requested one.

        Raises:
            DamagedFile: As `path`.
            ConfigError: The config is not valid for this version.
        """
        return load_config(self.path(name))

    def config_to_resume(self) -> Config:
        """Return the config of the run with the current address of its store; raises as `config`.

        The record has that of a store to which `captcha-exp sync --to` has delivered it.
        """
        config = self.config()
        if isinstance(config.tracking, MlflowConfig) and self.info.mlflow is not None:
            config = replace(config, tracking=replace(config.tracking, uri=self.info.mlflow.uri))
        return with_moved_store(config, root_dir())

    def flat_config(self) -> dict[str, Any]:
        """Return config.yaml flattened to `group.key` -> value, unchecked; lists are not flattened.

        Raises:
            DamagedFile: As `path`, or the file is not a mapping.
        """

        def parse(content: bytes) -> dict[str, Any]:
            # JSON has no dates.
            return flatten_mapping(parse_json(json.dumps(parse_yaml(content.decode("utf-8")))))

        return self._parse("config.yaml", parse)

    def metrics_rows(self) -> list[MetricsRow]:
        """Return the rows of metrics.jsonl by step, without a last line that a kill has truncated.

        Raises:
            DamagedFile: A line is damaged, or lines are missing.
        """
        if METRICS not in self.info.files and not (self.run_dir / METRICS).exists():
            if self.info.num_metrics_rows:
                raise self._damaged(METRICS, "is missing")
            return []
        if METRICS in self.info.files:
            self.path(METRICS)
        rows, damaged_lines = read_metrics_rows(self.run_dir)
        if problem := self.damage_of(rows, damaged_lines):
            raise self._damaged(METRICS, problem)
        return rows

    def damage_of(self, rows: list[MetricsRow], damaged_lines: Mapping[int, str]) -> str | None:
        """Return the damage of metrics.jsonl; None if it has all rows that were recorded."""
        missing = self.info.num_metrics_rows - len(rows)
        is_truncated = list(damaged_lines) == [len(rows) + 1] and missing <= 0
        if damaged_lines and not is_truncated:
            return f"line {', '.join(map(str, damaged_lines))} is damaged"
        return f"{missing} of {self.info.num_metrics_rows} lines are missing" if missing > 0 else None

    def _parse(self, name: str, parse: Callable[[bytes], ValueT]) -> ValueT:
        try:
            return parse(read_document(self.path(name)))
        except (OSError, TypeError, ValueError) as error:
            raise self._damaged(name, f"cannot be read: {one_line(error)}") from None

    def _damaged(self, name: str, reason: str) -> DamagedFile:
        """Return the error of a file, with its remedy and what is possible without the file."""
        ref, weights = self.info.mlflow, self.run_dir / WEIGHTS
        has_copy = ref is not None and ref.closed and ref.run_id is not None and "/" not in name
        source = f" from the artifacts of MLflow run {self.info.run_id}" if has_copy else ""
        line = f"{self.run_dir / name}: {reason}; restore it{source}"
        if name != WEIGHTS and weights.is_file():
            line += f"; captcha-exp predict {shlex.quote(str(weights))} still works"
        elif name == WEIGHTS and self.info.result is not None:
            line += f", or train it again with captcha-exp reproduce {shlex.quote(str(self.run_dir))}"
        if self.info.status != "FINISHED":
            line += "; captcha-exp train --resume=never starts a new run"
        return DamagedFile(line)


def load(run_dir: Path) -> SavedRun:
    """Load the run in a directory.

    Raises:
        DamagedFile: run.json is damaged.
        UserError: Another version of captcha_exp wrote it.
    """
    return SavedRun(run_dir, RunInfo.load(run_dir))


def read_metrics_rows(run_dir: Path) -> tuple[list[MetricsRow], dict[int, str]]:
    """Return the valid rows of metrics.jsonl by step, and the damage by line number, from 1.

    A process that is killed while writing leaves a truncated last line; the other rows remain valid.
    """
    path = run_dir / METRICS
    rows: list[MetricsRow] = []
    damaged_lines: dict[int, str] = {}
    if not path.exists():
        return rows, damaged_lines
    try:
        lines = io.StringIO(read_document(path).decode("utf-8", "replace"), newline="\n")
    except (OSError, ValueError) as error:
        return rows, {1: one_line(error)}
    for number, line in enumerate(lines, 1):
        try:
            rows.append(MetricsRow.from_line(line))
        except ValueError as error:
            damaged_lines[number] = str(error)
    # An epoch whose row was damaged is trained again, so its row follows those of later epochs.
    return sorted(rows, key=lambda row: row.step), damaged_lines
