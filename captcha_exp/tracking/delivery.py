"""Bring MLflow up to date with the directory of a run or sweep.

All that MLflow gets is read from the directory. A run is therefore delivered in the same way while it trains,
at its end, and later by another process, to a local store and to a server.
"""

import contextlib
import getpass
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from captcha_exp.config import Config, MlflowConfig, flatten, load, moved_store_uri, sqlite_path
from captcha_exp.errors import UserError, first_line
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

MAX_METRICS_PER_REQUEST = 1000  # MLflow's limit; a request is stored as a whole or not at all
MAX_FAILURES = 2  # in a row, without progress
FAILURE_PAUSE_SECONDS = 0.2


class StoreError(Exception):
    """The store cannot be used now."""


class RunDeletedError(Exception):
    """The run was deleted in MLflow, by itself or with its store."""


class ParentMissingError(Exception):
    """The sweep of a job is not in MLflow yet; its own process, or `captcha-exp sync`, delivers it first."""


class Delivery:
    """Delivers a run or sweep to MLflow, as often as it has new content.

    What was delivered is remembered, so that an update continues where the previous one failed. After a
    failure MLflow is asked what it has, since a request may have arrived without an answer.
    """

    def __init__(self, recorded: RecordedDir[Any]) -> None:
        self.recorded = recorded
        self.progress = 0
        """number of successful steps"""
        self._client: Any = None
        self._store_file: tuple[int, int] | None = None
        self._is_certain = self._is_created = self._is_described = self._has_inputs = self._has_end = False
        self._may_recreate = recorded.info.is_running  # of a resumed run that was deleted in MLflow
        self._present: set[tuple[Any, ...]] = set()
        """keys of the rows that MLflow has"""
        self._sent_rows: list[MetricsRow] = []
        self._sent_files: set[tuple[Any, ...]] = set()

    @property
    def _ref(self) -> MlflowRef:
        return current_ref(self.recorded.info)

    def complete(self) -> None:
        """Update until MLflow has everything, as long as some requests succeed.

        Raises:
            Exception: as in `update`, if it keeps failing.
        """
        failures = 0
        while True:
            before = self.progress
            try:
                self.update()
            except (RunDeletedError, ParentMissingError):
                raise
            except Exception:
                failures = 1 if self.progress > before else failures + 1
                if failures == MAX_FAILURES:
                    raise
                time.sleep(FAILURE_PAUSE_SECONDS)
            else:
                return

    def update(self) -> None:
        """Send everything that MLflow does not have yet.

        Raises:
            RunDeletedError: the run was deleted in MLflow.
            ParentMissingError: the run of the sweep has to be delivered first.
            Exception: any other error of the store, which MLflow does not wrap.
        """
        info = self.recorded.info  # if the run ends meanwhile, the next update sends the end
        try:
            self._open()
            if not self._is_certain:
                self._attach()
                self._is_certain = True
            self._send_inputs()
            self._send_rows()
            if not info.is_running:
                self._send_end(info)
        except BaseException:
            self._is_certain = False
            raise

    def waits_for_parent(self) -> bool:
        """Return whether this is a job of a sweep that is not in MLflow yet."""
        try:
            self._parent_tag()
        except ParentMissingError:
            return True
        return False

    def describe_sent(self) -> list[str]:
        """Return what was sent so far."""
        end = f"status {self.recorded.info.status}" if self._has_end else ""
        return _describe(self._is_created, self._sent_rows, len(self._sent_files), end)

    def describe_owed(self) -> list[str]:
        """Return what MLflow lacks, as far as this process knows."""
        rows = [row for row in self._rows() if _row_key(row) not in self._present]
        files = [path for path in self._files() if _file_key(path) not in self._sent_files]
        end = "" if self._has_end else f"status {self.recorded.info.status}"
        return _describe(self._ref.run_id is None, rows, len(files), end)

    # -- the run ---------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Open the store, if this was not done before."""
        if self._client is not None:
            if self._store_file != self._file_identity():  # SQLite would write to the deleted file
                raise StoreError("the store was deleted or replaced")
            return
        from captcha_exp.tracking.store import inspect_store, open_store

        ref, path = self._ref, sqlite_path(self._ref.uri)
        is_new_run = ref.run_id is None or self._may_recreate
        if path is not None and not is_new_run and not path.is_file():
            raise StoreError(f"{path} does not exist; it was deleted, or its disk is not mounted")
        status, detail = inspect_store(ref.uri, self._experiment() if is_new_run else "")
        if status == "new" and not is_new_run:
            raise RunDeletedError
        if status not in ("new", "current", "locked"):  # `open_store` waits for a lock
            raise StoreError(f"the store is {status}" + (f" ({shorten(detail)})" if detail else ""))
        self._client = open_store(ref.uri)
        self._store_file = self._file_identity()
        self.progress += 1

    def _attach(self) -> None:
        """Find the run in MLflow, or create it; describe it, and ask for the metrics that it has.

        Raises:
            RunDeletedError, ParentMissingError: see `update`.
        """
        from captcha_exp.tracking.store import run_exists

        client, run_id = self._client, self._ref.run_id
        if run_id is not None and not run_exists(client, run_id):
            if not self._may_recreate:
                raise RunDeletedError
            run_id = None
        if run_id is None or not self._is_described:
            self._describe_run(run_id)
            self._is_described, self._may_recreate = True, False
            self.progress += 1
        else:
            self._ask_for_rows()

    def _describe_run(self, run_id: str | None) -> None:
        """Create the run unless it exists, and set its parameters and tags."""
        from mlflow.entities import Param, RunTag

        from captcha_exp.tracking.store import get_or_create_experiment

        client, info, tags = self._client, self.recorded.info, self._tags()
        params: dict[str, str] = {}
        if run_id is None:
            experiment = get_or_create_experiment(client, self._ref.uri, self._experiment())
            # The answer to an earlier request may have been lost.
            run_id = self._find_run(experiment)
            if run_id is None:
                name = self._ref.run_name or self.recorded.run_dir.name
                started = int(info.started.timestamp() * 1000)
                created = client.create_run(experiment, start_time=started, tags=tags, run_name=name)
                run_id = created.info.run_id
                self._is_created = True
                self._present.clear()
            self.recorded.update_mlflow(experiment_id=experiment, run_id=run_id)
        if not self._is_created:
            params = client.get_run(run_id).data.params
            self._ask_for_rows()
        new_params: list[Any] = []
        with contextlib.suppress(UserError):  # damaged since the start; MLflow gets the rest
            new_params = [Param(*item) for item in self._params().items() if item[0] not in params]
        client.log_batch(run_id, params=new_params, tags=[RunTag(*item) for item in tags.items()])
        if info.is_running:
            client.update_run(run_id, status="RUNNING")

    def _find_run(self, experiment: str) -> str | None:
        """Return the ID of the run by its tags, if MLflow has it."""
        started = f"tags.started = '{self._started()}'"
        for found in self._client.search_runs([experiment], started):
            if Path(found.data.tags.get("run_dir", "")).name == self.recorded.run_dir.name:
                return str(found.info.run_id)
        return None

    def _file_identity(self) -> tuple[int, int] | None:
        """Return what identifies the file of a SQLite store; None for a server, or if it is missing."""
        path = sqlite_path(self._ref.uri)
        with contextlib.suppress(FileNotFoundError):
            stat = None if path is None else path.stat()
            return stat and (stat.st_dev, stat.st_ino)
        return None

    def _started(self) -> str:
        return str(self.recorded.info.started.isoformat(timespec="microseconds"))

    def _configs(self) -> list[Config]:
        """Return the config of the run, or those of the jobs of the sweep."""
        info, run_dir = self.recorded.info, self.recorded.run_dir
        if isinstance(info, SweepInfo):
            return [load(run_dir / "jobs" / f"{job.number}.yaml") for job in info.jobs]
        return [SavedRun(run_dir, info).config()]

    def _experiment(self) -> str:
        tracking = self._configs()[0].tracking
        assert isinstance(tracking, MlflowConfig)  # otherwise the run has no reference to MLflow
        return tracking.experiment

    def _params(self) -> dict[str, str]:
        """Return every config key with its value, or with all its values if the jobs of a sweep differ."""
        configs = [flatten(config) for config in self._configs()]
        keys = dict.fromkeys(key for config in configs for key in config)
        return {key: ", ".join(dict.fromkeys(each[key] for each in configs if key in each)) for key in keys}

    def _tags(self) -> dict[str, str]:
        info = self.recorded.info
        return {
            "mlflow.user": getpass.getuser(),
            "mlflow.source.name": "captcha-exp",
            "mlflow.source.type": "LOCAL",
            "run_dir": str(self.recorded.run_dir),
            "started": self._started(),
            **{key: str(getattr(info, key)) for key in ("host", "pid", "process_started")},
            **self._ref.tags,
            **(info.tags if isinstance(info, RunInfo) else {}),
            **self._parent_tag(),
        }

    def _parent_tag(self) -> dict[str, str]:
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

    # -- its content -----------------------------------------------------------------------------------------

    def _send_inputs(self) -> None:
        """Send the dataset as an MLflow dataset, and the git commit as tags, once they are recorded."""
        run_dir = self.recorded.run_dir
        if self._has_inputs or not (run_dir / "dataset.json").is_file():
            return  # a sweep has none
        from mlflow.entities import Dataset, DatasetInput, InputTag

        from captcha_exp.tracking.store import send_tags

        try:
            run = SavedRun(run_dir, self.recorded.info)
            manifest, environment = run.read_json("dataset.json"), run.read_json("environment.json")
        except UserError:
            return  # damaged since; MLflow gets the files as they are
        git = environment["git"] or {}
        tags = {
            "mlflow.source.git.commit": git.get("commit"),
            "mlflow.source.git.branch": git.get("branch"),
            "git.dirty": git.get("dirty"),
            "captcha_exp.version": environment["captcha_exp"],
        }
        send_tags(self._client, self._run_id, {k: str(v) for k, v in tags.items() if v is not None})
        profile = {k: manifest[k] for k in ("images", "distinct_labels", "splits", "images_sha256")}
        dataset = Dataset(
            name=manifest["provenance"]["source"]["source"],
            digest=manifest["key"][:36],
            source_type="code",
            source=json.dumps(manifest["provenance"]),
            profile=json.dumps(profile),
        )
        training = InputTag("mlflow.data.context", "training")
        self._client.log_inputs(self._run_id, [DatasetInput(dataset, [training])])
        self._has_inputs = True
        self.progress += 1

    def _send_rows(self) -> None:
        from captcha_exp.tracking.store import send_metrics

        rows = [row for row in self._rows() if row.metrics and _row_key(row) not in self._present]
        size = MAX_METRICS_PER_REQUEST // max((len(row.metrics) for row in rows), default=1) or 1
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            send_metrics(self._client, self._run_id, batch)
            self._present.update(map(_row_key, batch))
            self._sent_rows += batch
            self.progress += 1

    def _send_end(self, info: Any) -> None:
        """Send the final status, then the files, which may be many."""
        from captcha_exp.tracking.store import send_artifact, send_tags

        run_dir = self.recorded.run_dir
        if not self._has_end:
            tags = dict(info.tags) if isinstance(info, RunInfo) else {}
            if (summary := run_dir / "summary.md").is_file():  # of a sweep
                tags["mlflow.note.content"] = summary.read_text(encoding="utf-8")
            send_tags(self._client, self._run_id, tags)
            ended = None if info.ended is None else int(info.ended.timestamp() * 1000)
            self._client.set_terminated(self._run_id, info.status, end_time=ended)
            self._has_end = True
            self.progress += 1
        for path in self._files():
            if (key := _file_key(path)) not in self._sent_files:
                send_artifact(self._client, self._run_id, run_dir, path)
                self._sent_files.add(key)
                self.progress += 1
        self.recorded.update_mlflow(closed=True, owed=[])

    @property
    def _run_id(self) -> str:
        run_id = self._ref.run_id
        assert run_id is not None  # `_attach` has set it
        return run_id

    def _rows(self) -> list[MetricsRow]:
        recorded = self.recorded
        if isinstance(recorded, Run):
            return recorded.metrics_rows()
        return read_metrics_rows(recorded.run_dir)[0]

    def _ask_for_rows(self) -> None:
        """Ask MLflow which rows it has, by one metric of each: a row is stored as a whole."""
        keys = {min(row.metrics) for row in self._rows() if row.metrics}
        for key in keys:
            for metric in self._client.get_metric_history(self._run_id, key):
                self._present.add((key, metric.step, metric.timestamp))

    def _files(self) -> Iterator[Path]:
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


def shorten(error: BaseException | str) -> str:
    """Return the cause of an error of a store in a few words; MLflow's message has the whole request."""
    text = error if isinstance(error, str) else first_line(error)
    pattern = r"\[Errno -?\d+\] ([^'\"\])]+)|Error\(\d+, '([^']+)'|Disconnected\('([^']+)'|(timed out)"
    if match := re.search(pattern, text):
        return str(next(filter(None, match.groups())))
    return text if len(text) <= 160 else f"{text[:157]}..."


def _row_key(row: MetricsRow) -> tuple[Any, ...]:
    return min(row.metrics, default=""), row.step, row.timestamp_ms


def _file_key(path: Path) -> tuple[Any, ...]:
    stat = path.stat()
    return str(path), stat.st_mtime_ns, stat.st_size


def _describe(run: bool, rows: Sequence[MetricsRow], num_files: int, end: str) -> list[str]:
    parts = ["the run"] if run else []
    if rows:
        steps = sorted({row.step for row in rows})
        parts.append(
            f"metrics of steps {steps[0]}-{steps[-1]}" if len(steps) > 1 else f"metrics of step {steps[0]}"
        )
    if num_files:
        parts.append(f"{num_files} files" if num_files > 1 else "1 file")
    return [*parts, end] if end else parts
