"""How long the plan of a batch size takes, beside one step of that size on this machine's CPU.

Prints one JSON line: seconds of the first plan of the process, which imports torch's compiler; for each batch
size the plan's tensors, seconds of its first plan and the median of several, seconds of one real `train_step`
in fp32 on noise, and the ratio. All share a process and its threads, and each step runs right beside its
plans. A plan and a step of a small batch come before those that count.

    python benchmarks/planning.py [--experiment article] [--sizes 25 50 100 200 400 800] [--runs 5]

With `--cards all` (or a list) instead: wall-clock and processor seconds of the whole process
`captcha-exp plan --gpu all experiment=article train.batch_size=100 --json`, the median of the runs and the
smallest, and the number of GPUs.

    python benchmarks/planning.py --cards all [--config-dir DIR] [--runs 5]
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

from captcha_exp import compose, load
from captcha_exp.config import Config
from captcha_exp.data.dataset import random_batch
from captcha_exp.memory.plan import Plan, Planner
from captcha_exp.model.step import init_train_state, train_step

WARM_UP = 8  # pictures in a batch
PICTURES = {"train": 80_000, "validation": 10_000, "test": 10_000}


def seconds(call: Callable[..., object], *arguments: object) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def planned(config: Config, size: int) -> Plan:
    """The plan of a batch size, by a planner that knows no other."""
    return Planner(config, PICTURES).plan_for(size)


def cards(arguments: argparse.Namespace) -> dict[str, object]:
    """Return the time of plans for several GPUs, each run a process of its own."""
    command = [sys.executable, "-m", "captcha_exp", "plan", "--json", "--gpu", arguments.cards]
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
        "benchmark": "planning --cards",
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
    parser.add_argument("--cards", metavar="all|NAME,NAME", help="time a comparison of these GPUs instead")
    parser.add_argument("--config-dir", metavar="DIR", help="a folder with more files in card/")
    arguments = parser.parse_args()
    if arguments.cards:
        print(json.dumps(cards(arguments)))
        return
    torch.set_num_threads(arguments.threads)
    device = torch.device("cpu")
    chosen = (f"experiment={arguments.experiment}", "device.name=cpu", "device.precision=fp32")
    config = load(compose(*chosen, "gpu=gtx1650"))
    first = seconds(planned, config, WARM_UP)
    state = init_train_state(config, device)
    train_step(state, random_batch(config, WARM_UP, device), config)
    sizes = []
    for size in arguments.sizes:
        plans = [seconds(planned, config, size) for _ in range(arguments.runs)]
        step = seconds(train_step, state, random_batch(config, size, device), config)
        sizes.append(
            {
                "size": size,
                "tensors_mib": round(planned(config, size).tensors_mib, 2),
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
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
