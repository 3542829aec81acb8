"""Serve the MLflow UI for a store on 127.0.0.1."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence

import psutil
from mlflow import MlflowClient

from captcha_exp.config import MlflowConfig, sqlite_path
from captcha_exp.errors import UserError, first_line
from captcha_exp.tracking import views
from captcha_exp.tracking.inspection import inspect_store
from captcha_exp.tracking.problems import describe_problem
from captcha_exp.tracking.store import open_store

logger = logging.getLogger(__name__)


def serve_ui(tracking: MlflowConfig, port: int | None) -> None:
    """Serve the MLflow UI on 127.0.0.1 until Ctrl-C, and print the URLs of its pages.

    A tracking server has a UI of its own: only the URLs of its pages are printed.

    Raises:
        UserError: The store cannot be used or does not have the experiment (train a model first), or the port
            is in use.
    """
    uri = tracking.uri
    status, detail = inspect_store(uri, tracking.experiment, is_written=False)
    if status == "new":
        raise UserError(
            f"{sqlite_path(uri) or uri}: MLflow store does not exist yet; captcha-exp train creates it"
        )
    if status != "current":
        raise UserError("; ".join(describe_problem(uri, status, detail, is_written=False)))
    client = open_store(uri)
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        raise UserError(
            f"tracking.experiment={tracking.experiment}: not found in {uri}; captcha-exp train creates it"
        )
    if uri.startswith("http"):
        _print_pages(client, uri.rstrip("/"), str(experiment.experiment_id))
        return
    port = _free_port(port)
    # Otherwise MLflow starts eight more processes, for background jobs that are not used here.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_STATIC_PREFIX", None)  # would move the pages
    command = [sys.executable, "-m", "captcha_exp.tracking.server", uri, str(port)]
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            _wait_until_up(server, port)
            _print_pages(client, f"http://127.0.0.1:{port}", str(experiment.experiment_id))
            logger.info("Press Ctrl-C to stop")
            assert server.stderr is not None
            for _ in server.stderr:  # drain the pipe, or the server blocks when it is full
                pass
        except KeyboardInterrupt:
            logger.info("UI stopped")
        finally:
            server.terminate()


def _print_pages(client: MlflowClient, base_url: str, experiment_id: str) -> None:
    try:
        urls = views.create_views(client, base_url, experiment_id)
    except Exception as error:  # MLflow does not wrap SQL, HTTP and file errors
        logger.warning(f"views were not saved to MLflow: {first_line(error)}; showing its default pages")
        urls = {
            "runs": views.runs_url(base_url, experiment_id),
            "curves": views.runs_url(base_url, experiment_id, charts=True),
        }
    for label, url in urls.items():
        logger.info(f"{label:7}  {url}")


def _free_port(requested: int | None) -> int:
    candidates: Sequence[int] = [requested] if requested is not None else range(5000, 5050)
    for port in candidates:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise UserError(f"--port={candidates[0]}: in use; give a free port")


def _wait_until_up(server: subprocess.Popen[str], port: int) -> None:
    for _ in range(600):
        if server.poll() is not None:
            lines = (server.stderr.read() if server.stderr else "").strip().splitlines()
            raise UserError(f"the MLflow UI did not start: {lines[-1] if lines else 'no error message'}")
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1),
        ):
            return
        time.sleep(0.1)
    raise UserError("the MLflow UI did not answer within a minute; try again")


def _server_main(uri: str, port: str) -> None:
    """Run the MLflow server; exits with all child processes when standard input is closed."""

    def exit_with_parent() -> None:
        sys.stdin.read()
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.terminate()
        os._exit(0)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent handles it
    from mlflow.cli import cli

    cli(["server", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", port, "--workers", "1"])


if __name__ == "__main__":
    _server_main(*sys.argv[1:])
