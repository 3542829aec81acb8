"""What only a try on the device itself can tell: which precision is right and pays.

What a card's data sheet says is no proof: some cards have 16-bit numbers that come out as NaN in some
convolutions, or that are emulated and slow. So each precision does the project's own training step, from the
same weights on the same pictures, and is taken only if its numbers are finite, its gradient points where that
of fp32 does, and it is faster.
"""

import statistics
import time
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from captcha_exp import chance
from captcha_exp import device as devices
from captcha_exp.config import Config, Precision
from captcha_exp.dataset import Batch
from captcha_exp.display import Display
from captcha_exp.step import forward_and_backward, fresh_state, train_step

LEAST_COSINE = 0.9  # between the gradients of fp32 and of the precision; chance is 0
LEAST_GAIN = 1.1  # times as fast as fp32: less is not worth another rounding
MOST_PICTURES = {"cpu": 32, "cuda": 256, "mps": 64}  # in a step of the probe: enough to be busy
TIMED_STEPS = 5


@dataclass(frozen=True)
class Tried:
    """How one precision did."""

    precision: Precision
    finite: bool
    cosine: float  # between its gradient and that of fp32
    step_seconds: float  # median

    def words(self, plain: "Tried") -> str:
        """What was seen, in a few words."""
        if not self.finite:
            return f"{self.precision} is not finite here"
        speed = f"{plain.step_seconds / self.step_seconds:.2f} times as fast"
        return f"{self.precision} {speed}, gradient {'close' if self.is_close else 'off'} ({self.cosine:.3f})"

    @property
    def is_close(self) -> bool:
        return self.cosine >= LEAST_COSINE


def precision(config: Config, display: Display) -> tuple[Precision, list[dict[str, object]]]:
    """The fastest precision whose numbers are right on the config's device, and how each did."""
    device = devices.set_up(config)
    batch = _noise(config, device)
    plain, gradient = _try("fp32", config, batch, None)
    tried = [plain]
    for other in devices.half_precisions(device):
        tried.append(_try(other, config, batch, gradient)[0])
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the training's peaks are to be its own
    good = [t for t in tried if t.finite and t.is_close and t.step_seconds * LEAST_GAIN <= plain.step_seconds]
    best = min(good, key=lambda t: t.step_seconds, default=plain).precision
    seen = "; ".join(t.words(plain) for t in tried[1:]) or "no other precision on this device"
    display.line(f"precision {best}: {seen}")
    return best, [asdict(t) for t in tried]


def _noise(config: Config, device: torch.device) -> Batch:
    """Pictures of noise with labels of noise: what the numbers do does not depend on what they show."""
    captcha = config.captcha
    size = min(int(config.train.batch_size), MOST_PICTURES[device.type])
    generator = torch.Generator().manual_seed(chance.derive(config.seed, "probe"))
    shape = (size, captcha.height, captcha.width, captcha.channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, len(captcha.alphabet), (size, captcha.length), generator=generator)
    return Batch(images.to(device), targets.to(device), torch.arange(size))


def _try(
    precision: Precision, config: Config, batch: Batch, reference: Tensor | None
) -> tuple[Tried, Tensor]:
    """How a precision does, and its gradient (P,) at fresh weights."""
    config = replace(config, device=replace(config.device, precision=precision))
    device = batch.images.device
    state = fresh_state(config, device)
    forward_and_backward(state, batch, config)
    parts = [p.grad.flatten() for p in state.model.parameters() if p.grad is not None]
    gradient = torch.cat(parts).cpu().double()  # a scale does not change where it points
    state.optimizer.zero_grad(set_to_none=True)
    seconds = []
    for _ in range(1 + TIMED_STEPS):  # the first one loads kernels
        _wait(device)
        began = time.perf_counter()
        step = train_step(state, batch, config)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    cosine = 1.0 if reference is None else float(torch.cosine_similarity(gradient, reference, dim=0))
    finite = bool(step.finite)  # a loss scale has had time to fall by then
    return Tried(precision, finite, cosine, statistics.median(seconds[1:])), gradient


def _wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
