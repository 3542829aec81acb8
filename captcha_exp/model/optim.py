"""Optimizers, the learning rate schedule, and the loss scale of fp16.

The learning rate is a function of the step alone, so it has no state to save or restore.

The optimizers are torch's, by default the fused ones. They are the fastest (5.5 times the speed of the
for-loop implementation on a CPU) and support `found_inf`, a flag on the device that skips the step without a
host synchronization. The other implementations have no such flag: their steps are run and then reverted on
the device if they were not finite.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, assert_never

import torch
from torch import Tensor, nn

from captcha_exp.config import TrainConfig


def build_optimizer(
    train: TrainConfig, parameters: Iterable[nn.Parameter], on_gpu: bool = False
) -> torch.optim.Optimizer:
    """Build the optimizer of a config. Weight decay applies to tensors with two or more axes only."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused, foreach = train.optimizer_impl == "fused", train.optimizer_impl == "foreach"
    settings: dict[str, Any] = {"lr": train.learning_rate, "fused": fused, "foreach": foreach}
    # Otherwise Adam counts its steps on the host, where a step cannot be reverted without a synchronization.
    capturable = on_gpu and not fused
    optimizer: torch.optim.Optimizer
    match train.optimizer:
        case "adam":
            optimizer = torch.optim.Adam(groups, **settings, capturable=capturable)
        case "adamw":
            optimizer = torch.optim.AdamW(groups, **settings, betas=(0.9, 0.99), capturable=capturable)
        case "sgd":
            optimizer = torch.optim.SGD(groups, **settings, momentum=0.9, nesterov=True)
        case _:
            assert_never(train.optimizer)
    # torch would warn that capturable is meant for CUDA graphs.
    optimizer._warned_capturable_if_run_uncaptured = True
    for parameter in parameters:
        optimizer.state[parameter].update(_init_state(train.optimizer, parameter))
    return optimizer


def _init_state(name: Literal["adam", "adamw", "sgd"], parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the state that torch would create in the first step, which may have to be reverted."""
    if name == "sgd":
        return {"momentum_buffer": torch.zeros_like(parameter)}
    step = torch.tensor(0.0, device=parameter.device)
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def step(optimizer: torch.optim.Optimizer, finite: Tensor, scale: Tensor | None) -> None:
    """Run one step with the gradients divided by `scale` () if `finite` () bool is true; else none."""
    if optimizer.defaults["fused"]:
        # The attributes that GradScaler sets: with found_inf = 1 the step changes nothing.
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.grad_scale = scale  # type: ignore[attr-defined]
        optimizer.step()
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if scale is not None:
        for gradient in (p.grad for p in parameters if p.grad is not None):
            gradient.div_(scale)
    with torch.no_grad():
        tensors = [*parameters, *(value for values in optimizer.state.values() for value in values.values())]
        before = [value.clone() for value in tensors]
        optimizer.step()
        revert_unless(finite, tensors, before)


@torch.no_grad()
def revert_unless(finite: Tensor, tensors: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Copy the old values back into the tensors unless `finite` () bool is true."""
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(finite, tensor, old))


class LossScale:
    """The factor of the loss in fp16, without which small gradients would underflow to 0.

    It is kept on the device, so no step waits for it: a non-finite gradient halves it, GROWTH_INTERVAL finite
    steps in a row double it. The optimizer divides the gradients by it.

    Source: Micikevicius et al., Mixed precision training, ICLR 2018, section 3.2.
    """

    INIT_SCALE = 2.0**16
    MIN_SCALE = 1.0
    GROWTH_INTERVAL = 2000

    def __init__(self, device: torch.device) -> None:
        self.factor = torch.full((), self.INIT_SCALE, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)  # in a row

    def is_at_minimum(self) -> Tensor:
        """Return () bool: whether the factor cannot be halved any more."""
        return self.factor <= self.MIN_SCALE

    def update(self, finite: Tensor) -> None:
        """Update the factor after a step; `finite` () bool says whether its gradients were."""
        good = torch.where(finite, self.good_steps + 1, 0)
        grow = good >= self.GROWTH_INTERVAL
        grown = torch.where(grow, self.factor * 2, self.factor)
        shrunk = (self.factor / 2).clamp(min=self.MIN_SCALE)
        self.factor.copy_(torch.where(finite, grown, shrunk))
        self.good_steps.copy_(torch.where(grow, 0, good))


def learning_rate(train: TrainConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    match train.schedule:
        case "constant":
            return train.learning_rate
        case "onecycle":
            # Half a step is added: neither the first nor the last step then has a rate of zero.
            fraction = (step + 0.5) / total_steps
            up = fraction / train.warmup_fraction if train.warmup_fraction else 1.0
            down = (1 - fraction) / (1 - train.warmup_fraction)
            return train.learning_rate * min(up, down)
        case _:
            assert_never(train.schedule)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
