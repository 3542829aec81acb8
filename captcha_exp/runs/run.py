"""The run directory and its files.

run.json            status, times, host and process, SHA-256 of every file, and a checksum of itself
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
import logging
import os
import shlex
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from captcha_exp.config import Config, to_dict
from captcha_exp.errors import DamagedFile, UserError
from captcha_exp.runs.info import WEIGHTS, RunInfo, RunLink, Status, list_run_files
from captcha_exp.runs.saved import METRICS, MetricsRow, SavedRun, load, read_metrics_rows
from captcha_exp.runtime.files import (
    describe_broken_link,
    json_bytes,
    sha256_of,
    sha256_of_json,
    write_atomically,
)
from captcha_exp.runtime.paths import root_dir
from captcha_exp.runtime.shutdown import StopReason

logger = logging.getLogger(__name__)

CHECKPOINT_DIR = "checkpoint"  # relative to the run directory
CONFIG_FILES = ("config.yaml", "requested.yaml")  # the resolved and the requested config
INPUT_FILES = (*CONFIG_FILES, "code.json", "code.diff", "environment.json", "memory.json", "dataset.json")
"""files that are complete before the first step"""


class Run(SavedRun):
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
        """Write a file of the run atomically.

        Its SHA-256 is recorded first, and another content removed before: whenever the process is killed, the
        file is missing or has the recorded content. The weights contain their own.
        """
        path = self.run_dir / name
        digest = hashlib.sha256(content).hexdigest()
        if name != WEIGHTS and self.info.files.get(name) != digest:
            path.unlink(missing_ok=True)
            self.update(files=self.info.files | {name: digest})
        write_atomically(path, content)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file of the run, as `write`."""
        self.write(name, json_bytes(content))

    def close(
        self,
        status: Status,
        error: str | None = None,
        stop_reason: StopReason | None = None,
        ended: datetime | None = None,
    ) -> None:
        """Write the end as `RecordedDir.close`, and the SHA-256 of all files but damaged and temporary ones.

        The thread that sends to MLflow may be writing run.json. The files of a killed run are not hashed:
        another process cannot know what they were.
        """
        paths = {path.relative_to(self.run_dir).as_posix(): path for path in list_run_files(self.run_dir)}
        others = {name for name in paths if name.endswith((".damaged", ".part"))} | {self.info.filename}
        new = sorted(paths.keys() - self.info.files.keys() - others)
        self.update(files=self.info.files | {name: sha256_of(paths[name]) for name in new})
        super().close(status, error, stop_reason, ended)

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
        with (self.run_dir / METRICS).open("a", encoding="utf-8", newline="\n") as file:
            file.write(row.to_line())
            file.flush()
            os.fsync(file.fileno())
        self.update(num_metrics_rows=len(self._rows))
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
    return sha256_of_json(values)


def list_runs(warn: Callable[[str], None] | None = None) -> list[SavedRun]:
    """Return the runs in outputs/, oldest first.

    Calls `warn` for each one that cannot be read; without it, damaged ones are logged.

    Raises:
        UserError: outputs/ is a symbolic link to nothing; mount its disk, or remove the link.
    """
    found = []
    outputs = root_dir() / "outputs"
    if broken := describe_broken_link(outputs):
        raise UserError(broken)
    for run_dir in (*outputs.glob("*/*/"), *outputs.glob("*/*/*/")):  # and the jobs of sweeps
        if not os.path.lexists(run_dir / RunInfo.filename):  # a broken link is damage, which `glob` skips
            continue
        try:
            found.append(load(run_dir))
        except UserError as error:
            if warn is not None:
                warn(str(error))
            elif isinstance(error, DamagedFile):
                logger.warning(f"skipped: {error}")
    return sorted(found, key=lambda run: run.info.started)


def find_run(name: str, *, finished: bool = False, warns: bool = True) -> Path:
    """Find a run by its directory, by a prefix of its MLflow run ID, or as `latest`.

    With `finished`, `latest` is the newest run that has finished and is neither a reproduction nor one of
    several folds; without any such run, the newest that has finished; without that, the newest. One that has
    not finished, found or named, is a warning, unless the caller rejects it and has no use for one.

    Raises:
        UserError: No run matches, or several do; `captcha-exp runs` lists them.
    """
    if run_dir := resolve_dir(name, RunInfo.filename):
        return _checked(load(run_dir), finished and warns)  # `load` rejects a damaged or older record
    if sweep_dir := resolve_dir(name, "sweep.json"):
        first = min((path.parent.name for path in sweep_dir.glob("*/run.json")), default=None)
        example = f", e.g. {shlex.quote(str(sweep_dir / first))}" if first else " (none has started yet)"
        raise UserError(f"{name}: is a sweep, not a run; give the run directory of one of its jobs{example}")
    known = list_runs()
    if name == "latest":
        if not known:
            raise UserError(f"latest: no runs in {root_dir() / 'outputs'} yet; captcha-exp train creates one")
        return _checked(_latest(known) if finished else known[-1], finished and warns)
    matches = [run for run in known if name and (run.info.run_id or "").startswith(name)]
    if len(matches) > 1:
        raise UserError(f"{name!r} matches {len(matches)} MLflow run IDs; give a longer prefix")
    if not matches:
        raise UserError(
            f"{name!r} is not a run: give a run directory, a prefix of an MLflow run ID, or latest "
            "(captcha-exp runs lists all runs)"
        )
    return _checked(matches[0], finished and warns)


def _checked(run: SavedRun, warns: bool) -> Path:
    """Return the directory of a run; with `warns`, warn if it has not finished."""
    if warns and run.info.status != "FINISHED":
        epochs = "?"
        with contextlib.suppress(UserError):
            epochs = run.flat_config().get("train.epochs", epochs)
        done = run.info.num_metrics_rows
        logger.warning(
            f"{run.run_dir}: unfinished ({run.info.status} after epoch {done} of {epochs}), not calibrated"
        )
    return run.run_dir


def _latest(known: Sequence[SavedRun]) -> SavedRun:
    """Return the newest run that has finished, if there is one."""
    newest_first = list(reversed(known))
    ended = [run for run in newest_first if run.info.status == "FINISHED"]
    return next(filter(_is_result, ended), (ended or newest_first)[0])


def _is_result(run: SavedRun) -> bool:
    """Return whether a finished run has a model that somebody would want to use."""
    with contextlib.suppress(UserError):
        return run.info.lineage.reproduces is None and run.flat_config().get("data.folds") is None
    return False


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
            if os.path.lexists(candidate / filename):  # whatever it is: reading it names it
                return candidate.resolve()
    return None


def list_checkpoints(checkpoint_dir: Path) -> list[Path]:
    """Return the checkpoint files, newest first."""
    steps = {path: path.stem.removeprefix("step-") for path in checkpoint_dir.glob("step-*.safetensors")}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: -int(steps[path]))


def now_ms() -> int:
    """Return the current Unix time in ms, the unit of MLflow."""
    return time.time_ns() // 1_000_000
