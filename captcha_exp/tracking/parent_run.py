"""The MLflow parent run of a sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mlflow import MlflowClient
from mlflow.entities import Param

from captcha_exp.config import MlflowConfig
from captcha_exp.errors import first_line
from captcha_exp.runs import MetricsRow, now_ms
from captcha_exp.runtime.console import Display
from captcha_exp.tracking.store import (
    get_or_create_experiment,
    open_store,
    raise_run_failed,
    run_exists,
    source_tags,
)
from captcha_exp.tracking.tracker import send_artifacts, send_metrics, send_status

StepMetrics: TypeAlias = tuple[int, Mapping[str, float]]
"""(step, metrics)"""

DEFAULT_PORT = 5000  # of the UI


class SweepParentRun:
    """The parent run of a sweep. Created before the first job, so a single process creates a new store."""

    def __init__(self, tracking: MlflowConfig, display: Display) -> None:
        """Open the store and get or create the experiment.

        Raises:
            RunFailed: The store cannot be opened; fix it, or use tracking=none.
        """
        self._display, self._uri = display, tracking.uri
        with raise_run_failed(self._uri):
            self._client: MlflowClient = open_store(tracking.uri)
            self.experiment_id = get_or_create_experiment(self._client, tracking.uri, tracking.experiment)
        self.run_id: str | None = None

    @property
    def mlflow_ref(self) -> dict[str, str | bool | None]:
        """Return the field `mlflow` of sweep.json while the sweep runs."""
        return {
            "uri": self._uri,
            "experiment_id": self.experiment_id,
            "run_id": self.run_id,
            "closed": False,
        }

    def start(self, sweep_dir: Path, state: Mapping[str, Any], params: Mapping[str, str]) -> None:
        """Create the run, tagged with its directory and process, with the grid as params.

        Raises:
            RunFailed: The store rejects it; fix the store, or use tracking=none.
        """
        tags = {
            **source_tags(),
            "run_dir": str(sweep_dir),
            **{key: str(state[key]) for key in ("host", "pid", "process_started")},
        }
        with raise_run_failed(self._uri):
            created = self._client.create_run(self.experiment_id, tags=tags, run_name=sweep_dir.name)
            self.run_id = str(created.info.run_id)
            self._client.log_batch(self.run_id, params=[Param(*item) for item in params.items()])

    def resume(self, run_id: str) -> bool:
        """Reattach to the sweep's existing MLflow run; returns False if the run or the store was deleted.

        Raises:
            RunFailed: The store cannot be used; fix it, or use tracking=none.
        """
        with raise_run_failed(self._uri):
            if not run_exists(self._client, run_id):
                return False
            self._client.update_run(run_id, status="RUNNING")
        self.run_id = run_id
        return True

    def finish(
        self, sweep_dir: Path, state: Mapping[str, Any], step_metrics: Sequence[StepMetrics], description: str
    ) -> bool:
        """Log metrics, description, artifacts and status of the sweep; returns False if MLflow failed."""
        now = now_ms()
        rows = [MetricsRow(step, now, metrics) for step, metrics in step_metrics]
        assert self.run_id is not None
        try:
            send_metrics(self._client, self.run_id, rows)
            self._client.set_tag(self.run_id, "mlflow.note.content", description)
            send_artifacts(self._client, self.run_id, sweep_dir)
            send_status(self._client, self.run_id, state)
        except Exception as error:  # as above; the sweep directory is complete, and `sync` retries
            self._display.warn(
                f"sweep summary not logged to MLflow: {first_line(error)}; it is in the sweep directory"
            )
            return False
        return True


def ui_url(uri: str) -> str:
    """Return the URL of the UI of a store: the tracking server, or the default of `captcha-exp ui`."""
    return uri.rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{DEFAULT_PORT}"
