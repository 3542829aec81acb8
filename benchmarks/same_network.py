"""Compare the article's loop with this project's on the article's network, with nothing asked for.

Both train ResNet-18 at batch size 100 with Adam. The article's loop is its own, in fp32; this project's is
`experiment=article` with its defaults, so the precision is the one that it chooses. They take turns on the
same images in one process. Prints one JSON line: seconds per 800 images, as in the article, and the ratio.

    python benchmarks/same_network.py [--images 800] [--rounds 5] [--threads 1] [OVERRIDE ...]

With --accuracy it trains both from scratch on a small task instead, once per seed (new images, splits and
weights), a line per seed: the accuracies on the test split after the last epoch, in fp32, and at the end the
mean of the paired differences with its 95 % interval. Equal accuracies have 0 in it.

    python benchmarks/same_network.py --accuracy [--seeds 5] [--epochs 8]
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence

import torch
from interference import conclude, exit_code, interference
from loops import TRAIN_SHARD, ArticleLoop, OurLoop, first_images, prepare, requested_config, temporary_root
from rounds import compare, interleave, spread
from scipy import stats

SMALL_TASK = (
    "captcha.alphabet='01234'",
    "captcha.width=40",
    "captcha.height=16",
    "data=captcha",
    "data.count=4000",
    "data.test_fraction=0.25",
)


def compare_speed(options: argparse.Namespace) -> int:
    """Print the seconds of both loops; return the exit code."""
    requested = requested_config("experiment=article", "data.count=1000", *options.overrides)
    with temporary_root() as root:
        config, data = prepare(requested)
        data = first_images(data, options.images)
        ours = OurLoop(config, data, root)
        article = ArticleLoop(data, root / "shards", 0, ours.device)
        works = {"article": article.train_epoch, "ours": ours.train_epoch}
        interleave(works, 1)  # loads kernels
        found = interleave(works, options.rounds)
    scale = TRAIN_SHARD / options.images
    ratio = compare(found["article"], found["ours"])
    seconds = {name: spread([scale * each.wall for each in found[name]]) for name in works}
    conclusion = conclude(ratio["wall"]["median"], at_least=options.min_ratio)
    figures = {
        "images": options.images,
        "rounds": options.rounds,
        "precision": config.device.precision,
        "threads": torch.get_num_threads(),
        "seconds_per_800_images": seconds,
        "ratio": ratio["wall"],
        "cpu_ratio": ratio["cpu"],
    }
    print(json.dumps({"benchmark": "same_network", **figures, **conclusion}))
    return exit_code(conclusion)


def train_seed(seed: int, epochs: int, overrides: Sequence[str]) -> dict[str, float]:
    """Train both from scratch; return their accuracies on the test split."""
    seeds = (f"seed={seed}", f"data.seed={seed}", f"data.split_seed={seed}")
    requested = requested_config(
        "experiment=article", *SMALL_TASK, *seeds, f"train.epochs={epochs}", *overrides
    )
    with temporary_root() as root:
        config, data = prepare(requested)
        ours = OurLoop(config, data, root)
        article = ArticleLoop(data, root / "shards", seed, ours.device)
        for loop in (article, ours):
            for _ in range(epochs):
                loop.train_epoch()
        return {"article": article.accuracy("test"), "ours": ours.accuracy("test")}


def compare_accuracy(options: argparse.Namespace) -> int:
    """Print the accuracies of both; return 0 if they are equal within the noise, else 1."""
    found = []
    for seed in range(options.seeds):
        found.append(train_seed(seed, options.epochs, options.overrides))
        rounded = {name: round(value, 4) for name, value in found[-1].items()}
        print(
            json.dumps({"benchmark": "same_network --accuracy", "seed": seed, "test_accuracy": rounded}),
            flush=True,
        )
    differences = [each["ours"] - each["article"] for each in found]
    mean, half = statistics.mean(differences), 0.0
    if len(differences) > 1:
        error = statistics.stdev(differences) / len(differences) ** 0.5
        half = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    are_equal = len(differences) > 1 and mean - half <= 0 <= mean + half
    figures = {
        "seeds": options.seeds,
        "epochs": options.epochs,
        "mean_test_accuracy": {
            name: round(statistics.mean(each[name] for each in found), 4) for name in ("article", "ours")
        },
        "mean_difference": round(mean, 4),
        "interval": [round(mean - half, 4), round(mean + half, 4)],
        "goal": "0 in the interval",
        "met": are_equal if len(differences) > 1 else None,
    }
    print(json.dumps({"benchmark": "same_network --accuracy", **figures, **interference()}))
    return 0 if are_equal else 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=TRAIN_SHARD, help="trained by each in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="(default: those that a training uses)")
    parser.add_argument("--min-ratio", type=float, help="goal of the ratio")
    parser.add_argument("--accuracy", action="store_true", help="compare accuracies instead of seconds")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    options = parser.parse_args()
    if min(options.images, options.rounds, options.seeds, options.epochs, options.threads or 1) < 1:
        parser.error("--images, --rounds, --seeds, --epochs and --threads must be at least 1")
    if options.threads:
        options.overrides.append(f"device.threads={options.threads}")
    sys.exit(compare_accuracy(options) if options.accuracy else compare_speed(options))


if __name__ == "__main__":
    main()
