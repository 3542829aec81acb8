"""The worker process of a job: a stop request interrupts whatever it waits for."""

import contextlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from captcha_exp.config import Config
from captcha_exp.runs import load, make_run_dir
from captcha_exp.runtime import fork_server
from captcha_exp.sweep.supervisor import TrainJob, train_with_oom_retry
from captcha_exp.sweep.worker import STOP

BLOCKED = """
import signal, socket, sys, threading
from captcha_exp.sweep import worker
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
threading.Thread(target=worker._watch_stdin, args=(worker._read_lines(),), daemon=True).start()
print("ready", flush=True)
ours, theirs = socket.socketpair()
ours.recv(1)
"""


def test_a_stop_request_interrupts_a_blocking_call() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BLOCKED], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            process.stdin.write(STOP + b"\n")
            process.stdin.flush()
            assert process.wait(10) == 143
        finally:
            process.kill()


PRELOADED = """
import json, os, sys
from pathlib import Path
import torch
before, asked = torch.get_rng_state(), []
for name in ("_cuda_getDeviceCount", "_cuda_init"):
    if hasattr(torch._C, name):
        setattr(torch._C, name, lambda: asked.append(name) or 0)
from captcha_exp.sweep import worker
worker.preload("mlflow" in sys.argv)
print(json.dumps({
    "threads": sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")),
    "descriptors": sorted(map(int, os.listdir("/proc/self/fd"))),
    "uses_cuda": bool(asked) or torch.cuda.is_initialized(),
    "has_drawn": not torch.equal(torch.get_rng_state(), before),
    "num_threads": torch.get_num_threads(),
    "modules": [n for n in ("mlflow", "onnxruntime", "scipy", "torch._dynamo") if n in sys.modules],
}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize(
    ("arguments", "modules"), [([], []), pytest.param(["mlflow"], ["mlflow"], marks=pytest.mark.long)]
)
def test_the_fork_server_has_imported_modules_and_nothing_else(
    arguments: list[str], modules: list[str]
) -> None:
    """A job's memory has no module of another; its threads, draws and devices are its own."""
    done = subprocess.run(
        [sys.executable, "-c", PRELOADED, *arguments],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # NumPy's threads end before a fork
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert set(found.pop("threads")) <= {"python", "jemalloc_bg_thd"}, "Arrow's allocator handles forks"
    assert found.pop("num_threads") >= 1
    assert found == {
        "descriptors": [0, 1, 2, 3],  # 3 is the listing itself
        "uses_cuda": False,
        "has_drawn": False,
        "modules": [*modules, *(["scipy"] if modules else [])],
    }


@pytest.mark.long
def test_a_forked_job_equals_one_in_a_new_process(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights, metrics, environment and peak memory."""

    def train(is_forked: bool) -> tuple[dict[str, Any], float]:
        monkeypatch.setattr(fork_server, "is_supported", lambda: is_forked)
        path = make_run_dir("tiny")
        job = TrainJob(replace(tiny, train=replace(tiny.train, on_oom="record")), {})
        lines: list[str] = []
        train_with_oom_retry(job, lambda _: contextlib.nullcontext(path), lines.append)
        run = load(path)
        result = run.info.result
        assert result is not None, lines
        metrics = [
            {key: value for key, value in row.metrics.items() if not key.startswith(("memory/", "speed/"))}
            for row in run.metrics_rows()
        ]
        lines = [re.sub(r"[\d,]+ images/s.*", "", line) for line in lines if str(path) not in line]
        environment, code = run.read_json("environment.json"), run.read_json("code.json")
        return {
            "weights": result.weights_sha256,
            "metrics": metrics,
            "environment": environment,
            "code": code,
            "output": lines,
        }, result.process_peak_mib

    train(False)  # renders the images
    (forked, forked_peak), (new, new_peak) = train(True), train(False)
    assert forked == new
    assert forked_peak == pytest.approx(new_peak, rel=0.03)
