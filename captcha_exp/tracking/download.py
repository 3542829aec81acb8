"""Download the files of a run that exists only in MLflow."""

from collections.abc import Iterable
from pathlib import Path

from captcha_exp.errors import UserError, first_line
from captcha_exp.tracking.inspection import inspect_store
from captcha_exp.tracking.problems import describe_problem
from captcha_exp.tracking.store import open_store, run_exists


def download_artifacts(run_id: str, uri: str, names: Iterable[str], dst_dir: Path) -> bool:
    """Download the named artifacts of a run, as far as they exist; returns False if the store lacks the run.

    Raises:
        UserError: The store or its artifacts cannot be read; give the run directory instead.
    """
    status, detail = inspect_store(uri, "", is_written=False)
    if status == "new":
        return False
    if status != "current":
        raise UserError("; ".join(describe_problem(uri, status, detail, is_written=False)))
    try:
        client = open_store(uri)
        if not run_exists(client, run_id):
            return False
        available = {file.path for file in client.list_artifacts(run_id)}
        for name in names:
            if name in available:
                client.download_artifacts(run_id, name, str(dst_dir))
    except Exception as error:  # MLflow does not wrap SQL, HTTP and file errors
        raise UserError(
            f"{run_id}: cannot download its files from {uri}: {first_line(error)}; give the run directory"
        ) from error
    return True
