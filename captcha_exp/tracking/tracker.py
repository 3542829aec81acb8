"""The `Tracker` that logs to MLflow.

The run directory is written first and is complete without MLflow. If the store becomes unreachable, training
continues: rows are queued and sent with the next one. Their timestamps let MLflow ignore duplicates.
"""

import getpass
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param

from captcha_exp.config import Config, MlflowConfig, flatten, moved_store_uri
from captcha_exp.errors import first_line
from captcha_exp.runs import MetricsRow, RecordedDir, Run, StaleRun
from captcha_exp.runs.info import MlflowRef
from captcha_exp.runtime.paths import root_dir
from captcha_exp.tracking.store import (
    get_or_create_experiment,
    open_store,
    raise_run_failed,
    run_exists,
    send_metrics,
    send_tags,
)
from captcha_exp.tracking.sync import sync_all

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

    def start(self, run: Run, config: Config) -> None:
        """Create the MLflow run, or reattach to that of a resumed run, and log the config as params.

        Raises:
            RunFailed: The store cannot be used; fix it, or use tracking=none.
        """
        assert isinstance(config.tracking, MlflowConfig)  # `make_tracker` checks this
        tags = run.info.tags | self._tags
        self._client, self._run_id = start_run(run, config.tracking, flatten(config), tags, self._run_name)

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
            send_tags(client, self._run_id, {k: str(v) for k, v in tags.items() if v is not None})
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
        """Send all rows again, the files of the run directory as artifacts, and the final status."""
        sync_all([StaleRun(run.run_dir, run.info)])

    def _try_send(self, what: str, send: Callable[[Any], object]) -> bool:
        """Call `send`; on an error, warn and return False, since the run directory has all data."""
        try:
            send(self._client)
        except Exception as error:  # MLflow does not wrap SQL, HTTP and file errors
            logger.warning(f"{what} not logged to MLflow: {first_line(error)}; the run directory is complete")
            return False
        return True


def start_run(
    run: RecordedDir[Any],
    tracking: MlflowConfig,
    params: Mapping[str, str],
    tags: Mapping[str, str] | None = None,
    name: str | None = None,
) -> tuple[MlflowClient, str]:
    """Create the MLflow run of a run or sweep, or reattach to that of a resumed one; return its ID as well.

    Raises:
        RunFailed: The store cannot be used; fix it, or use tracking=none.
    """
    uri, ref = tracking.uri, run.info.mlflow
    all_tags = {
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": "captcha-exp",
        "mlflow.source.type": "LOCAL",
        "run_dir": str(run.run_dir),
        **{key: str(getattr(run.info, key)) for key in ("host", "pid", "process_started")},
        **(tags or {}),
    }
    with raise_run_failed(uri):
        client = open_store(uri)
        experiment = get_or_create_experiment(client, uri, tracking.experiment)
        is_same_store = ref is not None and moved_store_uri(ref.uri, root_dir()) == uri
        if ref is not None and ref.run_id and is_same_store and run_exists(client, ref.run_id):
            run_id: str = ref.run_id
            client.update_run(run_id, status="RUNNING")
            run.update_mlflow(uri=uri, closed=False)
        else:
            # Recorded before creating the MLflow run: after a kill in between, `sync` can find that run.
            run.update(mlflow=MlflowRef(uri=uri, experiment_id=experiment, run_id=None, closed=False))
            run_id = client.create_run(
                experiment, tags=all_tags, run_name=name or run.run_dir.name
            ).info.run_id
            run.update_mlflow(run_id=run_id)
        known = client.get_run(run_id).data.params
        new_params = [Param(*item) for item in params.items() if item[0] not in known]
        client.log_batch(run_id, params=new_params)
        send_tags(client, run_id, all_tags)
    return client, run_id
