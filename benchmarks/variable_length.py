"""Train labels of different lengths with each head that reads them.

Renders 3 to 6 characters of a-z and 0-9, and sums of 4 to 7 characters, with the default generator. Prints
one JSON line per training: minutes of the whole command, accuracy of the test split with its interval and
per length, and, on images rendered with another seed, how labels with doubled characters are read: the
difference to the other labels of the same lengths, with its interval. (Long labels have doubled characters
more often, and are harder.)

    python benchmarks/variable_length.py [--heads end_class ctc] [--sets letters sums] [--new 20000]
        [OVERRIDE ...]
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interference import interference

from captcha_exp import runs
from captcha_exp.config import FolderConfig
from captcha_exp.data import dataset
from captcha_exp.model.predict import Predictor
from captcha_exp.model.proportions import wilson_interval
from captcha_exp.model.saved import evaluate_run

ALNUM = "abcdefghijklmnopqrstuvwxyz0123456789"
SETS = {
    "letters": (f"captcha.alphabet={ALNUM}", "captcha.min_length=3", "captcha.length=6"),
    "sums": (
        *("captcha.alphabet=0123456789+-x=", "captcha.min_length=4", "captcha.length=7"),
        "data.text=arithmetic",
    ),
}
COMMON = ("data.count=40000", "tracking=none")


def has_doubled(label: str) -> bool:
    """Return whether two neighbors are equal."""
    return any(a == b for a, b in pairwise(label))


def share(correct: list[bool]) -> dict[str, Any]:
    low, high = wilson_interval(sum(correct), len(correct))
    accuracy = sum(correct) / len(correct)
    interval = [round(low, 4), round(high, 4)]
    return {"images": len(correct), "accuracy": round(accuracy, 4), "interval": interval}


def predict_new(run_dir: Path, count: int) -> tuple[list[str], list[bool]]:
    """Return the labels of images rendered with another seed, and whether a run reads them correctly."""
    config = runs.load(run_dir).config()
    assert not isinstance(config.data, FolderConfig)
    other = replace(config, data=replace(config.data, seed=config.data.seed + 1, count=count))
    data = dataset.load_or_build(dataset.inspect_dataset(other))
    predictor, found = Predictor(run_dir / runs.WEIGHTS, "auto"), list[str]()
    for images in torch.split(data.images, config.train.eval_batch_size):
        found += [answer.text for answer in predictor.predict_images(images)]
    return data.labels, [text == label for text, label in zip(found, data.labels, strict=True)]


def compare_doubled(labels: Sequence[str], correct: Sequence[bool]) -> dict[str, Any]:
    """Return the accuracy of labels with doubled characters, and of others if these had their lengths."""
    lengths, is_correct = np.array(list(map(len, labels))), np.array(correct)
    doubled = np.array([has_doubled(label) for label in labels])
    expected = variance = 0.0
    for length in np.unique(lengths[doubled]):
        weight = float((lengths[doubled] == length).mean())
        others = is_correct[(lengths == length) & ~doubled]
        accuracy = float(others.mean())
        expected += weight * accuracy
        variance += weight**2 * accuracy * (1 - accuracy) / len(others)
    accuracy = float(is_correct[doubled].mean())
    variance += accuracy * (1 - accuracy) / int(doubled.sum())
    difference, spread = accuracy - expected, 1.96 * math.sqrt(variance)
    return {
        "images": int(doubled.sum()),
        "accuracy": round(accuracy, 4),
        "others": round(expected, 4),
        "difference": round(difference, 4),
        "interval": [round(difference - spread, 4), round(difference + spread, 4)],
    }


def train(root: str, words: list[str], num_new: int) -> dict[str, Any]:
    """Train once and return the figures."""
    os.environ["CAPTCHA_EXP_ROOT"] = root
    start = time.perf_counter()
    command = [sys.executable, "-m", "captcha_exp", "train", "--json", "--resume=never", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    minutes = (time.perf_counter() - start) / 60
    run_dir = Path(json.loads(done.stdout)["run_dir"])
    evaluation, _ = evaluate_run(run_dir, "test")
    return {
        "minutes": round(minutes, 2),
        "all": share(evaluation.is_correct.tolist()),
        "by_length": {n: round(each, 4) for n, (_, each) in evaluation.accuracy_by_length().items()},
        "char_accuracy": round(evaluation.char_accuracy, 4),
        "doubled": compare_doubled(*predict_new(run_dir, num_new)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--heads", nargs="+", default=["end_class", "ctc"], choices=["end_class", "ctc", "auto"]
    )
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--new", type=int, default=20_000, help="images rendered with another seed")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for name in arguments.sets:
            for head in arguments.heads:
                words = [*COMMON, *SETS[name], f"model.head={head}", *arguments.overrides]
                line = {"benchmark": "variable_length", "set": name, "head": head}
                line |= {
                    "overrides": arguments.overrides,
                    **train(root, words, arguments.new),
                    **interference(),
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
