"""Measure the report of folders of images: scan, duplicates, summary and page, after imports.

Prints one JSON line: the seconds of each folder, and per 2,000 images of all.

    python benchmarks/dataset_report.py DIR [DIR ...]
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from interference import interference

from captcha_exp import compose, load
from captcha_exp.config import resolve
from captcha_exp.data import dataset
from captcha_exp.report import dataset_page
from captcha_exp.runtime.device import detect_machine


def report(folder: str, page: Path) -> tuple[float, int, dict[str, str]]:
    """Report a folder; return the seconds, the number of images, and what was inferred."""
    config = resolve(load(compose("data=folder", f"data.path={folder}")), detect_machine())
    start = time.perf_counter()
    data = dataset.load_or_build(dataset.inspect_dataset(config))
    dataset_page.write_page(data, (), page)
    seconds = time.perf_counter() - start
    return seconds, len(data.labels), {each["key"]: each["value"] for each in data.manifest["inferred"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="DIR")
    arguments = parser.parse_args()
    seconds, images, inferred = {}, 0, {}
    with tempfile.TemporaryDirectory() as root:
        os.environ["CAPTCHA_EXP_ROOT"] = root
        for folder in arguments.folders:
            name = Path(folder).name
            taken, count, inferred[name] = report(folder, Path(root, "page.html"))
            seconds[name], images = round(taken, 2), images + count
    per_2000 = sum(seconds.values()) / images * 2000
    line = {"benchmark": "dataset_report", "seconds": seconds, "per_2000_images": round(per_2000, 2)}
    print(json.dumps({**line, "images": images, "inferred": inferred, **interference()}))


if __name__ == "__main__":
    main()
