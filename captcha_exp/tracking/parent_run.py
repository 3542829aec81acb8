"""The MLflow parent run of a sweep."""

import logging
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from mlflow import MlflowClient
from mlflow.entities import Param

from captcha_exp.config import MlflowConfig
from captcha_exp.errors import first_line
from captcha_exp.runs import MetricsRow, RecordedDir, SweepInfo, now_ms
from captcha_exp.runs.info import MlflowRef
from captcha_exp.tracking.store import (
    get_or_create_experiment,
    open_store,
    raise_run_failed,
    run_exists,
)
from captcha_exp.tracking.tracker import (
    identity_tags,
    send_artifacts,
    send_metrics,
    send_status,
)

logger = logging.getLogger(__name__)

StepMetrics: TypeAlias = tuple[int, Mapping[str, float]]
"""(step, metrics)"""

DEFAULT_PORT = 5000  # of the UI


class SweepParentRun:
    """The parent run of a sweep. Created before the first job, so a single process creates a new store."""

    def __init__(self, tracking: MlflowConfig) -> None:
        """Open the store and get or create the experiment.

        Raises:
            RunFailed: The store cannot be opened; fix it, or use tracking=none.
        """
        self._uri = tracking.uri
        with raise_run_failed(self._uri):
            self._client: MlflowClient = open_store(tracking.uri)
            self.experiment_id = get_or_create_experiment(self._client, tracking.uri, tracking.experiment)
        self.run_id: str | None = None

    @property
    def mlflow_ref(self) -> MlflowRef:
        """Return the field `mlflow` of sweep.json while the sweep runs."""
        return MlflowRef(uri=self._uri, experiment_id=self.experiment_id, run_id=self.run_id, closed=False)

    def start(self, sweep: RecordedDir[SweepInfo], params: Mapping[str, str]) -> None:
        """Create the run, tagged with its directory and process, with the grid as params.

        Raises:
            RunFailed: The store rejects it; fix the store, or use tracking=none.
        """
        with raise_run_failed(self._uri):
            created = self._client.create_run(
                self.experiment_id, tags=identity_tags(sweep), run_name=sweep.run_dir.name
            )
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
        self, sweep: RecordedDir[SweepInfo], step_metrics: Sequence[StepMetrics], description: str
    ) -> bool:
        """Log metrics, description, artifacts and status of the sweep; returns False if MLflow failed."""
        now = now_ms()
        rows = [MetricsRow(step, now, metrics) for step, metrics in step_metrics]
        assert self.run_id is not None
        try:
            send_metrics(self._client, self.run_id, rows)
            self._client.set_tag(self.run_id, "mlflow.note.content", description)
            send_artifacts(self._client, self.run_id, sweep.run_dir)
            send_status(self._client, self.run_id, sweep.info)
        except Exception as error:  # as above; the sweep directory is complete, and `sync` retries
            logger.warning(
                f"sweep summary not logged to MLflow: {first_line(error)}; it is in the sweep directory"
            )
            return False
        return True


def ui_url(uri: str) -> str:
    """Return the URL of the UI of a store: the tracking server, or the default of `captcha-exp ui`."""
    return uri.rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{DEFAULT_PORT}"
