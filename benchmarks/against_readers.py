"""Compare exported models with ddddocr, a reader without training: images/s on one core, accuracy, file size.

Each RUN is exported, and its test split is read by its ONNX file and by the two models of ddddocr, each in a
process of its own on the same core, with one thread of ONNX Runtime. All start from the same contents of
image files in memory; the time includes decoding and preprocessing. ("decoded" starts from what each one's
API takes for an image: pixels, and images of Pillow.) The readers take turns in each of several rounds;
speeds are medians over rounds, and ratios are medians of the ratios within a round. Images per second of CPU
time are given as well, since other processes disturb them less. Labels and texts are compared in lower case
where the labels have one case.

ddddocr is installed once, into a virtual environment of its own below --environments. Prints one JSON line
per set and reader.

    python benchmarks/against_readers.py RUN [RUN ...] [--model MODEL.onnx] [--rounds 7] [--count 256]
        [--images N]
"""

import argparse
import base64
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from interference import interference
from PIL import Image

from captcha_exp import runs
from captcha_exp.config import FolderConfig
from captcha_exp.export.export import export_run
from captcha_exp.model.proportions import wilson_interval
from captcha_exp.model.saved import load_images_of
from captcha_exp.runs import find_run
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.paths import root_dir

DDDDOCR = "ddddocr==1.6.1"
OURS = "captcha_exp"
WORKER = Path(__file__).with_name("reader_process.py")


@dataclass(frozen=True)
class Case:
    """One way to call a reader."""

    start: str  # encoded or decoded
    batch_size: int


CASES = {
    "ddddocr": (Case("encoded", 1), Case("decoded", 1)),  # it has no batches
    OURS: (Case("encoded", 1), Case("decoded", 1), Case("encoded", 64), Case("decoded", 64)),
}


class Reader:
    """A process that reads images with one reader."""

    def __init__(self, python: str, kind: str, model: str, images: Path, core: int) -> None:
        self.kind = kind
        self.name = kind if kind == OURS else f"ddddocr {model}"
        words = [python, str(WORKER), kind, model, str(images), str(core)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._receive()

    def read(self, case: Case, count: int) -> dict[str, Any]:
        """Return the texts of the first images, and the seconds."""
        assert self._process.stdin is not None
        request = {"start": case.start, "batch_size": case.batch_size, "count": count}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._receive()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the process has ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def install(environments: Path) -> str:
    """Return the Python of the virtual environment of ddddocr; install it if necessary."""
    python = environments / DDDDOCR / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", DDDDOCR], check=True)
    return str(python)


def write_images(run_dir: Path, path: Path, most: int | None) -> tuple[list[str], bool]:
    """Write test images of a run as JSON lines; return their labels, and whether they have one case."""
    run = runs.load(run_dir)
    config = devices.for_inference(run.config(), "cpu")
    spec, data = load_images_of(run, config)
    indices = data.split("test", torch.device("cpu"), 0).indices.tolist()[:most]
    labels = [data.labels[n] for n in indices]
    if isinstance(config.data, FolderConfig):
        contents = [Path(str(config.data.path), data.image_name(n)).read_bytes() for n in indices]
    else:
        contents = list(map(to_png, spec.source.load_originals(spec.scan, indices)))
    with path.open("w") as file:
        for label, content in zip(labels, contents, strict=True):
            print(json.dumps({"label": label, "image": base64.b64encode(content).decode()}), file=file)
    return labels, config.captcha.case == "fold"


def to_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def accuracy(labels: Sequence[str], texts: Sequence[str], folded: bool) -> dict[str, Any]:
    """Return how many texts are those of the labels."""
    change = str.lower if folded else str
    correct = sum(change(a) == change(b) for a, b in zip(labels, texts, strict=True))
    low, high = wilson_interval(correct, len(labels))
    return {
        "images": len(labels),
        "correct": correct,
        "accuracy": round(correct / len(labels), 4),
        "interval": [round(low, 4), round(high, 4)],
    }


def measure(readers: Sequence[Reader], rounds: int, count: int) -> dict[tuple[str, Case], list[Any]]:
    """Return the seconds of each round, of each reader and case; the readers take turns."""
    times: dict[tuple[str, Case], list[Any]] = {}
    for number in range(rounds + 1):
        for case in CASES[OURS]:
            for reader in readers:
                if case in CASES[reader.kind]:
                    answer = reader.read(case, count)
                    if number > 0:  # the first round warms up
                        times.setdefault((reader.name, case), []).append(answer)
    return times


def speeds(
    times: dict[tuple[str, Case], list[Any]], reader: Reader, reference: str, count: int
) -> Iterator[tuple[str, Any]]:
    """Yield the figures of a reader's speed, by case."""
    for case in CASES[reader.kind]:
        own = times[reader.name, case]
        other = times[reference, Case(case.start, 1)]
        figures: dict[str, Any] = {}
        for clock in ("wall", "cpu"):
            rates = [count / each[clock] for each in own]
            ratios = [b[clock] / a[clock] for a, b in zip(own, other, strict=True)]
            figures[f"images_per_{clock}_second"] = round(statistics.median(rates), 1)
            figures[f"{clock}_range"] = [round(min(rates), 1), round(max(rates), 1)]
            figures[f"{clock}_ratio"] = round(statistics.median(ratios), 2)
            figures[f"{clock}_ratio_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
        yield f"{case.start}, batch {case.batch_size}", figures


def compare(run_dir: Path, model: Path | None, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a line for each reader of the test images of a run."""
    core = min(os.sched_getaffinity(0)) if arguments.core is None else arguments.core
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        images = Path(folder, "images.jsonl")
        labels, folded = write_images(run_dir, images, arguments.images)
        if model is None:
            model = export_run(run_dir, Path(folder, "model.onnx")).path
        python = install(arguments.environments)
        readers = [
            Reader(python, "ddddocr", "default", images, core),
            Reader(python, "ddddocr", "beta", images, core),
            Reader(sys.executable, OURS, str(model), images, core),
        ]
        for reader in readers:
            stack.callback(reader.close)
        count = min(arguments.count, len(labels))
        times = measure(readers, arguments.rounds, count)
        texts = [reader.read(CASES[reader.kind][-1], len(labels))["texts"] for reader in readers]
    disturbed = interference()  # now that the readers have ended, their time counts as that of children
    for reader, read in zip(readers, texts, strict=True):
        yield {
            "benchmark": "against_readers",
            "run": run_dir.name,
            "reader": reader.name,
            **reader.about,
            **accuracy(labels, read, folded),
            "rounds": arguments.rounds,
            "images_per_round": count,
            "ratios_to": readers[0].name,
            "speed": dict(speeds(times, reader, readers[0].name, count)),
            **disturbed,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--model", type=Path, help="an exported file of the run, instead of a new one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", type=int, default=256, help="images per round")
    parser.add_argument("--images", type=int, help="test images for the accuracy; default: all")
    parser.add_argument("--core", type=int, help="default: the first one")
    parser.add_argument("--environments", type=Path, default=root_dir() / "build" / "readers")
    arguments = parser.parse_args()
    for name in arguments.runs:
        for line in compare(find_run(name, finished=True), arguments.model, arguments):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
