"""Optimisers, the learning rate, the loss scale of fp16. The rate is a function of the step alone: nothing to
save, nothing to restore.

The optimisers are torch's, by default the fused ones. They are the fastest (5.5 times the loop over
parameters on a CPU), and they take `found_inf`, a flag on the device that turns a step into no step at all,
so that nobody has to wait and look. The other kernels know no such flag; with them a step is done, and undone
on the device where it must not count.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, assert_never

import torch
from torch import Tensor, nn

from captcha_exp.config import TrainConfig


def build_optimizer(
    train: TrainConfig, parameters: Iterable[nn.Parameter], on_gpu: bool = False
) -> torch.optim.Optimizer:
    """The optimiser of a config. Weights of two and more axes decay; biases and batch norms do not."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    rate, kernel = train.learning_rate, train.optimizer_impl
    fused, foreach = kernel == "fused", kernel == "foreach"
    # Without it Adam counts its steps on the host, and one could not be undone there without a wait.
    capturable = on_gpu and not fused
    made: torch.optim.Optimizer
    match train.optimizer:
        case "adam":
            made = torch.optim.Adam(groups, rate, fused=fused, foreach=foreach, capturable=capturable)
        case "adamw":
            betas = (0.9, 0.99)
            made = torch.optim.AdamW(groups, rate, betas, fused=fused, foreach=foreach, capturable=capturable)
        case "sgd":
            made = torch.optim.SGD(groups, rate, momentum=0.9, nesterov=True, fused=fused, foreach=foreach)
        case _:
            assert_never(train.optimizer)
    # torch would speak of CUDA graphs, for which the steps are on the device as well.
    made._warned_capturable_if_run_uncaptured = True
    for parameter in parameters:
        made.state[parameter].update(_init_state(train.optimizer, parameter))
    return made


def _init_state(name: Literal["adam", "adamw", "sgd"], parameter: nn.Parameter) -> dict[str, Tensor]:
    """What torch makes in the first step, which may be one that must not count."""
    if name == "sgd":
        return {"momentum_buffer": torch.zeros_like(parameter)}
    step = torch.tensor(0.0, device=parameter.device)
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def step(optimizer: torch.optim.Optimizer, finite: Tensor, scale: Tensor | None) -> None:
    """One step with the gradients divided by `scale` (), where `finite` () bool is true; else none."""
    if optimizer.defaults["fused"]:
        # Read as GradScaler sets them: where found_inf is 1 the step leaves everything as it is.
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.grad_scale = scale  # type: ignore[attr-defined]
        optimizer.step()
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if scale is not None:
        for gradient in (p.grad for p in parameters if p.grad is not None):
            gradient.div_(scale)
    with torch.no_grad():
        kept = [*parameters, *(value for values in optimizer.state.values() for value in values.values())]
        before = [value.clone() for value in kept]
        optimizer.step()
        revert_unless(finite, kept, before)


@torch.no_grad()
def revert_unless(finite: Tensor, tensors: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """The tensors are as they were before, unless `finite` () bool."""
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(finite, tensor, old))


class LossScale:
    """What the loss is multiplied by before the backward pass in fp16, where small gradients would become 0.

    It lives on the device, so that no step waits: a gradient that is not finite halves it, and many steps
    that all were double it. The optimiser divides the gradients by it.

    Source: Micikevicius et al., Mixed precision training, ICLR 2018, section 3.2.
    """

    INIT_SCALE = 2.0**16
    MIN_SCALE = 1.0
    GROWTH_INTERVAL = 2000

    def __init__(self, device: torch.device) -> None:
        self.factor = torch.full((), self.INIT_SCALE, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)  # in a row

    def is_at_minimum(self) -> Tensor:
        """() bool: whether it has nowhere left to fall."""
        return self.factor <= self.MIN_SCALE

    def update(self, finite: Tensor) -> None:
        """After a step whose gradients were finite, or not: () bool."""
        good = torch.where(finite, self.good_steps + 1, 0)
        grow = good >= self.GROWTH_INTERVAL
        grown = torch.where(grow, self.factor * 2, self.factor)
        shrunk = (self.factor / 2).clamp(min=self.MIN_SCALE)
        self.factor.copy_(torch.where(finite, grown, shrunk))
        self.good_steps.copy_(torch.where(grow, 0, good))


def learning_rate(train: TrainConfig, step: int, total_steps: int) -> float:
    """The rate of step number `step`, counted from 0, of `steps` in all."""
    match train.schedule:
        case "constant":
            return train.learning_rate
        case "onecycle":
            # Half a step is added, so that neither the first nor the last step has a rate of zero.
            place = (step + 0.5) / total_steps
            up = place / train.warmup_fraction if train.warmup_fraction else 1.0
            down = (1 - place) / (1 - train.warmup_fraction)
            return train.learning_rate * min(up, down)
        case _:
            assert_never(train.schedule)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
