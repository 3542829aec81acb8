"""Check that two commits train bitwise identically: losses, weights, test figures and predictions.

Each commit is checked out into a temporary folder and trains every case from scratch, with this interpreter
and its packages. Losses, accuracies and confidences are compared as written, weights by the hashes of their
tensors, regardless of names. Prints a line per case and one JSON line at the end; exit code 1 if anything
differs.

    python benchmarks/compare_commits.py BEFORE [AFTER] [--case NAME ...] [--keep FOLDER]

AFTER defaults to HEAD. With --keep the figures of each commit are cached in the folder.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from PIL import Image

PROJECT = Path(__file__).resolve().parents[1]
EXPERIMENTS = {
    "quickstart": (),
    "alnum": ("train.epochs=2",),
    "article": (
        *("data.count=400", "train.epochs=2", "train.batch_size=20"),
        *("data.validation_fraction=0.2", "data.test_fraction=0.2"),
    ),
}
CASES = {
    f"{experiment} {precision}": (f"experiment={experiment}", *overrides, f"device.precision={precision}")
    for experiment, overrides in EXPERIMENTS.items()
    for precision in ("fp32", "bf16")
}
MACHINE = ("device.name=cpu", "device.threads=2")
IMAGES = 32  # random images, predicted with low confidence


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("before")
    parser.add_argument("after", nargs="?", default="HEAD")
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args(arguments)
    cases = options.case or list(CASES)
    before, after = (
        figures_of(commit(name), cases, options.keep) for name in (options.before, options.after)
    )
    differences = {case: differing_figures(before[case], after[case]) for case in cases}
    for case, names in differences.items():
        print(f"{case:18} {', '.join(names) + ' differ' if names else 'equal'}", file=sys.stderr)
    print(
        json.dumps(
            {
                "benchmark": "compare_commits",
                "before": commit(options.before),
                "after": commit(options.after),
                "cases": len(cases),
                "tensors": sum(len(before[case]["tensors"]) for case in cases),
                "differences": {case: names for case, names in differences.items() if names},
            }
        )
    )
    return int(any(differences.values()))


def commit(name: str) -> str:
    """Return the full hash of a commit."""
    return git("rev-parse", "--verify", f"{name}^{{commit}}")


def git(*words: str) -> str:
    """Run git and return its output."""
    done = subprocess.run(["git", *words], cwd=PROJECT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def differing_figures(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of the figures that differ."""
    return [name for name, value in before.items() if value != after.get(name)]


def figures_of(full: str, cases: Sequence[str], keep: Path | None) -> dict[str, Any]:
    """Return the figures of each case, from the cache in `keep` or by training."""
    kept = None if keep is None else keep / f"{full}.json"
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept is not None and kept.exists() else {}
    missing = [case for case in cases if case not in figures]
    if not missing:
        return figures
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--quiet", "--detach", str(tree), full)
        try:
            images = noise(Path(folder) / "images")
            for case in missing:
                print(f"{full[:7]} {case}", file=sys.stderr)
                figures[case] = train_case(tree, Path(folder) / case.replace(" ", "-"), CASES[case], images)
                if kept is not None:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    kept.write_text(json.dumps(figures))
        finally:
            git("worktree", "remove", "--force", str(tree))
    return figures


def noise(folder: Path) -> Path:
    """Fill and return a folder of random images, the same in every call."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = rng.integers(0, 256, (60, 160, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


def train_case(tree: Path, root: Path, overrides: Sequence[str], images: Path) -> dict[str, Any]:
    """Train in the given root and return the figures."""
    command(tree, root, "train", *overrides, *MACHINE)
    (run,) = {path.parent for path in root.glob("outputs/*/*/metrics.jsonl")}
    epochs = [json.loads(line)["metrics"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    predictions = json.loads(
        command(tree, root, "predict", str(run), str(images), "--json", "--device", "cpu")
    )
    test = json.loads((run / "test.json").read_text())
    tensors = safetensors.numpy.load_file(run / "model.safetensors")
    return {
        "losses": [[row["train/loss"], row["val/loss"]] for row in epochs if "val/loss" in row],
        "accuracies": [[row["train/accuracy"], row["val/accuracy"]] for row in epochs if "val/loss" in row],
        "test": [test["accuracy"], test["loss"]],
        "predictions": [[each["text"], each["confidences"]] for each in predictions],
        "tensors": sorted(map(describe_tensor, tensors.values())),
    }


def describe_tensor(tensor: np.ndarray[Any, Any]) -> str:
    """Return the type, shape and hash of a tensor."""
    digest = hashlib.sha256(np.ascontiguousarray(tensor).tobytes()).hexdigest()
    return f"{tensor.dtype} {list(tensor.shape)} {digest}"


def command(tree: Path, root: Path, *words: str) -> str:
    """Run captcha-exp from a checkout and return its standard output."""
    root.mkdir(exist_ok=True)
    variables = {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1", "CAPTCHA_EXP_ROOT": str(root)}
    done = subprocess.run(
        [sys.executable, "-m", "captcha_exp", *words],
        cwd=root,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(
            f"{tree.name}: captcha-exp {' '.join(words)}: exit code {done.returncode}\n{done.stderr}"
        )
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
