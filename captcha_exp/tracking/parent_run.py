"""The run in MLflow that stands above the runs of a sweep."""

import contextlib
import getpass
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mlflow import MlflowClient
from mlflow.entities import Param

from captcha_exp.config import Mlflow
from captcha_exp.errors import RunFailed
from captcha_exp.runs import MetricsRow, now_ms
from captcha_exp.runtime.console import Display
from captcha_exp.tracking.store import experiment_id, first_line, is_there, open_store
from captcha_exp.tracking.tracker import BATCH, send_end, send_files, send_rows

Figures: TypeAlias = tuple[int, Mapping[str, float]]
"""step, and metrics"""

PORT = 5000  # of the UI, if it is free
LONGEST = 6000  # characters of a param that MLflow takes


class Parent:
    """The parent run of a sweep; made before the first point, so that one process makes a new store."""

    def __init__(self, tracking: Mlflow, display: Display) -> None:
        """In the store and the experiment of the config.

        Raises:
            RunFailed: the store cannot be opened; the line says which.
        """
        self._display, self._uri = display, tracking.uri
        with self._refused():
            self._client: MlflowClient = open_store(tracking.uri)
            self.experiment_id = experiment_id(self._client, tracking.uri, tracking.experiment)
        self.run_id: str | None = None

    @property
    def noted(self) -> dict[str, str | bool | None]:
        """What the sweep's record keeps of it while it runs."""
        return {
            "uri": self._uri,
            "experiment_id": self.experiment_id,
            "run_id": self.run_id,
            "closed": False,
        }

    def begin(self, folder: Path, state: Mapping[str, Any], params: Mapping[str, str]) -> None:
        """A new run, known by its folder and its process, with the grid as its params.

        Raises:
            RunFailed: the store does not take it.
        """
        tags = {
            "mlflow.user": getpass.getuser(),
            "mlflow.source.name": "captcha-exp",
            "mlflow.source.type": "LOCAL",
            "folder": str(folder),
            **{key: str(state[key]) for key in ("host", "pid", "process_started")},
        }
        named = [Param(key, value[:LONGEST]) for key, value in params.items()]
        with self._refused():
            created = self._client.create_run(self.experiment_id, tags=tags, run_name=folder.name)
            self.run_id = str(created.info.run_id)
            for start in range(0, len(named), BATCH):
                self._client.log_batch(self.run_id, params=named[start : start + BATCH])

    def go_on(self, run_id: str) -> bool:
        """Whether the run of a sweep that is gone on with is there still: it, or all of the store, may have
        been deleted.

        Raises:
            RunFailed: the store does not take it.
        """
        with self._refused():
            if not is_there(self._client, run_id):
                return False
            self._client.update_run(run_id, status="RUNNING")
        self.run_id = run_id
        return True

    @contextlib.contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # MLflow lets exceptions of SQL, HTTP and files through as they come
            raise RunFailed(
                f"tracking.uri={self._uri}: MLflow cannot record there: {first_line(error)}; "
                "mend the store (captcha-exp doctor says how), or sweep with tracking=none"
            ) from error

    def finish(
        self, folder: Path, state: Mapping[str, Any], figures: Sequence[Figures], description: str
    ) -> bool:
        """Whether MLflow has taken the sweep's figures, by step, its table in words, its files, its end."""
        now = now_ms()
        rows = [MetricsRow(step, now, metrics) for step, metrics in figures]
        assert self.run_id is not None
        try:
            send_rows(self._client, self.run_id, rows)
            self._client.set_tag(self.run_id, "mlflow.note.content", description)
            send_files(self._client, self.run_id, folder)
            send_end(self._client, self.run_id, state)
        except Exception as error:  # as above; the sweep's folder has it all, and `closing` sends it again
            self._display.warn(f"MLflow did not take the verdict: {first_line(error)}; the folder has it")
            return False
        return True


def server_of(uri: str) -> str:
    """The address of the UI of a store: the server itself, or else what `captcha-exp ui` takes first."""
    return uri.rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{PORT}"
