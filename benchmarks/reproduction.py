"""Check that finished runs reproduce, and that changes are detected and named.

Part one: every experiment of conf/, shortened, is trained and reproduced three times, with another number of
rendering workers, as a job of a sweep, and from a copy of its run directory with an empty store. Part two:
repeated reproductions, without false alarms; and changes to files, code and environment, each of which must
be named as the cause or as a change without effect. Everything runs through the real command, in one process
each. Prints a line per check and one JSON line at the end; exit code 1 if a check fails.

    python benchmarks/reproduction.py [--repeats 20] [--quick]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from captcha_exp import runs
from captcha_exp.runtime.files import sha256_of

PROJECT = Path(__file__).resolve().parents[1]
SHORT = {  # overrides that shorten an experiment to minutes
    "quickstart": ("data.count=2000", "train.epochs=2"),
    "alnum": ("data.count=2000", "train.epochs=2"),
    "article": ("data.count=600", "train.epochs=1", "data.validation_fraction=0.2", "data.test_fraction=0.2"),
}
SMALL = (
    *(
        "data.count=300",
        "data.validation_fraction=0.25",
        "data.test_fraction=0.25",
        "captcha.alphabet='01234'",
    ),
    *("captcha.length=2", "captcha.width=32", "captcha.height=16", "model.channels=[4,8,8]"),
    *(
        "train.batch_size=64",
        "train.epochs=2",
        "device.name=cpu",
        "device.threads=2",
        "device.precision=fp32",
    ),
)
OF_A_FOLDER = (*SMALL[1:3], *SMALL[4:], "captcha.channels=1", "data=folder", "captcha.alphabet='0123456789'")

OVERRIDES: Mapping[str, tuple[str, Any]] = {  # difference -> config key, and its new value
    "alphabet order": ("captcha.alphabet", "'01243'"),
    "seed": ("seed", 1),
    "precision": ("device.precision", "bf16"),
    "split": ("data.split_seed", 1),
    "learning rate": ("train.learning_rate", 0.02),
    "augmentation": ("augment.translate", 0.1),
    "threads": ("device.threads", 1),
}


class Bench:
    """Runs the command in a temporary root and counts failed checks."""

    def __init__(self, work_dir: Path) -> None:
        self.work_dir, self.num_failed = work_dir, 0
        self.root = work_dir / "root"

    def command(
        self, *overrides: str, home: Path = PROJECT, root: Path | None = None, **variables: str
    ) -> dict[str, Any]:
        """Run the command and return the JSON that it prints.

        Raises:
            SystemExit: it printed none; the message has the end of its error output.
        """
        environment = {"PYTHONPATH": str(home), "CAPTCHA_EXP_ROOT": str(root or self.root), **variables}
        done = subprocess.run(
            [sys.executable, "-P", "-m", "captcha_exp", *overrides, "--json"],
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        if not done.stdout:
            raise SystemExit(f"{' '.join(overrides)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        values: dict[str, Any] = json.loads(done.stdout)
        return values

    def train(self, *overrides: str) -> Path:
        """Train and return the run directory; for a sweep, that of its first job."""
        folder = Path(self.command("train", *overrides)["run_dir"])
        if (folder / "sweep.json").exists():
            return sorted(path.parent for path in folder.glob("*/run.json"))[0]
        return folder

    def check(self, what: str, result: Mapping[str, Any], passed: bool) -> bool:
        """Print the result of a check, and count it if it failed."""
        print(f"{'ok   ' if passed else 'WRONG'} {what}: {result['summary']}", flush=True)
        self.num_failed += not passed
        return passed

    def identical(self, what: str, folder: Path, *overrides: str, **where: Any) -> bool:
        """Reproduce a run and return whether it is identical."""
        result = self.command("reproduce", str(folder), *overrides, **where)
        return self.check(what, result, result["verdict"] == "identical")

    def copied(self, folder: Path, name: str) -> Path:
        """Copy a run directory to another folder."""
        return shutil.copytree(folder, self.work_dir / name.replace(" ", "-") / folder.name)


def experiments(bench: Bench, quick: bool) -> dict[str, str]:
    """Return, for each experiment, how many of its reproductions are identical."""
    found = {}
    names = sorted(path.stem for path in (PROJECT / "conf" / "experiment").glob("*.yaml"))
    for name in names[:1] if quick else names:
        overrides = (f"experiment={name}", "device.name=cpu", *(SMALL if quick else SHORT[name]))
        folder = bench.train(*overrides)
        results = [bench.identical(f"{name} {number}", folder) for number in range(1, 2 if quick else 4)]
        results.append(
            bench.identical(f"{name}, other workers", folder, "data.workers=3", "data.cache=fresh")
        )
        copy = bench.copied(folder, f"copy of {name}")
        results.append(bench.identical(f"{name}, copied", copy, root=bench.work_dir / f"empty-{name}"))
        if not quick:
            job = bench.train("-m", *overrides, "seed=5,6")
            results.append(bench.identical(f"{name}, a job of a sweep", job))
        found[name] = f"{sum(results)} of {len(results)}"
    return found


# -- injected changes ----------------------------------------------------------------------------------------


def inject_changes(bench: Bench, folder: Path, image_run: Path, image_dir: Path) -> int:
    """Return how many of the injected changes were detected and named."""
    found = 0
    for name, (key, value) in OVERRIDES.items():
        result = bench.command("reproduce", str(folder), f"{key}={value}")
        found += _caused(bench, name, result, f"cause: {key} ")
    result = bench.command("reproduce", str(folder), ATEN_CPU_CAPABILITY="default")
    found += _caused(bench, "CPU capability", result, "cause: device.cpu_capability ")
    home = _other_code(bench, "line", 'config.seed, "weights"))', 'config.seed, "weight"))')
    result = bench.command("reproduce", str(folder), home=home)
    found += _caused(bench, "a line of code", result, "cause: code (captcha_exp/model/step.py)")
    found += _of_images(bench, image_run, image_dir)

    copy = bench.copied(folder, "version")
    environment = json.loads((copy / "environment.json").read_text())
    environment["packages"]["pillow"] = "1.2.3"
    (copy / "environment.json").write_text(json.dumps(environment))
    record = runs.load(copy)
    record.update(files=record.info.files | {"environment.json": sha256_of(copy / "environment.json")})
    result = bench.command("reproduce", str(copy))
    passed = result["summary"].startswith("identical, but pillow 1.2.3 -> ")
    found += bench.check("a version in the record", result, passed)
    home = _other_code(bench, "comment", '"weights"))', '"weights"))  # why')
    result = bench.command("reproduce", str(folder), home=home)
    passed = result["summary"].startswith("identical, but code (captcha_exp/model/step.py)")
    return found + bench.check("a comment in the code", result, passed)


def _of_images(bench: Bench, image_run: Path, image_dir: Path) -> int:
    """Change one pixel, then one label."""
    whole = (image_dir / "0007.png").read_bytes()
    with Image.open(image_dir / "0007.png") as image:
        image.putpixel((3, 4), 255 if image.getpixel((3, 4)) == 0 else 0)
        image.save(image_dir / "0007.png")
    result = bench.command("reproduce", str(image_run))
    found = _caused(bench, "one pixel", result, "cause: different content: 0007.png")
    (image_dir / "0007.png").write_bytes(whole)
    labels = (image_dir / "labels.csv").read_text()
    (image_dir / "labels.csv").write_text(labels.replace("0005.png,05", "0005.png,50"))
    result = bench.command("reproduce", str(image_run))
    (image_dir / "labels.csv").write_text(labels)
    return found + _caused(bench, "one label", result, "cause: different label: 0005.png")


def _caused(bench: Bench, name: str, result: Mapping[str, Any], cause: str) -> bool:
    return bench.check(name, result, result["verdict"] != "identical" and cause in result["summary"])


def _other_code(bench: Bench, name: str, original: str, other: str) -> Path:
    """Copy the package and change its training step."""
    home = bench.work_dir / f"code-{name}"
    for part in ("captcha_exp", "conf"):
        shutil.copytree(PROJECT / part, home / part, ignore=shutil.ignore_patterns("__pycache__"))
    path = home / "captcha_exp" / "model" / "step.py"
    text = path.read_text()
    if text.count(original) != 1:
        raise SystemExit(f"step.py: must contain {original!r} exactly once")
    path.write_text(text.replace(original, other))
    return home


def _make_images(folder: Path) -> None:
    """Create a hundred random images with a table of labels."""
    folder.mkdir()
    lines = ["file,label"]
    for number in range(100):
        name = f"{number:04}.png"
        noise = bytes((number * 7919 + n * n * 31 + n) % 251 for n in range(32 * 16))
        Image.frombytes("L", (32, 16), noise).save(folder / name)
        lines.append(f"{name},{number:02}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20, help="reproductions without changes")
    parser.add_argument("--quick", action="store_true", help="one tiny experiment and three repeats")
    options = parser.parse_args(arguments)
    repeats = 3 if options.quick else options.repeats
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        by_experiment = experiments(bench, options.quick)
        small = bench.train(*SMALL, "tracking=none")
        clean = 0
        for number in range(1, repeats + 1):
            result = bench.command("reproduce", str(small))
            clean += bench.check(f"clean repeat {number}", result, result["summary"] == "identical")
        image_dir = bench.work_dir / "images"
        _make_images(image_dir)
        image_run = bench.train(*OF_A_FOLDER, f"data.path={image_dir}", "tracking=none")
        found = inject_changes(bench, small, image_run, image_dir)
    figures = {
        "benchmark": "reproduction",
        "identical": by_experiment,
        "clean_repeats": f"{clean} of {repeats}",
        "injected_changes_named": f"{found} of {len(OVERRIDES) + 6}",
    }
    print(json.dumps(figures))
    return 1 if bench.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
