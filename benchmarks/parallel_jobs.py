"""Compare jobs of a sweep in parallel with the same jobs one after the other.

Four jobs are trained in turn one after the other, each with all cores, and two at a time with joblib, which
share the cores. The weights of the parallel jobs must equal those of a run of its own with as many threads.
For a machine that is otherwise idle. Prints one JSON line: wall seconds, their ratio, and where they go; exit
code 1 if there is a fault.

    python benchmarks/parallel_jobs.py [--rounds 3] [--max-ratio 0.9] [OVERRIDE ...]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from interference import interference

OVERRIDES = ("experiment=quickstart", "data.count=12000", "tracking=none", "device.name=cpu")
NUM_JOBS, NUM_PARALLEL = 4, 2
JOBLIB = ("hydra/launcher=joblib", f"hydra.launcher.n_jobs={NUM_PARALLEL}")


def run(root: str, *words: str) -> dict[str, Any]:
    """Run `captcha-exp train` and return its JSON, with its wall seconds."""
    command = [sys.executable, "-m", "captcha_exp", "train", "--json", "--quiet", "--resume=never", *words]
    began = time.perf_counter()
    environment = os.environ | {"CAPTCHA_EXP_ROOT": root}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return {**result, "wall_seconds": time.perf_counter() - began}


def epoch_seconds(job: dict[str, Any]) -> float:
    """Return the seconds of a job in its epochs, validation included."""
    lines = (Path(job["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    return float(sum(json.loads(line)["metrics"].get("speed/epoch_seconds", 0.0) for line in lines))


def describe(sweeps: list[dict[str, Any]], num_parallel: int) -> dict[str, Any]:
    """Return medians over the sweeps: wall seconds, and those in and outside the epochs of one of the jobs
    that run at the same time."""
    walls = [each["wall_seconds"] for each in sweeps]
    epochs = [sum(map(epoch_seconds, each["jobs"])) / num_parallel for each in sweeps]
    jobs = [job for each in sweeps for job in each["jobs"]]
    outside = statistics.median(wall - inside for wall, inside in zip(walls, epochs, strict=True))
    return {
        "wall_seconds": round(statistics.median(walls), 1),
        "epoch_seconds": round(statistics.median(epochs), 1),
        "other_seconds": round(outside, 1),
        "images_per_second": round(statistics.median(job["images_per_second"] for job in jobs)),
        "disturbed_jobs": sum(job["disturbed"] for job in jobs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-ratio", type=float, default=0.9, help="of the wall seconds")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    options = parser.parse_args()
    seeds = f"seed={','.join(map(str, range(NUM_JOBS)))}"
    words = [*OVERRIDES, "data.seed=0", *options.overrides]
    serial, parallel, faults = [], [], []
    with tempfile.TemporaryDirectory() as root:
        run(root, *words, "seed=9", "train.epochs=1")  # renders the images
        for _ in range(options.rounds):
            serial.append(run(root, "-m", *words, seeds))
            parallel.append(run(root, "-m", *words, seeds, *JOBLIB))
        config = (Path(parallel[0]["jobs"][0]["run_dir"]) / "config.yaml").read_text()
        threads = int(config.partition("threads:")[2].split()[0])
        for seed, job in enumerate(parallel[0]["jobs"]):
            alone = run(root, *words, f"seed={seed}", f"device.threads={threads}")
            if alone["weights_sha256"] != job["weights_sha256"]:
                faults.append(f"seed {seed}: other weights than alone with {threads} threads")
        figures: dict[str, Any] = {
            "serial": describe(serial, 1),
            "parallel": describe(parallel, NUM_PARALLEL),
            "threads_in_parallel": threads,
        }
    pairs = zip(serial, parallel, strict=True)
    ratio = statistics.median(two["wall_seconds"] / one["wall_seconds"] for one, two in pairs)
    if ratio > options.max_ratio:
        faults.append(f"two at a time take {ratio:.2f} of the time of one after the other")
    if figures["parallel"]["disturbed_jobs"]:
        faults.append("parallel jobs are called disturbed")
    about = {"benchmark": "parallel_jobs", "jobs": NUM_JOBS, "ratio": round(ratio, 3)}
    print(json.dumps({**about, **figures, "faults": faults, "machine": interference()}))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
