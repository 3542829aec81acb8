"""Give hostile files to the commands that read them, and check that each is refused and does nothing.

Files of runs and sweeps, with right hashes, GPU files and config files are made to do harm: content that
grows when it is read, other types, code, links, pipes, addresses outside. Each command runs in a process that
has its imports done, under an audit hook. It must end with an exit code other than 0 and name the file, in
a second and 100 MB; it must start no program, import nothing that a file names, and write nothing outside the
root directory. Prints one JSON line: cases, the largest seconds and MB, faults; exit code 1 if there is one.

    python benchmarks/hostile.py [--only TEXT] [--every 1] [--seconds 1] [--mb 100]
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import damage
import torch
from damage import DAY, TINY, Read, call, make_runs
from hostile_cases import OUTSIDE, SWEEP, Case, all_cases, run_file
from hostile_files import CANARY

TIMEOUT_SECONDS = 30
RENAMES = ("os.rename", "os.link", "os.symlink")  # audit events
CHANGES = ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod")


@dataclass
class Watch:
    """What the audit hook has seen during a command."""

    root: Path
    events: list[str]

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note programs, imports of the canary, and writes outside the root directory."""
        if event in ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "pickle.find_class"):
            self.events.append(f"{event} {arguments!r}"[:200])
        elif event == "subprocess.Popen" and arguments[0] not in ("git", sys.executable):
            self.events.append(f"{event} {arguments[:2]!r}"[:200])
        elif event == "import" and CANARY in str(arguments[0]):
            self.events.append(f"import {arguments[0]}")
        elif event in CHANGES or (event == "open" and _is_for_writing(arguments[2])):
            self._write(event, arguments[0])
        elif event in RENAMES:
            self._write(event, arguments[1])
        elif event == "sqlite3.connect":
            self._write(event, str(arguments[0]).removeprefix("file:").partition("?")[0])

    def _write(self, event: str, path: Any) -> None:
        if isinstance(path, int | bytes) or str(path).startswith(("/dev/", "/proc/")):
            return
        place = Path(path)
        # A rename replaces a link; the temporary directory is opened for files without a name.
        place = place.parent.resolve() / place.name if event in RENAMES else place.resolve()
        if not place.is_relative_to(self.root) and str(place) != tempfile.gettempdir():
            self.events.append(f"{event} {path}")


def _is_for_writing(flags: Any) -> bool:
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


_watch: list[Watch] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    for watch in _watch:
        watch.hook(event, arguments)


@contextlib.contextmanager
def watched(root: Path) -> Iterator[Watch]:
    """Watch what a command does until the context exits."""
    watch = Watch(root.resolve(), [])
    _watch.append(watch)
    try:
        yield watch
    finally:
        _watch.remove(watch)


def build(root: Path) -> None:
    """Create the runs, a sweep, a GPU file and a config directory below the root directory."""
    make_runs(root)
    with damage.environment(root):
        from captcha_exp import compose, load
        from captcha_exp.runtime.paths import conf_dir
        from captcha_exp.sweep.record import Job, create_sweep

        configs = {str(size): load(compose(*TINY, f"train.batch_size={size}")) for size in (16, 32)}
        jobs = [
            Job(number=number, swept={"train.batch_size": size}, choices={}, requested=config)
            for number, (size, config) in enumerate(configs.items(), 1)
        ]
        sweep = create_sweep("hostile", jobs, [None] * len(jobs), 1)
        sweep.close("KILLED")
        shutil.move(sweep.run_dir, root / run_file(SWEEP, ""))
        shutil.copy(conf_dir() / "gpu" / "gtx1650.yaml", root / "gpu.yaml")
        (root / "conf" / "experiment").mkdir(parents=True)


def check(
    case: Case, root: Path, pristine: Path, seconds: float, mb: float
) -> tuple[float, float, list[str]]:
    """Return the seconds and MB that a command took, and what is wrong with its answer."""
    for entry in (*root.iterdir(), root.parent / OUTSIDE):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    shutil.copytree(pristine, root, dirs_exist_ok=True, symlinks=True)
    (root.parent / OUTSIDE).mkdir(exist_ok=True)
    case.make(root)
    with watched(root) as watch:
        read, took, grown = _measure(root, case.command)
    text = f"{read.out}{read.err}"
    faults = [*watch.events]
    if "Traceback" in read.err:
        faults.append("traceback")
    if not all(c.isprintable() or c == "\n" for c in text):
        faults.append("control characters in the output")
    # These name the damage and go on, a resumed run from the checkpoint before.
    goes_on = case.command[0] in ("diff", "runs") or "/checkpoint/" in case.file
    name = f"experiment={Path(case.file).stem}" if "conf/" in case.file else Path(case.file).name
    is_refused = (read.code > 0 or goes_on) and (name in text or Path(case.file).name in text)
    if not is_refused and not case.accepts:
        faults.append(f"not refused by name (exit code {read.code})")
    if took > seconds and not case.accepts:
        faults.append(f"{took:.1f} s")
    if grown > mb:
        faults.append(f"{grown:.0f} MB")
    if any((root.parent / OUTSIDE).rglob("*.lock")) or any((root.parent / OUTSIDE).rglob("*.db")):
        faults.append("wrote outside")
    return took, grown, [f"{fault}: {read.err[-400:]}{read.out[-200:]}" for fault in faults]


def _measure(root: Path, command: Sequence[str]) -> tuple[Read, float, float]:
    """Run a command; return what it printed, its seconds, and the MB by which the process grew meanwhile."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = _memory_mb("VmRSS")
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT_SECONDS)
    began = time.perf_counter()
    with mock.patch("captcha_exp.cli.sweep.run_sweep", side_effect=damage.FirstStep):
        read = call(root, command)
    took = time.perf_counter() - began
    signal.setitimer(signal.ITIMER_REAL, 0)
    return read, took, _memory_mb("VmHWM") - before


def _memory_mb(key: str) -> float:
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / 1000


def _raise_timeout(*_: object) -> None:
    raise TimeoutError(f"{TIMEOUT_SECONDS} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name, file or command has this text")
    parser.add_argument("--every", type=int, default=1, help="only every N-th case")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--mb", type=float, default=100.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _raise_timeout)
    counts, faults, slowest, largest = Counter[str](), [], (0.0, ""), (0.0, "")
    with tempfile.TemporaryDirectory() as temporary:
        root, pristine = Path(temporary) / "root", Path(temporary) / "pristine"
        root.mkdir()
        build(root)
        shutil.copytree(root, pristine, symlinks=True)
        (root.parent / OUTSIDE).mkdir()
        cases = [
            each for each in all_cases(root) if options.only in f"{each.name} {each.file} {each.command}"
        ]
        cases = cases[:: options.every]
        for command in dict.fromkeys(each.command for each in cases):
            _measure(root, command)  # imports
        sys.addaudithook(_audit)
        for case in cases:
            took, grown, wrong = check(case, root, pristine, options.seconds, options.mb)
            label = f"{case.command[0]}: {case.name[:60]} in {case.file.removeprefix(f'outputs/{DAY}/')}"
            counts[Path(case.file).name] += 1
            slowest, largest = max(slowest, (round(took, 2), label)), max(largest, (round(grown), label))
            for fault in wrong:
                faults.append(f"{label}: {fault}")
                print(faults[-1], file=sys.stderr, flush=True)
    figures = {"cases": len(cases), "files": dict(counts), "slowest": slowest, "largest_mb": largest}
    print(json.dumps({"benchmark": "hostile", **figures, "faults": [each[:300] for each in faults]}))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
