"""Train with MLflow servers that are absent, stopped, killed, slow or that break connections.

Each training is the real command with a real `mlflow server` on 127.0.0.1, most of them behind a proxy. Then
`captcha-exp sync` delivers the rest, and MLflow must have every metric of every epoch once, the files and the
status, in one run. Trainings without tracking come in between: the ratio of the training times is that of two
neighbors. Prints each ratio, and at the end one JSON line: per case the median ratio, seconds and warnings;
exit code 1 if there is a fault. A ratio above --max-ratio is a fault; the machine has to be idle for it, and
the five cases with a server take 90 minutes. What depends less on the machine: the CPU time during a training
of the thread that sends, and of the server, as shares of the training time.

    python benchmarks/tracking.py [--repeats 5] [--epochs 30] [--count 4000] [--max-ratio 1.03]
                                  [--cases NAME ...]
"""

import argparse
import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from timed_sender import LABEL

CONFIG = (
    "name=tracking",
    "captcha.alphabet='0123456789'",
    "captcha.length=2",
    "captcha.width=64",
    "captcha.height=32",
    "data.validation_fraction=0.25",
    "data.test_fraction=0.25",
    "train.batch_size=50",
    "train.patience=null",
    "device.name=cpu",
)
CASES = ("local", "server", "absent", "middle", "end", "slow", "resets")
PROGRAM = ("-P", "-m", "captcha_exp")
TIMED_PROGRAM = (str(Path(__file__).with_name("timed_sender.py")),)
SLOW_SECONDS = 5.0
MAX_WARNINGS = 2


class Server:
    """An MLflow server with its own store, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self._past_cpu_seconds = 0.0

    def cpu_seconds(self) -> float:
        """Return the CPU time of all processes of the server so far."""
        seconds = self._past_cpu_seconds
        if self._process is not None:
            server = psutil.Process(self._process.pid)
            for process in (server, *server.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    seconds += times.user + times.system
        return seconds

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
            self._past_cpu_seconds = self.cpu_seconds()
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


def command(root: Path, *words: str, program: Sequence[str] = PROGRAM) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *program, *words],
        env=os.environ | {"CAPTCHA_EXP_ROOT": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


class Bench:
    """The trainings and their faults."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder, self._options = folder, options
        self._config = (*CONFIG, f"train.epochs={options.epochs}", f"data.count={options.count}")
        self._number = 0
        self.faults: list[str] = []
        self.ratios: dict[str, list[float]] = defaultdict(list)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.wall_seconds: dict[str, list[float]] = defaultdict(list)
        self.cpu_shares: dict[str, list[float]] = defaultdict(list)
        self.server_cpu_shares: dict[str, list[float]] = defaultdict(list)
        self.warnings: dict[str, int] = defaultdict(int)
        self._cache = folder / "cache"
        root = self._new_root("cache-of")
        done = command(root, "data", *self._config)
        if done.returncode:
            raise RuntimeError(done.stderr)
        shutil.copytree(root / "outputs" / "cache", self._cache)

    def _new_root(self, name: str) -> Path:
        self._number += 1
        root = self._folder / f"{self._number:02}-{name}"
        (root / "outputs").mkdir(parents=True)
        if self._cache.exists():
            shutil.copytree(self._cache, root / "outputs" / "cache")
        return root

    def pair(self, case: str) -> None:
        """Train without tracking and with this case, one after the other."""
        reference = self._train(self._new_root("none"), "none", "tracking=none")
        ratio = self._train_tracked(case) / reference
        self.ratios[case].append(ratio)
        print(f"{case}: ratio {ratio:.4f} of training times", file=sys.stderr, flush=True)

    def _train_tracked(self, case: str) -> float:
        root = self._new_root(case)
        if case == "local":
            uri = f"sqlite:///{root}/mlruns/mlflow.db"
            seconds = self._train(root, case, f"tracking.uri={uri}")
            self._check(root, case, uri)
            return seconds
        server = Server(root / "server")
        proxy = Proxy(server)
        try:
            if case == "slow":
                proxy.seconds = SLOW_SECONDS
            proxy.breaks = case == "resets"
            if case != "absent":
                server.start()
            before = server.cpu_seconds()
            with self._watch(root, case, server):
                seconds = self._train(root, case, f"tracking.uri={proxy.uri}")
            self.server_cpu_shares[case].append((server.cpu_seconds() - before) / seconds)
            proxy.seconds = 0.0
            server.start()
            self._check(root, case, server.uri)
        finally:
            server.kill()
            proxy.close()
        return seconds

    @contextlib.contextmanager
    def _watch(self, root: Path, case: str, server: Server) -> Iterator[None]:
        """Kill or start the server when the training has reached some epoch."""
        epochs = self._options.epochs
        actions = {
            "middle": ((epochs // 3, server.kill), (2 * epochs // 3, lambda: server.start(wait=False))),
            "end": ((epochs - 1, server.kill),),
        }.get(case, ())
        is_over = threading.Event()

        def watch() -> None:
            for epoch, act in actions:
                while not is_over.is_set() and self._epochs(root) < epoch:
                    time.sleep(0.02)
                act()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    @staticmethod
    def _epochs(root: Path) -> int:
        return sum(len(path.read_bytes().splitlines()) for path in root.glob("outputs/*/*/metrics.jsonl"))

    def _train(self, root: Path, case: str, *words: str) -> float:
        """Train, check the end, and return the training time that the run has recorded."""
        start = time.perf_counter()
        program = PROGRAM if case == "none" else TIMED_PROGRAM
        done = command(root, "train", *self._config, *words, program=program)
        self.wall_seconds[case].append(time.perf_counter() - start)
        warnings = [line for line in done.stderr.splitlines() if line.startswith("warning:")]
        self.warnings[case] = max(self.warnings[case], len(warnings))
        if len(warnings) > MAX_WARNINGS:
            self._fault(case, f"{len(warnings)} warnings: {warnings}")
        if done.returncode:
            self._fault(case, f"exit code {done.returncode}: {done.stderr[-2000:]}")
            return float("nan")
        info = json.loads(self._run_dir(root).joinpath("run.json").read_text())
        if info["status"] != "FINISHED":
            self._fault(case, f"status {info['status']}")
        if case != "none" and bool(info["mlflow"]["owed"]) == info["mlflow"]["closed"]:
            self._fault(case, f"owed {info['mlflow']['owed']}, closed {info['mlflow']['closed']}")
        if case != "none" and ("MLflow does not have yet" in done.stdout) == info["mlflow"]["closed"]:
            self._fault(case, "the summary does not say what is owed")
        seconds = float(info["result"]["seconds"])
        self.seconds[case].append(seconds)
        for cpu_seconds in re.findall(rf"(?m)^{LABEL} ([\d.]+)$", done.stderr):
            self.cpu_shares[case].append(float(cpu_seconds) / seconds)
        return seconds

    @staticmethod
    def _run_dir(root: Path) -> Path:
        (path,) = root.glob("outputs/*/*/run.json")
        return path.parent

    def _check(self, root: Path, case: str, uri: str) -> None:
        """Deliver what is owed, and compare MLflow with the run directory."""
        from mlflow import MlflowClient

        done = command(root, "sync")
        if done.returncode:
            self._fault(case, f"sync: exit code {done.returncode}: {done.stdout}{done.stderr}")
        if not command(root, "sync").stdout.startswith("nothing to deliver"):
            self._fault(case, "a second sync has something to deliver")
        run_dir, client = self._run_dir(root), MlflowClient(uri)
        experiment = client.get_experiment_by_name("captcha_exp")
        if experiment is None:
            return self._fault(case, "no experiment")
        found = client.search_runs([experiment.experiment_id])
        if len(found) != 1:
            return self._fault(case, f"{len(found)} runs")
        run_id = found[0].info.run_id
        if found[0].info.status != "FINISHED":
            self._fault(case, f"status {found[0].info.status} in MLflow")
        expected = defaultdict(list)
        for line in (run_dir / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            for key, value in row["metrics"].items():
                expected[key].append((row["step"], row["timestamp_ms"], value))
        for key, values in expected.items():
            history = client.get_metric_history(run_id, key)
            if sorted((m.step, m.timestamp, m.value) for m in history) != sorted(values):
                self._fault(case, f"{key}: {len(history)} values in MLflow, {len(values)} in the run")
        if found[0].data.metrics.keys() != expected.keys():
            self._fault(case, "other metrics in MLflow")
        names = {p.relative_to(run_dir).as_posix() for p in run_dir.rglob("*") if p.is_file()}
        wanted = {name for name in names if not name.startswith("checkpoint/")}
        if (sent := set(_artifacts(client, run_id))) != wanted:
            self._fault(case, f"files {sorted(sent ^ wanted)}")
        return None

    def _fault(self, case: str, text: str) -> None:
        self.faults.append(f"{case}: {text}")
        print(f"{case}: {text}", file=sys.stderr)

    def figures(self) -> dict[str, Any]:
        limit = self._options.max_ratio
        ratios = {case: round(statistics.median(values), 4) for case, values in self.ratios.items()}
        slow = [f"{case}: ratio {ratio} of training times" for case, ratio in ratios.items() if ratio > limit]
        return {
            "ratio": ratios,
            "ratios": {case: [round(each, 4) for each in values] for case, values in self.ratios.items()},
            "seconds": {case: round(statistics.median(v), 1) for case, v in self.seconds.items()},
            "wall_seconds": {case: round(statistics.median(v), 1) for case, v in self.wall_seconds.items()},
            "cpu_share_of_thread": {case: round(max(v), 4) for case, v in self.cpu_shares.items()},
            "cpu_share_of_server": {case: round(max(v), 4) for case, v in self.server_cpu_shares.items()},
            "warnings": dict(self.warnings),
            "faults": self.faults + slow,
        }


def _artifacts(client: Any, run_id: str, path: str | None = None) -> Iterator[str]:
    for item in client.list_artifacts(run_id, path):
        if item.is_dir:
            yield from _artifacts(client, run_id, item.path)
        else:
            yield item.path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--count", type=int, default=4000, help="images")
    parser.add_argument("--max-ratio", type=float, default=1.03, help="inf on a busy machine")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="NAME")
    parser.add_argument("--folder", type=Path, help="new folder to keep the runs in, for inspection")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        bench = Bench(folder, options)
        for _ in range(options.repeats):
            for case in options.cases:
                bench.pair(case)
        figures = bench.figures()
    print(json.dumps({"benchmark": "tracking", "epochs": options.epochs, "count": options.count, **figures}))
    sys.exit(bool(figures["faults"]))


if __name__ == "__main__":
    main()
