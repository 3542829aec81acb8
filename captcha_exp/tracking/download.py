"""The files of a run whose folder is not here, out of MLflow's artifacts."""

from collections.abc import Iterable
from pathlib import Path

from captcha_exp.errors import UserError
from captcha_exp.tracking.store import first_line, open_store, run_exists
from captcha_exp.tracking.uri import sqlite_path


def download_artifacts(run_id: str, uri: str, names: Iterable[str], dst_dir: Path) -> bool:
    """Whether the store has the run; then these of its files, as far as it has them, are in the folder.

    Raises:
        UserError: the store, or the place where it keeps files, cannot be read; the line says why.
    """
    path = sqlite_path(uri)
    if path is not None and not path.is_file():
        return False
    try:
        client = open_store(uri)
        if not run_exists(client, run_id):
            return False
        there = {file.path for file in client.list_artifacts(run_id)}
        for name in names:
            if name in there:
                client.download_artifacts(run_id, name, str(dst_dir))
    except Exception as error:  # MLflow lets exceptions of SQL, HTTP and files through as they come
        raise UserError(
            f"{run_id}: its files cannot be had from {uri}: {first_line(error)}; give the run's folder"
        ) from error
    return True
