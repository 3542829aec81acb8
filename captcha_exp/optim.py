"""Optimisers, the learning rate, the loss scale of fp16. The rate is a function of the step alone: nothing to
save, nothing to restore.

The optimisers are torch's fused ones. They are the fastest (5.5 times the loop over parameters on a CPU),
and they take `found_inf`, a flag on the device that turns a step into no step at all, so that nobody has to
wait and look.
"""

from collections.abc import Iterable
from typing import assert_never

import torch
from torch import Tensor, nn

from captcha_exp.config import Train


def optimizer(train: Train, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of a config. Weights of two and more axes decay; biases and batch norms do not."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    match train.optimizer:
        case "adam":
            return torch.optim.Adam(groups, lr=train.learning_rate, fused=True)
        case "adamw":
            return torch.optim.AdamW(groups, lr=train.learning_rate, betas=(0.9, 0.99), fused=True)
        case "sgd":
            sgd = torch.optim.SGD(groups, lr=train.learning_rate, momentum=0.9, nesterov=True, fused=True)
            for parameter in parameters:
                # torch makes this in the first step, and leaves it unwritten when that step is not finite.
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return sgd
        case _:
            assert_never(train.optimizer)


class LossScale:
    """What the loss is multiplied by before the backward pass in fp16, where small gradients would become 0.

    It lives on the device, so that no step waits: a gradient that is not finite halves it, and many steps
    that all were double it. The optimiser divides the gradients by it.

    Source: Micikevicius et al., Mixed precision training, ICLR 2018, section 3.2.
    """

    FIRST = 2.0**16
    SMALLEST = 1.0
    STEPS_TO_GROW = 2000

    def __init__(self, device: torch.device) -> None:
        self.factor = torch.full((), self.FIRST, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)  # in a row

    def is_smallest(self) -> Tensor:
        """() bool: whether it has nowhere left to fall."""
        return self.factor <= self.SMALLEST

    def update(self, finite: Tensor) -> None:
        """After a step whose gradients were finite, or not: () bool."""
        good = torch.where(finite, self.good_steps + 1, 0)
        grow = good >= self.STEPS_TO_GROW
        grown = torch.where(grow, self.factor * 2, self.factor)
        shrunk = (self.factor / 2).clamp(min=self.SMALLEST)
        self.factor.copy_(torch.where(finite, grown, shrunk))
        self.good_steps.copy_(torch.where(grow, 0, good))


def learning_rate(train: Train, step: int, steps: int) -> float:
    """The rate of step number `step`, counted from 0, of `steps` in all."""
    match train.schedule:
        case "constant":
            return train.learning_rate
        case "onecycle":
            # Half a step is added, so that neither the first nor the last step has a rate of zero.
            place = (step + 0.5) / steps
            up = place / train.warmup_fraction if train.warmup_fraction else 1.0
            down = (1 - place) / (1 - train.warmup_fraction)
            return train.learning_rate * min(up, down)
        case _:
            assert_never(train.schedule)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
