"""MLflow's backend store: open or create it, and send to it. `inspection` checks one without MLflow."""

import contextlib
import logging
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import filelock
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException

from captcha_exp.config import sqlite_path
from captcha_exp.config.uri import sqlite_uri
from captcha_exp.errors import RunFailed, first_line
from captcha_exp.runs import MetricsRow
from captcha_exp.tracking.inspection import connect

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
    with closing(connect(path, "ro")) as database:
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
        with closing(connect(path, "rw")) as database, database:
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
