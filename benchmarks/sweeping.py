"""What it costs that each point of a sweep has a process of its own.

Sweeps of few and of more points that train for no time worth mentioning, through the real command; what a
point more takes is the start of its process, its plan, its record and its end. Prints one JSON line: wall and
CPU seconds of a point, with MLflow and without, and of the sweep around them.

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


def seconds(root: Path, points: int, tracking: str) -> tuple[float, float]:
    """Wall and CPU seconds of a sweep over so many seeds."""
    seeds = f"seed={','.join(map(str, range(points)))}"
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
    asked = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for tracking in ("mlflow", "none"):
            seconds(Path(folder), 1, tracking)  # draws the pictures and makes the store
            few, more = (seconds(Path(folder), points, tracking) for points in (asked.few, asked.more))
            for kind, one, other in zip(("wall", "cpu"), few, more, strict=True):
                point = (other - one) / (asked.more - asked.few)
                figures[f"point_{kind}_seconds_{tracking}"] = round(point, 2)
                figures[f"around_{kind}_seconds_{tracking}"] = round(one - asked.few * point, 2)
    print(json.dumps({"benchmark": "sweeping", "points": [asked.few, asked.more], **figures}))


if __name__ == "__main__":
    main()
