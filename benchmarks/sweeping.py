"""Measure the overhead of running each job of a sweep in its own process.

Runs sweeps with few and with more jobs of negligible training time through the real command; the difference
per job, of the wall time without its epochs, is its startup, plan, record and shutdown. Prints one JSON line
per source tree: wall and CPU seconds per job, with and without MLflow, and of the rest of the sweep; medians
over the rounds. Several source trees (clones of other commits) take turns.

    python benchmarks/sweeping.py [--few 1] [--more 4] [--rounds 1] [--sources DIR ...]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from interference import interference

SMALL = (
    "data.count=300",
    "data.validation_fraction=0.25",
    "data.test_fraction=0.25",
    "captcha.alphabet='01234'",
    "captcha.length=2",
    "captcha.width=32",
    "captcha.height=16",
    "model.channels=[4,8,8]",
    "train.batch_size=64",
    "train.epochs=1",
)
ROOT = Path(__file__).resolve().parents[1]


def seconds(source: Path, root: Path, num_jobs: int, tracking: str) -> tuple[float, float, float]:
    """Return the wall and CPU seconds of a sweep over `num_jobs` seeds, and those of its epochs."""
    seeds = f"seed={','.join(map(str, range(num_jobs)))}"
    words = ["train", "-m", *SMALL, seeds, f"tracking={tracking}", "--json"]
    command = [sys.executable, "-P", "-m", "captcha_exp", *words]  # -P: not that of the working directory
    environment = os.environ | {"CAPTCHA_EXP_ROOT": str(root), "PYTHONPATH": str(source)}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=environment, check=True, capture_output=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    rows = [
        json.loads(line)
        for job in json.loads(done.stdout)["jobs"]
        for line in (Path(job["run_dir"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    epochs = sum(row["metrics"].get("speed/epoch_seconds", 0.0) for row in rows)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, epochs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--few", type=int, default=1)
    parser.add_argument("--more", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sources", type=Path, nargs="+", default=[ROOT])
    options = parser.parse_args()
    measured: dict[tuple[Path, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds + 1):
            for source in options.sources:
                for tracking in ("mlflow", "none"):
                    root = Path(folder) / str(options.sources.index(source))
                    if number == 0:  # renders the images and creates the store
                        seconds(source.resolve(), root, 1, tracking)
                        continue
                    few, more = (
                        seconds(source.resolve(), root, num_jobs, tracking)
                        for num_jobs in (options.few, options.more)
                    )
                    training = (more[2] - few[2]) / (options.more - options.few)
                    for index, kind in enumerate(("wall", "cpu")):
                        per_job = (more[index] - few[index]) / (options.more - options.few)
                        around = few[index] - options.few * per_job
                        per_job -= training if kind == "wall" else 0.0
                        measured[source, f"job_{kind}_seconds_{tracking}"].append(per_job)
                        measured[source, f"around_{kind}_seconds_{tracking}"].append(around)
    others = interference()
    for source in options.sources:
        figures = {
            name: round(statistics.median(values), 2)
            for (each, name), values in measured.items()
            if each == source
        }
        jobs = {"benchmark": "sweeping", "source": str(source), "jobs": [options.few, options.more]}
        print(json.dumps({**jobs, "rounds": options.rounds, **figures, **others}))


if __name__ == "__main__":
    main()
