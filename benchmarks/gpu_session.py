"""What a graphics card does: the article's loop and ours side by side, and plans against what is measured.

    python benchmarks/gpu_session.py                     everything; on no card yet
    python benchmarks/gpu_session.py --call 1            what fits ten minutes, the most valuable first; 2, 3
    python benchmarks/gpu_session.py --parts doctor,ours-cuda-bf16,plan
    python benchmarks/gpu_session.py --dry-run           all of it on the CPU, with small numbers

Each part runs in a process of its own, so that no part sees the memory, the caches or the settings of
another, and one that fails or takes too long costs nothing but itself. The JSON file in benchmarks/results/
is written anew after each part; a second call with other parts adds to it. `plan` among the parts means all
whose names begin with `plan-`. With --call, parts that have their figures already are left alone, and none
begins for which no time is left.

    predictions       on the CPU alone, and in the file before anything that was foretold is measured
    plan-*            one training each: peaks, and what the process holds of the card
    allocator-trace-* what torch asked the driver for, event by event, beside our model of its allocator
    context-*         what the driver takes for a process, step by step
    largest-*         the largest batch in the memory of the article's card, by its loop and by ours
    workspaces-*      what cuDNN takes beside the tensors, under limits that it may or may not heed
    speed-*, matrix-products, determinism-*, and the trainings of the article's pictures

The unit of time is the article's: the seconds that 1,000 pictures take, of which 800 train and 100 validate.
Of several epochs the median counts; the first one, which loads kernels, is left out.
"""

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import gpu_judging
import gpu_memory
import gpu_speed
import torch
from gpu_cases import Case

HERE = Path(__file__).resolve().parent
ARTICLE = {"cpu_seconds_per_1000": 13.60, "gpu_seconds_per_1000": 1.90, "process_mib": 2915}
PRECISIONS = ("fp32", "bf16", "fp16")

BATCHES: dict[str, tuple[int, ...]] = {"resnet18": (32, 100, 400, 1000), "compact": (64, 128, 1024, 4096)}
VARIANTS = ("fp32", "bf16", "fp32-again", "bf16-again")  # of which plans take the first three
ARTICLE_MIB = 3908  # what torch sees of the article's card
BUDGETS = (768, 1024, 1536, 2048, 3072, ARTICLE_MIB, 6144, 8192, 12288)  # that every plan is held against
CALLS = {
    1: ("predictions", "allocator-trace-", "plan-", "context-", "doctor"),
    2: ("predictions", "largest-", "workspaces-", "determinism-", "matrix-products", "speed-"),
    3: ("tests", "article-", "ours-", "auto-", ""),  # at last whatever the others have left
}
CALL_SECONDS = 560  # of the 600 of a call: writing and sending the file take some
LEAST_SECONDS = 12  # less is not enough for a process to start and to measure
FORETOLD = ("plan-", "largest-")  # measured only where a prediction stands in the file


class Part(NamedTuple):
    """Something to be measured."""

    act: Callable[..., Any]
    arguments: dict[str, Any]
    limit: int  # seconds
    environment: Mapping[str, str] = MappingProxyType({})  # of the part's process


class Numbers:
    """How large everything is."""

    def __init__(self, dry_run: bool) -> None:
        self.device = "cpu" if dry_run else "cuda"
        self.precisions = PRECISIONS[:2] if dry_run else PRECISIONS  # fp16 on a CPU takes minutes for a step
        self.shard = 50 if dry_run else 1000  # pictures
        self.shards = 1 if dry_run else 5
        self.cpu_shards = 1 if dry_run else 2
        self.epochs = 2 if dry_run else 4
        self.batches = {"resnet18": (2,), "compact": (8,)} if dry_run else BATCHES
        self.variants = ("bf16-again",) if dry_run else VARIANTS
        self.budgets = (1024, 3908) if dry_run else BUDGETS
        self.dry_run = dry_run

    def parts(self) -> dict[str, Part]:
        """Name -> what is done, in the order in which it is."""
        return self._trainings() | self._memory() | self._speed()

    def cases(self) -> list[tuple[Case, dict[str, int]]]:
        """The trainings that are foretold and measured, and their pictures: three steps and an evaluation."""
        validation = {"resnet18": 4, "compact": 8} if self.dry_run else {"resnet18": 250, "compact": 1200}
        return [
            (Case(network, variant, batch), {"train": 3 * batch, "validation": validation[network]})
            for network, batches in self.batches.items()
            for variant in (self.variants if self.dry_run else VARIANTS[:3])
            for batch in batches
        ]

    def _memory(self) -> dict[str, Part]:
        small = 2 if self.dry_run else 100
        cases = self.cases()
        device: dict[str, Any] = {"device": self.device}
        foretold: dict[str, Any] = {"cases": cases, "budgets": self.budgets, "variants": self.variants}
        # In a dry run none is to fit: the article's budget would be searched for a minute.
        budget: dict[str, Any] = {"budget_mib": 900 if self.dry_run else ARTICLE_MIB}
        workers: dict[str, Any] = {"workers": 1 if self.dry_run else min(16, os.cpu_count() or 1)}
        parts = {"predictions": Part(gpu_memory.predictions, foretold | budget | workers, 300)}
        for network in BATCHES:
            events: dict[str, Any] = {"network": network, "batch": 100, "steps": 2, **device}
            parts[f"allocator-trace-{network}"] = Part(gpu_memory.allocator_trace, events, 90)
        arguments: dict[str, Any]
        for case, pictures in cases:
            arguments = {
                "case": case,
                "pictures": pictures,
                "budgets": self.budgets,
                **device,
            }
            parts[f"plan-{case.name}"] = Part(gpu_memory.plan, arguments, 60)
        for network in BATCHES:
            for variant in self.variants if self.dry_run else ("fp32", "bf16"):
                arguments = {"network": network, "variant": variant, "batch": small, **device}
                parts[f"context-{network}-{variant}"] = Part(gpu_memory.context, arguments, 90)
        tries = (
            {"first": 2, "most": 4, "tries": 2} if self.dry_run else {"first": 64, "most": 4096, "tries": 12}
        )
        for who in ("article", *self.variants):
            arguments = {"who": who, "budget_mib": ARTICLE_MIB, **tries, **device}
            parts[f"largest-{who}"] = Part(gpu_memory.largest, arguments, 120)
        for cap in ("8",) if self.dry_run else ("none", "0", "8", "64", "128"):
            arguments = {
                "cap": cap,
                "batch": small,
                "steps": 1 if self.dry_run else 10,
                **device,
            }
            environment = {} if cap == "none" else {"CUDNN_CONV_WSCAP_DBG": cap}
            parts[f"workspaces-{cap}"] = Part(gpu_memory.workspaces, arguments, 90, environment)
        return parts

    def _speed(self) -> dict[str, Part]:
        device: dict[str, Any] = {"device": self.device}
        most = {"resnet18": 8, "compact": 16} if self.dry_run else {"resnet18": 1024, "compact": 4096}
        seconds: dict[str, Any] = {"seconds": 0.0 if self.dry_run else 0.7}
        parts = {}
        arguments: dict[str, Any]
        for way in (True, False):
            batches = {"resnet18": 2, "compact": 8} if self.dry_run else {"resnet18": 100, "compact": 128}
            arguments = {
                "deterministic": way,
                "batches": batches,
                "steps": 2 if self.dry_run else 50,
                **device,
            }
            parts[f"determinism-{str(way).lower()}"] = Part(gpu_speed.determinism, arguments, 60)
        arguments = {"size": 128 if self.dry_run else 4096, **seconds, **device}
        parts["matrix-products"] = Part(gpu_speed.matrix_products, arguments, 60)
        for network in BATCHES:
            for variant in self.precisions[:1] if self.dry_run else self.precisions:
                arguments = {
                    "network": network,
                    "variant": variant,
                    "most": most[network],
                    **seconds,
                    **device,
                }
                parts[f"speed-{network}-{variant}"] = Part(gpu_speed.speed, arguments, 90)
        return parts

    def _trainings(self) -> dict[str, Part]:
        few = {"shards": self.cpu_shards, "shard": self.shard, "epochs": 2}
        many = {"shards": self.shards, "shard": self.shard, "epochs": self.epochs}
        batch = {"batch": 10 if self.dry_run else 100}
        parts = {
            "doctor": Part(doctor, {"device": self.device}, 60),
            "tests": Part(tests, {"collect_only": self.dry_run}, 300),
            "article-cpu": Part(article_loop, {"device": "cpu", **few}, 240),
            "ours-cpu-fp32": Part(ours, {"device": "cpu", "precision": "fp32", **few, **batch}, 240),
        }
        if not self.dry_run:
            parts["article-cuda"] = Part(article_loop, {"device": "cuda", **many}, 180)
        for precision in self.precisions:
            arguments = {"device": self.device, "precision": precision, **many, **batch}
            parts[f"ours-{self.device}-{precision}"] = Part(ours, arguments, 120)
        arguments = {"device": self.device, "precision": "auto", **many, **batch}
        parts[f"auto-{self.device}"] = Part(ours, arguments, 120)
        return parts


def call(number: int, names: list[str]) -> list[str]:
    """The parts of a call of ten minutes; the third has what the first two may have left over, too."""
    return list(dict.fromkeys(name for begin in CALLS[number] for name in names if name.startswith(begin)))


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


def ours(device: str, precision: str, shards: int, shard: int, epochs: int, batch: int) -> dict[str, Any]:
    """experiment=article, trained by the package as anybody would."""
    from captcha_exp import compose, load
    from captcha_exp.train import train

    with tempfile.TemporaryDirectory() as folder:
        overrides = ("experiment=article", f"data.count={shards * shard}", f"train.epochs={epochs}")
        places = (f"device.name={device}", f"device.precision={precision}", f"train.batch_size={batch}")
        result = train(load(compose(*overrides, *places, f"data.cache={folder}/cache", "tracking=none")))
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


def run_part(
    name: str, dry_run: bool, limit: float, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The part's figures, or how it failed; when it began, and its seconds."""
    script = str(Path(__file__).resolve())
    command = [sys.executable, script, "--one", name, *(["--dry-run"] if dry_run else [])]
    part: dict[str, Any] = {"began": datetime.now(UTC).isoformat(timespec="milliseconds")}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        done = bounded(command, _environment(root) | dict(environment or {}), limit)
    if done is None:
        return part | {"error": f"took more than {limit:.0f} s", "wall_seconds": round(limit, 1)}
    part["wall_seconds"] = round(time.perf_counter() - began, 1)
    if done.returncode:
        return part | {"error": done.stderr[-3000:], "exit_code": done.returncode}
    return part | {"figures": json.loads(done.stdout.splitlines()[-1])}


def bounded(
    command: list[str], environment: dict[str, str], limit: float
) -> subprocess.CompletedProcess[str] | None:
    """How a command ended; None if it took more seconds, and then it is gone with all that it started.

    Those would else hold the pipes open that are waited for here, and the card. They are a group and no
    session of their own, so that who ends this program's session ends them too.
    """
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            process.communicate()
            return None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _environment(root: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    return os.environ | {"CAPTCHA_EXP_ROOT": root, "PYTHONPATH": path}


def machine(dry_run: bool) -> dict[str, Any]:
    """What the figures were measured on."""
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


def _machine_of_a_card() -> dict[str, Any]:
    """What the figures are measured on, asked for by another process: this one is to hold nothing of it."""
    asked = run_part("machine", dry_run=False, limit=120)
    if "error" in asked:
        raise SystemExit(asked["error"])
    found: dict[str, Any] = asked["figures"]
    return found


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


def chosen_parts(asked: str, names: list[str]) -> list[str]:
    """The names in a list with commas; one that is the beginning of others, up to a dash, means those.

    Raises:
        SystemExit: one of them is no part; the line says which there are.
    """
    found, unknown = [], []
    for word in asked.split(","):
        meant = [name for name in names if name == word or name.startswith(f"{word}-")]
        found += [name for name in meant if name not in found]
        unknown += [] if meant else [word]
    if unknown:
        raise SystemExit(f"--parts: there is no {', '.join(unknown)}; there are {', '.join(names)}")
    return found


def as_text(session: dict[str, Any]) -> str:
    """The session as JSON with a line for each part, so that lists of events take no line for each number."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in session.items() if key != "parts"]
    parts = [f"{json.dumps(name)}: {json.dumps(part)}" for name, part in session["parts"].items()]
    return ",\n".join(["{\n" + lines[0], *lines[1:], '"parts": {\n' + ",\n".join(parts) + "\n}"]) + "\n}\n"


def measure(
    session: dict[str, Any],
    names: list[str],
    parts: Mapping[str, Part],
    out: Path,
    dry_run: bool,
    seconds: float,
) -> None:
    """The parts of these names, one after another; after each the session is in its file.

    What is foretold comes first. None begins when the seconds are over, and none goes on past them.
    """
    began = time.perf_counter()
    done = session["parts"]
    foretelling = any(name.startswith(FORETOLD) for name in names)
    if foretelling and "figures" not in done.get("predictions", {}) and "predictions" not in names:
        names = ["predictions", *names]
    for name in sorted(names, key=lambda name: name != "predictions"):
        left = seconds - (time.perf_counter() - began)
        if name == "predictions" and "figures" in done.get(name, {}):
            pass  # what was measured since then must not be foretold again
        elif left < LEAST_SECONDS:
            done.setdefault(name, {"error": f"not begun: {max(0.0, left):.0f} s were left"})
        elif name.startswith(FORETOLD) and "figures" not in done.get("predictions", {}):
            done[name] = {"error": "not begun: what it measures is not foretold in the file"}
        else:
            print(f"{name} ...", file=sys.stderr, flush=True)
            part = parts[name]
            done[name] = run_part(name, dry_run, min(part.limit, left), part.environment)
        out.write_text(as_text(session))
        print(f"{name}: {done[name].get('error', 'done')}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with small numbers")
    parser.add_argument("--parts", help="these alone, with commas between them (default: all)")
    parser.add_argument("--call", type=int, choices=CALLS, help="the parts that fit one call of ten minutes")
    parser.add_argument(
        "--seconds", type=float, help="in all; no part begins later (default: 560 with --call)"
    )
    parser.add_argument(
        "--out", type=Path, help="the JSON file (default: benchmarks/results/<date>-<card>.json)"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    parts = Numbers(arguments.dry_run).parts()
    if arguments.one == "machine":
        print(json.dumps(machine(arguments.dry_run)))
        return
    if arguments.one:
        part = parts[arguments.one]
        print(json.dumps(part.act(**part.arguments)))
        return
    if arguments.parts and arguments.call:
        parser.error("--parts or --call")
    names = chosen_parts(arguments.parts, list(parts)) if arguments.parts else list(parts)
    on_a_card = not arguments.dry_run and names != ["predictions"]
    if on_a_card and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA card here; --dry-run does all of it on the CPU")
    about = machine(True) if not on_a_card else _machine_of_a_card()
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    kind = "dry-run" if arguments.dry_run else (about["card"] or "predictions").lower().replace(" ", "-")
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
    if arguments.call:
        names = [
            name for name in call(arguments.call, names) if "figures" not in session["parts"].get(name, {})
        ]
    seconds = arguments.seconds or (CALL_SECONDS if arguments.call else 24 * 3600)
    measure(session, names, parts, out, arguments.dry_run, seconds)
    print(table(session["parts"]), file=sys.stderr)
    print(f"\n{gpu_judging.tables(session['parts'])}", file=sys.stderr)
    print(json.dumps(session))
    sys.exit(any("error" in session["parts"][name] for name in names))


if __name__ == "__main__":
    main()
