"""Serve an exported model with `mlflow models serve`, and measure and check it.

Trains a small model, exports and registers it, and serves it on 127.0.0.1. Prints one JSON line: requests per
second and latencies of clients that each send one image per request and wait for the answer; lost and wrong
answers; the status of each malformed request; what a request of 100 megapixels does to a server with limited
memory; and, given an nginx, the statuses of the proxy in docs/serving.md.

    python benchmarks/serving.py [--requests 1000] [--clients 8] [--workers 1] [--nginx PATH]
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from interference import interference
from scoring_server import ACCEPTED, FAILING, REFUSED, Response, is_up, large_body, post, serve, to_body

from captcha_exp import OnnxPredictor
from captcha_exp.export.manifest import Manifest

OVERRIDES = ("data.count=3000", "train.epochs=3", "tracking.register=digits")
LARGE_SIDE = 10_000  # pixels: 100 megapixels
MAX_SERVER_BYTES = 6 * 2**30
SERVING = Path(__file__).parents[1] / "docs" / "serving.md"


def train(root: Path) -> tuple[OnnxPredictor, str]:
    """Train and register a model; return its file and the tracking URI."""
    environment = os.environ | {"CAPTCHA_EXP_ROOT": str(root)}
    command = [sys.executable, "-m", "captcha_exp", "train", "--quiet", *OVERRIDES]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    (path,) = root.glob("outputs/*/*/model.onnx")
    return OnnxPredictor(path, num_threads=1), f"sqlite:///{root}/mlruns/mlflow.db"


def texts_of(response: Response, manifest: Manifest) -> list[str]:
    """Return the texts in a response."""
    return ["".join(manifest.alphabet[k] for k in ids if k >= 0) for ids in response.predictions()["ids"]]


def server_cpu_seconds() -> float:
    """Return the CPU time of the processes that this one has started and that are alive."""
    times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return float(sum(each.user + each.system for each in times))


def measure(
    port: int,
    bodies: Sequence[bytes],
    expected: Sequence[str],
    manifest: Manifest,
    requests: int,
    clients: int,
) -> dict[str, Any]:
    """Send requests from several clients; return the figures."""

    def send(number: int) -> tuple[float, str]:
        start = time.perf_counter()
        response = post(port, bodies[number % len(bodies)])
        seconds = time.perf_counter() - start
        if response.status != 200:
            return seconds, "lost"
        right = texts_of(response, manifest) == [expected[number % len(bodies)]]
        return seconds, "right" if right else "wrong"

    start, cpu_start = time.perf_counter(), server_cpu_seconds()
    with ThreadPoolExecutor(clients) as pool:
        outcomes = list(pool.map(send, range(requests)))
    wall, cpu = time.perf_counter() - start, server_cpu_seconds() - cpu_start
    times = [1000 * seconds for seconds, _ in outcomes]
    cuts = statistics.quantiles(times, n=100)
    found = [outcome for _, outcome in outcomes]
    return {
        "requests": requests,
        "clients": clients,
        "right": found.count("right"),
        "wrong": found.count("wrong"),
        "lost": found.count("lost"),
        "requests_per_second": round(requests / wall, 1),
        "server_cpu_ms_per_request": round(1000 * cpu / requests, 1),
        "latency_ms": {
            "p50": round(cuts[49]),
            "p95": round(cuts[94]),
            "p99": round(cuts[98]),
            "max": round(max(times)),
        },
    }


def check_malformed(port: int) -> dict[str, dict[str, int]]:
    """Return the status of each malformed request."""
    return {
        "refused": {name: post(port, *request).status for name, request in REFUSED.items()},
        "failing": {name: post(port, body).status for name, body in FAILING.items()},
        "accepted": {name: post(port, body).status for name, body in ACCEPTED.items()},
    }


def check_large(model: str, store: str) -> dict[str, Any]:
    """Send 100 megapixels to a server whose memory is limited; return what happens."""
    with serve(model, store, max_bytes=MAX_SERVER_BYTES) as port:
        body, size = large_body(LARGE_SIDE)
        start = time.perf_counter()
        response = post(port, body, num_bytes=size)
        seconds = time.perf_counter() - start
        return {
            "request_mb": round(size / 1e6),
            "limit_gib": MAX_SERVER_BYTES // 2**30,
            "status": response.status,
            "answer": response.body[:100].decode(errors="replace"),
            "seconds": round(seconds, 1),
            "answers_afterwards": is_up(port),
        }


def check_proxy(nginx: str, port: int, body: bytes, folder: Path) -> dict[str, int]:
    """Start the proxy of docs/serving.md; return the statuses of requests with and without a password."""
    block = re.search(r"```nginx\n(.*?)```", SERVING.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    front = port + 1 if port < 65535 else port - 1
    text = re.sub(r"listen [^;]+;", f"listen 127.0.0.1:{front};", block[1])
    text = re.sub(r"ssl_\w+ [^;]+;", "", text).replace("127.0.0.1:5001", f"127.0.0.1:{port}")
    text = re.sub(r"auth_basic_user_file [^;]+;", f"auth_basic_user_file {folder}/users;", text)
    paths = "".join(
        f"{n}_temp_path {folder}/{n};" for n in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "users").write_text("alice:{PLAIN}secret\n")
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; events {{}}\nhttp {{ access_log off; {paths}\n{text}\n}}\n"
    )
    command = [nginx, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    with subprocess.Popen(command) as proxy:
        try:
            time.sleep(2)
            curl = [
                "curl",
                "-s",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}",
                "-H",
                "Content-Type: application/json",
            ]
            url = f"http://127.0.0.1:{front}/invocations"
            (folder / "body.json").write_bytes(body)
            (folder / "large.json").write_bytes(b" " * 3_000_000)
            small, large = f"@{folder}/body.json", f"@{folder}/large.json"
            user = ["-u", "alice:secret"]
            calls = {
                "no password": [*curl, "-d", small, url],
                "wrong password": [*curl, "-u", "alice:x", "-d", small, url],
                "right password": [*curl, *user, "-d", small, url],
                "3 MB": [*curl, *user, "--data-binary", large, url],
                "no content type": [*curl[:6], "-H", "Content-Type:", *user, "-d", small, url],
            }
            return {
                name: int(subprocess.run(words, capture_output=True, check=False).stdout or 0)
                for name, words in calls.items()
            }
        finally:
            proxy.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1, help="processes of the server")
    parser.add_argument("--nginx", help="path of an nginx, for the proxy")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        predictor, store = train(root)
        images = predictor.proof_images()
        bodies = [to_body(image.pixels.tolist()) for image in images]
        figures: dict[str, Any] = {
            "image": list(images[0].pixels.shape),
            "request_kb": len(bodies[0]) // 1000,
        }
        start = time.perf_counter()
        with serve("models:/digits@newest", store, arguments.workers) as port:
            figures |= {"workers": arguments.workers, "start_seconds": round(time.perf_counter() - start, 1)}
            post(port, bodies[0])
            expected, manifest = [image.text for image in images], predictor.manifest
            figures |= measure(port, bodies, expected, manifest, arguments.requests, arguments.clients)
            figures |= {"malformed": check_malformed(port)}
            if arguments.nginx:
                with tempfile.TemporaryDirectory() as proxy:
                    Path(proxy).chmod(0o755)  # nginx reads the users as another user
                    figures |= {"proxy": check_proxy(arguments.nginx, port, bodies[0], Path(proxy))}
        figures |= {"large": check_large("models:/digits@newest", store)}
    print(json.dumps({"benchmark": "serving", **figures, **interference()}))


if __name__ == "__main__":
    main()
