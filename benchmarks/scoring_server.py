"""MLflow's scoring server as a process, requests to it, and requests that it has to refuse."""

import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS = 300.0  # on a busy machine
JSON = "application/json"


@dataclass(frozen=True)
class Response:
    """The status and body of a response; status 0 if the connection was closed without one."""

    status: int
    body: bytes

    def predictions(self) -> dict[str, Any]:
        predictions: dict[str, Any] = json.loads(self.body)["predictions"]
        return predictions


@contextlib.contextmanager
def serve(model: str, store: str, workers: int = 1, max_bytes: int | None = None) -> Iterator[int]:
    """Serve a model of a store as docs/serving.md says, and yield the port; MLflow's words go to server.log.

    Args:
        model: URI or directory of the model.
        store: Tracking URI.
        workers: Number of processes.
        max_bytes: Limit of the address space of each process.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        uvicorn = Path(folder, "uvicorn")  # `mlflow models serve` starts it by name
        uvicorn.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m uvicorn "$@"\n')
        uvicorn.chmod(0o755)
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        probe.close()
        words = ["models", "serve", "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
        with Path(folder, "server.log").open("wb") as log:
            server = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *words, "--workers", str(workers), "-m", model],
                env=os.environ
                | {"MLFLOW_TRACKING_URI": store, "MLFLOW_DISABLE_TELEMETRY": "true"}
                | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=None if max_bytes is None else lambda: _limit(max_bytes),
            )
        try:
            _wait(server, port, Path(folder, "server.log"))
            yield port
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _limit(max_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))


def _wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        if is_up(port):
            return
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")


def is_up(port: int) -> bool:
    """Return whether a server answers /ping."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/ping")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def post(
    port: int, body: bytes | Iterable[bytes], content_type: str = JSON, num_bytes: int | None = None
) -> Response:
    """Send a request to /invocations; a body in parts needs its size."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    headers = {"Content-Type": content_type} | ({"Content-Length": str(num_bytes)} if num_bytes else {})
    try:
        connection.request("POST", "/invocations", body, headers)
        response = connection.getresponse()
        return Response(response.status, response.read())
    except OSError as error:
        return Response(0, type(error).__name__.encode())
    finally:
        connection.close()


def to_body(*images: Any) -> bytes:
    """Return the request for images (H, W, 3), nested lists, in the form that MLflow reads fastest."""
    return json.dumps({"instances": [{"images": image} for image in images]}).encode()


def large_body(side: int) -> tuple[Iterator[bytes], int]:
    """Return a valid request with a black image of this height and width, in parts, and its size."""
    row = b"[" + b",".join([b"[0,0,0]"] * side) + b"]"
    start, end = b'{"instances":[{"images":[' + row, b"]}]}"
    size = len(start) + (side - 1) * (len(row) + 1) + len(end)

    def parts() -> Iterator[bytes]:
        yield start
        for _ in range(side - 1):
            yield b"," + row
        yield end

    return parts(), size


def _pixel(*values: Any) -> bytes:
    return json.dumps({"instances": [{"images": [[list(values)]]}]}).encode()


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty body": (b"", JSON),
    "broken JSON": (b'{"instances": [{"images": [[', JSON),
    "not UTF-8": (b"\xff\xfe{", JSON),
    "a list": (b"[]", JSON),
    "no input": (b"{}", JSON),
    "no image": (b'{"instances": []}', JSON),
    "null": (b'{"inputs": null}', JSON),
    "another name": (b'{"instances": [{"image": [[[1, 2, 3]]]}]}', JSON),
    "no batch": (b'{"inputs": [[[1, 2, 3]]]}', JSON),
    "gray": (_pixel(1), JSON),
    "alpha": (_pixel(1, 2, 3, 4), JSON),
    "no rows": (b'{"instances": [{"images": []}]}', JSON),
    "no columns": (b'{"instances": [{"images": [[]]}]}', JSON),
    "rows of two lengths": (b'{"inputs": [[[[1, 2, 3], [1, 2, 3]], [[1, 2, 3]]]]}', JSON),
    "images of two sizes": (to_body([[[1, 2, 3]]], [[[1, 2, 3], [1, 2, 3]]]), JSON),
    "256": (_pixel(256, 2, 3), JSON),
    "-1": (_pixel(-1, 2, 3), JSON),
    "1e30": (b'{"inputs": [[[[1e30, 2, 3]]]]}', JSON),
    "NaN": (_pixel(float("nan"), 2, 3), JSON),
    "text": (_pixel("a", "b", "c"), JSON),
    "none": (_pixel(None, 2, 3), JSON),
    "an image file": (b"\x89PNG\r\n\x1a\n", "image/png"),
    "a form": (_pixel(1, 2, 3), "application/x-www-form-urlencoded"),
    "CSV": (b"images\n5\n", "text/csv"),
    "Latin-1": (_pixel(1, 2, 3), f"{JSON}; charset=latin-1"),
}
"""name -> body and content type of requests that get an error with status 4xx"""

FAILING: dict[str, bytes] = {
    "100,000 brackets": b'{"inputs": ' + b"[" * 100_000,
    "a number of 5,000 digits": b'{"inputs": ' + b"9" * 5000 + b"}",
}
"""name -> body of requests that get status 500 from MLflow 3.17, which goes on to answer others"""

ACCEPTED: dict[str, bytes] = {
    "fractions": _pixel(0.5, 1.9, 2.0),
    "digits as text": _pixel("1", "2", "3"),
    "true": _pixel(True, False, True),
}
"""name -> body of requests that should be refused, and that MLflow 3.17 casts to uint8 and answers"""
