"""Measure the startup time of the commands, each the median of several runs that alternate.

Prints one JSON line: CPU seconds of `--help` and of a completion, wall seconds of `python -c "import torch"`,
of `captcha-exp train experiment=quickstart` up to its first step on a cached dataset, of `evaluate latest`,
and of `runs` with 1,000 runs (benchmarks/many_runs.py). `..._beyond_torch_seconds` is the median difference
from the import of torch in the same round. In the measured training `train_step` prints the time and exits.

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
from many_runs import make_runs

FIRST_STEP = """
import sys, time
from captcha_exp.cli import train as command
from captcha_exp.cli.main import main

def first_step(*arguments):
    print("first step", time.time())
    raise KeyboardInterrupt

def train(*arguments, original=command._train):
    import captcha_exp.training.train
    captcha_exp.training.train.train_step = first_step
    return original(*arguments)

command._train = train
sys.argv = ["captcha-exp", "train", "experiment=quickstart", "--resume=never"]
main()
"""
NUM_RUNS = 1000
QUICK = ("experiment=quickstart", "train.epochs=1")  # of the run that `evaluate` reads


def run(arguments: list[str], **environment: str) -> None:
    """Run the command, without its output."""
    command = [sys.executable, "-m", "captcha_exp", *arguments]
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)


def cpu_seconds(arguments: list[str], **environment: str) -> float:
    """Return the user and system seconds of one run of the command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(arguments, **environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def wall_seconds(arguments: list[str], root: Path) -> float:
    """Return the wall seconds of one run of the command."""
    began = time.perf_counter()
    run(arguments, CAPTCHA_EXP_ROOT=str(root))
    return time.perf_counter() - began


def import_torch_seconds() -> float:
    """Return the wall seconds of a process that only imports torch."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - began


def first_step_seconds(root: Path) -> float:
    """Return the wall seconds from the start of the process to its first training step."""
    environment = os.environ | {"CAPTCHA_EXP_ROOT": str(root)}
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", FIRST_STEP], env=environment, capture_output=True, text=True, check=False
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("first step")), None)
    assert line is not None, done.stderr
    return float(line.split()[-1]) - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    num_rounds = parser.parse_args().runs
    completion = {"COMP_LINE": "captcha-exp train experiment="}
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root, many = Path(folder, "root"), Path(folder, "many")
        root.mkdir()
        run(["train", *QUICK], CAPTCHA_EXP_ROOT=str(root))  # renders the images and creates the store
        make_runs(next(root.glob("outputs/*/*/run.json")).parent, many, NUM_RUNS)
        for _ in range(num_rounds):
            seconds = {
                "help_cpu_seconds": cpu_seconds(["--help"]),
                "completion_cpu_seconds": cpu_seconds(["-sc", "query=bash"], **completion),
                "import_torch_seconds": (torch := import_torch_seconds()),
                "first_step_seconds": (step := first_step_seconds(root)),
                "first_step_beyond_torch_seconds": step - torch,
                "evaluate_seconds": (evaluate := wall_seconds(["evaluate", "latest"], root)),
                "evaluate_beyond_torch_seconds": evaluate - torch,
                f"list_{NUM_RUNS}_runs_seconds": wall_seconds(["runs"], many),
            }
            for name, value in seconds.items():
                figures.setdefault(name, []).append(value)
    medians = {name: round(statistics.median(values), 3) for name, values in figures.items()}
    print(json.dumps({"benchmark": "startup", "runs": num_rounds, **medians, **interference()}))


if __name__ == "__main__":
    main()
