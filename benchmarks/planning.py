"""Measure how long planning a batch size takes, compared with one training step of that size on the CPU.

Prints one JSON line: seconds of the first plan of the process, which imports torch's compiler; for each batch
size the plan's tensors, seconds of its first plan and the median of several, seconds of one real `train_step`
in fp32 on random images, and the ratio. All run in one process, each step directly after its plans, after a
warm-up with a small batch.

    python benchmarks/planning.py [--experiment article] [--sizes 25 50 100 200 400 800] [--runs 5]

With `--gpus all` (or a list) instead: wall-clock and processor seconds of the whole process
`captcha-exp plan --gpu all experiment=article train.batch_size=100 --json`, the median of the runs and the
smallest, and the number of GPUs.

    python benchmarks/planning.py --gpus all [--config-dir DIR] [--runs 5]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from interference import interference

from captcha_exp import compose, load
from captcha_exp.config import Config
from captcha_exp.data.dataset import random_batch
from captcha_exp.memory.plan import Plan, Planner
from captcha_exp.model.step import init_train_state, train_step

WARM_UP = 8  # batch size
SPLIT_SIZES = {"train": 80_000, "validation": 10_000, "test": 10_000}


def seconds(call: Callable[..., object], *arguments: object) -> float:
    """Return the seconds of one call."""
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def make_plan(config: Config, size: int) -> Plan:
    """Return the plan of a batch size from a new planner."""
    return Planner(config, SPLIT_SIZES).plan_for(size)


def time_gpus(arguments: argparse.Namespace) -> dict[str, object]:
    """Return the time of plans for several GPUs, each run in its own process."""
    command = [sys.executable, "-m", "captcha_exp", "plan", "--json", "--gpu", arguments.gpus]
    command += [f"experiment={arguments.experiment}", "train.batch_size=100"]
    if arguments.config_dir:
        command += ["--config-dir", arguments.config_dir]
    wall, processor = [], []
    for _ in range(arguments.runs):
        began, before = time.perf_counter(), os.times()
        done = subprocess.run(command, capture_output=True, check=True, text=True)
        wall.append(time.perf_counter() - began)
        after = os.times()
        processor.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    return {
        "benchmark": "planning --gpus",
        "experiment": arguments.experiment,
        "runs": arguments.runs,
        "gpus": len(json.loads(done.stdout)["gpus"]),
        "seconds": round(statistics.median(wall), 2),
        "min_seconds": round(min(wall), 2),
        "processor_seconds": round(statistics.median(processor), 2),
        "min_processor_seconds": round(min(processor), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", default="article")
    parser.add_argument("--sizes", type=int, nargs="+", default=[25, 50, 100, 200, 400, 800])
    parser.add_argument("--runs", type=int, default=5, help="plans of each size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--gpus", metavar="all|NAME,NAME", help="time a comparison of these GPUs instead")
    parser.add_argument("--config-dir", metavar="DIR", help="directory with more files in gpu/")
    arguments = parser.parse_args()
    if arguments.gpus:
        print(json.dumps(time_gpus(arguments) | interference()))
        return
    torch.set_num_threads(arguments.threads)
    device = torch.device("cpu")
    chosen = (f"experiment={arguments.experiment}", "device.name=cpu", "device.precision=fp32")
    config = load(compose(*chosen, "gpu=gtx1650"))
    first = seconds(make_plan, config, WARM_UP)
    state = init_train_state(config, device)
    train_step(state, random_batch(config, WARM_UP, device), config)
    sizes = []
    for size in arguments.sizes:
        plans = [seconds(make_plan, config, size) for _ in range(arguments.runs)]
        step = seconds(train_step, state, random_batch(config, size, device), config)
        sizes.append(
            {
                "size": size,
                "tensors_mib": round(make_plan(config, size).tensors_mib, 2),
                "new_plan_seconds": round(plans[0], 3),
                "plan_seconds": round(statistics.median(plans), 3),
                "step_seconds": round(step, 3),
                "new_plan_to_step": round(plans[0] / step, 3),
            }
        )
    figures = {
        "benchmark": "planning",
        "experiment": arguments.experiment,
        "threads": arguments.threads,
        "runs": arguments.runs,
        "first_plan_seconds": round(first, 3),
        "new_plan_seconds": round(statistics.median(each["new_plan_seconds"] for each in sizes), 3),
        "sizes": sizes,
    }
    print(json.dumps(figures | interference()))


if __name__ == "__main__":
    main()
