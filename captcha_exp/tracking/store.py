"""The store that MLflow keeps runs in: opened, made when it is new, found by name."""

import logging
from pathlib import Path

import filelock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

# MLflow tells in detail how it sets up its own tables.
logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


def open_store(uri: str) -> MlflowClient:
    """A client of the store; a store in a new SQLite file is made first, by one process at a time."""
    if path := sqlite_file(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_suffix(".lock")):
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)  # the first question makes the tables
            return client
    return MlflowClient(uri)


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The id of an experiment, made when it is new.

    The place of its artifacts is stored as an absolute path: a relative one would mean another folder to
    whoever starts the UI elsewhere.
    """
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    path = sqlite_file(uri)
    location = (path.parent / "artifacts").resolve().as_uri() if path else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:
        if found := client.get_experiment_by_name(name):  # another process made it in between
            return str(found.experiment_id)
        raise


def sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
