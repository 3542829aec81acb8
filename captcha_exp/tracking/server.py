"""MLflow's own UI with the right store, on 127.0.0.1, for as long as it is asked for."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

import psutil
from mlflow import MlflowClient

from captcha_exp.config import MlflowConfig
from captcha_exp.errors import UserError
from captcha_exp.runtime.console import Display
from captcha_exp.tracking import views
from captcha_exp.tracking.store import first_line, open_store
from captcha_exp.tracking.uri import sqlite_path


def serve_ui(tracking: MlflowConfig, port: int | None, display: Display) -> None:
    """MLflow's UI on 127.0.0.1 until it is stopped; prints the addresses of its pages.

    Raises:
        UserError: there is no such store or experiment, or the port is taken.
    """
    uri = tracking.uri
    path = sqlite_path(uri)
    if path is not None and not path.is_file():
        raise UserError(f"{path}: there is no MLflow store yet; captcha-exp train makes it")
    client = open_store(uri)
    found = client.get_experiment_by_name(tracking.experiment)
    if found is None:
        raise UserError(
            f"tracking.experiment={tracking.experiment}: {uri} has no such experiment; a training makes it"
        )
    port = _free_port(port)
    # Without this, MLflow starts eight processes more, for jobs that nobody here gives it.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
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
            _print_pages(client, f"http://127.0.0.1:{port}", str(found.experiment_id), display)
            assert server.stderr is not None
            for _ in server.stderr:  # read, so that the server never waits for a reader
                pass
        except KeyboardInterrupt:
            display.info("the UI has ended")
        finally:
            server.terminate()


def _print_pages(client: MlflowClient, base_url: str, experiment_id: str, display: Display) -> None:
    try:
        found = views.create_views(client, base_url, experiment_id)
    except Exception as error:  # MLflow lets exceptions of SQL, HTTP and files through as they come
        display.warn(f"MLflow did not take the views: {first_line(error)}; its pages open as it has them")
        plain = views.runs_url(base_url, experiment_id)
        found = {"runs": plain, "curves": views.runs_url(base_url, experiment_id, charts=True)}
    lines = [f"{label:7}  {address}" for label, address in found.items()]
    display.info("\n".join([*lines, "Ctrl-C ends it"]))


def _free_port(requested: int | None) -> int:
    candidates: Sequence[int] = [requested] if requested is not None else range(5000, 5050)
    for port in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise UserError(f"port {candidates[0]} is taken; give another with --port")


def _wait_until_up(server: subprocess.Popen[str], port: int) -> None:
    for _ in range(600):
        if server.poll() is not None:
            words = (server.stderr.read() if server.stderr else "").strip().splitlines()
            raise UserError(f"MLflow's UI did not start: {words[-1] if words else 'it said nothing'}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise UserError("MLflow's UI did not answer within a minute")


def _server_main(uri: str, port: str) -> None:
    """MLflow's server, in a process that ends, with all that it started, when its standard input does."""

    def end_with_the_parent() -> None:
        sys.stdin.read()
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.terminate()
        os._exit(0)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent decides
    from mlflow.cli import cli

    cli(["server", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", port, "--workers", "1"])


if __name__ == "__main__":
    _server_main(*sys.argv[1:])
