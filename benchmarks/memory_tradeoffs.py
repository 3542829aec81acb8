"""Measure what each memory-saving option costs in time, on this machine's CPU or GPU.

Prints one JSON line: for each option the time of a training step relative to the plain config (the median of
ratios of consecutive steps), the ratio that the advice of captcha-exp plan assumes, and the MiB of a step's
tensors.

    python benchmarks/memory_tradeoffs.py [--experiment article] [--batch-size 64] [--runs 5] [--device cpu]
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from interference import interference

from captcha_exp import compose, load
from captcha_exp.config import Config, resolve
from captcha_exp.data.dataset import Batch, random_batch
from captcha_exp.memory.advisor import relative_time
from captcha_exp.memory.plan import Planner
from captcha_exp.model.step import init_train_state, train_step
from captcha_exp.runtime.device import detect_machine, setup_device

OPTIONS = {
    "checkpointing": ["train.activation_checkpointing=true"],
    "two passes": ["train.micro_batch_size={half}"],
    "four passes": ["train.micro_batch_size={quarter}"],
    "bf16": ["device.precision=bf16"],
    "bf16, checkpointing": ["device.precision=bf16", "train.activation_checkpointing=true"],
    "foreach": ["train.optimizer_impl=foreach"],
    "for_loop": ["train.optimizer_impl=for_loop"],
}
SPLIT_SIZES = {"train": 8000, "validation": 1000}


class Stepper:
    """Training steps of a config on one batch."""

    def __init__(self, config: Config, batch: Batch) -> None:
        self.config, self.batch = config, batch
        self.state = init_train_state(config, batch.images.device)
        self.seconds()  # loads kernels

    def seconds(self) -> float:
        """Return the seconds of one synchronized step."""
        began = time.perf_counter()
        float(train_step(self.state, self.batch, self.config).loss)
        return time.perf_counter() - began


def measure(config: Config, plain: Stepper, runs: int) -> dict[str, Any]:
    """Compare a config with the plain one."""
    stepper = Stepper(config, plain.batch)
    ratios = [stepper.seconds() / plain.seconds() for _ in range(runs)]
    tensors_mib = Planner(config, SPLIT_SIZES).plan_for(int(config.train.batch_size)).tensors_mib
    return {
        "time": round(statistics.median(ratios), 3),
        "advice": round(relative_time(config, plain.config), 3),
        "tensors_mib": round(tensors_mib, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", default="article")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    size = arguments.batch_size
    base = (
        f"experiment={arguments.experiment}",
        f"train.batch_size={size}",
        f"device.name={arguments.device}",
        "device.precision=fp32",
    )

    def config(*options: str) -> Config:
        overrides = [each.format(half=size // 2, quarter=size // 4) for each in options]
        return resolve(load(compose(*base, *overrides)), detect_machine())

    device = setup_device(config())
    plain = Stepper(config(), random_batch(config(), size, device))
    found = {name: measure(config(*options), plain, arguments.runs) for name, options in OPTIONS.items()}
    figures = {
        "benchmark": "memory_tradeoffs",
        "experiment": arguments.experiment,
        "batch_size": size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "runs": arguments.runs,
        "plain_tensors_mib": round(Planner(config(), SPLIT_SIZES).plan_for(size).tensors_mib, 1),
        "options": found,
    }
    print(json.dumps(figures | interference()))


if __name__ == "__main__":
    main()
