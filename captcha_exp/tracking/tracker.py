"""The `Tracker` that logs to MLflow from a thread.

The run directory is written first and is complete without MLflow. The thread sends its new content, so a
store that is slow, away or absent costs a training nothing: no queue can overflow, and what a killed process
did not send is still in the directory. MLflow is imported in the thread, after the first step of a training:
the import would take as long as all before that step, and slow it down.
"""

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from captcha_exp.config import Config, MlflowConfig, sqlite_path
from captcha_exp.runs import MetricsRow, RecordedDir, Run
from captcha_exp.runs.info import MlflowRef
from captcha_exp.runtime import startup
from captcha_exp.tracking.content import ParentMissingError, current_ref
from captcha_exp.tracking.delivery import Delivery, RunDeletedError, shorten
from captcha_exp.tracking.sync import sync_reachable

logger = logging.getLogger(__name__)

MAX_START_SECONDS = 10.0
"""maximum wait for the first step: a training that renders its images first is in MLflow meanwhile"""
SEND_INTERVAL_SECONDS = 2.0  # epochs that follow each other faster are sent together
RETRY_INTERVAL_SECONDS = 5.0  # after the first failure; doubled by each further one
MAX_RETRY_INTERVAL_SECONDS = 60.0
PARENT_INTERVAL_SECONDS = 1.0
END_SECONDS = 10.0
"""maximum wait at the end of a run; the rest is delivered later"""
LOCAL_END_SECONDS = 60.0
"""the same for a SQLite file, whose errors do not keep anyone waiting"""
STOP_END_SECONDS = 5.0
"""the same for a run that was stopped, for example by SIGTERM"""


class Sender:
    """Keeps MLflow up to date with a run or sweep, from a thread."""

    def __init__(
        self,
        recorded: RecordedDir[Any],
        tracking: MlflowConfig,
        run_name: str | None = None,
        tags: Mapping[str, str] | None = None,
        start: threading.Event | None = None,
    ) -> None:
        """Record where the run will be in MLflow, and start to send it, once `start` is set if it is given.

        Raises:
            RunFailed: tracking.required is set, and the store cannot be used.
        """
        ref = None if recorded.info.mlflow is None else current_ref(recorded.info)  # of a resumed run
        if ref is None or ref.uri != tracking.uri:
            ref = MlflowRef(uri=tracking.uri)
        changes = {"closed": False, "owed": [], "run_name": run_name, "tags": dict(tags or {})}
        recorded.update(mlflow=ref.model_copy(update=changes))
        self._recorded, self._delivery = recorded, Delivery(recorded)
        self._has_news, self._is_ending = threading.Event(), threading.Event()
        self._was_lost = self._was_back = False
        self._start = start
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        if tracking.required:
            from captcha_exp.tracking.store import raise_run_failed

            with raise_run_failed(tracking.uri):
                self._delivery.update()
        self._thread.start()

    def notify(self) -> None:
        """Note that the directory has new content."""
        self._has_news.set()

    def finish(self) -> None:
        """Send the end of the run, and record what is still owed to MLflow after a limited time."""
        info = self._recorded.info
        limit = END_SECONDS if sqlite_path(info.mlflow.uri) is None else LOCAL_END_SECONDS
        self._is_ending.set()
        self._has_news.set()
        if self._start is not None:
            self._start.set()
        if info.status == "KILLED":
            limit = min(limit, STOP_END_SECONDS)
        try:
            self._thread.join(limit)
        finally:
            if self._thread.is_alive():
                self._report_loss(f"did not take the end of the run within {limit:g} s")
            if not self._recorded.info.mlflow.closed:
                self._recorded.update_mlflow(owed=self._delivery.describe_owed())

    def _run(self) -> None:
        if self._start is not None:
            self._start.wait(MAX_START_SECONDS)
        has_synced_others = is_last = False
        pause = RETRY_INTERVAL_SECONDS
        while not is_last:
            self._has_news.clear()
            is_last = self._is_ending.is_set()
            try:
                if is_last:
                    self._delivery.complete()
                    return
                self._delivery.update()
                self._report_return()
                pause = RETRY_INTERVAL_SECONDS
                if not has_synced_others:
                    has_synced_others = True
                    sync_reachable(self._is_ending.is_set)
                self._is_ending.wait(SEND_INTERVAL_SECONDS)
                self._has_news.wait()
            except RunDeletedError:
                self._report_deleted()
                return
            except ParentMissingError:  # its own process is about to send it
                self._is_ending.wait(PARENT_INTERVAL_SECONDS)
                if is_last and sqlite_path(self._recorded.info.mlflow.uri) is not None:
                    is_last = False  # a local store is not away; `finish` limits the wait
                    time.sleep(PARENT_INTERVAL_SECONDS)
            except Exception as error:  # MLflow does not wrap SQL, HTTP and file errors
                has_synced_others = False
                self._report_loss(shorten(error))
                self._is_ending.wait(pause)
                pause = min(2 * pause, MAX_RETRY_INTERVAL_SECONDS)

    def _report_loss(self, reason: str) -> None:
        """Warn once; a server that comes and goes is reported by the end of the run only."""
        uri = self._recorded.info.mlflow.uri
        # The process of a sweep has warned if the sweep itself is not in MLflow.
        is_known = self._was_lost or self._delivery.waits_for_parent()
        level = logging.DEBUG if is_known else logging.WARNING
        self._was_lost = True
        logger.log(
            level,
            f"tracking.uri={uri}: {reason}; the run continues, and MLflow gets the rest once it answers, or "
            "by captcha-exp sync",
        )

    def _report_return(self) -> None:
        if self._was_lost and not self._was_back:
            self._was_back = True
            logger.warning(
                f"tracking.uri={self._recorded.info.mlflow.uri}: answers again; MLflow is up to date"
            )

    def _report_deleted(self) -> None:
        """Warn that nothing more is sent: deleting a run in MLflow is a decision of the user."""
        ref = self._recorded.info.mlflow
        logger.warning(
            f"tracking.uri={ref.uri}: run {ref.run_id} was deleted there; its directory is complete"
        )
        self._recorded.update_mlflow(closed=True, owed=[])


class MlflowTracker:
    """Logs a training as an MLflow run."""

    def __init__(self, choices: Mapping[str, str] | None = None, run_name: str | None = None) -> None:
        """Initialize the tracker.

        Args:
            choices: Conf group -> name of the chosen file; logged as tags.
            run_name: Name of the MLflow run; defaults to the name of the run directory.
        """
        self._run_name = run_name
        self._tags = {f"choice.{group}": choice for group, choice in (choices or {}).items()}
        self._sender: Sender | None = None

    def start(self, run: Run, config: Config) -> None:
        """Start to send the run; its params, tags and parent are read from its directory.

        Raises:
            RunFailed: tracking.required is set, and the store cannot be used.
        """
        assert isinstance(config.tracking, MlflowConfig)  # `make_tracker` checks this
        self._sender = Sender(run, config.tracking, self._run_name, self._tags, startup.first_step)

    def log_metrics(self, row: MetricsRow) -> None:  # noqa: ARG002  the thread reads it from the run
        """Let the thread send the new row."""
        if self._sender is not None:
            self._sender.notify()

    def finish(self) -> None:
        """Send the rest, the files as artifacts, and the final status, in a limited time."""
        if self._sender is not None:
            self._sender.finish()
