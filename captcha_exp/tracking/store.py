"""MLflow's backend store: open or create it, send to it, or inspect it without changing anything."""

import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import filelock
import mlflow
import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException

from captcha_exp.errors import RunFailed, first_line
from captcha_exp.runs import MetricsRow
from captcha_exp.tracking.uri import sqlite_path

# MLflow logs each step of creating its tables.
logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)
# A statement that fails is reported by the caller, in one line.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def open_store(uri: str) -> MlflowClient:
    """Open a store; a missing SQLite file is created first, by one process at a time."""
    if path := sqlite_path(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_suffix(".lock"), timeout=60):
            if not path.exists():
                _create_sqlite_store(path)
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)  # migrates the tables of an older store
            return client
    return MlflowClient(uri)


def _create_sqlite_store(path: Path) -> None:
    """Create a store atomically: MLflow creates its tables one by one and cannot open an incomplete store."""
    temporary, copy = (path.with_name(f".{path.name}.{suffix}") for suffix in ("new", "copy"))
    for leftover in path.parent.glob(f".{path.name}.*"):  # from a killed process
        leftover.unlink()
    MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)  # creates the tables
    # MLflow keeps its connection to the temporary file open, so a copy is renamed.
    with closing(sqlite3.connect(temporary)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    copy.replace(path)
    with contextlib.suppress(PermissionError):  # Windows cannot remove an open file; the next call does
        temporary.unlink()


def get_or_create_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Return the ID of an experiment; creates it if missing.

    The artifact location is stored as an absolute path, so the UI finds it from any working directory.
    """
    if experiment := client.get_experiment_by_name(name):
        return str(experiment.experiment_id)
    path = sqlite_path(uri)
    location = (path.parent / "artifacts").resolve().as_uri() if path else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:
        if experiment := client.get_experiment_by_name(name):  # another process created it in between
            return str(experiment.experiment_id)
        raise


@contextlib.contextmanager
def raise_run_failed(uri: str) -> Iterator[None]:
    """Turn any error of the store into RunFailed."""
    try:
        yield
    except Exception as error:  # MLflow does not wrap SQL, HTTP and file errors
        raise RunFailed(
            f"tracking.uri={uri}: MLflow cannot write to this store: {first_line(error)}; "
            "run captcha-exp doctor for the fix, or use tracking=none"
        ) from error


def run_exists(client: MlflowClient, run_id: str) -> bool:
    """Check whether the store has the run and it was not deleted."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return bool(run.info.lifecycle_stage == "active")


def send_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run."""
    client.log_batch(run_id, tags=[RunTag(*item) for item in tags.items()])


def send_metrics(client: MlflowClient, run_id: str, rows: Iterable[MetricsRow]) -> None:
    """Log rows; MLflow ignores those that it already has."""
    metrics = [
        Metric(key, value, row.timestamp_ms, row.step) for row in rows for key, value in row.metrics.items()
    ]
    client.log_batch(run_id, metrics=metrics)


def send_artifact(client: MlflowClient, run_id: str, run_dir: Path, path: Path) -> None:
    """Log a file of a run or sweep as an artifact of the same relative path."""
    directory = path.relative_to(run_dir).parent.as_posix()
    client.log_artifact(run_id, str(path), None if directory == "." else directory)


# -- inspect -----------------------------------------------------------------------------------------------

StoreStatus = Literal["new", "current", "older", "newer", "locked", "deleted", "broken", "unreachable"]
RESPONSE_TIMEOUT_SECONDS = 8.0
LOCK_TIMEOUT_SECONDS = 2.0


def inspect_store(uri: str, experiment: str) -> tuple[StoreStatus, str]:
    """Return the status of a store and a detail message, without creating or migrating anything.

    new          missing or empty; the first run creates it
    current      the schema of this MLflow version, or a server that answers
    older        the schema of an older MLflow version
    newer        the schema of a newer MLflow version
    locked       another process holds the lock
    deleted      the experiment was deleted
    broken       not a store, or access is denied
    unreachable  no answer within `RESPONSE_TIMEOUT_SECONDS`
    """
    results: list[tuple[StoreStatus, str]] = []

    def inspect() -> None:
        try:
            if path := sqlite_path(uri):
                results.append(_inspect_file(path, experiment))
            elif urlsplit(uri).scheme.partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql"):
                results.append(_inspect_database(uri, experiment))
            else:
                results.append(_inspect_server(uri))
        except Exception as error:  # MLflow does not wrap SQL, HTTP and file errors
            cause = getattr(error, "orig", error)  # SQLAlchemy's error has that of the driver
            results.append(("broken", first_line(cause)))

    # In a thread, because name resolution and database drivers have no timeout of their own.
    thread = threading.Thread(target=inspect, daemon=True)
    thread.start()
    thread.join(RESPONSE_TIMEOUT_SECONDS)
    return results[0] if results else ("unreachable", f"no answer within {RESPONSE_TIMEOUT_SECONDS:.0f} s")


def _inspect_file(path: Path, experiment: str) -> tuple[StoreStatus, str]:
    existing = next(ancestor for ancestor in (path, *path.parents) if ancestor.exists())
    if existing != path:
        return ("new", "") if existing.is_dir() else ("broken", f"{existing} is a file, not a directory")
    lock = path.with_suffix(".lock")
    try:
        if lock.exists():  # open_store would wait for it
            with filelock.FileLock(lock, timeout=LOCK_TIMEOUT_SECONDS):
                pass
        status = _inspect_database("sqlite://", experiment, creator=lambda: _connect(path, "ro"))
        if status[0] == "current":
            with closing(_connect(path, "rw")) as database:
                database.execute("BEGIN IMMEDIATE")  # takes the write lock; nothing is written
                database.rollback()
    except filelock.Timeout:
        return "locked", f"{lock} is held by another process"
    except (sqlite3.OperationalError, sqlalchemy.exc.OperationalError) as error:
        cause: Any = getattr(error, "orig", error)  # SQLAlchemy's error has that of the driver
        if cause.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return "locked", str(cause)
        raise
    return status


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    name = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(name, uri=True, timeout=LOCK_TIMEOUT_SECONDS, isolation_level=None)


def _inspect_database(uri: str, experiment: str, **options: Any) -> tuple[StoreStatus, str]:
    with sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool, **options).connect() as connection:
        names = set(sqlalchemy.inspect(connection).get_table_names())
        if "alembic_version" not in names:
            # The database of a server may have tables of other programs.
            is_other = names and connection.dialect.name == "sqlite"
            return ("broken", "not an MLflow database") if is_other else ("new", "")
        if names == {"alembic_version"}:
            return "new", ""
        revision = connection.scalar(sqlalchemy.text("SELECT version_num FROM alembic_version"))
        if (state := _schema_status(revision)) != "current":
            return state, f"schema {revision}"
        query = sqlalchemy.text("SELECT lifecycle_stage FROM experiments WHERE name = :name")
        stage = connection.scalar(query, {"name": experiment})
    return "current" if stage in (None, "active") else "deleted", ""


def _schema_status(revision: str) -> StoreStatus:
    """Compare a schema revision with the migrations of the installed MLflow version."""
    from alembic.script import ScriptDirectory

    steps = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    if revision in steps.get_heads():
        return "current"
    return "older" if revision in {step.revision for step in steps.walk_revisions()} else "newer"


def _inspect_server(uri: str) -> tuple[StoreStatus, str]:
    # MLflow reads these for each request; a single try keeps the check short. `tracking` has set both.
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    before = {name: os.environ[name] for name in limits}
    os.environ.update(limits)
    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except MlflowException as error:
        is_unreachable = "failed with exception" in str(error) or "timed out" in str(error)
        return "unreachable" if is_unreachable else "broken", first_line(error)
    finally:
        os.environ.update(before)
    return "current", ""
