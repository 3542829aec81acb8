"""The store that MLflow keeps runs in: opened, made when it is new, found by name; or only looked at."""

import contextlib
import logging
import os
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import filelock
import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from captcha_exp.tracking.uri import sqlite_path

# MLflow tells in detail how it sets up its own tables.
logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


def open_store(uri: str) -> MlflowClient:
    """A client of the store; a store in a new SQLite file is made first, by one process at a time."""
    if path := sqlite_path(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_suffix(".lock"), timeout=60):
            if not path.exists():
                _create_sqlite_store(path)
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)  # brings the tables of an older one up to date
            return client
    return MlflowClient(uri)


def _create_sqlite_store(path: Path) -> None:
    """A new store, whole or not at all: MLflow makes tables one by one, and never opens one that was cut."""
    making, whole = (path.with_name(f".{path.name}.{what}") for what in ("making", "whole"))
    for left in path.parent.glob(f".{path.name}.*"):  # of a process that was killed
        left.unlink()
    # The first question makes the tables.
    MlflowClient(f"sqlite:///{making}").search_experiments(max_results=1)
    # A copy, which nobody has open, as MLflow keeps its connection.
    with closing(sqlite3.connect(making)) as made, closing(sqlite3.connect(whole)) as copy:
        made.backup(copy)
    whole.replace(path)
    with contextlib.suppress(PermissionError):  # Windows removes no open file; the next one does
        making.unlink()


def get_or_create_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """The id of an experiment, made when it is new.

    The place of its artifacts is stored as an absolute path: a relative one would mean another folder to
    whoever starts the UI elsewhere.
    """
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    path = sqlite_path(uri)
    location = (path.parent / "artifacts").resolve().as_uri() if path else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:
        if found := client.get_experiment_by_name(name):  # another process made it in between
            return str(found.experiment_id)
        raise


def run_exists(client: MlflowClient, run_id: str) -> bool:
    """Whether the store has the run, and it was not deleted."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return bool(run.info.lifecycle_stage == "active")


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# -- looked at, not opened ------------------------------------------------------------------------------

StoreStatus = Literal["new", "current", "older", "newer", "locked", "deleted", "broken", "silent"]
RESPONSE_TIMEOUT_SECONDS = 8.0
LOCK_TIMEOUT_SECONDS = 2.0


def inspect_store(uri: str, experiment: str) -> tuple[StoreStatus, str]:
    """How a store would take a run, and its own words where there are any; nothing is made or changed.

    Opening it would make one that is not there, and may bring the tables of an old one up to date.

        new       there is none yet, or an empty one: the first run makes it
        current   made by this version of MLflow, or a server that answers
        older     made by an older one; `newer`: by a newer one
        locked    another process has it for longer than a moment
        deleted   the experiment was deleted in it: it takes no run
        broken    it is no store, or refuses us; `silent`: no answer within seconds
    """
    answer: list[tuple[StoreStatus, str]] = []

    def look() -> None:
        try:
            if path := sqlite_path(uri):
                answer.append(_inspect_file(path, experiment))
            elif urlsplit(uri).scheme.partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql"):
                answer.append(_inspect_database(uri))
            else:
                answer.append(_inspect_server(uri))
        except Exception as error:  # as MlflowTracker.start: they come as they come
            answer.append(("broken", first_line(error)))

    # A thread, for a name server or a database that never answers has no time limit of its own.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(RESPONSE_TIMEOUT_SECONDS)
    return answer[0] if answer else ("silent", f"no answer within {RESPONSE_TIMEOUT_SECONDS:.0f} s")


def _inspect_file(path: Path, experiment: str) -> tuple[StoreStatus, str]:
    standing = next(place for place in (path, *path.parents) if place.exists())
    if standing != path:
        return ("new", "") if standing.is_dir() else ("broken", f"{standing} is a file, not a folder")
    lock = path.with_suffix(".lock")
    try:
        if lock.exists():  # open_store would wait for it without end
            with filelock.FileLock(lock, timeout=LOCK_TIMEOUT_SECONDS):
                pass
        with closing(_connect(path, "ro")) as database:
            names = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            if not names - {"alembic_version"}:
                return "new", ""
            if "alembic_version" not in names:
                return "broken", "a database, but not one of MLflow's"
            (revision,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
            if (state := _schema_status(revision)) != "current":
                return state, f"schema {revision}"
            query = "SELECT lifecycle_stage FROM experiments WHERE name = ?"
            if (database.execute(query, (experiment,)).fetchone() or ("active",))[0] != "active":
                return "deleted", ""
        with closing(_connect(path, "rw")) as database:
            database.execute("BEGIN IMMEDIATE")  # what a writer asks for first; nothing is written
            database.rollback()
    except filelock.Timeout:
        return "locked", f"{lock} is held by another process"
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return "locked", str(error)
        raise
    return "current", ""


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    name = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(name, uri=True, timeout=LOCK_TIMEOUT_SECONDS, isolation_level=None)


def _inspect_database(uri: str) -> tuple[StoreStatus, str]:
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    with engine.connect() as connection:
        if not sqlalchemy.inspect(connection).has_table("alembic_version"):
            return "new", ""
        query = sqlalchemy.text("SELECT version_num FROM alembic_version")
        revision = connection.execute(query).scalar()
    state = _schema_status(str(revision))
    return state, "" if state == "current" else f"schema {revision}"


def _schema_status(revision: str) -> StoreStatus:
    """Whether this version of MLflow would make tables like these, or knows them at least."""
    from alembic.script import ScriptDirectory

    steps = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    if revision in steps.get_heads():
        return "current"
    return "older" if revision in {step.revision for step in steps.walk_revisions()} else "newer"


def _inspect_server(uri: str) -> tuple[StoreStatus, str]:
    # Read at each request: one try, so that the answer comes while somebody waits for it.
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    before = {name: os.environ.get(name) for name in limits}
    os.environ.update(limits)
    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except MlflowException as error:
        away = "failed with exception" in str(error) or "timed out" in str(error)
        return "silent" if away else "broken", first_line(error)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return "current", ""
