"""Measure how other busy processes slow down a CPU training, by the spin count of libgomp's threads.

Trains two short epochs per setting, alone and next to processes that keep a core busy, each in a fresh
process (the setting is read when torch is imported). Prints one JSON line: images/s of the second epoch.

    python benchmarks/omp_spin.py [--spins 300000,5000] [--limit 120]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from interference import interference

OVERRIDES = ("data.count=12000", "train.epochs=2", "tracking=none", "device.name=cpu")


def images_per_second(spins: str, num_busy: int, root: str, limit: int) -> float | None:
    """Return the rate, or None if the training took longer than the limit in seconds."""
    command = [sys.executable, "-m", "captcha_exp", "train", "--json", *OVERRIDES]
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_busy)]
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"CAPTCHA_EXP_ROOT": root, "GOMP_SPINCOUNT": spins},
            capture_output=True,
            text=True,
            timeout=limit,
            check=True,
        )
    except subprocess.TimeoutExpired:
        return None
    finally:
        for process in busy:
            process.kill()
            process.wait()
    rows = (Path(json.loads(done.stdout)["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    rate: float = json.loads(rows[1])["metrics"]["speed/images_per_second"]
    return round(rate)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spins", default="300000,5000")
    parser.add_argument("--limit", type=int, default=120, help="seconds for one training")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        images_per_second("5000", 0, root, arguments.limit)  # renders the images
        figures = {
            spins: {
                f"{n} busy processes": images_per_second(spins, n, root, arguments.limit)
                for n in range(os.cpu_count() or 1)
            }
            for spins in arguments.spins.split(",")
        }
    about = {"benchmark": "omp_spin", "cores": os.cpu_count(), "images_per_second": figures}
    print(json.dumps(about | interference()))


if __name__ == "__main__":
    main()
