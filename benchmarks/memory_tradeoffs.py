"""What sparing memory costs in time, on this machine's CPU or card.

Prints one JSON line: for each way of sparing memory the seconds of a training step, in steps of the plain
config (the median of the ratios, each of two steps right beside each other), beside what the advice of
captcha-exp plan takes for it, and the MiB of a step's tensors.

    python benchmarks/memory_tradeoffs.py [--experiment article] [--batch-size 64] [--runs 5] [--device cpu]
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch

from captcha_exp import compose, load
from captcha_exp.config import Config, resolve
from captcha_exp.data.dataset import Batch, random_batch
from captcha_exp.memory.advisor import relative_time
from captcha_exp.memory.plan import Planner
from captcha_exp.model.step import init_train_state, train_step
from captcha_exp.runtime.device import detect_machine, setup_device

LEVERS = {
    "checkpointing": ["train.activation_checkpointing=true"],
    "two passes": ["train.micro_batch_size={half}"],
    "four passes": ["train.micro_batch_size={quarter}"],
    "bf16": ["device.precision=bf16"],
    "bf16, checkpointing": ["device.precision=bf16", "train.activation_checkpointing=true"],
    "foreach": ["train.optimizer_impl=foreach"],
    "for_loop": ["train.optimizer_impl=for_loop"],
}
PICTURES = {"train": 8000, "validation": 1000}


class Stepper:
    """Training steps of a config on one batch."""

    def __init__(self, config: Config, batch: Batch) -> None:
        self.config, self.batch = config, batch
        self.state = init_train_state(config, batch.images.device)
        self.seconds()  # loads kernels

    def seconds(self) -> float:
        """Of one step, to the end of what the device was told."""
        began = time.perf_counter()
        float(train_step(self.state, self.batch, self.config).loss)
        return time.perf_counter() - began


def measured(config: Config, plain: Stepper, runs: int) -> dict[str, Any]:
    """One lever beside the plain config."""
    stepper = Stepper(config, plain.batch)
    ratios = [stepper.seconds() / plain.seconds() for _ in range(runs)]
    tensors_mib = Planner(config, PICTURES).plan_for(int(config.train.batch_size)).tensors_mib
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
    )

    def config(*levers: str) -> Config:
        written = [each.format(half=size // 2, quarter=size // 4) for each in levers]
        return resolve(load(compose(*base, *written)), detect_machine())

    device = setup_device(config())
    plain = Stepper(config(), random_batch(config(), size, device))
    found = {name: measured(config(*levers), plain, arguments.runs) for name, levers in LEVERS.items()}
    figures = {
        "benchmark": "levers",
        "experiment": arguments.experiment,
        "batch_size": size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "runs": arguments.runs,
        "plain_tensors_mib": round(Planner(config(), PICTURES).plan_for(size).tensors_mib, 1),
        "levers": found,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
