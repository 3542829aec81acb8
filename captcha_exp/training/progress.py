"""What a person sees of an epoch while it runs, and the sums behind it."""

import time
from collections.abc import Mapping

from captcha_exp.config import Config
from captcha_exp.model.state import Progress, TrainState
from captcha_exp.model.step import Step
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.console import Bar


class Sums:
    """Adds up an epoch on the device; read when a person may look, twice a second."""

    def __init__(self, progress: Progress, bar: Bar, title: str) -> None:
        self.progress, self.bar, self.title = progress, bar, title
        self.shown = progress.seen
        self.last = self.looked = time.perf_counter()

    def add(self, step: Step, pictures: int) -> bool:
        """Whether this was a moment to look."""
        progress = self.progress
        progress.loss += step.loss * pictures
        progress.right += step.right
        progress.seen += pictures
        progress.batches += 1
        self._read_clock()
        if self.last - self.looked < 0.5:
            return False
        self._show()
        self.looked = time.perf_counter()
        return True

    def metrics(self) -> dict[str, float]:
        progress = self.progress
        # Before the clock is read, since this waits for the device.
        loss, right = float(progress.loss), int(progress.right)
        self._show()
        self._read_clock()
        return {
            "train/loss": loss / progress.seen,
            "train/accuracy": right / progress.seen,
            "speed/images_per_second": progress.seen / progress.seconds,
        }

    def _read_clock(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self.last
        self.last = now

    def _show(self) -> None:
        done = self.progress
        loss, share = float(done.loss) / done.seen, int(done.right) / done.seen
        peak = devices.process_peak_mib(done.loss.device)
        speed = done.seen / done.seconds
        note = f"{self.title}  loss {loss:.4f}  accuracy {share:.1%}  {speed:,.0f} pictures/s"
        self.bar.advance(done.seen - self.shown, f"{note}  peak {peak:,.0f} MiB")
        self.shown = done.seen


def pictures_seen(state: TrainState, pictures: int) -> int:
    """By a training that goes on, in all epochs; each has so many."""
    if state.progress is None:
        return state.epoch * pictures
    return (state.epoch - 1) * pictures + state.progress.seen


def epoch_line(state: TrainState, metrics: Mapping[str, float], config: Config, better: bool) -> str:
    width = len(str(config.train.epochs))
    return (
        f"epoch {state.epoch:{width}}/{config.train.epochs}  "
        f"train loss {metrics['train/loss']:.4f} accuracy {metrics['train/accuracy']:7.2%}  "
        f"val loss {metrics['val/loss']:.4f} accuracy {metrics['val/accuracy']:7.2%}  "
        f"{metrics['speed/images_per_second']:,.0f} pictures/s  "
        f"peak {metrics['memory/process_peak_mib']:,.0f} MiB{'  best' if better else ''}"
    )
