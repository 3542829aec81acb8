"""Flip bits in the files of runs and cut them, and check that every command that reads them notices.

A finished run, one that was interrupted and one that was killed (tiny ones, of the real training) are damaged
in one file at a time: one flipped bit, or a cut at a random byte. `evaluate`, `predict`, `reproduce`,
`train --resume`, `diff` and `runs` then read the run; those that train stop at the first step, and everything
they have read is compared: tensors, counters, config, metrics. A damage must be named on standard error, or
change nothing. Prints one JSON line: reads by result, faults, seconds; exit code 1 if there is a fault.

    python benchmarks/damage.py [--flips 1000] [--cuts 200] [--clean 200] [--seed 0] [--processes 2]
"""

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from PIL import Image

from captcha_exp import compose, load, runs
from captcha_exp.cli import main as cli
from captcha_exp.cli.hydra_config import ComposedConfig, try_compose
from captcha_exp.config import Config
from captcha_exp.memory.plan import Plan, Planner
from captcha_exp.model import evaluate
from captcha_exp.model.state import TrainState
from captcha_exp.model.weights import tensors_sha256
from captcha_exp.reproduce.reference import ReferenceRun, load_reference
from captcha_exp.runs.source_code import hash_source_files
from captcha_exp.training import train
from captcha_exp.training.recorder import RunRecorder

TINY = (
    "name=damage",
    "data.count=120",
    "data.workers=1",
    "data.validation_fraction=0.25",
    "data.test_fraction=0.25",
    "captcha.alphabet='01234'",
    "captcha.length=2",
    "captcha.width=32",
    "captcha.height=16",
    "model.channels=[4,8,8]",
    "train.batch_size=16",
    "train.epochs=4",
    "train.checkpoint_every='1 epoch'",
    "device.name=cpu",
    "device.threads=1",
    "tracking=none",
)
RUNS = ("finished", "interrupted", "killed")
COMMANDS = ("evaluate", "predict", "reproduce", "resume", "diff", "runs")
DAY = "2026-01-01"  # in outputs/

Kind = Literal["flip", "cut", "clean"]


class FirstStep(BaseException):
    """Ends a training at its first step."""


@dataclass(frozen=True)
class Read:
    """What a command printed, and what a training has read before its first step."""

    code: int
    out: str
    err: str
    values: tuple[Any, ...]

    @property
    def result(self) -> tuple[Any, ...]:
        return self.code, self.out, self.values

    @property
    def remarks(self) -> int:
        """The number of lines on standard error, without those of progress, which depend on the time."""
        return sum(re.search(r": \d+%, about .+ left", line) is None for line in self.err.splitlines())


@dataclass(frozen=True)
class Case:
    """One damage: which run, and what happens to which of its files."""

    run: str
    kind: Kind
    name: str = ""
    offset: int = 0
    bit: int = 0

    def __str__(self) -> str:
        return f"{self.kind} of {self.run}/{self.name} at byte {self.offset}, bit {self.bit}"

    def apply(self, run_dir: Path) -> None:
        """Damage the file, which keeps its time."""
        path = run_dir / self.name
        status, content = path.stat(), bytearray(path.read_bytes())
        if self.kind == "flip":
            content[self.offset] ^= 1 << self.bit
        else:
            del content[self.offset :]
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# -- the runs ------------------------------------------------------------------------------------------------


def make_runs(root: Path) -> None:
    """Train the runs, and another one, below the root directory."""
    with environment(root):
        config = load(compose(*TINY))
        day_dir = root / "outputs" / DAY
        day_dir.mkdir(parents=True)
        train.train(config, run_dir=day_dir / "finished")
        train.train(replace(config, seed=1), run_dir=day_dir / "other")
        _interrupt(config, day_dir / "interrupted", KeyboardInterrupt)
        with mock.patch.object(runs.Run, "close"):
            _interrupt(config, day_dir / "killed", FirstStep)
        killed = runs.load(day_dir / "killed")
        killed.update(process_started=1.0)  # another process, which has exited
        _write_images(root)


def _interrupt(config: Config, run_dir: Path, error: type[BaseException]) -> None:
    """Interrupt a training in the evaluation of its third epoch."""
    results: list[Any] = [evaluate.evaluate] * 2

    def stop_at_third(*arguments: Any) -> Any:
        if not results:
            raise error
        return results.pop()(*arguments)

    with mock.patch.object(train, "evaluate", stop_at_third), contextlib.suppress(error):
        train.train(config, run_dir=run_dir)


def _write_images(root: Path) -> None:
    for number in range(3):
        noise = bytes((number * 7919 + n * n * 31 + n) % 251 for n in range(32 * 16))
        Image.frombytes("L", (32, 16), noise).save(root / f"{number}.png")


@contextlib.contextmanager
def environment(root: Path) -> Iterator[None]:
    """Set the root directory, and skip what is slow and reads no run: git, composing, and planning again."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, CAPTCHA_EXP_ROOT=str(root)))
        for place in ("runs.source_code.git_info", "runs.environment.git_info"):
            stack.enter_context(mock.patch(f"captcha_exp.{place}", return_value=None))
        for place in ("runs.source_code.hash_source_files", "reproduce.rerun.hash_source_files"):
            stack.enter_context(mock.patch(f"captcha_exp.{place}", _hash_source_files))
        for place in ("main", "train"):
            stack.enter_context(mock.patch(f"captcha_exp.cli.{place}.try_compose", _try_compose))
        stack.enter_context(mock.patch.object(Planner, "plan_for", _plan_for))
        yield


_hash_source_files = functools.cache(hash_source_files)
_composed = functools.cache(lambda words: try_compose(list(words), None))
_make_plan = Planner.plan_for
_plans: list[Plan] = []


def _try_compose(words: Sequence[str], _: object) -> ComposedConfig:
    return _composed(tuple(words))


def _plan_for(planner: Planner, batch_size: int) -> Plan:
    if not _plans:
        _plans.append(_make_plan(planner, batch_size))
    return _plans[0]


# -- the commands --------------------------------------------------------------------------------------------


class Reader:
    """Damages the runs below a root directory, reads them, and restores them."""

    def __init__(self, root: Path) -> None:
        """`root` is that of `make_runs`; the runs are copied, so it is not changed."""
        self.root, self._day_dir = root, root / "outputs" / DAY
        self._whole = root / "whole"
        if not self._whole.exists():
            shutil.copytree(self._day_dir, self._whole)
        self._clean = functools.cache(self.read)

    def files(self, run: str) -> dict[str, int]:
        """Return the size in bytes of each file of a run that has any."""
        paths = (path for path in (self._whole / run).rglob("*") if path.is_file())
        sizes = {path.relative_to(self._whole / run).as_posix(): path.stat().st_size for path in paths}
        return {name: size for name, size in sizes.items() if size}

    def words(self, run: str, command: str, name: str) -> list[str]:
        """Return the arguments of a command for this run, with a damage in the named file."""
        run_dir = str(self._day_dir / run)
        images = [str(self.root / f"{number}.png") for number in range(3)]
        match command:
            case "evaluate" | "reproduce":
                return [command, run_dir, "--json"]
            case "predict":
                weights = f"{run_dir}/model.safetensors"
                return ["predict", weights if name == "model.safetensors" else run_dir, *images, "--json"]
            case "resume":
                return ["train", "--resume", run_dir, *(["train.epochs=5"] if run == "finished" else [])]
            case "diff":
                return ["diff", run_dir, str(self._day_dir / "other"), "--all", "--json"]
        return ["runs", "--json", "--columns", "data.split_seed,val/accuracy"]

    def read(self, run: str, command: str, case: Case | None = None) -> Read:
        """Return what a command reads from the runs, after the damage of a case."""
        shutil.rmtree(self.root / "outputs" / DAY)
        for other in (self.root / "outputs").glob("2*"):  # new runs
            shutil.rmtree(other)
        shutil.copytree(self._whole, self._day_dir)
        if case is not None:
            case.apply(self._day_dir / run)
        return call(self.root, self.words(run, command, "" if case is None else case.name))

    def check(self, case: Case, commands: Sequence[str] = COMMANDS) -> tuple[Counter[str], list[str]]:
        """Return the number of commands by result, and the faults of a case."""
        results, faults = Counter[str](), []
        for command in commands:
            clean = self._clean(case.run, command)
            read = self.read(case.run, command, None if case.kind == "clean" else case)
            is_named = Path(case.name).name in read.err and Path(case.name).name not in clean.err
            is_equal = read.result == clean.result
            if "Traceback" in read.err:
                result = "traceback"
            elif case.kind == "clean":
                result = "clean" if is_equal and read.remarks == clean.remarks else "false alarm"
            else:
                result = "named" if is_named else "harmless" if is_equal else "silently different"
            results[result] += 1
            if result in ("traceback", "silently different", "false alarm"):
                faults.append(f"{command}: {result}: {case}\n{read.err[-2000:]}{read.out[-300:]}")
        return results, faults


def call(root: Path, words: Sequence[str]) -> Read:
    """Run a command in this process, with a training up to its first step."""
    values: list[Any] = []
    out, err, code = io.StringIO(), io.StringIO(), 0

    def stop(state: TrainState, *arguments: Any) -> None:
        config, recorder = arguments[3:5]
        assert isinstance(recorder, RunRecorder)
        counters = {key: value for key, value in state.counters().items() if key != "seconds"}
        rows = [asdict(row) for row in recorder.run.metrics_rows()]
        values.append((tensors_sha256(state.state_dict()), counters, config, rows, recorder.run.info.lineage))
        raise FirstStep

    def reference(*arguments: Any) -> ReferenceRun:
        found = load_reference(*arguments)
        values.append(found)
        return found

    torch.manual_seed(0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(environment(root))
        stack.enter_context(mock.patch.object(train, "fit", stop))
        stack.enter_context(mock.patch("captcha_exp.cli.reproduce.load_reference", reference))
        stack.enter_context(mock.patch.object(sys, "argv", ["captcha-exp", *words]))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            cli.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        except FirstStep:
            code = -1
        except BaseException:
            traceback.print_exc()
    return Read(code, out.getvalue(), err.getvalue(), tuple(map(repr, values)))


# -- many cases ----------------------------------------------------------------------------------------------


def plan_cases(reader: Reader, rng: random.Random, flips: int, cuts: int, clean: int) -> list[Case]:
    """Return random cases: half of the damages in the finished run, each of its files equally often."""
    cases = [Case(RUNS[number % 3], "clean") for number in range(clean)]
    kinds: list[Kind] = ["flip"] * flips
    kinds += ["cut"] * cuts
    for number, kind in enumerate(kinds):
        run = RUNS[0 if number % 2 else 1 + number // 2 % 2]
        files = reader.files(run)
        name = sorted(files)[number // 4 % len(files)]
        cases.append(Case(run, kind, name, rng.randrange(files[name]), rng.randrange(8)))
    return cases


_readers: dict[Path, Reader] = {}


def _check(root: Path, case: Case) -> tuple[Case, Counter[str], list[str]]:
    """Check a case in a copy of the root directory that this process has for itself."""
    torch.set_num_threads(1)
    own = root.with_name(f"{root.name}-{os.getpid()}")
    if own not in _readers:
        shutil.copytree(root, own)
        _readers[own] = Reader(own)
    return case, *_readers[own].check(case)


def check_all(
    root: Path, cases: Sequence[Case], processes: int, report: Callable[[str], None]
) -> Mapping[str, Any]:
    """Check all cases, and return the figures."""
    results: dict[str, Counter[str]] = {}
    faults: list[str] = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        for case, found, wrong in pool.imap_unordered(functools.partial(_check, root), cases):
            results.setdefault(case.kind, Counter()).update(found)
            faults += wrong
            for fault in wrong:
                report(fault)
        pool.close()  # not terminated: the commands have set their own handler of SIGTERM
        pool.join()
    kinds = Counter(case.kind for case in cases)
    return {
        "cases": dict(kinds),
        "reads": {kind: dict(each) for kind, each in results.items()},
        "faults": faults,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--clean", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "root"
        make_runs(root)
        reader = Reader(Path(shutil.copytree(root, Path(temporary) / "plan")))
        cases = plan_cases(reader, random.Random(options.seed), options.flips, options.cuts, options.clean)
        figures = check_all(root, cases, options.processes, lambda fault: print(fault, file=sys.stderr))
    seconds = round(time.perf_counter() - began)
    print(json.dumps({"benchmark": "damage", "seed": options.seed, **figures, "seconds": seconds}))
    sys.exit(bool(figures["faults"]))


if __name__ == "__main__":
    main()
