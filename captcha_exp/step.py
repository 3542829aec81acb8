"""One training step, and the state that it starts from.

A step reads no tensor on the host: it never waits for the device, and it can be traced without one. A step
that is not finite changes nothing; whether it was stands in a flag on the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from captcha_exp import chance, models, optim
from captcha_exp import device as devices
from captcha_exp.checkpoint import TrainState
from captcha_exp.config import Config
from captcha_exp.dataset import Batch


class Step(NamedTuple):
    """What one training step gives, all on the device."""

    loss: Tensor  # () mean over the batch
    right: Tensor  # () pictures read right in training mode
    finite: Tensor  # () bool; a step that is not finite has changed nothing
    broken: Tensor  # () bool; not finite, and no smaller loss scale would mend it


def forward_and_backward(state: TrainState, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
    """() loss and (B, T, K) logits; the gradients, times the loss scale, are in the parameters."""
    with devices.autocast(config, batch.images.device):
        logits = state.model(batch.images)
    loss = state.model.head.loss(logits.float(), batch.targets, config.train.label_smoothing)
    scaled = loss if state.loss_scale is None else loss * state.loss_scale.factor
    scaled.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
    return loss.detach(), logits.detach()


def train_step(state: TrainState, batch: Batch, config: Config) -> Step:
    """One step of the optimiser."""
    model, optimizer, scale = state.model, state.optimizer, state.loss_scale
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    loss, logits = forward_and_backward(state, batch, config)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    finite = torch.isfinite(loss) & torch.isfinite(torch.nn.utils.get_total_norm(gradients))
    # Fused optimisers read these attributes as GradScaler sets them: where found_inf is 1 the step leaves
    # everything as it is, and gradients are divided by grad_scale.
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    optimizer.grad_scale = None if scale is None else scale.factor  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    broken = ~finite if scale is None else ~torch.isfinite(loss) | (~finite & scale.is_smallest())
    with torch.no_grad():
        if scale is not None:
            scale.update(finite)
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(torch.where(finite, buffer, old))
        right = (model.head.decode(logits.float())[0] == batch.targets).all(dim=1).sum()
    return Step(loss, right, finite, broken)


def fresh_state(config: Config, device: torch.device) -> TrainState:
    """The state before the first step: weights that depend on the seed alone."""
    torch.manual_seed(chance.derive(config.seed, "weights"))
    return state_of(models.place(models.build(config.model, config.captcha), device), config, device)


def state_of(model: models.Recogniser, config: Config, device: torch.device) -> TrainState:
    """The state before the first step of a model that is on the device."""
    scale = optim.LossScale(device) if config.device.precision == "fp16" else None
    return TrainState(model, optim.optimizer(config.train, model.parameters()), scale)
