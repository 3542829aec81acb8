"""Make a root directory with many finished runs, copies of the files of one real run.

Each copy has a time and a name of its own; the weights, checkpoints and the report are left out.

    python benchmarks/many_runs.py RUN ROOT [--runs 1000]
"""

import argparse
import json
import shutil
from datetime import timedelta
from pathlib import Path

from captcha_exp.runs import RunInfo
from captcha_exp.runs.info import CHECKSUM_KEY
from captcha_exp.runtime.files import sha256_of_json

COPIED = ("*.json", "*.yaml", "*.jsonl")
RUNS_PER_DAY = 100


def make_runs(original: Path, root: Path, num_runs: int) -> None:
    """Write copies of a run to outputs/ of the root directory."""
    info = RunInfo.load(original)
    for number in range(num_runs):
        started = info.started - timedelta(days=number // RUNS_PER_DAY, minutes=number % RUNS_PER_DAY)
        run_dir = root / "outputs" / f"{started:%Y-%m-%d}" / f"{started:%H%M%S}-{info.name}-{number}"
        run_dir.mkdir(parents=True)
        for path in (path for pattern in COPIED for path in original.glob(pattern)):
            shutil.copyfile(path, run_dir / path.name)
        values = info.model_copy(update={"started": started}).model_dump()
        text = json.dumps(values | {CHECKSUM_KEY: sha256_of_json(values)})
        (run_dir / RunInfo.filename).write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument("root", type=Path, help="CAPTCHA_EXP_ROOT of the copies")
    parser.add_argument("--runs", type=int, default=1000)
    arguments = parser.parse_args()
    make_runs(arguments.run, arguments.root, arguments.runs)
    print(json.dumps({"benchmark": "many_runs", "root": str(arguments.root), "runs": arguments.runs}))


if __name__ == "__main__":
    main()
