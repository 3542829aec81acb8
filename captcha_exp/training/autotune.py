"""Choosing the precision and the batch size by trials on the device.

Data sheets are no proof: on some GPUs 16-bit convolutions return NaN, or are emulated and slow. Therefore
each precision runs the training step of this project, from the same weights on the same images, and is chosen
only if its results are finite, its gradient agrees with that of fp32, and it is faster.

The batch size at which the device is fully used depends on the device as well. Batch sizes that fit are tried
from small to large until the throughput stops improving.

A trial that other processes disturb is repeated a few times. A precision whose speed stays disturbed is not
chosen; of the batch sizes, those with an undisturbed speed are compared if there are any.
"""

import functools
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from captcha_exp.config import Config, Precision
from captcha_exp.data import dataset
from captcha_exp.data.dataset import Batch
from captcha_exp.errors import UserError
from captcha_exp.memory.plan import Plan, Planner, with_batch_size
from captcha_exp.model.state import TrainState
from captcha_exp.model.step import Step, forward_and_backward, init_train_state, train_step
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.cpu_time import measure_undisturbed

logger = logging.getLogger(__name__)

MIN_COSINE = 0.9  # between the gradients of fp32 and of the precision; 0 for unrelated ones
MIN_SPEEDUP = 1.1  # over fp32: less does not justify the rounding
MAX_TRIAL_IMAGES = {"cpu": 32, "cuda": 256, "mps": 64}  # per step: enough to use the device fully
TIMED_STEPS = 5

INITIAL_BATCH_SIZE = 8  # doubled after each trial
TARGET_FRACTION = 0.95  # of the best throughput: the smallest batch size that reaches it is chosen
MIN_IMPROVEMENT = 1.02  # over the best so far: two batch sizes in a row below it end the search
MIN_TIMED_SECONDS = 1.0  # of steps per batch size, not counting the first
MAX_SECONDS = 60.0  # of the whole search
FREE_FRACTION = 0.8  # of the free memory without a GPU, as a step needs more than its tensors

Trials: TypeAlias = list[dict[str, object]]


def autotune(config: Config, split_sizes: Mapping[str, int]) -> tuple[Config, dict[str, Trials]]:
    """Replace device.precision=auto and train.batch_size=auto of a resolved config by the fastest values.

    Returns the trials for environment.json as well; empty for a value that was not `auto`.

    Raises:
        UserError: train.batch_size=auto, and not even the smallest batch fits; the line says what it needs.
    """
    trials: dict[str, Trials] = {"precisions_tried": [], "batch_sizes_tried": []}
    if config.device.precision == "auto":
        precision, trials["precisions_tried"] = choose_precision(config)
        config = replace(config, device=replace(config.device, precision=precision))
    if config.train.batch_size == "auto":
        batch_size, trials["batch_sizes_tried"] = choose_batch_size(config, split_sizes)
        config = with_batch_size(config, batch_size)
    return config, trials


@dataclass(frozen=True)
class PrecisionTrial:
    """The result of one precision."""

    precision: Precision
    finite: bool
    cosine: float  # between its gradient and that of fp32
    step_seconds: float  # median
    disturbed: bool = False  # whether other processes took cores meanwhile

    def describe(self, baseline: "PrecisionTrial") -> str:
        """Return the result in a few words, relative to fp32."""
        if not self.finite:
            return f"{self.precision} is not finite on this device"
        speedup = f"{baseline.step_seconds / self.step_seconds:.2f}x the speed of fp32"
        text = (
            f"{self.precision} {speedup}, gradient {'close' if self.is_close else 'off'} ({self.cosine:.3f})"
        )
        if self.is_close and (self.disturbed or baseline.disturbed):
            text += f", not chosen as other processes disturbed it; device.precision={self.precision} sets it"
        return text

    @property
    def is_close(self) -> bool:
        """Whether its gradient agrees with that of fp32."""
        return self.cosine >= MIN_COSINE


def choose_precision(config: Config) -> tuple[Precision, Trials]:
    """Return the fastest precision with correct results on the device, and all trials."""
    device = devices.setup_device(config)
    num_images, batch_size = MAX_TRIAL_IMAGES[device.type], config.train.batch_size
    if batch_size != "auto":
        num_images = min(batch_size, num_images)
    batch = dataset.random_batch(config, num_images, device)
    baseline, gradient = _try_precision("fp32", config, batch, None)
    trials = [baseline]
    for precision in devices.half_precisions(device):
        trials.append(_try_precision(precision, config, batch, gradient)[0])
        logger.debug(f"tried {trials[-1]}")
    if device.type == "cuda":
        torch.cuda.empty_cache()  # keep the trials out of the peaks of the training
    undisturbed = [] if baseline.disturbed else [t for t in trials if not t.disturbed]
    good = [
        t
        for t in undisturbed
        if t.finite and t.is_close and t.step_seconds * MIN_SPEEDUP <= baseline.step_seconds
    ]
    best = min(good, key=lambda t: t.step_seconds, default=baseline).precision
    results = "; ".join(t.describe(baseline) for t in trials[1:]) or "no other precision on this device"
    logger.info(f"precision {best}: {results}")
    return best, [asdict(t) for t in trials]


@dataclass(frozen=True)
class BatchSizeTrial:
    """The result of one batch size."""

    batch_size: int
    predicted_mib: float  # of the process on a GPU; of the tensors of a step elsewhere
    fits: bool
    images_per_second: float | None  # None: not tried, or out of memory
    disturbed: bool = False  # as in PrecisionTrial


def choose_batch_size(config: Config, split_sizes: Mapping[str, int]) -> tuple[int, Trials]:
    """Return the smallest batch size that fits and is close to the best throughput, and all trials.

    Raises:
        UserError: not even the smallest batch fits; the line says what it needs.
    """
    device = devices.setup_device(config)
    devices.set_memory_limit(config, device)
    planner = Planner(config, split_sizes, devices.gpu_total_mib(config))
    trials: list[BatchSizeTrial] = []
    start_time = time.perf_counter()
    size = min(INITIAL_BATCH_SIZE, split_sizes["train"])
    while (
        size <= split_sizes["train"]
        and time.perf_counter() - start_time < MAX_SECONDS
        and not _has_plateaued(trials)
    ):
        plan = planner.plan_for(size)
        predicted_mib, fits = _check_fit(plan, device)
        speed, disturbed = None, False
        if fits:
            measure = functools.partial(_measure_images_per_second, with_batch_size(config, size), device)
            speed, disturbed = measure_undisturbed(measure, device)
        trials.append(BatchSizeTrial(size, predicted_mib, fits, speed, disturbed))
        logger.debug(f"tried {trials[-1]}")
        if speed is None:
            break
        size *= 2
    if device.type == "cuda":
        torch.cuda.empty_cache()  # as above
    speeds = {t.batch_size: t.images_per_second for t in trials if t.images_per_second is not None}
    disturbed_sizes = [t.batch_size for t in trials if t.disturbed]
    if not speeds:
        raise UserError(
            f"train.batch_size=auto: not even {trials[0].batch_size} images fit (predicted "
            f"{trials[0].predicted_mib:,.0f} MiB); captcha-exp plan --advise lists what needs less"
        )
    believed = {size: speed for size, speed in speeds.items() if size not in disturbed_sizes} or speeds
    max_speed = max(believed.values())
    chosen = min(size for size, speed in believed.items() if speed >= TARGET_FRACTION * max_speed)
    results = ", ".join(f"{size:,}: {speed:,.0f}" for size, speed in speeds.items())
    limit = "" if trials[-1].images_per_second else f"; {trials[-1].batch_size:,} does not fit"
    logger.info(f"batch size {chosen}: images/s by batch size {results}{limit}")
    if disturbed_sizes:
        logger.warning(
            f"train.batch_size=auto: other processes disturbed the speed of batch sizes "
            f"{', '.join(map(str, disturbed_sizes))}; {chosen} may be wrong: set train.batch_size, or start "
            "again when the cores are idle"
        )
    return chosen, [asdict(t) for t in trials]


def _has_plateaued(trials: Sequence[BatchSizeTrial]) -> bool:
    """Return whether neither of the last two batch sizes improved on the best before them."""
    speeds = [t.images_per_second or 0.0 for t in trials]
    return len(speeds) > 2 and max(speeds[-2:]) < MIN_IMPROVEMENT * max(speeds[:-2])


def _check_fit(plan: Plan, device: torch.device) -> tuple[float, bool]:
    """Return the predicted MiB of a batch size and whether it fits."""
    if device.type == "cuda":
        return plan.process_mib.max, plan.fits == "fits"
    needed_mib = max(plan.training.allocated_mib.min, plan.evaluation.allocated_mib.min)
    has_room = needed_mib * devices.MIB < FREE_FRACTION * devices.free_memory_bytes()
    return needed_mib, has_room and plan.fits in ("fits", None)  # a budget applies to the prediction


def _measure_images_per_second(config: Config, device: torch.device) -> float | None:
    """Measure the throughput of training steps with the config's batch size; None if out of memory."""
    size = int(config.train.batch_size)
    try:
        batch = dataset.random_batch(config, size, device)
        state = init_train_state(config, device)
        seconds: list[float] = []
        while len(seconds) < 2 or (len(seconds) <= TIMED_STEPS and sum(seconds[1:]) < MIN_TIMED_SECONDS):
            seconds.append(_time_step(state, batch, config)[1])  # the first step loads kernels
    except torch.OutOfMemoryError:
        return None
    return size / statistics.median(seconds[1:])


def _time_step(state: TrainState, batch: Batch, config: Config) -> tuple[Step, float]:
    """Run a training step and return its seconds as well, including its work on the device."""
    device = batch.images.device
    _synchronize(device)
    start_time = time.perf_counter()
    step = train_step(state, batch, config)
    _synchronize(device)
    return step, time.perf_counter() - start_time


def _try_precision(
    precision: Precision, config: Config, batch: Batch, reference: Tensor | None
) -> tuple[PrecisionTrial, Tensor]:
    """Return the trial of a precision, and its gradient (P,) at the initial weights."""
    config = replace(config, device=replace(config.device, precision=precision))
    state = init_train_state(config, batch.images.device)
    forward_and_backward(state, batch, config)
    parts = [p.grad.flatten() for p in state.model.parameters() if p.grad is not None]
    gradient = torch.cat(parts).cpu().double()  # the loss scale does not change its direction
    state.optimizer.zero_grad(set_to_none=True)

    def time_steps() -> list[tuple[Step, float]]:
        return [_time_step(state, batch, config) for _ in range(1 + TIMED_STEPS)]

    timed, disturbed = measure_undisturbed(time_steps, batch.images.device)
    steps, seconds = zip(*timed, strict=True)
    cosine = 1.0 if reference is None else float(torch.cosine_similarity(gradient, reference, dim=0))
    finite = bool(steps[-1].finite)  # after the loss scale had time to adapt
    median = statistics.median(seconds[1:])  # the first step loads kernels
    return PrecisionTrial(precision, finite, cosine, median, disturbed), gradient


def _synchronize(device: torch.device) -> None:
    """Wait for the device to finish its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
