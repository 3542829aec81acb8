"""The end of runs and sweeps whose process is gone, in their folders and in MLflow.

MLflow is imported only where it lacks an end and its store is there. What it has already, it keeps once: all
of a run is sent again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captcha_exp.runs import (
    StaleRun,
    Status,
    find_stale,
    read_metrics_rows,
    remove_partial_runs,
    stale_in,
    stale_lock,
)
from captcha_exp.runtime.console import Display, escape_unprintable
from captcha_exp.runtime.paths import root_dir
from captcha_exp.tracking.uri import sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient


def close_stale_runs(display: Display) -> list[Path]:
    """The folders of runs and sweeps whose end was written now, there or in MLflow: their process, of this
    host, is gone.

    Nothing raises: what cannot be closed is told in a line and tried again at the next start.
    """
    remove_partial_runs()
    left = [each for each in find_stale() if each.is_running or _can_sync(each)]
    if not left:
        return []
    try:
        with stale_lock() as granted:
            if not granted:
                return []  # another process is closing them
            left = [now for each in left if (now := each.reload()) is not None]
            closed = _close_runs(left, display)
            sent = [each for each in _sync_all(left, display) if each not in closed]
    except OSError as error:
        display.warn(f"{root_dir() / 'outputs'}: runs whose process is gone cannot be closed: {error}")
        return []
    for each in closed:
        display.info(f"{_format_name(each)}: its process {each.state['pid']} is gone; closed as KILLED")
    for each in sent:
        display.info(f"{_format_name(each)}: MLflow has its end now, {each.state['status']}")
    return [each.run_dir for each in (*closed, *sent)]


def finalize_run(run_dir: Path, status: Status, error: str, display: Display) -> None:
    """The end of the run in this folder, if its process, which this one has seen end, has not written it."""
    left = stale_in(run_dir)
    if left is not None:
        if left.is_running:
            left.close(status, error)
        _sync_all([left], display)


def _close_runs(stale_runs: Sequence[StaleRun], display: Display) -> list[StaleRun]:
    closed = []
    for each in stale_runs:
        if each.is_running:
            try:
                each.close()
                closed.append(each)
            except OSError as error:
                display.warn(
                    f"{_format_name(each)}: its process is gone, and its end cannot be written: {error}"
                )
    return closed


def _format_name(stale: StaleRun) -> str:
    return escape_unprintable(str(stale.run_dir.relative_to(root_dir())))


# -- MLflow --------------------------------------------------------------------------------------------------


def _can_sync(stale: StaleRun) -> bool:
    """Whether MLflow lacks the end, and its store may be there.

    A file that is gone is looked for and no more: it was deleted, or its disk is away and comes back.
    """
    if not stale.needs_sync or not _store_uri(stale):
        return False
    path = sqlite_path(_store_uri(stale))
    return path is None or path.is_file()


def _store_uri(stale: StaleRun) -> str:
    uri = stale.state["mlflow"].get("uri")
    return uri if isinstance(uri, str) else ""


def _sync_all(stale_runs: Sequence[StaleRun], display: Display) -> list[StaleRun]:
    """Those whose end MLflow has taken."""
    by_store: dict[str, list[StaleRun]] = {}
    for each in stale_runs:
        if not each.is_running and _can_sync(each):
            by_store.setdefault(_store_uri(each), []).append(each)
    return [each for uri, several in by_store.items() for each in _sync_to_store(uri, several, display)]


def _sync_to_store(uri: str, stale_runs: Sequence[StaleRun], display: Display) -> list[StaleRun]:
    from mlflow import MlflowClient

    from captcha_exp.tracking.store import first_line, inspect_store

    state, words = inspect_store(uri, "")
    trouble = f"it is {state}" + (f" ({words})" if words else "")
    if state == "silent":
        trouble = "it does not answer"
    elif state in ("current", "new"):  # a store without a table has none of the runs, and is left without
        trouble = ""
    taken: list[StaleRun] = []
    done = 0
    for each in () if trouble else stale_runs:
        try:
            run_id = _sync_run(MlflowClient(uri), each) if state == "current" else None
            known = each.state["mlflow"]
            each.update(mlflow={**known, "run_id": run_id or known.get("run_id"), "closed": True})
            done += 1
            taken += [each] if run_id is not None else []
        except Exception as error:  # as in MlflowTracker.start
            trouble = first_line(error)
            if inspect_store(uri, "")[0] != "current":
                break  # it went away: each of the others would wait for it in vain
    if trouble:
        of = f"{len(stale_runs) - done} of {len(stale_runs)} runs whose process is gone"
        display.warn(
            f"{escape_unprintable(uri)}: did not take the end of {of}: {trouble}; the next start tries again"
        )
    return taken


def _sync_run(client: "MlflowClient", stale: StaleRun) -> str | None:
    """The id of the run in MLflow, which has all of it now; None where it was deleted there."""
    from captcha_exp.tracking.tracker import send_artifacts, send_metrics, send_status

    run_id = _find_run_id(client, stale)
    if run_id is not None:
        stale.remove_partial_files()  # those of its very end, which nobody had to write
        send_metrics(client, run_id, read_metrics_rows(stale.run_dir)[0])
        send_artifacts(client, run_id, stale.run_dir)
        send_status(client, run_id, stale.state)
    return run_id


def _find_run_id(client: "MlflowClient", stale: StaleRun) -> str | None:
    from captcha_exp.tracking.store import run_exists

    known = stale.state["mlflow"]
    if known.get("run_id") is None:  # killed while MLflow made the run
        found = client.search_runs([known["experiment_id"]], f"tags.pid = '{stale.state['pid']}'")
        ids = (run.info.run_id for run in found if run.data.tags.get("run_dir") == str(stale.run_dir))
        return next(ids, None)
    return str(known["run_id"]) if run_exists(client, known["run_id"]) else None
