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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

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
    *("train.batch_size=64", "train.epochs=2", "device.name=cpu", "device.threads=2"),
)
OF_A_FOLDER = (*SMALL[1:3], *SMALL[4:], "captcha.channels=1", "data=folder", "captcha.alphabet='0123456789'")

EDITS: Mapping[str, tuple[str, Any]] = {  # difference -> key of config.yaml, and its new value
    "alphabet order": ("captcha.alphabet", "01243"),
    "seed": ("seed", 1),
    "precision": ("device.precision", "bf16"),
    "split": ("data.split_seed", 1),
    "learning rate": ("train.learning_rate", 0.02),
    "augmentation": ("augment.translate", 0.1),
    "threads": ("device.threads", 1),
}


class Bench:
    """Runs the command in a temporary root and counts failed checks."""

    def __init__(self, place: Path) -> None:
        self.place, self.wrong = place, 0
        self.root = place / "root"

    def command(
        self, *words: str, home: Path = PROJECT, root: Path | None = None, **variables: str
    ) -> dict[str, Any]:
        """Run the command and return the JSON that it prints.

        Raises:
            SystemExit: it printed none; the message has the end of its error output.
        """
        environment = {"PYTHONPATH": str(home), "CAPTCHA_EXP_ROOT": str(root or self.root), **variables}
        done = subprocess.run(
            [sys.executable, "-P", "-m", "captcha_exp", *words, "--json"],
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        if not done.stdout:
            raise SystemExit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        values: dict[str, Any] = json.loads(done.stdout)
        return values

    def train(self, *overrides: str) -> Path:
        """Train and return the run directory; for a sweep, that of its first job."""
        folder = Path(self.command("train", *overrides)["run_dir"])
        if (folder / "sweep.json").exists():
            return sorted(path.parent for path in folder.glob("*/run.json"))[0]
        return folder

    def check(self, what: str, made: Mapping[str, Any], well: bool) -> bool:
        """Print the result of a check, and count it if it failed."""
        print(f"{'ok   ' if well else 'WRONG'} {what}: {made['summary']}", flush=True)
        self.wrong += not well
        return well

    def identical(self, what: str, folder: Path, *words: str, **where: Any) -> bool:
        """Reproduce a run and return whether it is identical."""
        made = self.command("reproduce", str(folder), *words, **where)
        return self.check(what, made, made["verdict"] == "identical")

    def copied(self, folder: Path, name: str) -> Path:
        """Copy a run directory to another folder."""
        return shutil.copytree(folder, self.place / name.replace(" ", "-") / folder.name)


def experiments(bench: Bench, quick: bool) -> dict[str, str]:
    """Return, for each experiment, how many of its reproductions are identical."""
    found = {}
    names = sorted(path.stem for path in (PROJECT / "conf" / "experiment").glob("*.yaml"))
    for name in names[:1] if quick else names:
        words = (f"experiment={name}", "device.name=cpu", *(SMALL if quick else SHORT[name]))
        folder = bench.train(*words)
        results = [bench.identical(f"{name} {number}", folder) for number in range(1, 2 if quick else 4)]
        results.append(
            bench.identical(f"{name}, other workers", folder, "data.workers=3", "data.cache=fresh")
        )
        copy = bench.copied(folder, f"copy of {name}")
        results.append(bench.identical(f"{name}, copied", copy, root=bench.place / f"empty-{name}"))
        if not quick:
            job = bench.train("-m", *words, "seed=5,6")
            results.append(bench.identical(f"{name}, a job of a sweep", job))
        found[name] = f"{sum(results)} of {len(results)}"
    return found


# -- injected changes ----------------------------------------------------------------------------------------


def inject_changes(bench: Bench, folder: Path, image_run: Path, there: Path) -> int:
    """Return how many of the injected changes were detected and named."""
    found = 0
    for name, (key, value) in EDITS.items():
        copy = bench.copied(folder, name)
        _edit(copy / "config.yaml", key, value)
        found += _caused(bench, name, bench.command("reproduce", str(copy)), f"cause: {key} ")
    made = bench.command("reproduce", str(folder), ATEN_CPU_CAPABILITY="default")
    found += _caused(bench, "CPU capability", made, "cause: CPU capability ")
    home = _other_code(bench, "line", 'config.seed, "weights"))', 'config.seed, "weight"))')
    made = bench.command("reproduce", str(folder), home=home)
    found += _caused(bench, "a line of code", made, "cause: code (captcha_exp/model/step.py)")
    found += _of_images(bench, image_run, there)

    copy = bench.copied(folder, "version")
    _edit(copy / "environment.json", "packages.pillow", "1.2.3")
    made = bench.command("reproduce", str(copy))
    well = made["summary"].startswith("identical, but pillow 1.2.3 -> ")
    found += bench.check("a version in the record", made, well)
    home = _other_code(bench, "comment", '"weights"))', '"weights"))  # why')
    made = bench.command("reproduce", str(folder), home=home)
    well = made["summary"].startswith("identical, but code (captcha_exp/model/step.py)")
    return found + bench.check("a comment in the code", made, well)


def _of_images(bench: Bench, image_run: Path, there: Path) -> int:
    """Change one pixel, then one label."""
    whole = (there / "0007.png").read_bytes()
    with Image.open(there / "0007.png") as image:
        image.putpixel((3, 4), 255 if image.getpixel((3, 4)) == 0 else 0)
        image.save(there / "0007.png")
    made = bench.command("reproduce", str(image_run))
    found = _caused(bench, "one pixel", made, "cause: different content: 0007.png")
    (there / "0007.png").write_bytes(whole)
    labels = (there / "labels.csv").read_text()
    (there / "labels.csv").write_text(labels.replace("0005.png,05", "0005.png,50"))
    made = bench.command("reproduce", str(image_run))
    (there / "labels.csv").write_text(labels)
    return found + _caused(bench, "one label", made, "cause: different label: 0005.png")


def _caused(bench: Bench, name: str, made: Mapping[str, Any], cause: str) -> bool:
    return bench.check(name, made, made["verdict"] != "identical" and cause in made["summary"])


def _edit(path: Path, key: str, value: Any) -> None:
    """Change a value in a file of a run without updating its hash."""
    read: Callable[[str], Any] = json.loads if path.suffix == ".json" else yaml.safe_load
    write: Callable[[Any], str] = json.dumps if path.suffix == ".json" else yaml.safe_dump
    values = read(path.read_text())
    *groups, last = key.split(".")
    inner = values
    for group in groups:
        inner = inner[group]
    inner[last] = value
    path.write_text(write(values))


def _other_code(bench: Bench, name: str, original: str, other: str) -> Path:
    """Copy the package and change its training step."""
    home = bench.place / f"code-{name}"
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
    asked = parser.parse_args(arguments)
    repeats = 3 if asked.quick else asked.repeats
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        by_experiment = experiments(bench, asked.quick)
        small = bench.train(*SMALL, "tracking=none")
        clean = 0
        for number in range(1, repeats + 1):
            made = bench.command("reproduce", str(small))
            clean += bench.check(f"clean repeat {number}", made, made["summary"] == "identical")
        there = bench.place / "images"
        _make_images(there)
        image_run = bench.train(*OF_A_FOLDER, f"data.path={there}", "tracking=none")
        found = inject_changes(bench, small, image_run, there)
    figures = {
        "benchmark": "reproduction",
        "identical": by_experiment,
        "clean_repeats": f"{clean} of {repeats}",
        "injected_changes_named": f"{found} of {len(EDITS) + 6}",
    }
    print(json.dumps(figures))
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
