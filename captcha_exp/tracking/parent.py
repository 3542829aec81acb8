"""The run in MLflow that stands above the runs of a sweep."""

import getpass
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from captcha_exp.config import Mlflow
from captcha_exp.display import Display
from captcha_exp.errors import RunFailed
from captcha_exp.record import Status, now_ms
from captcha_exp.tracking.store import experiment_id, first_line, open_store
from captcha_exp.tracking.tracker import BATCH

PORT = 5000  # of the UI, if it is free
LONGEST = 6000  # characters of a param that MLflow takes


class Parent:
    """The parent run of a sweep; made before the first point, so that one process makes a new store."""

    def __init__(self, tracking: Mlflow, display: Display, noted: Mapping[str, str] | None = None) -> None:
        """A new one; or the one of a sweep that is gone on with, as it was noted then.

        Raises:
            RunFailed: the store cannot be opened; the line says which.
        """
        self._display, self._uri = display, tracking.uri
        try:
            self._client: MlflowClient = open_store(tracking.uri)
            self.experiment_id = experiment_id(self._client, tracking.uri, tracking.experiment)
            if noted is not None:
                self.run_id = noted["run_id"]
                self._client.update_run(self.run_id, status="RUNNING")
            else:
                self.run_id = self._client.create_run(self.experiment_id).info.run_id
        except Exception as error:  # MLflow lets exceptions of SQL, HTTP and files through as they come
            raise RunFailed(
                f"tracking.uri={tracking.uri}: MLflow cannot record there: {first_line(error)}; "
                "mend the store (captcha-exp doctor says how), or sweep with tracking=none"
            ) from error

    @property
    def noted(self) -> dict[str, str]:
        """What the sweep's record keeps of it."""
        return {"uri": self._uri, "experiment_id": self.experiment_id, "run_id": self.run_id}

    def describe(self, name: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Its name, the grid, and whose process it is."""
        facts = {
            "mlflow.runName": name,
            "mlflow.user": getpass.getuser(),
            "mlflow.source.name": "captcha-exp",
            "mlflow.source.type": "LOCAL",
            **tags,
        }
        for key, value in facts.items():
            self._client.set_tag(self.run_id, key, value)
        named = [Param(key, value[:LONGEST]) for key, value in params.items()]
        for start in range(0, len(named), BATCH):
            self._client.log_batch(self.run_id, params=named[start : start + BATCH])

    def finish(
        self,
        status: Status,
        figures: Sequence[tuple[int, Mapping[str, float]]],
        description: str,
        files: Sequence[Path],
    ) -> None:
        """The sweep's figures, by step; its table, in words; its files; and the end."""
        try:
            now = now_ms()
            metrics = [
                Metric(key, value, now, step) for step, values in figures for key, value in values.items()
            ]
            for start in range(0, len(metrics), 1000):
                self._client.log_batch(self.run_id, metrics=metrics[start : start + 1000])
            self._client.set_tag(self.run_id, "mlflow.note.content", description)
            for path in files:
                self._client.log_artifact(self.run_id, str(path))
            self._client.set_terminated(self.run_id, status)
        except Exception as error:  # as above; the sweep's folder has it all
            self._display.warn(f"MLflow did not take the verdict: {first_line(error)}; the folder has it")


def server_of(uri: str) -> str:
    """The address of the UI of a store: the server itself, or else what `captcha-exp ui` takes first."""
    return uri.rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{PORT}"


def runs_address(server: str, experiment: str) -> str:
    """The page of an experiment's runs, in the view for training and not in that for chats."""
    return f"{server}/#/experiments/{experiment}/runs?workflowType=machine_learning"


def compare_address(server: str, experiment: str, run_ids: Sequence[str]) -> str:
    """The page that shows these runs side by side."""
    runs, experiments = quote(json.dumps(list(run_ids))), quote(json.dumps([experiment]))
    return f"{server}/#/compare-runs?runs={runs}&experiments={experiments}"
