"""An MLflow server that can be killed and started again, and a proxy that is slow or breaks connections."""

import contextlib
import http.client
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SLOW_SECONDS = 5.0  # per request, of the case `slow`


class Server:
    """An MLflow server with its own store, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, wait: bool = True) -> None:
        if self._process is None:
            words = ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db", "--host", "127.0.0.1"]
            words += ["--artifacts-destination", str(self._folder / "artifacts"), "--port", str(self.port)]
            with (self._folder / "server.log").open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "mlflow", "server", *words, "--workers", "1"],
                    env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        while wait and not self._is_up():
            time.sleep(0.2)

    def _is_up(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def kill(self) -> None:
        """Kill the server and its worker."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None


class Proxy:
    """Forwards requests to a server, late or with broken connections."""

    def __init__(self, server: Server) -> None:
        self.seconds, self.breaks = 0.0, False
        self.requests = self.broken = 0
        lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _forward(self) -> None:
                with lock:
                    proxy.requests += 1
                    number = proxy.requests
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                time.sleep(proxy.seconds)
                # Every fourth request is lost, and every fourth answer.
                if proxy.breaks and number % 4 == 1:
                    return self._reset()
                upstream = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
                try:
                    upstream.request(self.command, self.path, body, dict(self.headers))
                    answer = upstream.getresponse()
                    content = answer.read()
                except OSError:
                    return self._reset()
                finally:
                    upstream.close()
                if proxy.breaks and number % 4 == 3:
                    return self._reset()
                self.send_response_only(answer.status, answer.reason)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                return None

            def _reset(self) -> None:
                with lock:
                    proxy.broken += 1
                linger = struct.pack("ii", 1, 0)  # close by RST
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
                self.close_connection = True

            def __getattr__(self, name: str) -> Any:
                if name.startswith("do_"):  # any method of HTTP
                    return self._forward
                raise AttributeError(name)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class QuietServer(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a closed connection

        self._http = QuietServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
