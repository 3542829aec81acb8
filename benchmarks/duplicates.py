"""Plant copies of images in a folder, and count those that are found.

Renders distinct images with the default generator and saves copies of some: equal files, equal pixels in
another format, recompressed as JPEG, each of them also with another label. Prints one JSON line: found by
kind, false alarms, groups that cross a split, and the seconds of the scan; exit code 1 if a goal is missed.

    python benchmarks/duplicates.py [--count 5000] [--copies 50]
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from captcha_exp import compose, load
from captcha_exp.config import CaptchaLibraryConfig, resolve
from captcha_exp.data import dataset
from captcha_exp.data.sources.generators import get_renderer_spec, image_rng
from captcha_exp.runtime.device import detect_machine

KINDS = ("bytes", "pixels", "recompressed")


def render(folder: Path, count: int) -> list[Path]:
    """Render distinct images with distinct labels."""
    config = load(compose("captcha.length=6", "tracking=none"))
    assert isinstance(config.data, CaptchaLibraryConfig)
    spec = get_renderer_spec(config.data)
    draw, labels, files = spec.make_renderer(), set[str](), []
    for index in range(count):
        rng = image_rng(config.data, index)
        label = spec.sample_label(config.captcha, rng)
        if label not in labels:
            labels.add(label)
            files.append(folder / f"{index:05}-{label}.png")
            draw(label, rng).save(files[-1])
    return files


def plant(files: list[Path], copies: int, with_other_labels: bool) -> dict[str, str]:
    """Save copies of each kind; return name of the copy -> its kind."""
    from PIL import Image

    planted, rng = {}, random.Random(int(with_other_labels))
    chosen = rng.sample(files, copies * len(KINDS))
    for number, file in enumerate(chosen):
        kind = KINDS[number % len(KINDS)]
        label = file.stem.partition("-")[2]
        label = f"{(int(label) + 123457) % 10**6:06}" if with_other_labels else label
        suffix = {"bytes": ".png", "pixels": ".bmp", "recompressed": ".jpg"}[kind]
        copy = file.with_name(f"{90000 + number + 1000 * with_other_labels}-{label}{suffix}")
        if kind == "bytes":
            shutil.copy(file, copy)
        else:
            Image.open(file).convert("RGB").save(copy, quality=rng.randint(40, 90))
        planted[copy.name] = kind
    return planted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--copies", type=int, default=50, help="of each kind, with and without another label")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        os.environ["CAPTCHA_EXP_ROOT"] = root
        folder = Path(root) / "images"
        folder.mkdir()
        files = render(folder, options.count)
        planted = plant(files, options.copies, False) | plant(files, options.copies, True)
        words = ["data=folder", f"data.path={folder}", "data.on_conflict=skip", "tracking=none"]
        config = resolve(load(compose(*words)), detect_machine())
        start = time.perf_counter()
        spec = dataset.inspect_dataset(config)
        seconds = time.perf_counter() - start
    names = [name for name, _ in spec.scan.files]
    grouped = {names[n] for group in spec.scan.duplicates for n in group.indices}
    found_names = grouped | set(spec.scan.conflicts)
    found = Counter(kind for name, kind in planted.items() if name in found_names)
    originals = {file.name for file in files}
    split_of = {names[int(n)]: split for split, rows in spec.split_indices.items() for n in rows}
    crossing = sum(len({split_of[names[n]] for n in group.indices}) > 1 for group in spec.scan.duplicates)
    # A group of distinct originals would be a false alarm; each planted copy has one original.
    false_alarms = sum(
        sum(names[n] in originals for n in group.indices) > 1 for group in spec.scan.duplicates
    )
    total = Counter(planted.values())
    is_good = (
        all(found[kind] == total[kind] for kind in ("bytes", "pixels"))
        and found["recompressed"] >= 0.95 * total["recompressed"]
        and not crossing
        and not false_alarms
    )
    figures = {"images": len(files), "planted": dict(total), "found": dict(found)}
    figures |= {"false_alarms": false_alarms, "groups_across_splits": crossing}
    print(json.dumps({"benchmark": "duplicates", **figures, "scan_seconds": round(seconds, 1)}))
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
