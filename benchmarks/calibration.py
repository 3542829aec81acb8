"""Check the calibration of runs on images that they were not trained on.

For each run, prints one JSON line: the calibration error on the test split before and after the calibration
on the validation split; then, for random halves of both splits together, how often the answers that
--min-confidence would give on one half keep the promise made on the other. A promise is kept if the 95%
interval of their accuracy reaches the fraction asked for, and if the coverage of both halves differs by no
more than its 95% interval.

    python benchmarks/calibration.py RUN_DIR ... [--splits 20] [--accuracies 0.98 0.99 0.995]
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from captcha_exp import runs
from captcha_exp.model import calibration, saved
from captcha_exp.model.confidence import Calibration, OperatingPoint
from captcha_exp.model.evaluate import Evaluation
from captcha_exp.model.heads import Head
from captcha_exp.model.proportions import wilson_interval
from captcha_exp.model.weights import load_weights, max_file_bytes
from captcha_exp.runtime import device as devices

Array: TypeAlias = np.ndarray[Any, Any]


def load_logits(run_dir: Path) -> tuple[Head, dict[str, tuple[Tensor, Tensor]]]:
    """Return the head of a run, and the logits and labels of its validation and test splits."""
    run = runs.load(run_dir)
    config = devices.for_inference(run.config(), "cpu")
    device = devices.setup_device(config)
    model, _ = load_weights(run.path(runs.WEIGHTS, max_file_bytes(config)), device)
    _, data = saved.load_images_of(run, config)
    found = {}
    for name in ("validation", "test"):
        batches = list(data.split(name, device, 0).batches(config.train.eval_batch_size))
        with torch.inference_mode():
            logits = torch.cat([model(batch.images).float() for batch in batches])
        found[name] = (logits, torch.cat([batch.targets for batch in batches]))
    return model.head, found


def error_of(confidences: Array, is_correct: Array) -> float:
    """Return the calibration error, as `evaluate` prints it."""
    nothing = np.zeros((len(confidences), 1), np.int64)
    found = Evaluation(
        0.0, nothing, nothing, nothing.astype(np.float32), confidences, np.arange(len(nothing))
    )
    return replace(found, targets=np.where(is_correct, 0, 1)[:, None]).calibration_error


def answers(head: Head, fitted: Calibration, logits: Tensor, targets: Tensor) -> tuple[Array, Array]:
    """Return confidences (N,), and whether (N,) the predicted texts are right."""
    decoded = head.decode(logits / fitted.temperature)
    confidences = fitted.confidence(decoded.text_confidence.numpy()).astype(np.float32)
    return confidences, (decoded.ids == targets).all(dim=1).numpy()


def check_promise(
    rest: tuple[Array, Array],
    point: OperatingPoint,
    accuracy: float,
    given: int,
) -> bool:
    """Return whether images keep the promise of an operating point that was fitted on `given` others."""
    confidences, is_correct = rest
    answered = confidences >= point.threshold
    num_answered = int(answered.sum())
    if not num_answered:
        return False
    _, high = wilson_interval(int(is_correct[answered].sum()), num_answered)
    coverage = num_answered / len(answered)
    pooled = (num_answered + point.coverage * given) / (len(answered) + given)
    deviation = math.sqrt(pooled * (1 - pooled) * (1 / len(answered) + 1 / given))
    return high >= accuracy and abs(coverage - point.coverage) <= 1.96 * deviation + 1e-9


def check(run_dir: Path, num_splits: int, accuracies: list[float]) -> dict[str, Any]:
    """Return the figures of a run."""
    head, splits = load_logits(run_dir)
    logits, targets = splits["test"]
    before = head.decode(logits)
    is_right = (before.ids == targets).all(dim=1).numpy()
    fitted = calibration.fit(head, *splits["validation"])
    confidences, is_correct = answers(head, fitted, logits, targets)
    values: dict[str, Any] = {
        "benchmark": "calibration",
        "run": run_dir.name,
        "images": {name: len(each[0]) for name, each in splits.items()},
        "accuracy": round(float(is_correct.mean()), 4),
        "error_before": round(error_of(before.text_confidence.numpy(), is_right), 4),
        "error": round(error_of(confidences, is_correct), 4),
        "temperature": round(fitted.temperature, 3),
        "slope": round(fitted.slope, 3),
        "intercept": round(fitted.intercept, 3),
    }
    pooled = [torch.cat([splits[name][n] for name in splits]) for n in (0, 1)]
    kept = dict.fromkeys(accuracies, 0)
    promised = dict.fromkeys(accuracies, 0)
    coverages: dict[float, list[float]] = {accuracy: [] for accuracy in accuracies}
    for seed in range(num_splits):
        order = torch.randperm(len(pooled[0]), generator=torch.Generator().manual_seed(seed))
        first, second = order[: len(order) // 2], order[len(order) // 2 :]
        fitted = calibration.fit(head, *(each[first] for each in pooled))
        rest = answers(head, fitted, *(each[second] for each in pooled))
        for accuracy in accuracies:
            if point := fitted.operating_point(accuracy):
                promised[accuracy] += 1
                coverages[accuracy].append(point.coverage)
                kept[accuracy] += check_promise(rest, point, accuracy, len(first))
    values["promises"] = {
        str(accuracy): {
            "made": promised[accuracy],
            "kept": kept[accuracy],
            "mean_coverage": round(float(np.mean(coverages[accuracy])), 4) if coverages[accuracy] else None,
        }
        for accuracy in accuracies
    }
    return values


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--accuracies", type=float, nargs="+", default=[0.98, 0.99, 0.995])
    arguments = parser.parse_args()
    for run_dir in arguments.runs:
        print(json.dumps(check(run_dir, arguments.splits, arguments.accuracies)), flush=True)


if __name__ == "__main__":
    main()
