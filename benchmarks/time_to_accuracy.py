"""Compare the time to a validation accuracy: the article's loop and this project's, on the same images.

The tasks are experiments: `digits` is quickstart (24,000 images of 4 digits), `alnum` is alnum (40,000 of 4
of a-z0-9). The article's loop trains its network with its settings and validates after each epoch. This
project trains the experiment by `train`, record and checkpoints included, and all that it does before the
first step except rendering. Seconds end with the first validation that reaches the target. Both run in one
process, per seed (images, splits, weights) once, in alternating order.

Each finished training is a line of the file --results, which a later call continues; so is an interrupted
training of the article's loop, whose state is saved next to that file. After --max-minutes the call ends
with exit code 4. It prints one JSON line last: seconds of both and their ratio, the median of the seeds.

    python benchmarks/time_to_accuracy.py --task digits [--target 0.95] [--seeds 3] [--threads 1]
        [--max-minutes 10] [--max-article-epochs 30] [--results build/time_to_accuracy.jsonl] [OVERRIDE ...]
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import article_loop
import torch
from interference import conclude, exit_code, interference
from loops import ArticleLoop, requested_config, temporary_root
from rounds import ratios, spread

from captcha_exp.config import Config, resolve
from captcha_exp.data import dataset
from captcha_exp.runs import MetricsRow, Run
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.files import write_atomically
from captcha_exp.training.train import train

TASKS = {"digits": "experiment=quickstart", "alnum": "experiment=alnum"}
OUT_OF_TIME = 4  # exit code

Row = dict[str, Any]


class OutOfTimeError(Exception):
    """--max-minutes are over."""


class TargetTracker:
    """Notes when a training first reaches the target."""

    def __init__(self, target: float) -> None:
        self._target, self._start_time = target, time.perf_counter()
        self.seconds: float | None = None
        self.accuracies: list[float] = []

    def start(self, run: Run, config: Config) -> None:
        """Do nothing: the seconds begin with this object."""

    def log_metrics(self, row: MetricsRow) -> None:
        """Note the accuracy of an epoch."""
        if "val/accuracy" not in row.metrics:
            return
        self.accuracies.append(row.metrics["val/accuracy"])
        if self.seconds is None and self.accuracies[-1] >= self._target:
            self.seconds = time.perf_counter() - self._start_time

    def finish(self) -> None:
        """Do nothing."""


def train_ours(requested: Config, target: float) -> Row:
    """Train the experiment in one go, and return its seconds to the target."""
    tracker = TargetTracker(target)
    result = train(requested, tracker)
    return {
        "seconds": tracker.seconds,
        "epochs": len(tracker.accuracies),
        "accuracies": tracker.accuracies,
        "precision": result.config.device.precision,
    }


class ArticleTraining:
    """A training of the article's loop that can be interrupted between two files of images."""

    def __init__(self, loop: ArticleLoop, path: Path) -> None:
        """Continue from the state in a file, if it exists."""
        self._loop, self._path = loop, path
        self.counters: Row = {"seconds": 0.0, "shard": 0, "accuracies": [], "calls": 1}
        if path.exists():
            self._restore(article_loop.read_gzip(path))

    def run(self, target: float, max_epochs: int, check_time: Callable[[], None]) -> Row:
        """Train to the target, or for so many epochs, and return the seconds.

        Raises:
            OutOfTimeError: raised by `check_time`; the state is saved.
        """
        counters, shards = self.counters, self._loop.shards("train")
        while len(counters["accuracies"]) < max_epochs:
            while counters["shard"] < len(shards):
                try:
                    check_time()
                except OutOfTimeError:
                    self._save()
                    raise
                start = time.perf_counter()
                self._loop.train_shard(shards[counters["shard"]])
                counters["seconds"] += time.perf_counter() - start
                counters["shard"] += 1
            start = time.perf_counter()
            counters["accuracies"].append(self._loop.accuracy("validation"))
            counters["seconds"] += time.perf_counter() - start
            counters["shard"] = 0
            print(
                f"article: epoch {len(counters['accuracies'])} {counters['accuracies'][-1]:.2%}",
                file=sys.stderr,
            )
            if counters["accuracies"][-1] >= target:
                break
        self._path.unlink(missing_ok=True)
        reached = counters["accuracies"][-1] >= target
        return {
            "seconds": counters["seconds"] if reached else None,
            "epochs": len(counters["accuracies"]),
            "accuracies": counters["accuracies"],
            "calls": counters["calls"],
            "precision": "fp32",
        }

    def _save(self) -> None:
        moments = self._loop.optimizer.state_dict()["state"]
        tensors = {f"optimizer/{n}/{key}": v for n, each in moments.items() for key, v in each.items()}
        tensors |= {f"network/{name}": value for name, value in self._loop.network.state_dict().items()}
        tensors["counters"] = torch.frombuffer(
            bytearray(json.dumps(self.counters).encode()), dtype=torch.uint8
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        article_loop.write_gzip(part, tensors)
        part.replace(self._path)

    def _restore(self, tensors: dict[str, torch.Tensor]) -> None:
        self.counters = json.loads(tensors["counters"].numpy().tobytes())
        self.counters["calls"] += 1
        network, moments = {}, dict[int, Any]()
        for name, value in tensors.items():
            part, _, rest = name.partition("/")
            if part == "network":
                network[rest] = value
            elif part == "optimizer":
                number, _, key = rest.partition("/")
                moments.setdefault(int(number), {})[key] = value
        self._loop.network.load_state_dict(network)
        state = self._loop.optimizer.state_dict()
        self._loop.optimizer.load_state_dict({**state, "state": moments})


class Results:
    """The finished trainings, in a file of JSON lines."""

    def __init__(self, path: Path, about: Row) -> None:
        self._path, self._about = path, about
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: list[Row] = [json.loads(line) for line in lines]

    def find(self, seed: int, program: str) -> Row | None:
        """Return the line of a training with the same settings, if it has finished."""
        wanted = {**self._about, "seed": seed, "program": program}
        return next((row for row in self.rows if wanted.items() <= row.items()), None)

    def add(self, seed: int, program: str, row: Row) -> None:
        """Append the line of a training."""
        self.rows.append({**self._about, "seed": seed, "program": program, **row})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, "".join(json.dumps(each) + "\n" for each in self.rows).encode())


def train_seed(
    seed: int, options: argparse.Namespace, results: Results, check_time: Callable[[], None]
) -> None:
    """Run what is missing of one seed.

    Raises:
        OutOfTimeError: --max-minutes are over.
    """
    seeds = (f"seed={seed}", f"data.seed={seed}", f"data.split_seed={seed}")
    requested = requested_config(TASKS[options.task], *seeds, *options.overrides)
    programs = ("article", "ours") if seed % 2 == 0 else ("ours", "article")
    missing = [name for name in programs if results.find(seed, name) is None]
    if not missing:
        return
    with temporary_root() as root:
        config = resolve(requested, devices.detect_machine())
        data = dataset.load_or_build(dataset.inspect_dataset(config))  # rendering is not measured
        device = devices.setup_device(config)
        for program in missing:
            check_time()
            if program == "ours":
                row = train_ours(requested, options.target)
            else:
                state = options.results.with_suffix(f".{options.task}-{seed}.gz")
                training = ArticleTraining(ArticleLoop(data, root / "shards", seed, device), state)
                row = training.run(options.target, options.max_article_epochs, check_time)
            results.add(seed, program, {**row, **interference()})


def summary(options: argparse.Namespace, results: Results) -> tuple[Row, float | None]:
    """Return the figures of all seeds, and the ratio where both reached the target for every seed."""
    found = {
        program: [results.find(seed, program) or {} for seed in range(options.seeds)]
        for program in ("article", "ours")
    }
    seconds: dict[str, list[Any]] = {
        program: [row.get("seconds") for row in rows] for program, rows in found.items()
    }
    figures: Row = {"task": options.task, "target": options.target, "seeds": options.seeds}
    figures["reached"] = {p: sum(s is not None for s in values) for p, values in seconds.items()}
    if None in seconds["article"] + seconds["ours"]:
        return {**figures, "seconds": seconds}, None
    ratio = ratios(seconds["article"], seconds["ours"])
    figures["seconds"] = {program: spread(values) for program, values in seconds.items()}
    was_disturbed = any(row["disturbed"] for rows in found.values() for row in rows)
    return {**figures, "ratio": ratio, "disturbed_trainings": was_disturbed}, ratio["median"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=tuple(TASKS), required=True)
    parser.add_argument("--target", type=float, default=0.95, help="validation accuracy")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="(default: those that a training uses)")
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="of this call")
    parser.add_argument("--max-article-epochs", type=int, default=30)
    parser.add_argument("--min-ratio", type=float, help="goal of the ratio")
    parser.add_argument("--results", type=Path, default=Path("build/time_to_accuracy.jsonl"))
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    options = parser.parse_args(arguments)
    if not 0 < options.target <= 1:
        parser.error("--target must be in (0, 1]")
    if min(options.seeds, options.threads or 1, options.max_article_epochs) < 1:
        parser.error("--seeds, --threads and --max-article-epochs must be at least 1")
    options.overrides += [f"device.threads={options.threads}"] if options.threads else []
    logging.getLogger("captcha_exp").setLevel(logging.ERROR)
    deadline = time.monotonic() + 60 * options.max_minutes

    def check_time() -> None:
        if time.monotonic() > deadline:
            raise OutOfTimeError

    about = {key: getattr(options, key) for key in ("task", "target", "overrides")}
    results = Results(options.results, {**about, "max_article_epochs": options.max_article_epochs})
    try:
        for seed in range(options.seeds):
            train_seed(seed, options, results, check_time)
    except OutOfTimeError:
        print(f"out of time: the same command continues from {options.results}", file=sys.stderr)
        is_complete = False
    else:
        is_complete = True
    figures, ratio = summary(options, results)
    conclusion: dict[str, object] = {"goal": None, "met": None, **interference()}
    if ratio is not None:
        conclusion = conclude(ratio, at_least=options.min_ratio)
        conclusion["met"] = None if figures["disturbed_trainings"] else conclusion["met"]
    print(json.dumps({"benchmark": "time_to_accuracy", **figures, "complete": is_complete, **conclusion}))
    sys.exit(exit_code(conclusion) if is_complete else OUT_OF_TIME)


if __name__ == "__main__":
    main()
