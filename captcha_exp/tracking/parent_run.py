"""The run in MLflow that stands above the runs of a sweep."""

import contextlib
import getpass
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mlflow import MlflowClient
from mlflow.entities import Param

from captcha_exp.config import MlflowConfig
from captcha_exp.errors import RunFailed
from captcha_exp.runs import MetricsRow, now_ms
from captcha_exp.runtime.console import Display
from captcha_exp.tracking.store import first_line, get_or_create_experiment, open_store, run_exists
from captcha_exp.tracking.tracker import PARAMS_PER_REQUEST, send_artifacts, send_metrics, send_status

StepMetrics: TypeAlias = tuple[int, Mapping[str, float]]
"""step, and metrics"""

DEFAULT_PORT = 5000  # of the UI, if it is free
MAX_PARAM_LENGTH = 6000  # characters of a param that MLflow takes


class SweepParentRun:
    """The parent run of a sweep; made before the first point, so that one process makes a new store."""

    def __init__(self, tracking: MlflowConfig, display: Display) -> None:
        """In the store and the experiment of the config.

        Raises:
            RunFailed: the store cannot be opened; the line says which.
        """
        self._display, self._uri = display, tracking.uri
        with self._raise_run_failed():
            self._client: MlflowClient = open_store(tracking.uri)
            self.experiment_id = get_or_create_experiment(self._client, tracking.uri, tracking.experiment)
        self.run_id: str | None = None

    @property
    def mlflow_ref(self) -> dict[str, str | bool | None]:
        """What the sweep's record keeps of it while it runs."""
        return {
            "uri": self._uri,
            "experiment_id": self.experiment_id,
            "run_id": self.run_id,
            "closed": False,
        }

    def start(self, sweep_dir: Path, state: Mapping[str, Any], params: Mapping[str, str]) -> None:
        """A new run, known by its folder and its process, with the grid as its params.

        Raises:
            RunFailed: the store does not take it.
        """
        tags = {
            "mlflow.user": getpass.getuser(),
            "mlflow.source.name": "captcha-exp",
            "mlflow.source.type": "LOCAL",
            "run_dir": str(sweep_dir),
            **{key: str(state[key]) for key in ("host", "pid", "process_started")},
        }
        named = [Param(key, value[:MAX_PARAM_LENGTH]) for key, value in params.items()]
        with self._raise_run_failed():
            created = self._client.create_run(self.experiment_id, tags=tags, run_name=sweep_dir.name)
            self.run_id = str(created.info.run_id)
            for start in range(0, len(named), PARAMS_PER_REQUEST):
                self._client.log_batch(self.run_id, params=named[start : start + PARAMS_PER_REQUEST])

    def resume(self, run_id: str) -> bool:
        """Whether the run of a sweep that is gone on with is there still: it, or all of the store, may have
        been deleted.

        Raises:
            RunFailed: the store does not take it.
        """
        with self._raise_run_failed():
            if not run_exists(self._client, run_id):
                return False
            self._client.update_run(run_id, status="RUNNING")
        self.run_id = run_id
        return True

    @contextlib.contextmanager
    def _raise_run_failed(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # MLflow lets exceptions of SQL, HTTP and files through as they come
            raise RunFailed(
                f"tracking.uri={self._uri}: MLflow cannot record there: {first_line(error)}; "
                "mend the store (captcha-exp doctor says how), or sweep with tracking=none"
            ) from error

    def finish(
        self, sweep_dir: Path, state: Mapping[str, Any], step_metrics: Sequence[StepMetrics], description: str
    ) -> bool:
        """Whether MLflow has taken the sweep's figures, by step, its table in words, its files, its end."""
        now = now_ms()
        rows = [MetricsRow(step, now, metrics) for step, metrics in step_metrics]
        assert self.run_id is not None
        try:
            send_metrics(self._client, self.run_id, rows)
            self._client.set_tag(self.run_id, "mlflow.note.content", description)
            send_artifacts(self._client, self.run_id, sweep_dir)
            send_status(self._client, self.run_id, state)
        except Exception as error:  # as above; the sweep's folder has it all, and `closing` sends it again
            self._display.warn(f"MLflow did not take the verdict: {first_line(error)}; the folder has it")
            return False
        return True


def ui_url(uri: str) -> str:
    """The address of the UI of a store: the server itself, or else what `captcha-exp ui` takes first."""
    return uri.rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{DEFAULT_PORT}"
