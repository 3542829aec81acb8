"""Train labels of different lengths with each head that reads them.

Renders 3 to 6 characters of a-z and 0-9, and sums of 4 to 7 characters, with the default generator. Prints
one JSON line per training: accuracy with its interval, per length, of labels with and without doubled
characters, and minutes of the whole command.

    python benchmarks/variable_length.py [--heads end_class ctc] [--sets letters sums] [OVERRIDE ...]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from interference import interference

from captcha_exp.model.evaluate import evaluate_run, wilson_interval

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


def train(root: str, words: list[str]) -> dict[str, Any]:
    """Train once and return the figures."""
    os.environ["CAPTCHA_EXP_ROOT"] = root
    start = time.perf_counter()
    command = [sys.executable, "-m", "captcha_exp", "train", "--json", "--resume=never", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    minutes = (time.perf_counter() - start) / 60
    evaluation, data = evaluate_run(Path(json.loads(done.stdout)["run_dir"]), "test")
    labels = [data.labels[int(index)] for index in evaluation.indices]
    correct = evaluation.is_correct.tolist()
    doubled = [has_doubled(label) for label in labels]
    return {
        "minutes": round(minutes, 2),
        "all": share(correct),
        "by_length": {n: round(each, 4) for n, (_, each) in evaluation.accuracy_by_length().items()},
        "doubled": share([c for c, d in zip(correct, doubled, strict=True) if d]),
        "not_doubled": share([c for c, d in zip(correct, doubled, strict=True) if not d]),
        "char_accuracy": round(evaluation.char_accuracy, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--heads", nargs="+", default=["end_class", "ctc"], choices=["end_class", "ctc", "auto"]
    )
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for name in arguments.sets:
            for head in arguments.heads:
                words = [*COMMON, *SETS[name], f"model.head={head}", *arguments.overrides]
                line = {"benchmark": "variable_length", "set": name, "head": head}
                line |= {"overrides": arguments.overrides, **train(root, words), **interference()}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
