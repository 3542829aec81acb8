"""Close stale runs and sweeps in their directories and in MLflow.

MLflow is imported only if it lacks the end of a run and the store exists. Syncing sends the whole run again;
MLflow ignores rows that it already has.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captcha_exp.config import moved_store_uri, sqlite_path
from captcha_exp.errors import first_line
from captcha_exp.runs import (
    RunInfo,
    StaleRun,
    find_stale,
    read_metrics_rows,
    remove_partial_runs,
    stale_in,
    stale_lock,
)
from captcha_exp.runs.info import MlflowRef
from captcha_exp.runtime.paths import root_dir

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)


def close_stale_runs() -> list[Path]:
    """Close the stale runs and sweeps of this host, sync them to MLflow, and return their directories.

    Errors are reported as warnings, and the next start tries again.
    """
    remove_partial_runs()
    stale_runs = [stale for stale in find_stale() if stale.info.is_running or _unclosed_ref(stale)]
    if not stale_runs:
        return []
    try:
        with stale_lock() as granted:
            if not granted:
                return []  # another process is closing them
            stale_runs = [current for stale in stale_runs if (current := stale.reload()) is not None]
            closed = _close_runs(stale_runs)
            synced = [stale for stale in sync_all(stale_runs) if stale not in closed]
    except OSError as error:
        logger.warning(
            f"{root_dir() / 'outputs'}: cannot close stale runs: {error}; the next start tries again"
        )
        return []
    for stale in closed:
        logger.info(f"{_format_name(stale)}: process {stale.info.pid} has exited; marked KILLED")
    for stale in synced:
        logger.info(f"{_format_name(stale)}: synced to MLflow as {stale.info.status}")
    return [stale.run_dir for stale in (*closed, *synced)]


def finalize_run(run_dir: Path, error: str | None) -> None:
    """Close a run whose process has exited without doing so: FAILED with this error, KILLED without."""
    stale = stale_in(run_dir)
    if stale is not None:
        if stale.info.is_running:
            stale.finalize(error)
        sync_all([stale])


def _close_runs(stale_runs: Sequence[StaleRun[Any]]) -> list[StaleRun[Any]]:
    closed = []
    for stale in stale_runs:
        if stale.info.is_running:
            try:
                stale.finalize()
                closed.append(stale)
            except OSError as error:
                logger.warning(
                    f"{_format_name(stale)}: its process has exited, but it cannot be marked KILLED: {error}"
                )
    return closed


def _format_name(stale: StaleRun[Any]) -> str:
    return str(stale.run_dir.relative_to(root_dir()))


# -- MLflow --------------------------------------------------------------------------------------------------


def _unclosed_ref(stale: StaleRun[Any]) -> MlflowRef | None:
    """Return the reference to an MLflow run that lacks the end of the run, if the store may be reachable.

    A missing SQLite file is not an error: it was deleted, or its disk is not mounted.
    """
    ref = stale.info.mlflow
    if ref is None or ref.closed:
        return None
    ref = ref.model_copy(update={"uri": moved_store_uri(ref.uri, root_dir())})
    path = sqlite_path(ref.uri)
    return ref if path is None or path.is_file() else None


def sync_all(ended_runs: Sequence[StaleRun[Any]]) -> list[StaleRun[Any]]:
    """Sync the closed runs to their stores, and return those that MLflow has now."""
    by_store: dict[str, list[StaleRun[Any]]] = {}
    for run in ended_runs:
        if not run.info.is_running and (ref := _unclosed_ref(run)):
            by_store.setdefault(ref.uri, []).append(run)
    return [run for uri, group in by_store.items() for run in _sync_to_store(uri, group)]


def _sync_to_store(uri: str, stale_runs: Sequence[StaleRun[Any]]) -> list[StaleRun[Any]]:
    from mlflow import MlflowClient

    from captcha_exp.tracking.store import inspect_store

    status, detail = inspect_store(uri, "")
    problem = f"the store is {status}" + (f" ({detail})" if detail else "")
    if status in ("current", "new"):  # a new store has none of the runs, and stays empty
        problem = ""
    synced: list[StaleRun[Any]] = []
    num_handled = 0
    for stale in () if problem else stale_runs:
        try:
            run_id = _sync_run(MlflowClient(uri), stale) if status == "current" else None
            stale.update_mlflow(run_id=run_id or stale.info.run_id, closed=True)
            num_handled += 1
            synced += [stale] if run_id is not None else []
        except Exception as error:  # MLflow does not wrap SQL, HTTP and file errors
            problem = first_line(error)
            if inspect_store(uri, "")[0] != "current":
                break  # the store became unreachable: the other runs would wait for a timeout each
    if problem:
        count = f"{len(stale_runs) - num_handled} of {len(stale_runs)} runs"
        logger.warning(f"{uri}: {count} not synced to MLflow: {problem}; the next start tries again")
    return synced


def _sync_run(client: "MlflowClient", stale: StaleRun[Any]) -> str | None:
    """Send the whole run to MLflow and return its run ID; None if it was deleted in MLflow."""
    from captcha_exp.tracking.store import send_artifacts, send_metrics, send_tags

    run_id, info = _find_run_id(client, stale), stale.info
    if run_id is None:
        return None
    stale.remove_partial_files()  # a run that ended by itself still has them
    logger.debug(f"sending {stale.run_dir} to MLflow run {run_id}")
    tags = dict(info.tags) if isinstance(info, RunInfo) else {}
    if (summary := stale.run_dir / "summary.md").is_file():  # of a sweep
        tags["mlflow.note.content"] = summary.read_text(encoding="utf-8")
    send_tags(client, run_id, tags)
    send_metrics(client, run_id, read_metrics_rows(stale.run_dir)[0])
    send_artifacts(client, run_id, stale.run_dir)
    ended = None if info.ended is None else int(info.ended.timestamp() * 1000)
    client.set_terminated(run_id, info.status, end_time=ended)
    return run_id


def _find_run_id(client: "MlflowClient", stale: StaleRun[Any]) -> str | None:
    from captcha_exp.tracking.store import run_exists

    ref = stale.info.mlflow
    assert ref is not None  # only runs that need a sync come here
    if ref.run_id is None:  # killed while MLflow created the run
        candidates = client.search_runs([ref.experiment_id], f"tags.pid = '{stale.info.pid}'")
        ids = (run.info.run_id for run in candidates if run.data.tags.get("run_dir") == str(stale.run_dir))
        return next(ids, None)
    return ref.run_id if run_exists(client, ref.run_id) else None
