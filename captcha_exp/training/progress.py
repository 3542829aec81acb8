"""The lines about a training: the planned memory, and an epoch's running sums, progress bar and status."""

import logging
import statistics
import time
from collections.abc import Mapping

from captcha_exp.config import Config
from captcha_exp.memory.plan import Plan
from captcha_exp.model.state import EpochProgress, TrainState
from captcha_exp.model.step import Step
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.console import ProgressBar
from captcha_exp.runtime.cpu_time import CpuClock, CpuTimes, cores_metrics

logger = logging.getLogger(__name__)

MIN_CHUNK_FRACTION = 0.02  # of the seconds of the epoch so far, which limits the number of chunks


class EpochMeter:
    """Accumulates the metrics of an epoch on the device; updates the progress bar twice a second.

    The speed is the median over chunks of the epoch, which a short interruption does not change.
    """

    def __init__(self, progress: EpochProgress, bar: ProgressBar, title: str) -> None:
        self.progress, self.bar, self.title = progress, bar, title
        self.num_shown = self.num_in_chunks = progress.num_images
        self.clock = CpuClock()
        self.last_time = self.last_shown = self.chunk_start = time.perf_counter()

    def update(self, step: Step, num_images: int) -> bool:
        """Add a step; return whether the progress bar was updated, which waits for the device."""
        progress = self.progress
        progress.loss += step.loss * num_images
        progress.num_correct += step.num_correct
        progress.num_images += num_images
        progress.num_batches += 1
        self._update_seconds()
        if self.last_time - self.last_shown < 0.5:
            return False
        self._update_bar()
        self.last_shown = time.perf_counter()
        if self.last_shown - self.chunk_start >= MIN_CHUNK_FRACTION * progress.seconds:
            self._end_chunk()
        return True

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the epoch so far."""
        progress = self.progress
        # Before the clock is read: this waits for the device.
        loss, num_correct = float(progress.loss), int(progress.num_correct)
        self._update_bar()
        self._update_seconds()
        if progress.num_images > self.num_in_chunks:
            self._end_chunk(is_remainder=True)
        speed = progress.num_images / progress.seconds
        cores: dict[str, float] = {}
        if progress.chunks:  # none if a short epoch was interrupted after its last step
            chunks = [(num_images, CpuTimes(*times)) for num_images, *times in progress.chunks]
            speed = statistics.median(num_images / times.wall for num_images, times in chunks)
            cores = cores_metrics([times for _, times in chunks], progress.loss.device)
        return {
            "train/loss": loss / progress.num_images,
            "train/accuracy": num_correct / progress.num_images,
            "speed/images_per_second": speed,
            **cores,
        }

    def _end_chunk(self, is_remainder: bool = False) -> None:
        """Add the images since the previous chunk as one more; at the end of the epoch, to that chunk."""
        num_images, times = self.progress.num_images - self.num_in_chunks, self.clock.lap()
        if is_remainder and self.progress.chunks:
            num_previous, *previous = self.progress.chunks.pop()
            num_images, times = num_images + num_previous, CpuTimes(*previous) + times
        self.progress.chunks.append([num_images, *times])
        self.num_in_chunks, self.chunk_start = self.progress.num_images, time.perf_counter()

    def _update_seconds(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self.last_time
        self.last_time = now

    def _update_bar(self) -> None:
        progress = self.progress
        loss, accuracy = (float(x) / progress.num_images for x in (progress.loss, progress.num_correct))
        peak = devices.process_peak_mib(progress.loss.device)
        speed = progress.num_images / progress.seconds
        status = f"{self.title}  loss {loss:.4f}  accuracy {accuracy:.1%}  {speed:,.0f} images/s"
        self.bar.advance(progress.num_images - self.num_shown, f"{status}  peak {peak:,.0f} MiB")
        self.num_shown = progress.num_images


def num_images_seen(state: TrainState, num_images: int) -> int:
    """Return the number of images trained on so far in all epochs of `num_images` each."""
    if state.progress is None:
        return state.epoch * num_images
    return (state.epoch - 1) * num_images + state.progress.num_images


def format_epoch(state: TrainState, metrics: Mapping[str, float], config: Config, is_best: bool) -> str:
    """Return the status line of a finished epoch."""
    width = len(str(config.train.epochs))
    return (
        f"epoch {state.epoch:{width}}/{config.train.epochs}  "
        f"train loss {metrics['train/loss']:.4f} accuracy {metrics['train/accuracy']:7.2%}  "
        f"val loss {metrics['val/loss']:.4f} accuracy {metrics['val/accuracy']:7.2%}  "
        f"{metrics['speed/images_per_second']:,.0f} images/s"
        f"{' (disturbed)' if metrics.get('speed/disturbed') else ''}  "
        f"peak {metrics['memory/process_peak_mib']:,.0f} MiB{'  best' if is_best else ''}"
    )


def log_plan(plan: Plan, config: Config) -> None:
    """Log the predicted memory, as a warning if it does not fit."""
    prediction = f"GPU memory: batch size {plan.batch_size}: {plan.describe(config.gpu.name)}"
    if plan.fits == "does not fit":
        logger.warning(f"{prediction}; captcha-exp plan --advise lists what fits")
    else:
        logger.info(prediction)
    if micro := config.train.micro_batch_size:
        logger.info(f"train.micro_batch_size={micro}: batch norm statistics are those of a micro-batch")
