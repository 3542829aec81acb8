"""Trainings that are killed again and again, and end as if nothing had happened.

Tiny trainings are started by the real command, killed at random moments, at times with their newest
checkpoint damaged, and started by the same command again, until they finish; then all that they leave is
compared with what one leaves that nobody disturbed. Others are asked to end by SIGTERM. Linux alone. Prints
one JSON line: kills and terms by what the training was at, the faults that were found, seconds; exit code 1
if there is a fault.

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
    "name=storm",
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
"""How long a phase takes, about, where it is more than a moment"""
MOMENT = 0.01
MOST_STARTS = 60

Damage = Literal["", "cut", "flipped"]


class Training:
    """A training in a root of its own, started again and again by one command."""

    def __init__(
        self, server: ForkServer, root: Path, words: Sequence[str], store: Path | None = None
    ) -> None:
        """`store` is an empty MLflow store to begin with: to make one takes two seconds."""
        self._server, self.root = server, root
        self.words = ["train", *TINY, *words]
        root.mkdir()
        if store is not None:
            (root / "mlruns").mkdir()
            shutil.copy(store, root / "mlruns" / "mlflow.db")

    def start(self, interruption: Interruption | None = None, limit_seconds: float = 120.0) -> Ended:
        return self._server.run(self.root, self.words, interruption, limit_seconds)

    def next_start(self) -> Ended:
        """What closes the records of processes that are gone."""
        return self._server.run(self.root, ["runs", "--json"])

    def status(self) -> str | None:
        """What the run's folder says; None before there is one."""
        found = list((self.root / "outputs").glob("*/*/run.json"))
        return str(json.loads(found[0].read_text())["status"]) if found else None

    def finish(self) -> Ended:
        """To its end, undisturbed; a run that has reached it is not started anew."""
        return self.next_start() if self.status() == "FINISHED" else self.start()

    def run_snapshot(self) -> dict[str, Any]:
        return run_snapshot(self.root)


def aims(chance: random.Random, early: int, middle: int, late: int) -> list[Interruption]:
    """Where one training is to be interrupted, in the order in which it comes there."""
    found = []
    for phases, times in ((EARLY, early), (MIDDLE, middle), (LATE, late)):
        chosen = [phases[number % len(phases)] for number in range(times)]
        if phases is MIDDLE:
            chance.shuffle(chosen)
        else:
            chosen.sort(key=phases.index)
        for phase in chosen:
            if chance.random() < 0.2:
                found.append(Interruption(after_seconds=chance.uniform(0, 1.2)))
                continue
            call = chance.randint(1, 2) if phase in MIDDLE and phase != "best" else 1
            seconds = chance.uniform(0, SECONDS.get(phase, MOMENT))
            found.append(Interruption(PHASES[phase], call, after_seconds=seconds))
    return found


def damage(root: Path, chance: random.Random) -> tuple[Path, Damage]:
    """The newest checkpoint cut short, or with one bit flipped, if there are two."""
    files = sorted(
        root.glob("outputs/*/*/checkpoint/step-*.safetensors"), key=lambda path: reached(path.stem)
    )
    if len(files) < 2:
        return root, ""
    content = bytearray(files[-1].read_bytes())
    place = chance.randrange(len(content))
    if chance.random() < 0.5:
        files[-1].write_bytes(content[:place])
        return files[-1], "cut"
    content[place] ^= 1 << chance.randrange(8)
    files[-1].write_bytes(content)
    return files[-1], "flipped"


def new_store(folder: Path) -> Path:
    """An MLflow store without a run."""
    from captcha_exp.tracking.store import open_store

    open_store(f"sqlite:///{folder / 'mlflow.db'}")
    return folder / "mlflow.db"


class Storm:
    """Trainings under a storm, and what came of it."""

    def __init__(self, server: ForkServer, folder: Path, seed: int) -> None:
        self._server, self._folder, self.chance = server, folder, random.Random(seed)
        self._store = new_store(folder / "store")
        self.kills: Counter[str] = Counter()
        self.damages: Counter[str] = Counter()
        self.terms: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()  # of those that were asked to end: what their record says
        self.faults: list[str] = []
        self._undisturbed: dict[str, dict[str, Any]] = {}
        self._trainings = 0

    def undisturbed(self, name: str) -> dict[str, Any]:
        """What such a training leaves when nobody disturbs it."""
        if name not in self._undisturbed:
            training = Training(
                self._server, self._folder / f"undisturbed-{name}", TRAININGS[name], self._store
            )
            ended = training.start()
            if ended.code:
                raise RuntimeError(f"{name}, undisturbed: exit code {ended.code}\n{ended.output}")
            self._undisturbed[name] = training.run_snapshot()
        return self._undisturbed[name]

    def _begin(self, name: str) -> tuple[Training, dict[str, Any]]:
        undisturbed = self.undisturbed(name)
        self._trainings += 1
        # Each fourth makes its store, and is killed at that as well.
        store = None if self._trainings % 4 == 0 else self._store
        root = self._folder / f"{self._trainings:03}-{name}"
        return Training(self._server, root, TRAININGS[name], store), undisturbed

    def kill(self, name: str, early: int = 4, middle: int = 9, late: int = 3) -> None:
        """One training, killed so often."""
        training, undisturbed = self._begin(name)
        damaged, what = training.root, ""
        for aim in aims(self.chance, early, middle, late):
            ended = training.start(aim)
            self._told(training, damaged, what, ended)
            what = ""
            if ended.signalled:
                self.kills[ended.phase] += 1
            elif ended.code:
                self._fault(training, f"ended by itself with exit code {ended.code}", ended)
            if training.status() == "FINISHED":
                break
            if ended.signalled and self.chance.random() < 0.15:
                damaged, what = damage(training.root, self.chance)
                self.damages[what] += bool(what)
        self._end(training, undisturbed, damaged, what)

    def term(self, name: str, number: int = signal.SIGTERM) -> None:
        """One training that is asked to end at a random moment, and gone on with."""
        training, undisturbed = self._begin(name)
        phase = self.chance.choice([*PHASES, "any"])
        place = PHASES.get(phase)
        seconds = self.chance.uniform(0, SECONDS.get(phase, MOMENT) if place else 3)
        aim = Interruption(place, after_seconds=seconds, signals=(number,))
        ended = training.start(aim, limit_seconds=10)
        self.terms[ended.phase] += ended.signalled
        if ended.late:
            self._fault(training, "did not end within 10 s", ended)
        if ended.signalled and training.status() != "FINISHED" and ended.code != 128 + number:
            self._fault(training, f"exit code {ended.code} after signal {number}", ended)
        if training.status() == "RUNNING":
            self._fault(training, "its record says RUNNING", ended)
        lost = ended.steps_done - max((reached(p.stem) for p in training.root.rglob("step-*")), default=0)
        if lost > 1:
            self._fault(training, f"{lost} steps were lost", ended)
        self.ends[training.status() or "no record"] += 1
        again = training.next_start()
        if "RUNNING" in again.output:
            self._fault(training, "RUNNING at the next start", again)
        self._end(training, undisturbed, training.root, "")

    def _told(self, training: Training, damaged: Path, what: str, ended: Ended) -> None:
        """Whether a damaged checkpoint was reported, by a start that came to read it."""
        if what and damaged.name not in ended.output and ended.steps_here:
            self._fault(training, f"{damaged.name} was {what}, and nobody said so", ended)

    def _end(self, training: Training, undisturbed: Mapping[str, Any], damaged: Path, what: str) -> None:
        for _ in range(MOST_STARTS):
            ended = training.finish()
            self._told(training, damaged, what, ended)
            if not ended.code:
                break
            self._fault(training, f"exit code {ended.code}, with nobody disturbing it", ended)
        found = differences(undisturbed, training.run_snapshot())
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
    parser.add_argument("--folder", type=Path, help="a new folder that stays, to look into")
    asked = parser.parse_args()
    began, names = time.perf_counter(), list(TRAININGS)
    with tempfile.TemporaryDirectory() as temporary, ForkServer() as server:
        folder = asked.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        storm = Storm(server, folder, asked.seed)
        number = 0
        while storm.kills.total() < asked.kills:
            storm.kill(names[number % len(names)])
            number += 1
        while storm.terms.total() < asked.terms:
            storm.term(names[number % len(names)])
            number += 1
    figures = storm.figures() | {"seconds": round(time.perf_counter() - began)}
    print(json.dumps({"benchmark": "kill_resume", "seed": asked.seed, **figures}))
    sys.exit(bool(storm.faults))


if __name__ == "__main__":
    main()
