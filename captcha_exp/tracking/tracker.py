"""The `Tracker` that logs to MLflow.

The run directory is written first and is complete without MLflow. If the store becomes unreachable, training
continues: rows are queued and sent with the next one. Their timestamps let MLflow ignore duplicates.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from captcha_exp.config import Config, MlflowConfig, flatten
from captcha_exp.errors import first_line
from captcha_exp.runs import CHECKPOINT_DIR, MetricsRow, RecordedDir, Run, RunInfo
from captcha_exp.runs.info import MlflowRef, Record
from captcha_exp.tracking.store import (
    get_or_create_experiment,
    open_store,
    raise_run_failed,
    run_exists,
    source_tags,
)

logger = logging.getLogger(__name__)


class MlflowTracker:
    """Logs a training as an MLflow run."""

    def __init__(
        self,
        choices: Mapping[str, str] | None = None,
        run_name: str | None = None,
        parent_run_id: str | None = None,
    ) -> None:
        """Initialize the tracker.

        Args:
            choices: Conf group -> name of the chosen file; logged as tags.
            run_name: Name of the MLflow run; defaults to the name of the run directory.
            parent_run_id: ID of the MLflow run of the sweep.
        """
        self._run_name = run_name
        self._tags = {f"choice.{group}": choice for group, choice in (choices or {}).items()}
        if parent_run_id is not None:
            self._tags["mlflow.parentRunId"] = parent_run_id
        self._pending_rows: list[MetricsRow] = []
        self._client: MlflowClient | None = None
        self._run_id = ""

    def start(self, run: Run, config: Config) -> None:
        """Create the MLflow run, or reattach to that of a resumed run, and log the config as params.

        Raises:
            RunFailed: The store cannot be used; fix it, or use tracking=none.
        """
        assert isinstance(config.tracking, MlflowConfig)  # `make_tracker` checks this
        uri = config.tracking.uri
        with raise_run_failed(uri):
            self._client = open_store(uri)
            experiment = get_or_create_experiment(self._client, uri, config.tracking.experiment)
            tags = {**identity_tags(run), **run.info.tags, **self._tags}
            run_id = self._existing_run_id(run, uri)
            if run_id is None:
                # Recorded before creating the MLflow run: after a kill in between, `sync` can find that run.
                run.update(mlflow=MlflowRef(uri=uri, experiment_id=experiment, run_id=None, closed=False))
                name = self._run_name or run.run_dir.name
                run_id = self._client.create_run(experiment, tags=tags, run_name=name).info.run_id
                run.update_mlflow(run_id=run_id)
            else:
                self._client.update_run(run_id, status="RUNNING")
                self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
                # The interrupted process may not have sent its last rows.
                send_metrics(self._client, run_id, run.metrics_rows())
            self._run_id = run_id
            params = [Param(key, value) for key, value in flatten(config).items()]
            self._client.log_batch(self._run_id, params=params)

    def _existing_run_id(self, run: Run, uri: str) -> str | None:
        """Return the MLflow run ID of a resumed run, or None if it has none in this store."""
        assert self._client is not None
        ref = run.info.mlflow
        if ref is None or ref.run_id is None or ref.uri != uri or not run_exists(self._client, ref.run_id):
            return None
        return ref.run_id

    def log_inputs(self, manifest: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Log the dataset as an MLflow dataset, and the git commit as tags."""
        git = environment["git"] or {}
        tags = {
            "mlflow.source.git.commit": git.get("commit"),
            "mlflow.source.git.branch": git.get("branch"),
            "git.dirty": git.get("dirty"),
            "captcha_exp.version": environment["captcha_exp"],
        }
        dataset = Dataset(
            name=manifest["provenance"]["source"]["source"],
            digest=manifest["key"][:36],
            source_type="code",
            source=json.dumps(manifest["provenance"]),
            profile=json.dumps(
                {k: manifest[k] for k in ("images", "distinct_labels", "splits", "images_sha256")}
            ),
        )

        def send(client: MlflowClient) -> None:
            entities = [RunTag(key, str(value)) for key, value in tags.items() if value is not None]
            client.log_batch(self._run_id, tags=entities)
            client.log_inputs(
                self._run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
            )

        self._try_send("the dataset", send)

    def log_metrics(self, row: MetricsRow) -> None:
        """Log a row of metrics, and the rows that are still queued."""
        self._pending_rows.append(row)

        def send(client: MlflowClient) -> None:
            send_metrics(client, self._run_id, self._pending_rows)
            self._pending_rows.clear()

        self._try_send(f"metrics of step {row.step}", send)

    def finish(self, run: Run) -> None:
        """Log queued rows, the files of the run directory as artifacts, and the final status."""
        if not self._run_id:
            return
        if self._pending_rows:
            self.log_metrics(self._pending_rows.pop())
        artifacts_sent = self._try_send(
            "artifacts", lambda client: send_artifacts(client, self._run_id, run.run_dir)
        )
        status_sent = self._try_send(
            "the final status",
            lambda client: send_status(client, self._run_id, run.info),
        )
        if artifacts_sent and status_sent and not self._pending_rows:
            run.update_mlflow(closed=True)  # otherwise `sync` sends the run again

    def _try_send(self, what: str, send: Callable[[Any], object]) -> bool:
        """Call `send`; on an error, warn and return False, since the run directory has all data."""
        try:
            send(self._client)
        except Exception as error:  # MLflow does not wrap SQL, HTTP and file errors
            logger.warning(f"{what} not logged to MLflow: {first_line(error)}; the run directory is complete")
            return False
        return True


def identity_tags(run: RecordedDir[Any]) -> dict[str, str]:
    """Return the tags that name the directory and the process of a run or sweep."""
    return {
        **source_tags(),
        "run_dir": str(run.run_dir),
        **{key: str(getattr(run.info, key)) for key in ("host", "pid", "process_started")},
    }


def send_metrics(client: MlflowClient, run_id: str, rows: Iterable[MetricsRow]) -> None:
    """Log rows; MLflow ignores those that it already has."""
    metrics = [
        Metric(key, value, row.timestamp_ms, row.step) for row in rows for key, value in row.metrics.items()
    ]
    client.log_batch(run_id, metrics=metrics)


def send_artifacts(client: MlflowClient, run_id: str, run_dir: Path) -> None:
    """Log the files of a run or sweep as artifacts, without checkpoints and the jobs of a sweep."""
    for path in sorted(run_dir.iterdir()):
        if path.is_file():
            client.log_artifact(run_id, str(path))
        elif path.name != CHECKPOINT_DIR and not (path / "run.json").exists():
            client.log_artifacts(run_id, str(path), path.name)


def send_status(client: MlflowClient, run_id: str, info: Record) -> None:
    """Log the final status, the end time, and the tags of a run."""
    if isinstance(info, RunInfo) and info.tags:
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in info.tags.items()])
    ended = None if info.ended is None else int(info.ended.timestamp() * 1000)
    client.set_terminated(run_id, info.status, end_time=ended)
