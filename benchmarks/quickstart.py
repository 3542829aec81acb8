"""Measure accuracy, time and memory of an experiment or a folder of images over several seeds or folds.

Each seed has different rendered images, splits and weights; with folds, every image is tested once. Each
training starts from scratch, through the real command in a fresh process and an empty folder. Prints one JSON
line.

    python benchmarks/quickstart.py [--experiment quickstart] [--seeds 3] [OVERRIDE ...]
    python benchmarks/quickstart.py --folder DIR [--folds 5] [OVERRIDE ...]
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


def seed_overrides(seed: int, is_folder: bool) -> list[str]:
    return [f"seed={seed}", f"data.split_seed={seed}", *([] if is_folder else [f"data.seed={seed}"])]


def train(overrides: list[str]) -> dict[str, Any]:
    """Train once and return the result, with the wall time of the whole process."""
    command = [sys.executable, "-m", "captcha_exp", "train", "--json", *overrides]
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
        run_dir = Path(result["run_dir"])
        test = json.loads((run_dir / "test.json").read_text())
        manifest = json.loads((run_dir / "dataset.json").read_text())
    inferred = {each["key"]: each["value"] for each in manifest["inferred"]}
    counts = {"correct": test["correct"], "images": test["images"]}
    return {**result, **counts, "inferred": inferred, "wall_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", default="quickstart")
    parser.add_argument("--folder", metavar="DIR", help="folder of images instead of an experiment")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, help="train this many folds instead of seeds")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    arguments = parser.parse_args()
    source = ["data=folder", f"data.path={arguments.folder}"]
    base = source if arguments.folder else [f"experiment={arguments.experiment}"]
    variants = [seed_overrides(seed, bool(arguments.folder)) for seed in range(arguments.seeds)]
    if folds := arguments.folds:
        variants = [[f"data.folds={folds}", f"data.fold={fold}"] for fold in range(folds)]
    results = [train([*base, *arguments.overrides, *variant]) for variant in variants]
    accuracies = [result["test_accuracy"] for result in results]
    print(
        json.dumps(
            {
                "benchmark": "quickstart",
                "data": Path(arguments.folder).name if arguments.folder else arguments.experiment,
                "overrides": arguments.overrides,
                "trainings": [" ".join(variant) for variant in variants],
                "inferred": results[0]["inferred"],
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
