"""What only a try on the device itself can tell: which precision is right and pays, which batch size pays.

What a card's data sheet says is no proof: some cards have 16-bit numbers that come out as NaN in some
convolutions, or that are emulated and slow. So each precision does the project's own training step, from the
same weights on the same pictures, and is taken only if its numbers are finite, its gradient points where that
of fp32 does, and it is faster.

How many pictures a step wants before the device is busy depends on the device, too. Batch sizes that fit are
tried from small to large until more brings nothing more.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from captcha_exp.config import Config, Precision
from captcha_exp.data import dataset
from captcha_exp.data.dataset import Batch, DatasetSpec
from captcha_exp.errors import UserError
from captcha_exp.memory.plan import Plan, Planner, with_batch_size
from captcha_exp.model.state import TrainState
from captcha_exp.model.step import forward_and_backward, init_train_state, train_step
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.console import Display

MIN_COSINE = 0.9  # between the gradients of fp32 and of the precision; chance is 0
MIN_SPEEDUP = 1.1  # times as fast as fp32: less is not worth another rounding
MAX_TRIAL_IMAGES = {"cpu": 32, "cuda": 256, "mps": 64}  # in a step of the probe: enough to be busy
TIMED_STEPS = 5

INITIAL_BATCH_SIZE = 8  # pictures; then twice as many each time
TARGET_FRACTION = 0.95  # of the most pictures per second: the smallest batch that reaches it is taken
MIN_IMPROVEMENT = 1.02  # times the best so far: two batch sizes in a row with less end the probe
MIN_TIMED_SECONDS = 1.0  # of steps of one batch size, after the first
MAX_SECONDS = 60.0  # of the whole probe
FREE_FRACTION = (
    0.8  # of the free memory of a device that is no card, as a step's tensors are not all that it takes
)


class Autotuner:
    """The answers of this device to what a config leaves open, and what was seen on the way."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self.precision_trials: list[dict[str, object]] = []
        self.batch_size_trials: list[dict[str, object]] = []
        self.dataset_spec: DatasetSpec | None = None  # of the pictures, if it was needed

    def choose_precision(self, config: Config) -> Precision:
        """For device.precision=auto."""
        best, self.precision_trials = choose_precision(config, self.display)
        return best

    def choose_batch_size(self, config: Config) -> int:
        """For train.batch_size=auto."""
        self.dataset_spec = dataset.inspect_dataset(config, self.display)
        best, self.batch_size_trials = choose_batch_size(config, self.dataset_spec.split_sizes, self.display)
        return best


@dataclass(frozen=True)
class PrecisionTrial:
    """How one precision did."""

    precision: Precision
    finite: bool
    cosine: float  # between its gradient and that of fp32
    step_seconds: float  # median

    def describe(self, baseline: "PrecisionTrial") -> str:
        """What was seen, in a few words."""
        if not self.finite:
            return f"{self.precision} is not finite here"
        speed = f"{baseline.step_seconds / self.step_seconds:.2f} times as fast"
        return f"{self.precision} {speed}, gradient {'close' if self.is_close else 'off'} ({self.cosine:.3f})"

    @property
    def is_close(self) -> bool:
        return self.cosine >= MIN_COSINE


def choose_precision(config: Config, display: Display) -> tuple[Precision, list[dict[str, object]]]:
    """The fastest precision whose numbers are right on the config's device, and how each did."""
    device = devices.setup_device(config)
    most = MAX_TRIAL_IMAGES[device.type]
    asked = config.train.batch_size
    batch = dataset.random_batch(config, most if asked == "auto" else min(asked, most), device)
    plain, gradient = _try_precision("fp32", config, batch, None)
    tried = [plain]
    for other in devices.half_precisions(device):
        tried.append(_try_precision(other, config, batch, gradient)[0])
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the training's peaks are to be its own
    good = [
        t for t in tried if t.finite and t.is_close and t.step_seconds * MIN_SPEEDUP <= plain.step_seconds
    ]
    best = min(good, key=lambda t: t.step_seconds, default=plain).precision
    seen = "; ".join(t.describe(plain) for t in tried[1:]) or "no other precision on this device"
    display.info(f"precision {best}: {seen}")
    return best, [asdict(t) for t in tried]


@dataclass(frozen=True)
class BatchSizeTrial:
    """How one batch size did."""

    batch_size: int
    predicted_mib: float  # of the process on a card; elsewhere of the step's tensors
    fits: bool
    images_per_second: float | None  # None: it was not tried, or there was too little memory after all


def choose_batch_size(
    config: Config, split_sizes: Mapping[str, int], display: Display
) -> tuple[int, list[dict[str, object]]]:
    """The smallest batch that fits and comes near the most pictures per second, and how each did.

    Raises:
        UserError: not even the smallest fits; the line says what it needs.
    """
    device = devices.setup_device(config)
    devices.set_memory_limit(config, device)
    planner = Planner(config, split_sizes, devices.gpu_total_mib(config))
    tried: list[BatchSizeTrial] = []
    began = time.perf_counter()
    size = min(INITIAL_BATCH_SIZE, split_sizes["train"])
    while (
        size <= split_sizes["train"]
        and time.perf_counter() - began < MAX_SECONDS
        and not _has_plateaued(tried)
    ):
        plan = planner.plan_for(size)
        predicted_mib, fits = _check_fit(plan, device)
        speed = _measure_images_per_second(with_batch_size(config, size), device) if fits else None
        tried.append(BatchSizeTrial(size, predicted_mib, fits, speed))
        if speed is None:
            break
        size *= 2
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the training's peaks are to be its own
    speeds = {one.batch_size: one.images_per_second for one in tried if one.images_per_second is not None}
    if not speeds:
        raise UserError(
            f"train.batch_size=auto: not even {tried[0].batch_size} pictures fit; they need "
            f"{tried[0].predicted_mib:,.0f} MiB; captcha-exp plan --advise names what needs less"
        )
    chosen = min(size for size, speed in speeds.items() if speed >= TARGET_FRACTION * max(speeds.values()))
    seen = ", ".join(f"{size:,}: {speed:,.0f}" for size, speed in speeds.items())
    ended = "" if tried[-1].images_per_second else f"; {tried[-1].batch_size:,} does not fit"
    display.info(f"batch size {chosen}: pictures/s by batch size {seen}{ended}")
    return chosen, [asdict(one) for one in tried]


def _has_plateaued(trials: Sequence[BatchSizeTrial]) -> bool:
    """Whether the last two batch sizes brought nothing over the best before them."""
    speeds = [one.images_per_second or 0.0 for one in trials]
    return len(speeds) > 2 and max(speeds[-2:]) < MIN_IMPROVEMENT * max(speeds[:-2])


def _check_fit(plan: Plan, device: torch.device) -> tuple[float, bool]:
    """MiB that a batch size is said to need, and whether there is room for it."""
    if device.type == "cuda":
        return plan.process_mib.max, plan.fits == "fits"
    needed_mib = max(plan.training.allocated_mib.min, plan.evaluation.allocated_mib.min)
    here = needed_mib * devices.MIB < FREE_FRACTION * devices.free_memory_bytes()
    return needed_mib, here and plan.fits in ("fits", None)  # a budget holds for the prediction


def _measure_images_per_second(config: Config, device: torch.device) -> float | None:
    """In steps of the config's batch size; None where the card's memory did not do."""
    size = int(config.train.batch_size)
    try:
        batch = dataset.random_batch(config, size, device)
        state = init_train_state(config, device)
        seconds: list[float] = []
        while len(seconds) < 2 or (len(seconds) <= TIMED_STEPS and sum(seconds[1:]) < MIN_TIMED_SECONDS):
            seconds.append(_time_step(state, batch, config))  # the first one loads kernels
    except torch.OutOfMemoryError:
        return None
    return size / statistics.median(seconds[1:])


def _time_step(state: TrainState, batch: Batch, config: Config) -> float:
    """Seconds of a step on a device that has nothing else to do."""
    device = batch.images.device
    _synchronize(device)
    began = time.perf_counter()
    train_step(state, batch, config)
    _synchronize(device)
    return time.perf_counter() - began


def _try_precision(
    precision: Precision, config: Config, batch: Batch, reference: Tensor | None
) -> tuple[PrecisionTrial, Tensor]:
    """How a precision does, and its gradient (P,) at fresh weights."""
    config = replace(config, device=replace(config.device, precision=precision))
    device = batch.images.device
    state = init_train_state(config, device)
    forward_and_backward(state, batch, config)
    parts = [p.grad.flatten() for p in state.model.parameters() if p.grad is not None]
    gradient = torch.cat(parts).cpu().double()  # a scale does not change where it points
    state.optimizer.zero_grad(set_to_none=True)
    seconds = []
    for _ in range(1 + TIMED_STEPS):  # the first one loads kernels
        _synchronize(device)
        began = time.perf_counter()
        step = train_step(state, batch, config)
        _synchronize(device)
        seconds.append(time.perf_counter() - began)
    cosine = 1.0 if reference is None else float(torch.cosine_similarity(gradient, reference, dim=0))
    finite = bool(step.finite)  # a loss scale has had time to fall by then
    return PrecisionTrial(precision, finite, cosine, statistics.median(seconds[1:])), gradient


def _synchronize(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
