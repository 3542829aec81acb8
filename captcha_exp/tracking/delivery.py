"""Bring MLflow up to date with the directory of a run or sweep.

All that MLflow gets is read from the directory. A run is therefore delivered in the same way while it trains,
at its end, and later by another process, to a local store and to a server.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captcha_exp.config import is_inside, sqlite_path
from captcha_exp.errors import UserError, first_line
from captcha_exp.runs import MetricsRow, RecordedDir, RunInfo, SavedRun
from captcha_exp.runtime.paths import root_dir
from captcha_exp.tracking.content import Content, ParentMissingError, file_key, row_key

MAX_METRICS_PER_REQUEST = 1000  # MLflow's limit; a request is stored as a whole or not at all
MAX_FAILURES = 2  # in a row, without progress
FAILURE_PAUSE_SECONDS = 0.2


class StoreError(Exception):
    """The store cannot be used now."""


class RunDeletedError(Exception):
    """The run was deleted in MLflow, by itself or with its store."""


class Delivery:
    """Delivers a run or sweep to MLflow, as often as it has new content.

    An update continues where the previous one failed. After a failure MLflow is asked for the content of the
    run, since a request may have arrived without an answer.
    """

    def __init__(self, recorded: RecordedDir[Any]) -> None:
        self.recorded, self.content = recorded, Content(recorded)
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
            self.content.parent_tag()
        except ParentMissingError:
            return True
        return False

    def describe_sent(self) -> list[str]:
        """Return a description of everything sent so far."""
        end = f"status {self.recorded.info.status}" if self._has_end else ""
        return _describe(self._is_created, self._sent_rows, len(self._sent_files), end)

    def describe_owed(self) -> list[str]:
        """Return what MLflow lacks, as far as this process knows."""
        rows = [row for row in self.content.rows() if row_key(row) not in self._present]
        files = [path for path in self.content.files() if file_key(path) not in self._sent_files]
        end = "" if self._has_end else f"status {self.recorded.info.status}"
        return _describe(self.content.ref.run_id is None, rows, len(files), end)

    # -- the run ---------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Open the store, if this was not done before."""
        if self._client is not None:
            if self._store_file != self._file_identity():  # SQLite would write to the deleted file
                raise StoreError("the store was deleted or replaced")
            return
        from captcha_exp.tracking.inspection import inspect_store

        ref, path = self.content.ref, sqlite_path(self.content.ref.uri)
        is_new_run = ref.run_id is None or self._may_recreate
        may_create = is_new_run and (path is None or is_inside(path, root_dir()) or self._is_begun_here())
        if path is not None and not may_create and not path.is_file():
            raise StoreError(f"{path} does not exist; it was deleted, or its disk is not mounted")
        status, detail = inspect_store(ref.uri, self.content.experiment() if is_new_run else "")
        if status == "new" and not is_new_run:
            raise RunDeletedError
        if status not in ("new", "current", "locked"):  # `open_store` waits for a lock
            raise StoreError(f"the store is {status}" + (f" ({shorten(detail)})" if detail else ""))
        from captcha_exp.tracking.store import open_store

        self._client = open_store(ref.uri)
        self._store_file = self._file_identity()
        self.progress += 1

    def _attach(self) -> None:
        """Find the run in MLflow, or create it; describe it, and ask for the metrics that it has.

        Raises:
            RunDeletedError, ParentMissingError: see `update`.
        """
        from captcha_exp.tracking.store import run_exists

        client, run_id = self._client, self.content.ref.run_id
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

        client, info, tags = self._client, self.recorded.info, self.content.tags()
        params: dict[str, str] = {}
        if run_id is None:
            experiment = get_or_create_experiment(client, self.content.ref.uri, self.content.experiment())
            # The answer to an earlier request may have been lost.
            run_id = self._find_run(experiment)
            if run_id is None:
                name = self.content.ref.run_name or self.recorded.run_dir.name
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
            new_params = [Param(*item) for item in self.content.params().items() if item[0] not in params]
        client.log_batch(run_id, params=new_params, tags=[RunTag(*item) for item in tags.items()])
        if info.is_running:
            client.update_run(run_id, status="RUNNING")

    def _find_run(self, experiment: str) -> str | None:
        """Return the ID of the run by its tags, if MLflow has it."""
        started = f"tags.started = '{self.content.started()}'"
        for found in self._client.search_runs([experiment], started):
            if Path(found.data.tags.get("run_dir", "")).name == self.recorded.run_dir.name:
                return str(found.info.run_id)
        return None

    def _is_begun_here(self) -> bool:
        """Check whether this process began the run, so that its config is not that of another user."""
        info = self.recorded.info
        return info.pid == os.getpid() and not getattr(info, "resumed", ())

    def _file_identity(self) -> tuple[int, int] | None:
        """Return what identifies the file of a SQLite store; None for a server, or if it is missing."""
        path = sqlite_path(self.content.ref.uri)
        with contextlib.suppress(FileNotFoundError):
            stat = None if path is None else path.stat()
            return stat and (stat.st_dev, stat.st_ino)
        return None

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

        rows = [row for row in self.content.rows() if row.metrics and row_key(row) not in self._present]
        size = MAX_METRICS_PER_REQUEST // max((len(row.metrics) for row in rows), default=1) or 1
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            send_metrics(self._client, self._run_id, batch)
            self._present.update(map(row_key, batch))
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
        for path in self.content.files():
            if (key := file_key(path)) not in self._sent_files:
                send_artifact(self._client, self._run_id, run_dir, path)
                self._sent_files.add(key)
                self.progress += 1
        self.recorded.update_mlflow(closed=True, owed=[])

    @property
    def _run_id(self) -> str:
        run_id = self.content.ref.run_id
        assert run_id is not None  # `_attach` has set it
        return run_id

    def _ask_for_rows(self) -> None:
        """Ask MLflow which rows it has, by one metric of each: a row is stored as a whole."""
        keys = {min(row.metrics) for row in self.content.rows() if row.metrics}
        for key in keys:
            for metric in self._client.get_metric_history(self._run_id, key):
                self._present.add((key, metric.step, metric.timestamp))


def shorten(error: BaseException | str) -> str:
    """Return the cause of an error of a store in a few words; MLflow's message has the whole request."""
    text = error if isinstance(error, str) else first_line(error)
    pattern = r"\[Errno -?\d+\] ([^'\"\])]+)|Error\(\d+, '([^']+)'|Disconnected\('([^']+)'|(timed out)"
    if match := re.search(pattern, text):
        return str(next(filter(None, match.groups())))
    return text if len(text) <= 160 else f"{text[:157]}..."


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
