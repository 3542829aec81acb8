"""Kill trainings at random moments, resume them, and check that the results are unaffected.

Tiny trainings run through the real command, are killed at random moments, sometimes with a damaged latest
checkpoint, and resumed by the same command until they finish; then all their files are compared with those
of an uninterrupted run. Others are stopped by SIGTERM. Linux only. Prints one JSON line: kills and SIGTERMs
by phase of the training, faults, seconds; exit code 1 if there is a fault.

    python benchmarks/kill_resume.py [--kills 200] [--terms 20] [--seed 0]
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from run_snapshot import differences, reached, run_snapshot
from support.fork_server import PHASES, Ended, ForkServer, Interruption

TINY = (
    "name=kill_resume",
    "data.count=300",
    "data.workers=1",
    "data.validation_fraction=0.25",
    "data.test_fraction=0.25",
    "captcha.alphabet='01234'",
    "captcha.length=2",
    "captcha.width=32",
    "captcha.height=16",
    "model.channels=[4,8,8]",
    "train.batch_size=16",
    "train.eval_batch_size=16",
    "train.epochs=4",
    "train.checkpoint_every='3 steps'",
    "device.name=cpu",
    "device.threads=1",
    "device.precision=fp32",
)
TRAININGS: Mapping[str, tuple[str, ...]] = {
    "onecycle": ("augment=mild",),
    "constant": ("train.schedule=constant", "train.optimizer=sgd", "train.checkpoint_every='1 epoch'"),
    "bf16": ("device.precision=bf16", "augment=mild"),
    "patience": ("train.patience=1", "train.epochs=40", "train.checkpoint_every='10 steps'"),
}
EARLY = ("beginning", "store", "drawing", "caching")
MIDDLE = ("training", "checkpointing", "evaluation", "logging", "best")
LATE = ("report", "closing", "sending")
SECONDS = {"beginning": 0.02, "store": 0.2, "drawing": 0.6, "training": 0.05, "report": 1.5, "sending": 0.1}
"""Approximate duration of the phases that take longer than MOMENT"""
MOMENT = 0.01
MAX_STARTS = 60

Damage = Literal["", "cut", "flipped"]


class Training:
    """A training in its own root, started repeatedly by the same command."""

    def __init__(
        self, server: ForkServer, root: Path, overrides: Sequence[str], store: Path | None = None
    ) -> None:
        """`store` is an empty MLflow store to copy, since creating one takes two seconds."""
        self._server, self.root = server, root
        self.words = ["train", *TINY, *overrides]
        root.mkdir()
        if store is not None:
            (root / "mlruns").mkdir()
            shutil.copy(store, root / "mlruns" / "mlflow.db")

    def start(self, interruption: Interruption | None = None, limit_seconds: float = 120.0) -> Ended:
        return self._server.run(self.root, self.words, interruption, limit_seconds)

    def next_start(self) -> Ended:
        """Run a command that closes stale runs, in MLflow too."""
        return self._server.run(self.root, ["sync", "--json"])

    def status(self) -> str | None:
        """Return the status in run.json; None before it exists."""
        found = list((self.root / "outputs").glob("*/*/run.json"))
        return str(json.loads(found[0].read_text())["status"]) if found else None

    def finish(self) -> Ended:
        """Resume without interruption until the end; a finished run is not started again."""
        return self.next_start() if self.status() == "FINISHED" else self.start()

    def run_snapshot(self) -> dict[str, Any]:
        return run_snapshot(self.root)


def plan_interruptions(rng: random.Random, early: int, middle: int, late: int) -> list[Interruption]:
    """Return random interruptions of one training, in the order of its phases."""
    found = []
    for phases, times in ((EARLY, early), (MIDDLE, middle), (LATE, late)):
        chosen = [phases[number % len(phases)] for number in range(times)]
        if phases is MIDDLE:
            rng.shuffle(chosen)
        else:
            chosen.sort(key=phases.index)
        for phase in chosen:
            if rng.random() < 0.2:
                found.append(Interruption(after_seconds=rng.uniform(0, 1.2)))
                continue
            call = rng.randint(1, 2) if phase in MIDDLE and phase != "best" else 1
            seconds = rng.uniform(0, SECONDS.get(phase, MOMENT))
            found.append(Interruption(PHASES[phase], call, after_seconds=seconds))
    return found


def damage(root: Path, rng: random.Random) -> tuple[Path, Damage]:
    """Truncate the latest of several checkpoints or flip one of its bits; return it and the damage."""
    files = sorted(
        root.glob("outputs/*/*/checkpoint/step-*.safetensors"), key=lambda path: reached(path.stem)
    )
    if len(files) < 2:
        return root, ""
    content = bytearray(files[-1].read_bytes())
    offset = rng.randrange(len(content))
    if rng.random() < 0.5:
        files[-1].write_bytes(content[:offset])
        return files[-1], "cut"
    content[offset] ^= 1 << rng.randrange(8)
    files[-1].write_bytes(content)
    return files[-1], "flipped"


def new_store(folder: Path) -> Path:
    """Create an MLflow store without runs."""
    from captcha_exp.tracking.store import open_store

    open_store(f"sqlite:///{folder / 'mlflow.db'}")
    return folder / "mlflow.db"


class Storm:
    """A series of trainings that are interrupted at random, and their results."""

    def __init__(self, server: ForkServer, folder: Path, seed: int) -> None:
        self._server, self._folder, self.rng = server, folder, random.Random(seed)
        self._store = new_store(folder / "store")
        self.kills: Counter[str] = Counter()
        self.damages: Counter[str] = Counter()
        self.terms: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()  # status of the runs after SIGTERM
        self.faults: list[str] = []
        self._uninterrupted: dict[str, dict[str, Any]] = {}
        self._trainings = 0

    def uninterrupted(self, name: str) -> dict[str, Any]:
        """Return the snapshot of an uninterrupted training."""
        if name not in self._uninterrupted:
            training = Training(
                self._server, self._folder / f"uninterrupted-{name}", TRAININGS[name], self._store
            )
            ended = training.start()
            if ended.code:
                raise RuntimeError(f"{name}, uninterrupted: exit code {ended.code}\n{ended.output}")
            self._uninterrupted[name] = training.run_snapshot()
        return self._uninterrupted[name]

    def _begin(self, name: str) -> tuple[Training, dict[str, Any]]:
        uninterrupted = self.uninterrupted(name)
        self._trainings += 1
        # Every fourth creates its own store, and may be killed while doing so.
        store = None if self._trainings % 4 == 0 else self._store
        root = self._folder / f"{self._trainings:03}-{name}"
        return Training(self._server, root, TRAININGS[name], store), uninterrupted

    def kill(self, name: str, early: int = 4, middle: int = 9, late: int = 3) -> None:
        """Kill one training several times in each phase and check its result."""
        training, uninterrupted = self._begin(name)
        damaged, damage_kind = training.root, ""
        for interruption in plan_interruptions(self.rng, early, middle, late):
            ended = training.start(interruption)
            self._check_reported(training, damaged, damage_kind, ended)
            damage_kind = ""
            if ended.signalled:
                self.kills[ended.phase] += 1
            elif ended.code:
                self._fault(training, f"ended by itself with exit code {ended.code}", ended)
            if training.status() == "FINISHED":
                break
            if ended.signalled and self.rng.random() < 0.15:
                damaged, damage_kind = damage(training.root, self.rng)
                self.damages[damage_kind] += bool(damage_kind)
        self._end(training, uninterrupted, damaged, damage_kind)

    def term(self, name: str, number: int = signal.SIGTERM) -> None:
        """Stop one training by a signal at a random moment, resume it and check its result."""
        training, uninterrupted = self._begin(name)
        phase = self.rng.choice([*PHASES, "any"])
        function = PHASES.get(phase)
        seconds = self.rng.uniform(0, SECONDS.get(phase, MOMENT) if function else 3)
        interruption = Interruption(function, after_seconds=seconds, signals=(number,))
        ended = training.start(interruption, limit_seconds=10)
        self.terms[ended.phase] += ended.signalled
        if ended.late:
            self._fault(training, "did not end within 10 s", ended)
        if ended.signalled and training.status() != "FINISHED" and ended.code != 128 + number:
            self._fault(training, f"exit code {ended.code} after signal {number}", ended)
        if training.status() == "RUNNING":
            self._fault(training, "its status is RUNNING", ended)
        lost = ended.steps_done - max((reached(p.stem) for p in training.root.rglob("step-*")), default=0)
        if lost > 1:
            self._fault(training, f"{lost} steps were lost", ended)
        self.ends[training.status() or "no record"] += 1
        again = training.next_start()
        if "RUNNING" in again.output:
            self._fault(training, "still RUNNING after stale runs were closed", again)
        self._end(training, uninterrupted, training.root, "")

    def _check_reported(self, training: Training, damaged: Path, damage_kind: str, ended: Ended) -> None:
        """Record a fault unless a damaged checkpoint was reported by the start that loaded it."""
        if damage_kind and damaged.name not in ended.output and ended.steps_here:
            self._fault(training, f"{damaged.name} was {damage_kind}, which was not reported", ended)

    def _end(
        self, training: Training, uninterrupted: Mapping[str, Any], damaged: Path, damage_kind: str
    ) -> None:
        for _ in range(MAX_STARTS):
            ended = training.finish()
            self._check_reported(training, damaged, damage_kind, ended)
            if not ended.code:
                break
            self._fault(training, f"exit code {ended.code} without an interruption", ended)
        found = differences(uninterrupted, training.run_snapshot())
        self.faults += [f"{training.root.name}: {difference}" for difference in found]
        for difference in found:
            print(f"{training.root}: {difference}", file=sys.stderr)

    def _fault(self, training: Training, fault: str, ended: Ended) -> None:
        self.faults.append(f"{training.root.name}: in {ended.phase}: {fault}")
        print(f"{training.root}: in {ended.phase}: {fault}\n{ended.output[-2000:]}", file=sys.stderr)

    def figures(self) -> dict[str, Any]:
        return {
            "trainings": self._trainings,
            "kills": self.kills.total(),
            "kills_in": dict(self.kills),
            "damaged": dict(+self.damages),
            "terms": self.terms.total(),
            "terms_in": dict(+self.terms),
            "terms_ended": dict(self.ends),
            "faults": self.faults,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="new folder to keep the runs in, for inspection")
    options = parser.parse_args()
    began, names = time.perf_counter(), list(TRAININGS)
    with tempfile.TemporaryDirectory() as temporary, ForkServer() as server:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        storm = Storm(server, folder, options.seed)
        number = 0
        while storm.kills.total() < options.kills:
            storm.kill(names[number % len(names)])
            number += 1
        while storm.terms.total() < options.terms:
            storm.term(names[number % len(names)])
            number += 1
    figures = storm.figures() | {"seconds": round(time.perf_counter() - began)}
    print(json.dumps({"benchmark": "kill_resume", "seed": options.seed, **figures}))
    sys.exit(bool(storm.faults))


if __name__ == "__main__":
    main()
