"""Accuracy, time and memory of a named experiment over several seeds, each from nothing.

Every seed is another set of pictures, another split and other weights, trained through the real command in a
fresh process and an empty folder. Prints one JSON line.

    python benchmarks/quickstart.py [--experiment quickstart] [--seeds 3] [OVERRIDE ...]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any


def train(experiment: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """The result of one training, with its wall seconds, pictures, imports and all."""
    seeds = [f"seed={seed}", f"data.seed={seed}", f"data.split_seed={seed}"]
    command = [sys.executable, "-m", "captcha_exp", "train", "--json", f"experiment={experiment}"]
    with tempfile.TemporaryDirectory() as root:
        began = time.perf_counter()
        done = subprocess.run(
            [*command, *seeds, *overrides],
            env=os.environ | {"CAPTCHA_EXP_ROOT": root},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - began
    result: dict[str, Any] = json.loads(done.stdout)
    return {**result, "wall_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", default="quickstart")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    arguments = parser.parse_args()
    results = [train(arguments.experiment, seed, arguments.overrides) for seed in range(arguments.seeds)]
    accuracies = [result["test_accuracy"] for result in results]
    print(
        json.dumps(
            {
                "benchmark": "quickstart",
                "experiment": arguments.experiment,
                "overrides": arguments.overrides,
                "seeds": arguments.seeds,
                "test_accuracy": [round(accuracy, 4) for accuracy in accuracies],
                "mean_test_accuracy": round(statistics.mean(accuracies), 4),
                "wall_seconds": [round(result["wall_seconds"], 1) for result in results],
                "process_peak_mib": round(max(result["process_peak_mib"] for result in results)),
            }
        )
    )


if __name__ == "__main__":
    main()
