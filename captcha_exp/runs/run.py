"""A run's folder and what stands in it.

run.json            status, when, where, the SHA-256 of every finished file
config.yaml         what ran: resolved and complete          requested.yaml  what was asked
environment.json    versions, commit, machine                dataset.json    which pictures
code.json           the SHA-256 of each source file          code.diff       changes since the commit
metrics.jsonl       one line for each epoch, with a checksum of its own
checkpoint/         what an interrupted training goes on from
model.safetensors   the best weights, with the config in the file
test.json           what they read on the test split
report/             pictures
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

CHECKPOINT_DIR = "checkpoint"  # folder in a run's folder


Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

TypeSpec: TypeAlias = type | tuple[type, ...]
COMMON_FIELDS: dict[str, TypeSpec] = {
    "status": str,
    "host": str,
    "pid": int,
    "process_started": (int, float),
    "mlflow": (dict, NoneType),
}
"""what a run.json and a sweep.json have in common"""
_REQUIRED_FIELDS = {**COMMON_FIELDS, "name": str, "started": str, "result": dict, "files": dict}
_OPTIONAL_FIELDS: dict[str, TypeSpec] = {"tags": dict, "warnings": list, "links": dict, "resumed": list}
"""older runs lack these"""


@dataclass(frozen=True)
class MetricsRow:
    """Metrics of one step, with the time at which they were measured: sent twice, they stay one row."""

    step: int
    timestamp_ms: int
    metrics: Mapping[str, float]

    def to_line(self) -> str:
        text = json.dumps(asdict(self))
        return json.dumps({**asdict(self), "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}) + "\n"

    @staticmethod
    def from_line(line: str) -> "MetricsRow":
        """The row.

        Raises:
            ValueError: the line is not whole or not what was written.
        """
        values = json.loads(line)
        try:
            row = MetricsRow(values["step"], values["timestamp_ms"], values["metrics"])
        except (KeyError, TypeError):
            raise ValueError(f"a line of metrics.jsonl is no row: {line[:60]!r}") from None
        if row.to_line() != line:
            raise ValueError(f"a line of metrics.jsonl does not have its own checksum: {line[:60]!r}")
        return row


class Run:
    """A run that is being recorded."""

    def __init__(self, run_dir: Path, state: dict[str, Any]) -> None:
        """By `beginning`; `state` is the content of run.json."""
        self.run_dir, self.state = run_dir, state
        self._rows = read_metrics_rows(run_dir)[0]
        self._write_state()

    @property
    def report_dir(self) -> Path:
        """The folder of pictures, made at first use."""
        folder = self.run_dir / "report"
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def checkpoint_dir(self) -> Path:
        """The folder of what an interrupted training goes on from; it is there from the first one on."""
        return self.run_dir / CHECKPOINT_DIR

    def update(self, **state: Any) -> None:
        """Facts in run.json."""
        self.state.update(state)
        self._write_state()

    def write(self, name: str, content: str | bytes) -> Path:
        """A finished file, written atomically."""
        path = self.run_dir / name
        write_atomically(path, content.encode() if isinstance(content, str) else content)
        return path

    def write_json(self, name: str, content: Any) -> Path:
        """A finished file of JSON."""
        write_json(self.run_dir / name, content)
        return self.run_dir / name

    def log_metrics(self, row: MetricsRow) -> bool:
        """Whether it is one line more in metrics.jsonl, on the disk when this returns.

        What was done again after an interruption, and came out as before, stands there already.
        """
        before = next((r for r in reversed(self._rows) if _has_same_keys(row, r)), None)
        if before is not None:
            was, is_now = _reproducible_metrics(before), _reproducible_metrics(row)
            changed = [key for key in is_now if repr(was[key]) != repr(is_now[key])]  # nan is as nan was
            if not changed:
                return False
            key = changed[0]
            trouble = f"epoch {row.step}, done again, came out otherwise: {key} {was[key]} -> {is_now[key]}"
            self.update(warnings=[*self.state["warnings"], trouble])
        self._rows.append(row)
        with (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8", newline="\n") as file:
            file.write(row.to_line())
            file.flush()
            os.fsync(file.fileno())
        return True

    def metrics_rows(self) -> list[MetricsRow]:
        """All metrics that were logged."""
        return list(self._rows)

    def close(self, status: Status, error: str | None = None) -> None:
        """The end: every file with its SHA-256, and how the run ended."""
        self.update(
            status=status,
            error=error,
            ended=now_iso(),
            files=hash_files(self.run_dir),
        )

    def _write_state(self) -> None:
        self.write_json("run.json", self.state)


def now_iso() -> str:
    """The time with its zone, as a record has it."""
    return datetime.now().astimezone().isoformat(timespec="microseconds")


def _reproducible_metrics(row: MetricsRow) -> dict[str, float]:
    """Without what no two processes have in common."""
    return {key: v for key, v in row.metrics.items() if not key.startswith(("memory/", "speed/"))}


def _has_same_keys(row: MetricsRow, other: MetricsRow) -> bool:
    """Whether they are rows of the same: an epoch and the test after it have their step in common."""
    return row.step == other.step and _reproducible_metrics(row).keys() == _reproducible_metrics(other).keys()


def config_sha256(requested: Config) -> str:
    """SHA-256 of a config as it was asked for: equal for runs that were asked for the same.

    How long a process may take is not asked of the run: one that is out of time can be given more.
    """
    values = to_dict(requested)
    del values["train"]["max_minutes"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def list_runs(warn: Callable[[str], None] = lambda _: None) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, run.json) of each run in outputs/, the oldest first; tells of what it cannot read."""
    found = []
    outputs = root_dir() / "outputs"
    for path in (*outputs.glob("*/*/run.json"), *outputs.glob("*/*/*/run.json")):  # and those of a sweep
        try:
            found.append((path.parent, read_run_json(path)))
        except UserError as error:
            warn(str(error))
    return sorted(found, key=lambda item: datetime.fromisoformat(item[1]["started"]))


def find_run(name: str) -> Path:
    """The folder of a run: given as a folder, as the beginning of an MLflow run id, or as `latest`.

    Raises:
        UserError: there is no such run, or more than one; the line says how to see them.
    """
    if folder := resolve_dir(name, "run.json"):
        read_run_json(folder / "run.json")
        return folder
    if sweep := resolve_dir(name, "sweep.json"):
        first = min((path.parent.name for path in sweep.glob("*/run.json")), default=None)
        point = f": {shlex.quote(str(sweep / first))}, say" if first else ", which has none yet"
        raise UserError(f"{name}: is a sweep; give the folder of one of its points{point}")
    known = list_runs()
    if name == "latest":
        if not known:
            raise UserError(f"latest: no run in {root_dir() / 'outputs'} yet; captcha-exp train makes one")
        return known[-1][0]
    begin = [folder for folder, state in known if name and _run_id(state).startswith(name)]
    if len(begin) > 1:
        raise UserError(f"{name!r} begins the ids of {len(begin)} runs; give more of it")
    if not begin:
        raise UserError(
            f"{name!r} is no run: give a folder with a run.json, the start of an MLflow run id, or latest "
            "(captcha-exp runs lists them)"
        )
    return begin[0]


def find_linked(link: Mapping[str, Any], run_dir: Path) -> Path | None:
    """The folder of the run that the record in this one has a link to; None where it is nowhere.

    Runs are copied together: it is sought where it was, beside this one, and by its id in MLflow.
    """
    was, run_id = Path(str(link.get("run_dir"))), link.get("run_id")
    for place in (was, run_dir.parent.parent / was.parent.name / was.name, run_dir.parent / was.name):
        if (place / "run.json").is_file() and run_id in (None, _run_id(read_run_json(place / "run.json"))):
            return place
    return next((place for place, state in list_runs() if run_id and _run_id(state) == run_id), None)


def resolve_dir(name: str, filename: str) -> Path | None:
    """The folder of this name that has such a record: from here, from the root, or from outputs/."""
    for folder in (Path(name), root_dir() / name, root_dir() / "outputs" / name):
        with contextlib.suppress(OSError, ValueError):  # too long for a file, or of characters that none has
            if (folder / filename).is_file():
                return folder.resolve()
    return None


def _run_id(state: Mapping[str, Any]) -> str:
    return str((state["mlflow"] or {}).get("run_id") or "")


def read_metrics_rows(run_dir: Path) -> tuple[list[MetricsRow], list[int]]:
    """The whole rows of a folder's metrics.jsonl, and the numbers of its lines that are none, from 1.

    A process that is killed while it writes leaves a part of a line at the end; no other row is less true
    for that.
    """
    path = run_dir / "metrics.jsonl"
    rows: list[MetricsRow] = []
    broken: list[int] = []
    if not path.exists():
        return rows, broken
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(MetricsRow.from_line(line))
            except (ValueError, RecursionError):
                broken.append(number)
    # An epoch whose line was damaged is trained again, and has its row behind those of later ones.
    return sorted(rows, key=lambda row: row.step), broken


def check_file_unchanged(run_dir: Path, name: str) -> None:
    """Nothing, if the file is the one that the run ended with, or the run has not ended.

    Raises:
        UserError: the file has changed since, or is gone.
    """
    expected = read_run_json(run_dir / "run.json")["files"].get(name)
    path = run_dir / name
    if expected is not None and (not path.is_file() or sha256_of(path) != expected):
        raise UserError(f"{path}: is not the file that the run ended with (its SHA-256 is another)")


def read_run_json(path: Path) -> dict[str, Any]:
    """The content of a run.json.

    Raises:
        UserError: it cannot be read, or is no record of a run.
    """
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = _REQUIRED_FIELDS.keys() - state.keys()
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as the record of a run: {error}") from None
    if missing:
        raise UserError(f"{path}: is not the record of a run: it lacks {', '.join(sorted(missing))}")
    of_all = _REQUIRED_FIELDS | _OPTIONAL_FIELDS
    wrong = [key for key in of_all.keys() & state.keys() if not isinstance(state[key], of_all[key])]
    if wrong:
        key = min(wrong)
        value = repr(state[key])[:60]
        raise UserError(f"{path}: is not the record of a run: {key}={value} is nothing that a run writes")
    try:
        has_zone = datetime.fromisoformat(state["started"]).tzinfo is not None
    except ValueError:
        has_zone = False
    if not has_zone:
        raise UserError(f"{path}: started={state['started']!r} is no time with a zone, as a run writes it")
    return state


def list_checkpoints(checkpoint_dir: Path) -> list[Path]:
    """The files of what a training has reached, the newest first."""
    steps = {path: path.stem.removeprefix("step-") for path in checkpoint_dir.glob("step-*.safetensors")}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: -int(steps[path]))


def now_ms() -> int:
    """The time in ms since 1970, as MLflow counts it."""
    return time.time_ns() // 1_000_000
