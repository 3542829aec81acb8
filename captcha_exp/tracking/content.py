"""The content of an MLflow run, read from the directory of a run or sweep: params, tags, rows and files."""

import contextlib
import getpass
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captcha_exp.config import Config, MlflowConfig, flatten, load, moved_store_uri
from captcha_exp.errors import UserError
from captcha_exp.runs import (
    CHECKPOINT_DIR,
    MetricsRow,
    RecordedDir,
    Run,
    RunInfo,
    SavedRun,
    SweepInfo,
    read_metrics_rows,
)
from captcha_exp.runs.info import MlflowRef, list_run_files
from captcha_exp.runtime.files import is_abandoned_part
from captcha_exp.runtime.paths import root_dir


class ParentMissingError(Exception):
    """The sweep of a job is not in MLflow yet; its own process, or `captcha-exp sync`, delivers it first."""


class Content:
    """The content of a run or sweep for MLflow, read again by each call."""

    def __init__(self, recorded: RecordedDir[Any]) -> None:
        self.recorded = recorded

    @property
    def ref(self) -> MlflowRef:
        return current_ref(self.recorded.info)

    def started(self) -> str:
        """Return the start time, by which the run is found in MLflow."""
        return str(self.recorded.info.started.isoformat(timespec="microseconds"))

    def _configs(self) -> list[Config]:
        """Return the config of the run, or those of the jobs of the sweep."""
        info, run_dir = self.recorded.info, self.recorded.run_dir
        if isinstance(info, SweepInfo):
            return [load(run_dir / "jobs" / f"{job.number}.yaml") for job in info.jobs]
        return [SavedRun(run_dir, info).config()]

    def experiment(self) -> str:
        """Return the name of the MLflow experiment."""
        tracking = self._configs()[0].tracking
        assert isinstance(tracking, MlflowConfig)  # otherwise the run has no reference to MLflow
        return tracking.experiment

    def params(self) -> dict[str, str]:
        """Return every config key with its value, or with all its values if the jobs of a sweep differ."""
        configs = [flatten(config) for config in self._configs()]
        keys = dict.fromkeys(key for config in configs for key in config)
        return {key: ", ".join(dict.fromkeys(each[key] for each in configs if key in each)) for key in keys}

    def tags(self) -> dict[str, str]:
        """Return the tags; raises ParentMissingError as `parent_tag`."""
        info = self.recorded.info
        return {
            "mlflow.user": getpass.getuser(),
            "mlflow.source.name": "captcha-exp",
            "mlflow.source.type": "LOCAL",
            "run_dir": str(self.recorded.run_dir),
            "started": self.started(),
            **{key: str(getattr(info, key)) for key in ("host", "pid", "process_started")},
            **self.ref.tags,
            **(info.tags if isinstance(info, RunInfo) else {}),
            **self.parent_tag(),
        }

    def parent_tag(self) -> dict[str, str]:
        """Return the tag of the run of the sweep that this one is a job of.

        Raises:
            ParentMissingError: MLflow does not have the sweep yet.
        """
        parent: MlflowRef | None = None
        if isinstance(self.recorded.info, RunInfo):
            with contextlib.suppress(UserError):  # not a job of a sweep
                parent = SweepInfo.load(self.recorded.run_dir.parent).mlflow
        if parent is None or parent.uri != self.recorded.info.mlflow.uri:
            return {}
        if parent.run_id is None:
            raise ParentMissingError("the run of the sweep is not in MLflow yet")
        return {"mlflow.parentRunId": parent.run_id}

    def rows(self) -> list[MetricsRow]:
        """Return the rows of metrics that are recorded so far."""
        recorded = self.recorded
        if isinstance(recorded, Run):
            return recorded.metrics_rows()
        return read_metrics_rows(recorded.run_dir)[0]

    def files(self) -> Iterator[Path]:
        """Yield the files of the run or sweep, without checkpoints and the jobs of a sweep."""
        run_dir = self.recorded.run_dir
        for path in list_run_files(run_dir):
            if is_abandoned_part(path):
                path.unlink(missing_ok=True)  # of a process that was killed
            elif path.suffix != ".part" and path.relative_to(run_dir).parts[0] != CHECKPOINT_DIR:
                yield path


def current_ref(info: RunInfo | SweepInfo) -> MlflowRef:
    """Return where a run is in MLflow; its store has moved together with the root directory."""
    assert info.mlflow is not None  # where to deliver to
    return info.mlflow.model_copy(update={"uri": moved_store_uri(info.mlflow.uri, root_dir())})


def row_key(row: MetricsRow) -> tuple[Any, ...]:
    """Return what identifies a row in MLflow: one of its metrics, step and timestamp."""
    return min(row.metrics, default=""), row.step, row.timestamp_ms


def file_key(path: Path) -> tuple[Any, ...]:
    """Return what changes with the content of a file."""
    stat = path.stat()
    return str(path), stat.st_mtime_ns, stat.st_size
