"""Run two trainings at once in turns of a second, and count the seconds of each.

A shared machine changes its speed by 8 % from minute to minute: trainings one after the other cannot show a
difference of 3 %. In turns, both see the same machine. While one runs, the other is stopped (SIGSTOP) with
all its threads.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

TURN_SECONDS = 1.0
POLL_SECONDS = 0.05
NUM_FIRST = 3  # epochs in which MLflow is imported and the store opened


class SlicedTraining:
    """A training that runs only during its turns."""

    def __init__(self, root: Path, words: Sequence[str], epochs: int) -> None:
        """Prepare the command `train` with a root directory of its own, in which it makes one run."""
        self.root, self._epochs = root, epochs
        self._command = [sys.executable, "-P", "-m", "captcha_exp", "train", *words]
        self._process: subprocess.Popen[bytes] | None = None
        self._claimed: float | None = None  # active seconds when the run directory existed
        self._epoch_ends: list[float] = []  # ... when each epoch was recorded
        self.active_seconds = 0.0

    @property
    def training_seconds(self) -> float:
        """Active seconds from the run directory to the metrics of the last epoch."""
        if self._claimed is None or len(self._epoch_ends) < self._epochs:
            return float("nan")
        return self._epoch_ends[self._epochs - 1] - self._claimed

    @property
    def later_seconds(self) -> float:
        """Active seconds of the epochs after the first NUM_FIRST."""
        if len(self._epoch_ends) < self._epochs:
            return float("nan")
        return self._epoch_ends[self._epochs - 1] - self._epoch_ends[NUM_FIRST - 1]

    @property
    def returncode(self) -> int | None:
        return None if self._process is None else self._process.poll()

    @property
    def stdout(self) -> str:
        return (self.root / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.root / "stderr").read_text()

    def run(self, seconds: float) -> None:
        """Run for so many seconds or to the end, then stop."""
        start = time.perf_counter()
        if self._process is None:
            with (self.root / "stdout").open("wb") as out, (self.root / "stderr").open("wb") as err:
                environment = os.environ | {"CAPTCHA_EXP_ROOT": str(self.root)}
                self._process = subprocess.Popen(
                    self._command, env=environment, stdout=out, stderr=err, start_new_session=True
                )
        else:
            os.killpg(self._process.pid, signal.SIGCONT)
        while (passed := time.perf_counter() - start) < seconds and self._process.poll() is None:
            self._look(self.active_seconds + passed)
            time.sleep(POLL_SECONDS)
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGSTOP)
        self.active_seconds += time.perf_counter() - start
        self._look(self.active_seconds)

    def _look(self, now: float) -> None:
        """Note the time of what has happened since the last look."""
        if self._claimed is None and any(self.root.glob("outputs/*/*/run.json")):
            self._claimed = now
        if self._claimed is not None and len(self._epoch_ends) < self._epochs:
            self._epoch_ends += [now] * (self.num_epochs() - len(self._epoch_ends))

    def num_epochs(self) -> int:
        """Return the number of epochs that are recorded."""
        files = self.root.glob("outputs/*/*/metrics.jsonl")
        return sum(path.read_bytes().count(b'"speed/epoch_seconds"') for path in files)

    def kill(self) -> None:
        """Kill it, if it still runs."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def run_in_turns(trainings: Iterable[SlicedTraining], between_turns: Callable[[], None]) -> None:
    """Run trainings to their ends, one at a time in turns of equal length.

    `between_turns` is called while none runs.
    """
    trainings = list(trainings)
    try:
        while waiting := [each for each in trainings if each.returncode is None]:
            for each in waiting:
                each.run(TURN_SECONDS)
                between_turns()
    finally:
        for each in trainings:
            each.kill()
