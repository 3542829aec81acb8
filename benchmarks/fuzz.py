"""Read mutated image files, label tables and archives, and count what goes wrong.

Bits are flipped, parts are cut, repeated, moved or replaced by extreme numbers. Each case must be read or be
refused with one of the package's own errors, in at most --seconds, without the process growing by more than
--mib. Cases are read in processes of their own, so that a crash is found, too. Prints one JSON line. The exit
code is 1 if there is a fault, which can be repeated by its number: --first NUMBER --count 1.

    python benchmarks/fuzz.py [--count 20000] [--first 0] [--seconds 2] [--mib 200]
"""

import argparse
import io
import json
import random
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from interference import interference
from PIL import Image

from captcha_exp import compose, load
from captcha_exp.config import FolderConfig
from captcha_exp.data.images import InvalidImage
from captcha_exp.data.sources.decoder import decode_folder
from captcha_exp.data.sources.folder import decode_image, scan_folder
from captcha_exp.errors import UserError

CASES_PER_PROCESS = 1_000
KINDS = ("image",) * 8 + ("table", "archive")  # of ten cases
EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\xff\xff")


def sample_images() -> list[bytes]:
    """Return small image files in each format and mode that can be read."""
    rng = np.random.default_rng(0)
    gray = Image.fromarray(rng.integers(0, 256, (20, 60), dtype=np.uint8))
    color = Image.fromarray(rng.integers(0, 256, (20, 60, 3), dtype=np.uint8))
    found = []
    for kind, images in {
        "PNG": (
            gray,
            color,
            gray.convert("1"),
            color.convert("P"),
            color.convert("RGBA"),
            gray.convert("I;16"),
        ),
        "JPEG": (gray, color, color.convert("CMYK")),
        "GIF": (gray, color.convert("P")),
        "BMP": (gray, color, gray.convert("1")),
        "WEBP": (color, color.convert("RGBA")),
    }.items():
        for image in images:
            file = io.BytesIO()
            image.save(file, kind)
            found.append(file.getvalue())
    for kind, options in (("GIF", {"save_all": True}), ("JPEG", {"progressive": True})):
        file = io.BytesIO()
        more = {"append_images": [gray.rotate(180)]} if kind == "GIF" else {}
        gray.save(file, kind, **options, **more)
        found.append(file.getvalue())
    return found


def sample_tables(names: list[str]) -> dict[str, bytes]:
    """Return label tables of these files by name."""
    labels = [f"{n * 1237 % 10_000:04}" for n in range(len(names))]
    pairs = list(zip(names, labels, strict=True))
    quoted = "".join(f'"{name}","{label}"\r\n' for name, label in pairs)
    lines = "".join(json.dumps({"file": name, "label": label}) + "\n" for name, label in pairs)
    split = "".join(
        f"{name},{label},{('train', 'test')[n % 3 == 0]}\n" for n, (name, label) in enumerate(pairs)
    )
    return {
        "labels.csv": b"\xef\xbb\xbf" + f"file,label\r\n{quoted}".encode(),
        "metadata.csv": f"file_name,text,split\n{split}".encode(),
        "labels.tsv": ("file\tlabel\n" + "".join(f"{name}\t{label}\n" for name, label in pairs)).encode(),
        "labels.jsonl": lines.encode(),
        "corrections.csv": f"file,action,label\n{names[0]},label,9999\n{names[1]},drop,\n".encode(),
    }


def sample_archives(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return archives of these files by name."""
    found = {}
    modes: dict[str, Literal["w", "w:gz"]] = {"a.tar": "w", "a.tar.gz": "w:gz"}
    for name, mode in modes.items():
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode=mode) as tar:
            for file, data in files.items():
                info = tarfile.TarInfo(file)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        found[name] = content.getvalue()
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, data in files.items():
            archive.writestr(file, data)
    return {**found, "a.zip": content.getvalue()}


def mutate(content: bytes, rng: random.Random, other: bytes) -> bytes:
    """Return the content with one to four changes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        size = rng.choice((1, 2, 4, 16, 256))
        match rng.randrange(8):
            case 0 | 1 | 2 if data:
                data[min(start, len(data) - 1)] ^= 1 << rng.randrange(8)
            case 3:
                del data[start:]
            case 4:
                del data[start : start + size]
            case 5:
                data[start:start] = data[start : start + size] * rng.choice((1, 2, 50))
            case 6:
                data[start : start + 4] = rng.choice(EXTREMES)
            case _:
                data[start : start + size] = other[start : start + size]
    return bytes(data)


class Fuzzer:
    """The samples, and how a case is read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._images = sample_images()
        names = [f"{n:02}.png" for n in range(30)]
        self._files = dict.fromkeys(names, self._images[0])
        for name, content in self._files.items():
            (folder / name).write_bytes(content)
        self._tables = sample_tables(names)
        self._archives = sample_archives({**self._files, "labels.csv": self._tables["labels.csv"]})
        config = load(compose("data=folder", "data.path=.", "captcha.width=60", "captcha.height=20"))
        assert isinstance(config.data, FolderConfig)
        self._data, self._inferred = config.data, config.captcha
        self._captcha = replace(
            config.captcha, alphabet="0123456789", length=4, min_length=None, channels=1, case="keep"
        )

    def make(self, number: int) -> Callable[[], object]:
        """Return a function that reads case `number`."""
        rng = random.Random(number)
        match rng.choice(KINDS):
            case "image":
                content = mutate(rng.choice(self._images), rng, rng.choice(self._images))
                return lambda: decode_image(content, self._captcha)
            case "table":
                name = rng.choice(list(self._tables))
                content = mutate(self._tables[name], rng, rng.choice(list(self._tables.values())))
                return lambda: self._scan_table(name, content)
            case _:
                name = rng.choice(list(self._archives))
                content = mutate(self._archives[name], rng, rng.choice(list(self._archives.values())))
                return lambda: self._scan_archive(name, content)

    def _scan_table(self, name: str, content: bytes) -> None:
        (self._folder / name).write_bytes(content)
        try:
            self._scan(self._folder)
        finally:
            (self._folder / name).unlink()

    def _scan_archive(self, name: str, content: bytes) -> None:
        path = self._folder.parent / name
        path.write_bytes(content)
        self._scan(path)

    def _scan(self, path: Path) -> None:
        decode_folder(scan_folder(replace(self._data, path=str(path)), self._inferred))


def read_cases(first: int, count: int, seconds: float, mib: float) -> dict[str, Any]:
    """Read cases in this process; return their outcomes and faults."""
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "images")
        folder.mkdir()
        fuzzer = Fuzzer(folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        before = peak
        for number in range(first, first + count):
            read = fuzzer.make(number)
            start = time.perf_counter()
            try:
                read()
                outcomes["read"] += 1
            except (InvalidImage, UserError):
                outcomes["refused"] += 1
            except BaseException as error:
                faults.append(f"case {number}: {type(error).__name__}: {error}"[:300])
            duration = time.perf_counter() - start
            slowest = max(slowest, duration)
            if duration > seconds:
                faults.append(f"case {number}: took {duration:.1f} s")
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            if now - before > mib and now > peak:
                faults.append(f"case {number}: the process grew to {now - before:.0f} MiB above its start")
            peak = max(peak, now)
    return {"outcomes": outcomes, "faults": faults, "slowest": slowest, "grown_mib": peak - before}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--mib", type=float, default=200.0)
    parser.add_argument("--in-process", action="store_true", help="read the cases in this process")
    arguments = parser.parse_args()
    limits = (arguments.seconds, arguments.mib)
    if arguments.in_process:
        print(json.dumps(read_cases(arguments.first, arguments.count, *limits)))
        return
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    slowest = grown = 0.0
    for first in range(arguments.first, arguments.first + arguments.count, CASES_PER_PROCESS):
        count = min(CASES_PER_PROCESS, arguments.first + arguments.count - first)
        words = ["--first", first, "--count", count, "--seconds", limits[0], "--mib", limits[1]]
        command = [sys.executable, __file__, "--in-process", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            faults.append(
                f"cases {first} to {first + count - 1}: exit code {done.returncode}: {done.stderr[-500:]}"
            )
            continue
        part = json.loads(done.stdout)
        outcomes += Counter(part["outcomes"])
        faults += part["faults"]
        slowest, grown = max(slowest, part["slowest"]), max(grown, part["grown_mib"])
    line = {"benchmark": "fuzz", "cases": arguments.count, **outcomes, "slowest_seconds": round(slowest, 2)}
    print(json.dumps({**line, "grown_mib": round(grown), "faults": faults, **interference()}))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
