"""MLflow as a `Tracker`.

The run's folder is written first and is complete without MLflow. A store that goes away during a training
costs the training nothing: rows wait, are sent again with the next one, and keep their own timestamps, by
which MLflow knows a row that it has already.
"""

import getpass
import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from captcha_exp.config import Config, MlflowConfig, flatten
from captcha_exp.errors import RunFailed
from captcha_exp.runs import CHECKPOINT_DIR, MetricsRow, Run, Status
from captcha_exp.runtime.console import Display
from captcha_exp.tracking.store import first_line, get_or_create_experiment, open_store, run_exists

PARAMS_PER_REQUEST = 100  # params or tags that MLflow takes at once
METRICS_PER_REQUEST = 1000  # and values of metrics


class MlflowTracker:
    """A run in MLflow for each training."""

    def __init__(
        self,
        display: Display,
        choices: Mapping[str, str] | None = None,
        run_name: str | None = None,
        parent_run_id: str | None = None,
    ) -> None:
        """`choices` are conf group -> the file chosen; `name` is that of the folder, if it is left out;
        `parent` is the id of a sweep's run."""
        self._display = display
        self._run_name = run_name
        self._tags = {f"choice.{group}": choice for group, choice in (choices or {}).items()}
        if parent_run_id is not None:
            self._tags["mlflow.parentRunId"] = parent_run_id
        self._pending_rows: list[MetricsRow] = []
        self._client: MlflowClient | None = None
        self._run_id = ""

    def start(self, run: Run, config: Config) -> None:
        """The run in MLflow, with its params: a new one, or that of a run that is gone on with.

        Raises:
            RunFailed: the store cannot be opened; the line says which.
        """
        assert isinstance(config.tracking, MlflowConfig)  # cli makes a tracker for no other
        uri = config.tracking.uri
        try:
            self._client = open_store(uri)
            experiment = get_or_create_experiment(self._client, uri, config.tracking.experiment)
            tags = {
                "mlflow.user": getpass.getuser(),
                "mlflow.source.name": "captcha-exp",
                "mlflow.source.type": "LOCAL",
                "run_dir": str(run.run_dir),
                "host": run.state["host"],
                "pid": str(run.state["pid"]),
                "process_started": str(run.state["process_started"]),
                **run.state["tags"],
                **self._tags,
            }
            known = self._existing_run_id(run, uri)
            if known is None:
                # Before there is a run in MLflow, so that none stays there that no folder knows of.
                noted = {"uri": uri, "experiment_id": experiment, "run_id": None, "closed": False}
                run.update(mlflow=noted)
                name = self._run_name or run.run_dir.name
                known = self._client.create_run(experiment, tags=tags, run_name=name).info.run_id
                run.update(mlflow={**noted, "run_id": known})
            else:
                self._client.update_run(known, status="RUNNING")
                self._client.log_batch(known, tags=[RunTag(key, value) for key, value in tags.items()])
                send_metrics(
                    self._client, known, run.metrics_rows()
                )  # the process before may not have come to it
            self._run_id = known
            params = [Param(key, value) for key, value in flatten(config).items()]
            for start in range(0, len(params), PARAMS_PER_REQUEST):
                self._client.log_batch(self._run_id, params=params[start : start + PARAMS_PER_REQUEST])
        except Exception as error:  # MLflow lets exceptions of SQL, HTTP and files through as they come
            raise RunFailed(
                f"tracking.uri={uri}: MLflow cannot record there: {first_line(error)}; "
                "mend the store (captcha-exp doctor says how), or train with tracking=none"
            ) from error

    def _existing_run_id(self, run: Run, uri: str) -> str | None:
        """The id of the run that is gone on with; None where there is none, or it was deleted."""
        assert self._client is not None
        known = run.state["mlflow"] or {}
        run_id = known.get("run_id")
        if run_id is None or known.get("uri") != uri or not run_exists(self._client, run_id):
            return None
        return str(run_id)

    def log_inputs(self, manifest: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """The dataset as MLflow's dataset, the code's commit as tags."""
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
            named = [RunTag(key, str(value)) for key, value in tags.items() if value is not None]
            client.log_batch(self._run_id, tags=named)
            client.log_inputs(
                self._run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
            )

        self._try_send("the dataset", send)

    def log_metrics(self, row: MetricsRow) -> None:
        """One row of metrics, and those that could not be sent before."""
        self._pending_rows.append(row)

        def send(client: MlflowClient) -> None:
            send_metrics(client, self._run_id, self._pending_rows)
            self._pending_rows.clear()

        self._try_send(f"metrics of step {row.step}", send)

    def finish(self, run: Run, status: Status) -> None:
        """What has not been sent, the files of the run's folder as artifacts, and the status."""
        if not self._run_id:
            return
        if self._pending_rows:
            self.log_metrics(self._pending_rows.pop())
        files = self._try_send("artifacts", lambda client: send_artifacts(client, self._run_id, run.run_dir))
        end = self._try_send(
            "the end of the run",
            lambda client: send_status(client, self._run_id, {**run.state, "status": status}),
        )
        if files and end and not self._pending_rows:
            run.update(mlflow={**run.state["mlflow"], "closed": True})  # else `closing` sends all of it again

    def _try_send(self, what: str, send: Callable[[Any], object]) -> bool:
        """Whether MLflow took it; whatever happens, the training goes on and the folder has it all."""
        try:
            send(self._client)
        except Exception as error:  # as in start()
            self._display.warn(f"MLflow did not take {what}: {first_line(error)}; the run's folder has it")
            return False
        return True


def send_metrics(client: MlflowClient, run_id: str, rows: Iterable[MetricsRow]) -> None:
    """The rows in MLflow, once each, however often they are sent."""
    metrics = [
        Metric(key, value, row.timestamp_ms, row.step) for row in rows for key, value in row.metrics.items()
    ]
    for start in range(0, len(metrics), METRICS_PER_REQUEST):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_REQUEST])


def send_artifacts(client: MlflowClient, run_id: str, run_dir: Path) -> None:
    """The files of a run's or a sweep's folder as artifacts; a point of a sweep has a run for its own, and
    checkpoints, which are large, serve none but who has the folder."""
    for path in sorted(run_dir.iterdir()):
        if path.is_file():
            client.log_artifact(run_id, str(path))
        elif path.name != CHECKPOINT_DIR and not (path / "run.json").exists():
            client.log_artifacts(run_id, str(path), path.name)


def send_status(client: MlflowClient, run_id: str, state: Mapping[str, Any]) -> None:
    """The status and the time of the end, as the record has them, and the tags that it got on the way."""
    if tags := [RunTag(key, str(value)) for key, value in state.get("tags", {}).items()]:
        client.log_batch(run_id, tags=tags)
    ended = state["ended"] and int(datetime.fromisoformat(state["ended"]).timestamp() * 1000)
    client.set_terminated(run_id, state["status"], end_time=ended)
