"""MLflow as a `Tracker`, and MLflow's own UI with the right store.

The run's folder is written first and is complete without MLflow. A store that goes away during a training
costs the training nothing: rows wait, are sent again with the next one, and keep their own timestamps, by
which MLflow knows a row that it has already.
"""

import getpass
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock

# Read by MLflow when it is imported: nothing about a run leaves the machine, and a server that is away is
# given up after seconds instead of minutes.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

import logging

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from captcha_exp.config import Config, Mlflow, leaves
from captcha_exp.display import Display
from captcha_exp.errors import RunFailed, UserError
from captcha_exp.record import MetricsRow, Run, Status

# MLflow tells in detail how it sets up its own tables.
logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)

BATCH = 100  # params or tags that MLflow takes at once


class MlflowTracker:
    """A run in MLflow for each training."""

    def __init__(self, display: Display, choices: Mapping[str, str] | None = None) -> None:
        self._display = display
        self._choices = dict(choices or {})  # conf group -> the file chosen, as tags
        self._unsent: list[MetricsRow] = []
        self._client: MlflowClient | None = None
        self._run_id = ""

    def start(self, run: Run, config: Config) -> None:
        """The run in MLflow, with its params.

        Raises:
            RunFailed: the store cannot be opened; the line says which.
        """
        assert isinstance(config.tracking, Mlflow)  # noqa: S101 - cli makes a tracker for no other
        uri = config.tracking.uri
        try:
            self._client = _client(uri)
            experiment = _experiment(self._client, uri, config.tracking.experiment)
            tags = {
                "mlflow.user": getpass.getuser(),
                "mlflow.source.name": "captcha-exp",
                "mlflow.source.type": "LOCAL",
                "folder": str(run.folder),
                "host": run.state["host"],
                "pid": str(run.state["pid"]),
                "process_started": str(run.state["process_started"]),
                **{f"choice.{group}": choice for group, choice in self._choices.items()},
            }
            created = self._client.create_run(experiment, tags=tags, run_name=run.folder.name)
            self._run_id = created.info.run_id
            run.note(mlflow={"uri": uri, "experiment_id": experiment, "run_id": self._run_id})
            params = [Param(key, value) for key, value in leaves(config).items()]
            for start in range(0, len(params), BATCH):
                self._client.log_batch(self._run_id, params=params[start : start + BATCH])
        except Exception as error:  # MLflow lets exceptions of SQL, HTTP and files through as they come
            raise RunFailed(
                f"tracking.uri={uri}: MLflow cannot record there: {_first_line(error)}; "
                "mend the store, or train with tracking=none"
            ) from error

    def describe(self, manifest: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """The dataset as MLflow's dataset, the code's commit as tags."""
        git = environment["git"] or {}
        tags = {
            "mlflow.source.git.commit": git.get("commit"),
            "mlflow.source.git.branch": git.get("branch"),
            "git.dirty": git.get("dirty"),
            "captcha_exp.version": environment["captcha_exp"],
        }
        dataset = Dataset(
            name=manifest["made_from"]["source"]["source"],
            digest=manifest["key"][:36],
            source_type="code",
            source=json.dumps(manifest["made_from"]),
            profile=json.dumps(
                {k: manifest[k] for k in ("pictures", "distinct_labels", "splits", "images_sha256")}
            ),
        )

        def send(client: MlflowClient) -> None:
            named = [RunTag(key, str(value)) for key, value in tags.items() if value is not None]
            client.log_batch(self._run_id, tags=named)
            client.log_inputs(
                self._run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
            )

        self._try("the dataset", send)

    def log(self, row: MetricsRow) -> None:
        """One row of metrics, and those that could not be sent before."""
        self._unsent.append(row)

        def send(client: MlflowClient) -> None:
            metrics = [
                Metric(key, value, row.timestamp_ms, row.step)
                for row in self._unsent
                for key, value in row.metrics.items()
            ]
            for start in range(0, len(metrics), 1000):
                client.log_batch(self._run_id, metrics=metrics[start : start + 1000])
            self._unsent.clear()

        self._try(f"metrics of step {row.step}", send)

    def finish(self, run: Run, status: Status) -> None:
        """What has not been sent, the files of the run's folder as artifacts, and the status."""
        if not self._run_id:
            return
        if self._unsent:
            self.log(self._unsent.pop())
        self._try("artifacts", lambda client: client.log_artifacts(self._run_id, str(run.folder)))
        self._try("the end of the run", lambda client: client.set_terminated(self._run_id, status))

    def _try(self, what: str, send: Any) -> None:
        try:
            send(self._client)
        except (
            Exception
        ) as error:  # as in start(); whatever it is, the training goes on and the folder has it all
            self._display.warn(f"MLflow did not take {what}: {_first_line(error)}; the run's folder has it")


def _client(uri: str) -> MlflowClient:
    """A client of the store; a store in a new SQLite file is made first, by one process at a time."""
    if path := _sqlite_file(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_suffix(".lock")):
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)  # the first question makes the tables
            return client
    return MlflowClient(uri)


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    """The id of an experiment, made when it is new.

    The place of its artifacts is stored as an absolute path: a relative one would mean another folder to
    whoever starts the UI elsewhere.
    """
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    path = _sqlite_file(uri)
    location = (path.parent / "artifacts").resolve().as_uri() if path else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:
        if found := client.get_experiment_by_name(name):  # another process made it in between
            return str(found.experiment_id)
        raise


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# -- the UI --------------------------------------------------------------------------------------------------


def ui(tracking: Mlflow, port: int | None, display: Display) -> None:
    """MLflow's UI on 127.0.0.1 until it is stopped; prints the address of the training view.

    Raises:
        UserError: there is no such store or experiment, or the port is taken.
    """
    uri = tracking.uri
    path = _sqlite_file(uri)
    if path is not None and not path.is_file():
        raise UserError(f"{path}: there is no MLflow store yet; captcha-exp train makes it")
    found = _client(uri).get_experiment_by_name(tracking.experiment)
    if found is None:
        raise UserError(
            f"tracking.experiment={tracking.experiment}: {uri} has no such experiment; a training makes it"
        )
    port = _free_port(port)
    # Without this, MLflow starts eight processes more, for jobs that nobody here gives it.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _wait_until_up(server, port)
        address = (
            f"http://127.0.0.1:{port}/#/experiments/{found.experiment_id}/runs?workflowType=machine_learning"
        )
        display.line(f"MLflow shows the runs at  {address}\nCtrl-C ends it")
        server.communicate()
    except KeyboardInterrupt:
        display.line("the UI has ended")
    finally:
        server.terminate()
        server.wait()


def _free_port(wanted: int | None) -> int:
    candidates: Sequence[int] = [wanted] if wanted is not None else range(5000, 5050)
    for port in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise UserError(f"port {candidates[0]} is taken; give another with --port")


def _wait_until_up(server: subprocess.Popen[str], port: int) -> None:
    for _ in range(600):
        if server.poll() is not None:
            words = (server.stderr.read() if server.stderr else "").strip().splitlines()
            raise UserError(f"MLflow's UI did not start: {words[-1] if words else 'it said nothing'}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise UserError("MLflow's UI did not answer within a minute")
