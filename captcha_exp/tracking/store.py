"""MLflow's backend store: open or create it, send to it, or inspect it without changing anything."""

import contextlib
import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import filelock
import mlflow
import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag, ViewType
from mlflow.exceptions import MlflowException

from captcha_exp.config import sqlite_path
from captcha_exp.config.uri import sqlite_uri
from captcha_exp.errors import RunFailed, UserError, first_line, one_line
from captcha_exp.runs import MetricsRow
from captcha_exp.runtime.files import describe_broken_link
from captcha_exp.tracking.problems import StoreStatus, describe_problem

# MLflow logs each step of creating its tables.
logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)
# A statement that fails is reported by the caller, in one line.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

logger = logging.getLogger(__name__)


def open_store(uri: str) -> MlflowClient:
    """Open a store; a missing SQLite file is created first, by one process at a time."""
    if path := sqlite_path(uri):
        if _is_empty(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path.with_suffix(".lock"), timeout=60):
                if _is_empty(path):
                    _create_sqlite_store(path)
        move_artifacts(path)
    return MlflowClient(uri)


def _is_empty(path: Path) -> bool:
    return not path.exists() or path.stat().st_size == 0


def _create_sqlite_store(path: Path) -> None:
    """Create a store atomically: MLflow creates its tables one by one and cannot open an incomplete store."""
    temporary, copy = (path.with_name(f".{path.name}.{suffix}") for suffix in ("new", "copy"))
    for leftover in path.parent.glob(f".{path.name}.*"):  # from a killed process
        leftover.unlink()
    MlflowClient(sqlite_uri(temporary)).search_experiments(max_results=1)  # creates the tables
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
    location = _artifact_dir(path).as_uri() if path else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:
        if experiment := client.get_experiment_by_name(name):  # another process created it in between
            return str(experiment.experiment_id)
        raise


def _artifact_dir(path: Path) -> Path:
    return (path.parent / "artifacts").resolve()


def find_moved_artifacts(path: Path) -> list[tuple[str, Path]]:
    """Return (experiment ID, directory) of artifacts that were next to a SQLite store before it was moved.

    MLflow stores absolute locations. One that was chosen on purpose is not that of a moved store: its
    directory exists, or has another name, and its runs have no artifacts next to the store.
    """
    here, moved = _artifact_dir(path), []
    with closing(_connect(path, "ro")) as database:
        query = (
            "SELECT experiment_id, artifact_location FROM experiments WHERE artifact_location LIKE 'file:%'"
        )
        for experiment_id, location in database.execute(query).fetchall():
            there = Path(url2pathname(urlsplit(location).path))
            if there == here or there.name != here.name:
                continue
            run_ids = database.execute("SELECT run_uuid FROM runs WHERE experiment_id = ?", (experiment_id,))
            is_gone = there.parts[-2:] == here.parts[-2:] and not there.exists()
            if is_gone or any((here / run_id).is_dir() for (run_id,) in run_ids):
                moved.append((str(experiment_id), there))
    return moved


def move_artifacts(path: Path) -> None:
    """Let a SQLite store that was moved or copied have all its artifacts in its own directory."""
    here = _artifact_dir(path)
    for experiment_id, there in find_moved_artifacts(path):
        with closing(_connect(path, "rw")) as database, database:
            database.execute("BEGIN IMMEDIATE")
            database.execute(
                "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?",
                (here.as_uri(), experiment_id),
            )
            start = f"{there.as_uri()}/"
            rows = database.execute(
                "SELECT run_uuid, artifact_uri FROM runs WHERE experiment_id = ?", (experiment_id,)
            )
            uris = [
                (f"{here.as_uri()}/{uri.removeprefix(start)}", run_id)
                for run_id, uri in rows.fetchall()
                if uri.startswith(start) and ((here / run_id).is_dir() or not there.exists())
            ]
            database.executemany("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", uris)
            _move_models(database, experiment_id, there, here)
        logger.info(f"{path}: was moved; the artifacts of {len(uris)} runs are now found in {here}")


def _move_models(database: sqlite3.Connection, experiment_id: str, there: Path, here: Path) -> None:
    """Let the models of an experiment, and their versions, have their files in a moved directory."""
    start = f"{there.as_uri()}/"
    rows = database.execute(
        "SELECT model_id, artifact_location FROM logged_models WHERE experiment_id = ?", (experiment_id,)
    )
    for model_id, location in rows.fetchall():
        rest = location.removeprefix(start)
        if rest != location and ((here / "models" / model_id).is_dir() or not there.exists()):
            new = f"{here.as_uri()}/{rest}"
            database.execute(
                "UPDATE logged_models SET artifact_location = ? WHERE model_id = ?", (new, model_id)
            )
            database.execute(
                "UPDATE model_versions SET storage_location = ? WHERE storage_location = ?", (new, location)
            )


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

RESPONSE_TIMEOUT_SECONDS = 8.0
LOCK_TIMEOUT_SECONDS = 2.0
INTEGRITY_SECONDS = 0.5
"""time for reading a database as a whole; a larger one is checked in part"""
TABLES = {"alembic_version", "experiments", "runs", "metrics", "params", "tags"}


def check_store(uri: str, experiment: str) -> None:
    """Check that runs can be recorded in a store; one that is locked or away may answer later.

    Raises:
        UserError: it is no store, or not usable now; the line has the remedy.
    """
    status, detail = inspect_store(uri, experiment)
    if status not in ("new", "current", "locked", "unreachable"):
        raise UserError("; ".join(describe_problem(uri, status, detail)))


def inspect_store(uri: str, experiment: str, is_written: bool = True) -> tuple[StoreStatus, str]:
    """Return the status of a store and a detail message, without creating or migrating anything.

    A status that prevents only writing is "current" unless the store is to be written to.
    """
    results: list[tuple[StoreStatus, str]] = []

    def inspect() -> None:
        try:
            if path := sqlite_path(uri):
                results.append(_inspect_file(path, experiment, is_written))
            elif uri.startswith("sqlite"):
                results.append(("broken", "a database in memory does not outlive its process"))
            elif urlsplit(uri).scheme.partition("+")[0] in ("postgresql", "mysql", "mssql"):
                results.append(_inspect_database(uri, experiment))
            else:
                results.append(_inspect_server(uri, experiment))
        except Exception as error:  # MLflow does not wrap SQL, HTTP and file errors
            cause = getattr(error, "orig", error)  # SQLAlchemy's error has that of the driver
            results.append(("broken", first_line(cause)))

    # In a thread, because name resolution and database drivers have no timeout of their own.
    thread = threading.Thread(target=inspect, daemon=True)
    thread.start()
    thread.join(RESPONSE_TIMEOUT_SECONDS)
    return results[0] if results else ("unreachable", f"no answer within {RESPONSE_TIMEOUT_SECONDS:.0f} s")


def _inspect_file(path: Path, experiment: str, is_written: bool) -> tuple[StoreStatus, str]:
    if broken := describe_broken_link(path):
        return "broken", broken
    existing = next(ancestor for ancestor in (path, *path.parents) if ancestor.exists())
    if existing.is_dir() == (existing == path):
        return (
            "broken",
            f"{existing} is a {'directory, not a file' if existing == path else 'file, not a directory'}",
        )
    if not os.access(existing, os.W_OK) and is_written:
        return "broken", f"{existing} is not writable"
    if existing != path:
        return "new", ""
    if not path.is_file():  # reading a FIFO would wait
        return "broken", "not a regular file"
    if path.stat().st_size == 0:
        return "new", ""
    try:
        if fault := _find_fault(path):
            return "broken", fault
        status = _inspect_database("sqlite://", experiment, creator=lambda: _connect_to_read(path))
        if status[0] == "current" and is_written:
            with closing(_connect(path, "rw")) as database:
                database.execute("BEGIN IMMEDIATE")  # takes the write lock; nothing is written
                database.rollback()
    except (sqlite3.OperationalError, sqlalchemy.exc.OperationalError) as error:
        cause: Any = getattr(error, "orig", error)  # SQLAlchemy's error has that of the driver
        if cause.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return "locked", str(cause)
        raise
    return status


def _find_fault(path: Path) -> str:
    """Return the first structural fault of a SQLite file that is found in time, or an empty string."""
    end = time.monotonic() + INTEGRITY_SECONDS
    with closing(_connect_to_read(path)) as database:
        database.set_progress_handler(lambda: time.monotonic() > end, 10_000)
        try:
            (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
                return ""
            raise
    return "" if found == "ok" else one_line(found)


def _connect_to_read(path: Path) -> sqlite3.Connection:
    """Connect to read; a transaction of a killed process is rolled back, which needs write access."""
    return _connect(path, "rw" if path.with_name(f"{path.name}-journal").exists() else "ro")


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    name = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(name, uri=True, timeout=LOCK_TIMEOUT_SECONDS, isolation_level=None)


def _inspect_database(uri: str, experiment: str, **options: Any) -> tuple[StoreStatus, str]:
    with sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool, **options).connect() as connection:
        names = set(sqlalchemy.inspect(connection).get_table_names())
        is_own = connection.dialect.name == "sqlite"  # that of a server may have tables of other programs
        if not names or ("alembic_version" not in names and not is_own):
            return "new", ""
        revision = None
        if "alembic_version" in names:  # other programs have this table, too
            revision = connection.scalar(sqlalchemy.text("SELECT version_num FROM alembic_version"))
        if revision is None or not names >= TABLES:
            return ("new", "") if names == {"alembic_version"} else ("broken", "not an MLflow database")
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


def _inspect_server(uri: str, experiment: str) -> tuple[StoreStatus, str]:
    # MLflow reads these for each request; a single try keeps the check short. `tracking` has set both.
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    before = {name: os.environ[name] for name in limits}
    os.environ.update(limits)
    quote = '"' if "'" in experiment else "'"
    try:
        deleted = MlflowClient(uri).search_experiments(
            ViewType.DELETED_ONLY, max_results=1, filter_string=f"name = {quote}{experiment}{quote}"
        )
    except MlflowException as error:
        text = str(error)
        is_away = "failed with exception" in text or "timed out" in text
        is_away = is_away or re.search(r"error code (429|5\d\d)\b", text) is not None  # such as of a proxy
        cause = re.search(r"\[Errno -?\d+\] [^\"')]+", text)  # at the end of 300 characters
        return "unreachable" if is_away else "broken", cause[0] if cause else first_line(error)
    finally:
        os.environ.update(before)
    return "deleted" if deleted else "current", ""
