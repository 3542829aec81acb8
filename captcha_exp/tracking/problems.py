"""What can be wrong with a store, and the remedy. Does not import MLflow, which may be what fails."""

from typing import Literal

from captcha_exp.config.uri import absolute_uri, local_store_uri, sqlite_path
from captcha_exp.runtime.paths import root_dir, tracking_uri_variable

StoreStatus = Literal["new", "current", "older", "newer", "locked", "deleted", "broken", "unreachable"]
"""
new          missing or empty; the first run creates it
current      the schema of this MLflow version, or a server that answers
older        the schema of an older MLflow version
newer        the schema of a newer MLflow version
locked       another process holds the lock
deleted      the experiment was deleted
broken       not a store, or access is denied
unreachable  no answer in time
"""

_TEXTS = {
    "older": "created by an older MLflow",
    "newer": "created by a newer MLflow",
    "locked": "locked by another process",
    "deleted": "the experiment of this config is deleted",
    "unreachable": "does not answer",
    "broken": "cannot be used",
}


def source_of(uri: str) -> str:
    """Return what selects a resolved URI: MLFLOW_TRACKING_URI, tracking.uri=auto or tracking.uri."""
    variable = tracking_uri_variable()
    if variable is not None and absolute_uri(variable) == uri:
        return "MLFLOW_TRACKING_URI"
    if variable is None and uri == local_store_uri(root_dir()):
        return "tracking.uri=auto"
    return "tracking.uri" if variable is None else "tracking.uri, which precedes MLFLOW_TRACKING_URI"


def describe_problem(uri: str, status: StoreStatus, detail: str, is_written: bool = True) -> tuple[str, str]:
    """Return the problem of a store that cannot be used, and its remedy."""
    key = "MLFLOW_TRACKING_URI" if source_of(uri) == "MLFLOW_TRACKING_URI" else "tracking.uri"
    text = f"{key}={uri}: {_TEXTS[status]}" + (f" ({detail})" if detail else "")
    path, untracked = sqlite_path(uri), ", or train with tracking=none" if is_written else ""
    copy = "back it up, then: " if path is None else f'cp "{path}" "{path}.old" && '
    if detail.startswith("No module named"):
        repair = "install that module with python -m pip (psycopg2-binary, pymysql)"
    elif detail.endswith("is not writable"):
        repair = f"change the permissions, or name another file in {key}"
    elif uri.startswith("sqlite"):
        repair = f"name another file in {key}, or move this one away to get a new store"
    else:
        repair = f"correct {key}, or log in (MLFLOW_TRACKING_TOKEN)"
    remedies = {
        "older": f'{copy}mlflow db upgrade "{uri}"',
        "newer": "python -m pip install --upgrade mlflow, or another tracking.uri",
        "locked": f"close the program that has it open (captcha-exp ui, a database browser){untracked}",
        "deleted": "restore it (see mlflow experiments restore --help), or set another tracking.experiment",
        "unreachable": f"start the server, correct the address in {key}{untracked}",
        "broken": f"{repair}{untracked}",
    }
    return text, remedies[status]
