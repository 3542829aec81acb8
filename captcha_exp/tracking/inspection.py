"""Check a backend store without changing anything.

A SQLite file is read by sqlite3 alone: every training checks its store before it begins, and importing MLflow
takes longer than all else before the first step. A server or another database needs MLflow or SQLAlchemy.
"""

import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Collection
from contextlib import closing
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from captcha_exp.config import sqlite_path
from captcha_exp.errors import UserError, first_line, one_line
from captcha_exp.runtime.files import describe_broken_link
from captcha_exp.tracking.problems import StoreStatus, describe_problem

RESPONSE_TIMEOUT_SECONDS = 8.0
LOCK_TIMEOUT_SECONDS = 2.0
INTEGRITY_SECONDS = 0.5
"""time for reading a database as a whole; a larger one is checked in part"""
TABLES = {"alembic_version", "experiments", "runs", "metrics", "params", "tags"}

Select: TypeAlias = Callable[[str, dict[str, str]], Any]
"""returns the first value of the first row that a query finds, or None"""


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


# -- databases ---------------------------------------------------------------------------------------------


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
        status = _inspect_content(path, experiment)
        if status[0] == "current" and is_written:
            with closing(connect(path, "rw")) as database:
                database.execute("BEGIN IMMEDIATE")  # takes the write lock; nothing is written
                database.rollback()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return "locked", str(error)
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
    return connect(path, "rw" if path.with_name(f"{path.name}-journal").exists() else "ro")


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """Connect to a SQLite file in the mode "ro" or "rw"; a missing one is not created."""
    name = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(name, uri=True, timeout=LOCK_TIMEOUT_SECONDS, isolation_level=None)


def _inspect_content(path: Path, experiment: str) -> tuple[StoreStatus, str]:
    with closing(_connect_to_read(path)) as database:

        def select(query: str, values: dict[str, str]) -> Any:
            row = database.execute(query, values).fetchone()
            return row and row[0]

        tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        names = {name for (name,) in tables if not name.startswith("sqlite_")}  # those are SQLite's own
        return _inspect_tables(names, select, experiment, is_own=True)


def _inspect_database(uri: str, experiment: str) -> tuple[StoreStatus, str]:
    import sqlalchemy

    with sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool).connect() as connection:
        names = sqlalchemy.inspect(connection).get_table_names()
        return _inspect_tables(
            set(names),
            lambda query, values: connection.scalar(sqlalchemy.text(query), values),
            experiment,
            is_own=False,  # a database server may have tables of other programs
        )


def _inspect_tables(
    names: Collection[str], select: Select, experiment: str, is_own: bool
) -> tuple[StoreStatus, str]:
    """Return the status of a database with these tables; `is_own` if no other program should have any."""
    if not names or ("alembic_version" not in names and not is_own):
        return "new", ""
    revision = None
    if "alembic_version" in names:  # other programs have this table, too
        revision = select("SELECT version_num FROM alembic_version", {})
    if revision is None or not TABLES.issubset(names):
        return ("new", "") if set(names) == {"alembic_version"} else ("broken", "not an MLflow database")
    if (state := _schema_status(revision)) != "current":
        return state, f"schema {revision}"
    stage = select("SELECT lifecycle_stage FROM experiments WHERE name = :name", {"name": experiment})
    return "current" if stage in (None, "active") else "deleted", ""


def _schema_status(revision: str) -> StoreStatus:
    """Compare a schema revision with the migrations of the installed MLflow, which is not imported.

    Each of them names its own revision and the one before it; the newest one is before no other.
    """
    migrations = Path(str(distribution("mlflow").locate_file("mlflow/store/db_migrations/versions")))
    text = "\n".join(path.read_text(encoding="utf-8") for path in migrations.glob("*.py"))
    named = re.findall(r"^(down_)?revision\b[^=\n]*=\s*[\"'](\w+)[\"']", text, re.MULTILINE)
    known, earlier = ({name for prefix, name in named if bool(prefix) is old} for old in (False, True))
    if revision not in known:
        return "newer"
    return "older" if revision in earlier else "current"


# -- servers -----------------------------------------------------------------------------------------------


def _inspect_server(uri: str, experiment: str) -> tuple[StoreStatus, str]:
    from mlflow import MlflowClient
    from mlflow.entities import ViewType
    from mlflow.exceptions import MlflowException

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
