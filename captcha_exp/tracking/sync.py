"""Close stale runs and sweeps in their directories, and deliver to MLflow everything it lacks.

MLflow is imported only if something is owed to a store that may be reachable.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from captcha_exp.config import is_inside, sqlite_path
from captcha_exp.errors import UserError
from captcha_exp.runs import StaleRun, find_stale, remove_partial_runs, stale_in, stale_lock
from captcha_exp.runs.info import InfoT
from captcha_exp.runtime.paths import root_dir
from captcha_exp.tracking.content import current_ref
from captcha_exp.tracking.delivery import Delivery, RunDeletedError, StoreError, shorten

logger = logging.getLogger(__name__)

BACKGROUND_SECONDS = 5.0
SYNC_LOCK_SECONDS = 10.0
LOCK_TIMEOUT_SECONDS = 10.0  # another process may write to the record


def close_stale_runs() -> list[Path]:
    """Mark the stale runs and sweeps of this host as KILLED, and return their directories.

    Errors are reported as warnings, and the next start tries again.
    """
    remove_partial_runs()
    if not any(stale.info.is_running for stale in find_stale()):
        return []
    closed = []
    try:
        with stale_lock() as granted:
            for stale in find_stale() if granted else ():  # else another process is closing them
                if stale.info.is_running and _close(stale):
                    closed.append(stale.run_dir)
    except OSError as error:
        logger.warning(
            f"{root_dir() / 'outputs'}: cannot close stale runs: {error}; the next start tries again"
        )
    return closed


def finalize_run(run_dir: Path, error: str | None) -> None:
    """Close a run whose process has exited without doing so: FAILED with this error, KILLED without."""
    stale = stale_in(run_dir)
    if stale is not None and stale.info.is_running:
        stale.finalize(error)
        if stale.needs_sync:
            _run_in_background(lambda: sync_owed([stale]))


def _close(stale: StaleRun[Any]) -> bool:
    name = format_dir(stale.run_dir)
    try:
        stale.finalize()
    except OSError as error:
        logger.warning(f"{name}: its process has exited, but it cannot be marked KILLED: {error}")
        return False
    logger.info(f"{name}: process {stale.info.pid} has exited; marked KILLED")
    return True


def format_dir(run_dir: Path) -> str:
    """Return the path of a run relative to the root directory."""
    return str(run_dir.relative_to(root_dir()) if run_dir.is_relative_to(root_dir()) else run_dir)


# -- MLflow --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SyncResult:
    """What MLflow got of an ended run or sweep that it did not have completely."""

    run_dir: Path
    uri: str
    run_id: str | None
    delivered: list[str]
    problem: str | None
    """why MLflow does not have the rest"""
    is_deleted: bool = False
    """the run was deleted in MLflow, and is not sent again"""

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON."""
        return {**asdict(self), "run_dir": str(self.run_dir)}

    def __str__(self) -> str:
        """Return one line."""
        parts = [f"delivered {', '.join(self.delivered)}"] if self.delivered else []
        if self.problem is not None:
            parts.append(f"not delivered: {self.problem}" if not parts else f"then failed: {self.problem}")
        if self.is_deleted:
            parts.append(f"run {self.run_id} was deleted in MLflow, and is not sent again")
        return f"{format_dir(self.run_dir)}: {self.uri}: {'; '.join(parts) or 'has it already'}"


class _OwedRun(StaleRun[InfoT]):
    """An ended run of another process, which may be resumed while it is delivered."""

    def update_mlflow(self, **fields: Any) -> None:
        with stale_lock(LOCK_TIMEOUT_SECONDS) as granted:
            current = StaleRun.load(type(self.info), self.run_dir)
            if not granted or current is None or current.info.ended != self.info.ended:
                raise StoreError("the run was resumed, or another process writes its record")
            self.info = current.info
            super().update_mlflow(**fields)


def sync_in_background() -> None:
    """Deliver all that is owed, and wait for it for a few seconds at most."""
    if any(map(_may_be_reachable, find_owed())):
        _run_in_background(sync_reachable)


def sync_reachable(should_stop: Callable[[], bool] = lambda: False) -> list[SyncResult]:
    """Deliver what is owed to stores that may be reachable, and log the deliveries."""
    results = sync_owed(list(filter(_may_be_reachable, find_owed())), should_stop)
    for result in results:
        if result.problem is None:
            logger.log(logging.WARNING if result.is_deleted else logging.INFO, str(result))
    if failed := [result for result in results if result.problem is not None]:
        number = "1 earlier run" if len(failed) == 1 else f"{len(failed)} earlier runs"
        logger.info(
            f"{failed[0].uri}: lacks the end of {number}: {failed[0].problem}; captcha-exp sync delivers it"
        )
    return results


def find_owed() -> list[StaleRun[Any]]:
    """Return the ended runs and sweeps that MLflow does not have completely, a sweep before its jobs."""
    return [stale for stale in find_stale() if not stale.info.is_running]


def redirect(owed: Sequence[StaleRun[Any]], uri: str) -> None:
    """Owe these runs to another store, which gets them from their start.

    Raises:
        UserError: the store cannot be used now; nothing has been changed.
    """
    from captcha_exp.tracking.inspection import inspect_store
    from captcha_exp.tracking.problems import describe_problem

    status, detail = inspect_store(uri, "")
    path = sqlite_path(uri)
    if status == "new" and path is not None and not is_inside(path, root_dir()):
        raise UserError(f"sync --to {uri}: {path} does not exist; name an existing store, or auto")
    if status not in ("new", "current", "locked"):
        raise UserError("; ".join(describe_problem(uri, status, detail, is_written=False)))
    for stale in owed:
        if current_ref(stale.info).uri != uri:
            _OwedRun(stale.run_dir, stale.info).update_mlflow(uri=uri, experiment_id=None, run_id=None)


def sync_owed(
    owed: Sequence[StaleRun[Any]], should_stop: Callable[[], bool] = lambda: False, timeout: float = 0
) -> list[SyncResult]:
    """Deliver ended runs, and return a result for each; one process at a time does so.

    Raises:
        UserError: another process does so for more than `timeout` seconds.
    """
    import filelock

    results: list[SyncResult] = []
    if not owed:
        return results
    unreachable: dict[str, str] = {}  # its other runs would wait for a timeout each
    try:
        with filelock.FileLock(root_dir() / "outputs" / ".sync.lock", timeout=timeout):
            for stale in owed:
                if should_stop():
                    break
                results.append(_sync_run(stale, unreachable))
    except filelock.Timeout:
        raise UserError("sync: another process delivers runs to MLflow now; try again later") from None
    return results


def _sync_run(stale: StaleRun[Any], unreachable: dict[str, str]) -> SyncResult:
    run = _OwedRun(stale.run_dir, stale.info)
    delivery, uri, is_deleted = Delivery(run), current_ref(stale.info).uri, False
    problem = unreachable.get(uri)
    try:
        if problem is None:
            delivery.complete()
    except RunDeletedError:
        is_deleted = True
        run.update_mlflow(closed=True, owed=[])
    except Exception as error:  # MLflow does not wrap SQL, HTTP and file errors
        from captcha_exp.tracking.inspection import inspect_store

        problem = shorten(error)
        if inspect_store(uri, "")[0] != "current":
            unreachable[uri] = problem
    return SyncResult(run.run_dir, uri, run.info.run_id, delivery.describe_sent(), problem, is_deleted)


def _may_be_reachable(stale: StaleRun[Any]) -> bool:
    """Return False if the SQLite file with the run is missing: deleted, or its disk is not mounted."""
    ref = current_ref(stale.info)
    path = sqlite_path(ref.uri)
    return ref.run_id is None or path is None or path.is_file()


def _run_in_background(function: Callable[[], object]) -> None:
    """Run a function in a thread, and wait for it for a few seconds at most."""

    def run() -> None:
        try:
            function()
        except (UserError, OSError) as error:  # left for the next time
            logger.debug(f"not synced: {error}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(BACKGROUND_SECONDS)
