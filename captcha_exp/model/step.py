"""One training step, and the state that it starts from.

A step reads no tensor on the host: it never waits for the device, and it can be traced without one. A step
that is not finite changes nothing; whether it was stands in a flag on the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from captcha_exp.config import Config
from captcha_exp.data.dataset import Batch
from captcha_exp.model import networks, optim
from captcha_exp.model.state import TrainState
from captcha_exp.runtime import device as devices
from captcha_exp.runtime import seeding


class Step(NamedTuple):
    """What one training step gives, all on the device."""

    loss: Tensor  # () mean over the batch
    num_correct: Tensor  # () pictures read right in training mode
    finite: Tensor  # () bool; a step that is not finite has changed nothing
    diverged: Tensor  # () bool; not finite, and no smaller loss scale would mend it


def forward_and_backward(state: TrainState, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
    """() mean loss and () pictures read right; the gradients, times the loss scale, are in the parameters.

    A micro-batch at a time, each with its share of the mean: the gradients are those of the whole batch, but
    for batch norms, which see one micro-batch alone.
    """
    whole = batch.indices.shape[0]
    found = [
        _micro_batch_pass(state, part, part.indices.shape[0] / whole, config)
        for part in batch.micro_batches(config.train.micro_batch_size or whole)
    ]
    losses, rights = zip(*found, strict=True)
    return sum(losses[1:], losses[0]), sum(rights[1:], rights[0])


def _micro_batch_pass(state: TrainState, batch: Batch, share: float, config: Config) -> tuple[Tensor, Tensor]:
    """() its share of the loss and () pictures read right; its share of the gradients is added."""
    with devices.autocast(config, batch.images.device):
        logits = state.model(batch.images)
    loss = state.model.head.loss(logits.float(), batch.targets, config.train.label_smoothing) * share
    scaled = loss if state.loss_scale is None else loss * state.loss_scale.factor
    scaled.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
    with torch.no_grad():
        right = (state.model.head.decode(logits.float())[0] == batch.targets).all(dim=1).sum()
    return loss.detach(), right


def train_step(state: TrainState, batch: Batch, config: Config) -> Step:
    """One step of the optimiser."""
    model, optimizer, scale = state.model, state.optimizer, state.loss_scale
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    loss, right = forward_and_backward(state, batch, config)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    finite = torch.isfinite(loss) & torch.isfinite(torch.nn.utils.get_total_norm(gradients))
    optim.step(optimizer, finite, None if scale is None else scale.factor)
    optimizer.zero_grad(set_to_none=True)
    broken = ~finite if scale is None else ~torch.isfinite(loss) | (~finite & scale.is_at_minimum())
    with torch.no_grad():
        if scale is not None:
            scale.update(finite)
        optim.revert_unless(finite, buffers, before)
    return Step(loss, right, finite, broken)


def init_train_state(config: Config, device: torch.device) -> TrainState:
    """The state before the first step: weights that depend on the seed alone."""
    torch.manual_seed(seeding.derive_seed(config.seed, "weights"))
    return make_train_state(
        networks.to_device(networks.build(config.model, config.captcha), device), config, device
    )


def make_train_state(
    model: networks.Recognizer, config: Config, device: torch.device, on_gpu: bool | None = None
) -> TrainState:
    """The state before the first step of a model that is on the device; a trace says that it is a card."""
    on_gpu = device.type == "cuda" if on_gpu is None else on_gpu
    model.set_activation_checkpointing(config.train.activation_checkpointing)
    scale = optim.LossScale(device) if config.device.precision == "fp16" else None
    return TrainState(model, optim.build_optimizer(config.train, model.parameters(), on_gpu), scale)
