"""What a graphics card does: the article's loop and ours side by side.

    python benchmarks/gpu_session.py                     everything, in 25 minutes at most; on no card yet
    python benchmarks/gpu_session.py --parts doctor,ours-cuda-bf16
    python benchmarks/gpu_session.py --dry-run           all of it on the CPU, with small numbers

Each part runs in a process of its own, so that no part sees the memory, the caches or the settings of
another, and one that fails or takes too long costs nothing but itself. The JSON file in benchmarks/results/
is written anew after each part; a second call with other parts adds to it.

The unit of time is the article's: the seconds that 1,000 pictures take, of which 800 train and 100 validate.
Of several epochs the median counts; the first one, which loads kernels, is left out.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ARTICLE = {"cpu_seconds_per_1000": 13.60, "gpu_seconds_per_1000": 1.90, "process_mib": 2915}
PRECISIONS = ("fp32", "bf16", "fp16")


class Numbers:
    """How large everything is."""

    def __init__(self, dry_run: bool) -> None:
        self.device = "cpu" if dry_run else "cuda"
        self.precisions = PRECISIONS[:2] if dry_run else PRECISIONS  # fp16 on a CPU takes minutes for a step
        self.shard = 50 if dry_run else 1000  # pictures
        self.shards = 1 if dry_run else 5
        self.cpu_shards = 1 if dry_run else 2
        self.epochs = 2 if dry_run else 4
        self.dry_run = dry_run

    def parts(self) -> dict[str, tuple[Callable[..., Any], dict[str, Any], int]]:
        """Name -> what is done, its arguments, and the seconds that it may take."""
        few = {"shards": self.cpu_shards, "shard": self.shard, "epochs": 2}
        many = {"shards": self.shards, "shard": self.shard, "epochs": self.epochs}
        parts: dict[str, tuple[Callable[..., Any], dict[str, Any], int]] = {
            "doctor": (doctor, {"device": self.device}, 60),
            "tests": (tests, {"collect_only": self.dry_run}, 300),
            "article-cpu": (article_loop, {"device": "cpu", **few}, 240),
            "ours-cpu-fp32": (ours, {"device": "cpu", "precision": "fp32", **few}, 240),
        }
        if not self.dry_run:
            parts["article-cuda"] = (article_loop, {"device": "cuda", **many}, 180)
        for precision in self.precisions:
            arguments = {"device": self.device, "precision": precision, **many}
            parts[f"ours-{self.device}-{precision}"] = (ours, arguments, 120)
        parts[f"auto-{self.device}"] = (ours, {"device": self.device, "precision": "auto", **many}, 120)
        return parts


# -- the parts, each in its own process ----------------------------------------------------------------------


def doctor(device: str) -> list[dict[str, str]]:
    """What captcha-exp doctor finds."""
    command = [sys.executable, "-m", "captcha_exp", "doctor", "--json", f"device.name={device}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr)
    findings: list[dict[str, str]] = json.loads(done.stdout)
    return findings


def tests(collect_only: bool) -> dict[str, Any]:
    """How the tests marked gpu end; without a card they are only collected."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--collect-only"] if collect_only else []
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    output = done.stdout[-6000:] + done.stderr[-1000:]
    if done.returncode:
        raise SystemExit(output)  # a test that fails is an error of the session
    return {"output": output}


def article_loop(device: str, shards: int, shard: int, epochs: int) -> dict[str, Any]:
    """The article's program on files as it had them: GIFs of mode P with names that end in .png."""
    sys.path.append(str(HERE))
    import article_loop as loop

    with tempfile.TemporaryDirectory() as folder:
        draw_files(Path(folder, "pictures"), shards * shard)
        loop.prepare(Path(folder, "pictures"), Path(folder, "work"), shard=shard)
        figures = loop.measure(Path(folder, "work"), torch.device(device), epochs=epochs)
    figures["seconds_per_1000"] = figures["seconds_per_shard"] * 1000 / shard
    return figures


def draw_files(folder: Path, count: int) -> None:
    """Pictures of experiment=article, as they are drawn, in the article's names and format."""
    from captcha_exp import compose, load, sources
    from captcha_exp.config import Article

    config = load(compose("experiment=article"))
    assert isinstance(config.data, Article)
    folder.mkdir()
    draw_one = sources.library(config.data).make()
    for number in range(count):
        text = sources.label(config.data, config.captcha, number)
        picture = draw_one(text, random.Random(number))
        picture.quantize(256).save(folder / f"{number:05}-{text.upper()}.png", "GIF")


def ours(device: str, precision: str, shards: int, shard: int, epochs: int) -> dict[str, Any]:
    """experiment=article, trained by the package as anybody would."""
    from captcha_exp import compose, load
    from captcha_exp.train import train

    with tempfile.TemporaryDirectory() as folder:
        overrides = ("experiment=article", f"data.count={shards * shard}", f"train.epochs={epochs}")
        places = (f"device.name={device}", f"device.precision={precision}", f"data.cache={folder}/cache")
        result = train(load(compose(*overrides, *places, "tracking=none")))
        lines = (result.folder / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line)["metrics"] for line in lines]
        tried = json.loads((result.folder / "environment.json").read_text())["precisions_tried"]
    rows = [row for row in rows if "speed/epoch_seconds" in row][1:]
    return {
        "precision": result.config.device.precision,
        "precisions_tried": tried,
        "batch_size": result.config.train.batch_size,
        "epochs": epochs,
        "seconds_per_1000": statistics.median(row["speed/epoch_seconds"] for row in rows)
        / (shards * shard)
        * 1000,
        "training_pictures_per_second": statistics.median(row["speed/images_per_second"] for row in rows),
        **{key.removeprefix("memory/"): max(row[key] for row in rows) for key in rows[0] if "memory/" in key},
    }


# -- the session ---------------------------------------------------------------------------------------------


def run_part(name: str, dry_run: bool, limit: int) -> dict[str, Any]:
    """The part's figures, or how it failed, and its seconds."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--one",
        name,
        *(["--dry-run"] if dry_run else []),
    ]
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as root:
            done = subprocess.run(
                command,
                env=_environment(root),
                capture_output=True,
                text=True,
                timeout=limit,
                check=False,
            )
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {limit} s", "wall_seconds": limit}
    seconds = round(time.perf_counter() - began, 1)
    if done.returncode:
        return {"error": done.stderr[-3000:], "exit_code": done.returncode, "wall_seconds": seconds}
    return {"figures": json.loads(done.stdout.splitlines()[-1]), "wall_seconds": seconds}


def _environment(root: str) -> dict[str, str]:
    import os

    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    return os.environ | {"CAPTCHA_EXP_ROOT": root, "PYTHONPATH": path}


def machine(dry_run: bool) -> dict[str, Any]:
    """What the figures were measured on."""
    import os

    card = None if dry_run else torch.cuda.get_device_properties(0)
    return {
        "card": card.name if card else None,
        "card_mib": card.total_memory // 2**20 if card else None,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]  # torch has no types for it
    }


def table(parts: dict[str, Any]) -> str:
    """Time and memory beside the article's, in Markdown."""
    lines = ["| | seconds per 1,000 pictures | pictures/s | process, MiB |", "|---|---|---|---|"]
    lines.append(f"| the article, its CPU | {ARTICLE['cpu_seconds_per_1000']:.2f} | | |")
    lines.append(
        f"| the article, GTX 1650 | {ARTICLE['gpu_seconds_per_1000']:.2f} | | {ARTICLE['process_mib']:,} |"
    )
    for name, part in parts.items():
        figures = part.get("figures")
        if not isinstance(figures, dict) or "seconds_per_1000" not in figures:
            continue
        memory = next(
            (figures[k] for k in ("process_peak_mib", "process_mib", "peak_rss_mib") if figures.get(k)), None
        )
        speed = f"{figures['seconds_per_1000']:.3f} | {figures['training_pictures_per_second']:,.0f}"
        lines.append(f"| {name} | {speed} | {f'{memory:,.0f}' if memory else 'unknown'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with small numbers")
    parser.add_argument("--parts", help="these alone, with commas between them (default: all)")
    parser.add_argument(
        "--out", type=Path, help="the JSON file (default: benchmarks/results/<date>-<card>.json)"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    parts = Numbers(arguments.dry_run).parts()
    if arguments.one:
        act, how, _ = parts[arguments.one]
        print(json.dumps(act(**how)))
        return
    if not arguments.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA card here; --dry-run does all of it on the CPU")
    chosen = arguments.parts.split(",") if arguments.parts else list(parts)
    if unknown := [name for name in chosen if name not in parts]:
        raise SystemExit(f"--parts: there is no {', '.join(unknown)}; there are {', '.join(parts)}")
    about = machine(arguments.dry_run)
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    kind = "dry-run" if arguments.dry_run else about["card"].lower().replace(" ", "-")
    out = arguments.out or HERE / "results" / f"{day}-{kind}.json"
    session: dict[str, Any] = {
        "benchmark": "gpu_session",
        "date": day,
        "machine": about,
        "article": ARTICLE,
        "parts": {},
    }
    if out.exists():
        session["parts"] = json.loads(out.read_text())["parts"]
    for name in chosen:
        print(f"{name} ...", file=sys.stderr, flush=True)
        session["parts"][name] = run_part(name, arguments.dry_run, parts[name][2])
        out.write_text(json.dumps(session, indent=1) + "\n")
        print(f"{name}: {session['parts'][name].get('error', 'done')}", file=sys.stderr, flush=True)
    print(table(session["parts"]), file=sys.stderr)
    print(json.dumps(session))
    sys.exit(any("error" in session["parts"][name] for name in chosen))


if __name__ == "__main__":
    main()
