"""Find wrong labels: plant some in a drawn set, or compare with a list of known ones of a folder.

Without --folder, renders labels of four digits and letters, and replaces one character of a share of them.
Runs `captcha-exp data --folds N` on the folder. Prints one JSON line: how many of the wrong labels are among
those called probable, and among the first rows.

    python benchmarks/suspects.py [--count 3000] [--share 0.02] [--folds 5] [OVERRIDE ...]
    python benchmarks/suspects.py --folder DIR [--known FILE] [--folds 5] [OVERRIDE ...]

The file of --known has the name of a wrongly labeled image in each line.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from interference import interference
from PIL import Image

from captcha_exp import compose, load
from captcha_exp.config import resolve
from captcha_exp.data import sources
from captcha_exp.runtime.device import detect_machine

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
CAPTCHA = ("captcha.width=96", "captcha.height=36", f"captcha.alphabet={ALPHABET}", "captcha.length=4")
FIRST_ROWS = 40


def render(folder: Path, count: int, share: float) -> set[str]:
    """Write images labeled by their names, a share of them wrongly; return the names of these."""
    config = resolve(load(compose("data=captcha", f"data.count={count}", *CAPTCHA)), detect_machine())
    source = sources.make_source(config.data, config.captcha)
    labels, rng = source.scan().labels, random.Random(0)
    wrong = set(rng.sample(range(count), round(share * count)))
    names = set()
    for number, (label, image) in enumerate(zip(labels, source.load_images(), strict=True)):
        shown = label
        if number in wrong:
            place = rng.randrange(len(label))
            other = rng.choice([c for c in ALPHABET if c != label[place]])
            shown = label[:place] + other + label[place + 1 :]
        name = f"{number:05}-{shown}.png"
        Image.fromarray(image).save(folder / name)
        if number in wrong:
            names.add(name)
    return names


def find(folder: Path, folds: int, overrides: list[str], root: Path) -> dict[str, Any]:
    """Return the suspects of a folder, and the seconds of the command."""
    start = time.perf_counter()
    words = ["data=folder", f"data.path={folder}", "tracking=none", *overrides]
    command = [sys.executable, "-m", "captcha_exp", "data", "--json", "--folds", str(folds), *words]
    environment = os.environ | {"CAPTCHA_EXP_ROOT": str(root)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    suspects: dict[str, Any] = json.loads(done.stdout)["suspects"]
    return {**suspects, "seconds": round(time.perf_counter() - start)}


def count_found(suspects: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Return how many of the wrong labels are among the probable ones and the first rows."""
    ranked = [each["file"] for each in suspects["found"]]
    probable = {each["file"] for each in suspects["found"] if each["probable"]}
    hits = len(probable & known)
    return {
        "wrong": len(known),
        "recall": round(hits / len(known), 4),
        "precision": round(hits / max(1, len(probable)), 4),
        f"in_first_{FIRST_ROWS}": len(known & set(ranked[:FIRST_ROWS])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="a folder instead of rendered images")
    parser.add_argument("--known", type=Path, metavar="FILE", help="names of its wrongly labeled images")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--share", type=float, default=0.02)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where runs and pages are kept")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, known = arguments.folder, set[str]()
        if folder is None:
            folder = Path(temporary, "images")
            folder.mkdir()
            known = render(folder, arguments.count, arguments.share)
        elif arguments.known is not None:
            known = set(arguments.known.read_text().split())
        suspects = find(folder, arguments.folds, arguments.overrides, arguments.keep or Path(temporary))
    figures = {
        "images": suspects["read"],
        "suspects": len(suspects["found"]),
        "probable": suspects["probable"],
    }
    if known:
        figures |= count_found(suspects, known)
    line = {"benchmark": "suspects", "data": arguments.folder.name if arguments.folder else "drawn"}
    print(json.dumps({**line, **figures, "seconds": suspects["seconds"], **interference()}))


if __name__ == "__main__":
    main()
