"""Measure the cost of determinism, checkpoints and hashing in a training.

Runs training steps of an experiment on random images, alternating train.deterministic on and off; saves their
state; hashes bytes. Prints one JSON line: each cost and their sum in percent of an epoch, with a 95 %
confidence interval. An epoch counts only its training steps: with evaluation and rendering each share would
be smaller.

    python benchmarks/record_cost.py [--experiment alnum] [--pairs 200] [--steps 1] [--saves 20]
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from interference import interference

from captcha_exp import compose, load
from captcha_exp.config import Config, resolve
from captcha_exp.data import dataset as datasets
from captcha_exp.model import state
from captcha_exp.model.state import TrainState
from captcha_exp.model.step import init_train_state, train_step
from captcha_exp.model.weights import weights_sha256, weights_to_bytes
from captcha_exp.runtime.device import detect_machine, setup_device
from captcha_exp.runtime.files import sha256_of
from captcha_exp.runtime.paths import root_dir

HASHED_BYTES = 64 * 2**20  # size of the hashed test file; scaled to the size of the cache file
RESAMPLES = 2000
CHECKPOINT_SECONDS = 60.0  # train.checkpoint_every=1 minute


class Steps:
    """Training steps of a config, deterministic or not."""

    def __init__(self, config: Config) -> None:
        self._config = config
        device = setup_device(config)
        self._batch = datasets.random_batch(config, int(config.train.batch_size), device)
        self.state: TrainState = init_train_state(config, device)
        for deterministic in (True, False):
            self.seconds(deterministic, 3)  # loads kernels

    def seconds(self, deterministic: bool, steps: int) -> float:
        """Return the mean seconds of a step over `steps` steps."""
        setup_device(replace(self._config, train=replace(self._config.train, deterministic=deterministic)))
        began = time.perf_counter()
        for _ in range(steps):
            loss = train_step(self.state, self._batch, self._config).loss
        float(loss)
        return (time.perf_counter() - began) / steps


def seconds_of(work: Callable[[], object], times: int) -> list[float]:
    """Return the seconds of each of `times` calls."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return found


def bootstrap_medians(values: Sequence[float], rng: random.Random) -> list[float]:
    """Return the medians of bootstrap resamples."""
    return [statistics.median(rng.choices(values, k=len(values))) for _ in range(RESAMPLES)]


def percent(shares: Sequence[float]) -> list[float]:
    """Return the median and the ends of the 95 % interval, in percent."""
    ordered = sorted(shares)
    quantiles = (0.5, 0.025, 0.975)
    return [round(100 * ordered[round(quantile * (len(ordered) - 1))], 2) for quantile in quantiles]


def measure(config: Config, arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Return the costs as shares of an epoch, and the measured seconds."""
    counts = datasets.inspect_dataset(config).split_sizes
    per_epoch = -(-counts["train"] // int(config.train.batch_size))
    steps = Steps(config)
    pairs = []
    for number in range(arguments.pairs):
        order = (True, False) if number % 2 else (False, True)
        pairs.append({which: steps.seconds(which, arguments.steps) for which in order})
    steps.state.update_best(0.5, 1.0)
    saves = seconds_of(lambda: state.save(folder / "checkpoint", steps.state), arguments.saves)
    block = folder / "block"
    block.write_bytes(os.urandom(HASHED_BYTES))
    blocks = seconds_of(lambda: sha256_of(block), arguments.saves)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights_to_bytes(steps.state.model, config))
    files = [weights, *(folder / "checkpoint").iterdir()]

    def hash_the_end() -> None:
        weights_sha256(steps.state.model)
        for path in files:
            sha256_of(path)

    ends = seconds_of(hash_the_end, arguments.saves)
    captcha = config.captcha
    cached = sum(counts.values()) * prod((captcha.height, captcha.width, captcha.channels))

    rng = random.Random(0)
    ratios = [pair[True] / pair[False] for pair in pairs]
    determinism = [ratio - 1 for ratio in bootstrap_medians(ratios, rng)]
    epochs = [per_epoch * step for step in bootstrap_medians([p[False] for p in pairs], rng)]
    save = bootstrap_medians(saves, rng)
    a_block, an_end = bootstrap_medians(blocks, rng), bootstrap_medians(ends, rng)
    # One checkpoint per minute, and one at the end.
    saving = [s / CHECKPOINT_SECONDS + s / config.train.epochs / e for s, e in zip(save, epochs, strict=True)]
    each_epoch = [s / e for s, e in zip(save, epochs, strict=True)]
    hashing = [
        (b * cached / HASHED_BYTES + end) / config.train.epochs / e
        for b, end, e in zip(a_block, an_end, epochs, strict=True)
    ]
    together = [sum(shares) for shares in zip(determinism, saving, hashing, strict=True)]
    return {
        "epoch_seconds": round(statistics.median(epochs), 1),
        "save_seconds": round(statistics.median(saves), 4),
        "cache_bytes": cached,
        "determinism_percent": percent(determinism),
        "checkpoints_percent": percent(saving),
        "checkpoint_each_epoch_percent": percent(each_epoch),
        "hashing_percent": percent(hashing),
        "together_percent": percent(together),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", default="alnum")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1, help="steps per timing")
    parser.add_argument("--saves", type=int, default=20)
    arguments = parser.parse_args()
    config = resolve(load(compose(f"experiment={arguments.experiment}")), detect_machine())
    # Not in /tmp, which may be a tmpfs.
    with tempfile.TemporaryDirectory(dir=root_dir(), prefix=".record_cost-") as folder:
        figures = measure(config, arguments, Path(folder))
    about = {"experiment": arguments.experiment, "threads": torch.get_num_threads(), "pairs": arguments.pairs}
    print(json.dumps({"benchmark": "record_cost", **about, **figures, **interference()}))


if __name__ == "__main__":
    main()
