"""Checking the precision that device.precision=auto becomes, and choosing the batch size by trials.

The hardware decides the precision (`config.precision`). But data sheets are no proof: on some GPUs 16-bit
convolutions return NaN. Therefore the precision runs the training step of this project, from the same weights
on the same images as fp32, and is used only if its results are finite and its gradient agrees with that of
fp32. No speed is measured, so that the same command trains in the same precision on a busy machine.

The batch size at which the device is fully used depends on the device as well. Batch sizes that fit are tried
from small to large until the throughput stops improving. A trial that other processes disturb is repeated a
few times; those with an undisturbed speed are compared if there are any.
"""

import functools
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeAlias, cast

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
MAX_TRIAL_IMAGES = 32  # of the step in each precision
TRIAL_STEPS = 6  # in fp16, in which its loss scale has time to adapt
TIMED_STEPS = 5

INITIAL_BATCH_SIZE = 8  # doubled after each trial
TARGET_FRACTION = 0.95  # of the best throughput: the smallest batch size that reaches it is chosen
MIN_IMPROVEMENT = 1.02  # over the best so far: two batch sizes in a row below it end the search
MIN_TIMED_SECONDS = 1.0  # of steps per batch size, not counting the first
MAX_SECONDS = 60.0  # of the whole search
FREE_FRACTION = 0.8  # of the free memory without a GPU, as a step needs more than its tensors

Trials: TypeAlias = list[dict[str, object]]


def autotune(
    config: Config, requested: Config, split_sizes: Mapping[str, int]
) -> tuple[Config, dict[str, Trials]]:
    """Check the precision of a resolved config if it was `auto`, and replace train.batch_size=auto.

    Returns the trials for environment.json as well; empty for a value that was not `auto`.

    Raises:
        UserError: train.batch_size=auto, and not even the smallest batch fits; the line says what it needs.
    """
    trials: dict[str, Trials] = {"precisions_tried": [], "batch_sizes_tried": []}
    if requested.device.precision == "auto":
        precision, trials["precisions_tried"] = check_precision(config)
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

    @property
    def is_right(self) -> bool:
        """Whether its numbers are finite, and its gradient agrees with that of fp32."""
        return self.finite and self.cosine >= MIN_COSINE


def check_precision(config: Config) -> tuple[Precision, Trials]:
    """Return the precision of the config, or fp32 if its results on the device are wrong; and the trials."""
    precision = cast(Precision, config.device.precision)
    if precision == "fp32":
        return precision, []
    device = devices.setup_device(config)
    batch_size = config.train.batch_size
    num_images = MAX_TRIAL_IMAGES if batch_size == "auto" else min(batch_size, MAX_TRIAL_IMAGES)
    batch = dataset.random_batch(config, num_images, device)
    _, reference = _try_precision("fp32", config, batch, None)
    trial, _ = _try_precision(precision, config, batch, reference)
    logger.debug(f"tried {trial}")
    if device.type == "cuda":
        torch.cuda.empty_cache()  # keep the trials out of the peaks of the training
    if not trial.is_right:
        reason = "is not finite" if not trial.finite else f"has another gradient (cosine {trial.cosine:.3f})"
        logger.warning(f"device.precision=auto: {precision} {reason} on this device; the training is in fp32")
        precision = "fp32"
    return precision, [asdict(trial)]


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
    if reference is None:
        return PrecisionTrial(precision, True, 1.0), gradient
    state.optimizer.zero_grad(set_to_none=True)
    num_steps = 1 if state.loss_scale is None else TRIAL_STEPS
    steps = [train_step(state, batch, config) for _ in range(num_steps)]
    cosine = float(torch.cosine_similarity(gradient, reference, dim=0))
    return PrecisionTrial(precision, bool(steps[-1].finite), cosine), gradient


def _synchronize(device: torch.device) -> None:
    """Wait for the device to finish its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
