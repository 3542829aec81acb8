"""Measure the overhead of running each job of a sweep in its own process.

Runs sweeps with few and with more jobs of negligible training time through the real command; the difference
per job is its startup, plan, record and shutdown. Prints one JSON line: wall and CPU seconds per job, with
and without MLflow, and of the rest of the sweep.

    python benchmarks/sweeping.py [--few 1] [--more 4]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
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


def seconds(root: Path, num_jobs: int, tracking: str) -> tuple[float, float]:
    """Return the wall and CPU seconds of a sweep over `num_jobs` seeds."""
    seeds = f"seed={','.join(map(str, range(num_jobs)))}"
    command = [sys.executable, "-m", "captcha_exp", "train", "-m", *SMALL, seeds, f"tracking={tracking}"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=os.environ | {"CAPTCHA_EXP_ROOT": str(root)}, check=True, capture_output=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--few", type=int, default=1)
    parser.add_argument("--more", type=int, default=4)
    options = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for tracking in ("mlflow", "none"):
            seconds(Path(folder), 1, tracking)  # renders the images and creates the store
            few, more = (
                seconds(Path(folder), num_jobs, tracking) for num_jobs in (options.few, options.more)
            )
            for kind, one, other in zip(("wall", "cpu"), few, more, strict=True):
                per_job = (other - one) / (options.more - options.few)
                figures[f"job_{kind}_seconds_{tracking}"] = round(per_job, 2)
                figures[f"around_{kind}_seconds_{tracking}"] = round(one - options.few * per_job, 2)
    print(
        json.dumps(
            {"benchmark": "sweeping", "jobs": [options.few, options.more], **figures, **interference()}
        )
    )


if __name__ == "__main__":
    main()
