"""Check that a sweep believes only undisturbed speeds.

A sweep of the batch size runs next to a process that keeps a core busy: it must not name a batch size by its
speed. Then `--rerun-disturbed` trains its disturbed jobs again without that process, and it must name one.
More sweeps run alone, of which none may call a speed disturbed. For a machine that is otherwise idle. A
hypervisor may take cores nevertheless, which is a disturbance: this program samples the stolen time itself,
and repeats a sweep in which some was stolen. Prints one JSON line: disturbed jobs, speeds, the largest number
of cores waited for alone; exit code 1 if there is a fault.

    python benchmarks/disturbed.py [--sweeps 20] [--busy 1] [--nice 0] [OVERRIDE ...]
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from interference import interference

MAX_CORES_STOLEN = 0.05  # mean over an epoch; half of what makes a speed disturbed
MAX_REPEATS = 3  # sweeps begun for each one that nothing was stolen from
SAMPLE_SECONDS = 0.25
SIZES = "train.batch_size=32,64,128,256"
OVERRIDES = ("experiment=quickstart", "data.count=8000", "train.epochs=2", "tracking=none", "device.name=cpu")


@contextlib.contextmanager
def busy_processes(count: int, nice: int) -> Iterator[None]:
    """Keep `count` cores busy."""
    code = f"import os\nos.nice({nice})\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


class StealSampler:
    """Samples the CPU time that the hypervisor has stolen, in a thread, until the context exits."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float]] = []  # Unix time, seconds stolen so far
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "StealSampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(SAMPLE_SECONDS):
            self._samples.append((time.time(), getattr(psutil.cpu_times(), "steal", 0.0)))

    def cores(self, start: float, end: float) -> float:
        """Return the mean number of cores stolen between two Unix times."""
        found = [sample for sample in self._samples if start <= sample[0] <= end]
        if len(found) < 2:
            return 0.0
        (first, before), (last, after) = found[0], found[-1]
        return (after - before) / (last - first)


def stolen_cores(sampler: StealSampler, summary: dict[str, Any]) -> float:
    """Return the largest mean number of cores stolen during an epoch of a sweep."""
    spans = [(line["end"] - line["speed/epoch_seconds"], line["end"]) for line in epochs(summary)]
    return max(sampler.cores(*span) for span in spans)


def sweep(root: str, *words: str) -> dict[str, Any]:
    """Run a sweep and return its summary."""
    command = [sys.executable, "-m", "captcha_exp", "train", "-m", "--json", "--quiet", *words]
    environment = os.environ | {"CAPTCHA_EXP_ROOT": root}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def names_a_batch_size(summary: dict[str, Any]) -> bool:
    return " is the smallest that " in summary["conclusions"][0]


def disturbed_jobs(summary: dict[str, Any]) -> list[str]:
    return [job["name"] for job in summary["jobs"] if job["disturbed"]]


def speeds(summary: dict[str, Any]) -> dict[str, int]:
    return {job["name"]: round(job["images_per_second"]) for job in summary["jobs"]}


def epochs(summary: dict[str, Any]) -> list[dict[str, float]]:
    """Return the metrics of speed of each epoch of each job, and the Unix time of its end."""
    rows = [
        json.loads(line)
        for job in summary["jobs"]
        for line in (Path(job["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    ]
    return [
        {k: round(v, 3) for k, v in row["metrics"].items() if k.startswith("speed/")}
        | {"end": row["timestamp_ms"] / 1000}
        for row in rows
        if "speed/epoch_seconds" in row["metrics"]
    ]


def cores_waited(summary: dict[str, Any]) -> list[float]:
    """Return the cores that each epoch of each job waited for; empty where the system does not count them."""
    return [line["speed/cores_waited"] for line in epochs(summary) if "speed/cores_waited" in line]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweeps", type=int, default=20)
    parser.add_argument("--busy", type=int, default=1, help="number of busy processes")
    parser.add_argument("--nice", type=int, default=0, help="their niceness")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    options = parser.parse_args()
    words, began = [*OVERRIDES, SIZES, *options.overrides], time.perf_counter()
    faults = []
    with tempfile.TemporaryDirectory() as root:
        sweep(root, *words, "train.batch_size=256")  # renders the images
        with busy_processes(options.busy, options.nice):
            disturbed = sweep(root, *words, "--resume=never")
        rerun = sweep(root, *words, "--rerun-disturbed")
        if names_a_batch_size(disturbed) or not disturbed_jobs(disturbed):
            faults.append(f"next to a busy process: {disturbed['conclusions']}")
        if not names_a_batch_size(rerun):
            faults.append(f"after --rerun-disturbed: {rerun['conclusions']}")
        alone: list[dict[str, Any]] = []
        stolen_from: list[dict[str, Any]] = []
        with StealSampler() as sampler:
            while len(alone) < options.sweeps and len(stolen_from) < (MAX_REPEATS - 1) * options.sweeps:
                summary = sweep(root, *words, "--resume=never")
                is_alone = stolen_cores(sampler, summary) <= MAX_CORES_STOLEN
                (alone if is_alone else stolen_from).append(summary)
        if len(alone) < options.sweeps:
            faults.append(f"the hypervisor took cores in {len(stolen_from)} sweeps: use another machine")
        for number, summary in enumerate(alone, 1):
            if names := disturbed_jobs(summary):
                causes = [line for line in epochs(summary) if line.get("speed/disturbed")]
                faults.append(f"sweep {number} alone: {', '.join(names)} disturbed: {causes}")
        waited = [cores for summary in alone for cores in cores_waited(summary)]
        figures = {
            "disturbed": disturbed_jobs(disturbed),
            "speeds_disturbed": speeds(disturbed),
            "cores_waited_disturbed": [round(cores, 2) for cores in cores_waited(disturbed)],
            "conclusion_disturbed": disturbed["conclusions"][0],
            "speeds_after_rerun": speeds(rerun),
            "conclusion_after_rerun": rerun["conclusions"][0],
            "sweeps_alone": len(alone),
            "sweeps_stolen_from": [disturbed_jobs(summary) for summary in stolen_from],
            "max_cores_waited_alone": round(max(waited), 4) if waited else None,
            "faults": faults,
            "seconds": round(time.perf_counter() - began),
        }
    print(json.dumps({"benchmark": "disturbed", **figures, "machine": interference()}))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
