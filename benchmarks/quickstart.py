"""Measure accuracy, time and memory of an experiment or a folder of images over several seeds.

Each seed has different rendered images, splits and weights, and is trained from scratch through the real
command in a fresh process and an empty folder. Prints one JSON line.

    python benchmarks/quickstart.py [--experiment quickstart] [--seeds 3] [OVERRIDE ...]
    python benchmarks/quickstart.py --folder DIR captcha.alphabet=0123456789 captcha.length=4
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


def train(overrides: list[str], seed: int) -> dict[str, Any]:
    """Train once and return the result, with the wall time of the whole process."""
    seeds = [f"seed={seed}", f"data.split_seed={seed}"]
    seeds += [] if "data=folder" in overrides else [f"data.seed={seed}"]
    command = [sys.executable, "-m", "captcha_exp", "train", "--json", *overrides, *seeds]
    with tempfile.TemporaryDirectory() as root:
        began = time.perf_counter()
        done = subprocess.run(
            command,
            env=os.environ | {"CAPTCHA_EXP_ROOT": root},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - began
        result: dict[str, Any] = json.loads(done.stdout)
        test = json.loads((Path(result["run_dir"]) / "test.json").read_text())
    return {**result, "correct": test["correct"], "images": test["images"], "wall_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", default="quickstart")
    parser.add_argument("--folder", metavar="DIR", help="folder of images instead of an experiment")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    arguments = parser.parse_args()
    source = ["data=folder", f"data.path={arguments.folder}"]
    base = source if arguments.folder else [f"experiment={arguments.experiment}"]
    results = [train([*base, *arguments.overrides], seed) for seed in range(arguments.seeds)]
    accuracies = [result["test_accuracy"] for result in results]
    print(
        json.dumps(
            {
                "benchmark": "quickstart",
                "data": Path(arguments.folder).name if arguments.folder else arguments.experiment,
                "overrides": arguments.overrides,
                "seeds": arguments.seeds,
                "test_accuracy": [round(accuracy, 4) for accuracy in accuracies],
                "mean_test_accuracy": round(statistics.mean(accuracies), 4),
                "correct": sum(result["correct"] for result in results),
                "images": sum(result["images"] for result in results),
                "wall_seconds": [round(result["wall_seconds"], 1) for result in results],
                "process_peak_mib": round(max(result["process_peak_mib"] for result in results)),
                **interference(),
            }
        )
    )


if __name__ == "__main__":
    main()
