"""Measure the startup time of the command: `--help`, completion, and the first training step.

Prints one JSON line: CPU seconds of `--help` and of a completion, wall seconds from the start of
`captcha-exp train experiment=quickstart` to its first step on a cached dataset, each the median of several
runs. The measured process replaces `train_step` by a function that prints the time and exits.

    python benchmarks/startup.py [--runs 5]
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
from pathlib import Path

from interference import interference

FIRST_STEP = """
import sys, time
import captcha_exp.training.train as train
def first_step(*arguments):
    print("first step", time.time())
    raise KeyboardInterrupt
train.train_step = first_step
from captcha_exp.cli import main
sys.argv = ["captcha-exp", "train", "experiment=quickstart"]
main()
"""


def cpu_seconds(arguments: list[str], **environment: str) -> float:
    """Return the user and system seconds of one run of the command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "captcha_exp", *arguments]
    subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_step_seconds(root: Path) -> float:
    """Return the wall seconds from the start of the process to its first training step."""
    environment = os.environ | {"CAPTCHA_EXP_ROOT": str(root)}
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", FIRST_STEP], env=environment, capture_output=True, text=True, check=False
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("first step"))
    return float(line.split()[-1]) - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    completion = {"COMP_LINE": "captcha-exp train experiment="}
    with tempfile.TemporaryDirectory() as folder:
        first_step_seconds(Path(folder))  # renders the images and creates the store
        figures = {
            "help_cpu_seconds": [cpu_seconds(["--help"]) for _ in range(runs)],
            "completion_cpu_seconds": [cpu_seconds(["-sc", "query=bash"], **completion) for _ in range(runs)],
            "first_step_seconds": [first_step_seconds(Path(folder)) for _ in range(runs)],
        }
    medians = {name: round(statistics.median(values), 3) for name, values in figures.items()}
    print(json.dumps({"benchmark": "startup", "runs": runs, **medians, **interference()}))


if __name__ == "__main__":
    main()
