"""The end of runs and sweeps whose process is gone, in their folders and in MLflow.

MLflow is imported only where it lacks an end and its store is there. What it has already, it keeps once: all
of a run is sent again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captcha_exp.runs import Left, Status, alone, left_in, left_open, read_rows, remove_abandoned
from captcha_exp.runtime.console import Display, shown
from captcha_exp.runtime.paths import root
from captcha_exp.tracking.uri import sqlite_file

if TYPE_CHECKING:
    from mlflow import MlflowClient


def close_dead(display: Display) -> list[Path]:
    """The folders of runs and sweeps whose end was written now, there or in MLflow: their process, of this
    host, is gone.

    Nothing raises: what cannot be closed is told in a line and tried again at the next start.
    """
    remove_abandoned()
    left = [each for each in left_open() if each.runs or _may_be_sent(each)]
    if not left:
        return []
    try:
        with alone() as granted:
            if not granted:
                return []  # another process is closing them
            left = [now for each in left if (now := each.again()) is not None]
            closed = _close_folders(left, display)
            sent = [each for each in _send(left, display) if each not in closed]
    except OSError as error:
        display.warn(f"{root() / 'outputs'}: runs whose process is gone cannot be closed: {error}")
        return []
    for each in closed:
        display.line(f"{_name(each)}: its process {each.state['pid']} is gone; closed as KILLED")
    for each in sent:
        display.line(f"{_name(each)}: MLflow has its end now, {each.state['status']}")
    return [each.folder for each in (*closed, *sent)]


def close_left(folder: Path, status: Status, error: str, display: Display) -> None:
    """The end of the run in this folder, if its process, which this one has seen end, has not written it."""
    left = left_in(folder)
    if left is not None:
        if left.runs:
            left.close(status, error)
        _send([left], display)


def _close_folders(left: Sequence[Left], display: Display) -> list[Left]:
    closed = []
    for each in left:
        if each.runs:
            try:
                each.close()
                closed.append(each)
            except OSError as error:
                display.warn(f"{_name(each)}: its process is gone, and its end cannot be written: {error}")
    return closed


def _name(left: Left) -> str:
    return shown(str(left.folder.relative_to(root())))


# -- MLflow --------------------------------------------------------------------------------------------------


def _may_be_sent(left: Left) -> bool:
    """Whether MLflow lacks the end, and its store may be there.

    A file that is gone is looked for and no more: it was deleted, or its disk is away and comes back.
    """
    if not left.unsent or not _uri(left):
        return False
    path = sqlite_file(_uri(left))
    return path is None or path.is_file()


def _uri(left: Left) -> str:
    uri = left.state["mlflow"].get("uri")
    return uri if isinstance(uri, str) else ""


def _send(left: Sequence[Left], display: Display) -> list[Left]:
    """Those whose end MLflow has taken."""
    by_store: dict[str, list[Left]] = {}
    for each in left:
        if not each.runs and _may_be_sent(each):
            by_store.setdefault(_uri(each), []).append(each)
    return [each for uri, several in by_store.items() for each in _send_to(uri, several, display)]


def _send_to(uri: str, left: Sequence[Left], display: Display) -> list[Left]:
    from mlflow import MlflowClient

    from captcha_exp.tracking.store import first_line, look_at_store

    state, words = look_at_store(uri, "")
    trouble = f"it is {state}" + (f" ({words})" if words else "")
    if state == "silent":
        trouble = "it does not answer"
    elif state in ("current", "new"):  # a store without a table has none of the runs, and is left without
        trouble = ""
    taken: list[Left] = []
    done = 0
    for each in () if trouble else left:
        try:
            run_id = _send_one(MlflowClient(uri), each) if state == "current" else None
            known = each.state["mlflow"]
            each.note(mlflow={**known, "run_id": run_id or known.get("run_id"), "closed": True})
            done += 1
            taken += [each] if run_id is not None else []
        except Exception as error:  # as in MlflowTracker.start
            trouble = first_line(error)
            if look_at_store(uri, "")[0] != "current":
                break  # it went away: each of the others would wait for it in vain
    if trouble:
        of = f"{len(left) - done} of {len(left)} runs whose process is gone"
        display.warn(f"{shown(uri)}: did not take the end of {of}: {trouble}; the next start tries again")
    return taken


def _send_one(client: "MlflowClient", left: Left) -> str | None:
    """The id of the run in MLflow, which has all of it now; None where it was deleted there."""
    from captcha_exp.tracking.tracker import send_end, send_files, send_rows

    run_id = _run_id(client, left)
    if run_id is not None:
        left.remove_parts()  # those of its very end, which nobody had to write
        send_rows(client, run_id, read_rows(left.folder)[0])
        send_files(client, run_id, left.folder)
        send_end(client, run_id, left.state)
    return run_id


def _run_id(client: "MlflowClient", left: Left) -> str | None:
    from captcha_exp.tracking.store import is_there

    known = left.state["mlflow"]
    if known.get("run_id") is None:  # killed while MLflow made the run
        found = client.search_runs([known["experiment_id"]], f"tags.pid = '{left.state['pid']}'")
        ids = (run.info.run_id for run in found if run.data.tags.get("folder") == str(left.folder))
        return next(ids, None)
    return str(known["run_id"]) if is_there(client, known["run_id"]) else None
