"""One training step, and the initial train state.

A step reads no tensor on the host: it never waits for the device, and it can be traced without one. A step
with a non-finite loss or gradient changes nothing and sets a flag on the device.
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
    """Results of a training step, all on the device."""

    loss: Tensor  # () mean over the batch
    num_correct: Tensor  # () images predicted correctly in training mode
    finite: Tensor  # () bool; if false, the step changed nothing
    diverged: Tensor  # () bool; not finite, and a smaller loss scale would not fix it


def forward_and_backward(state: TrainState, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
    """Accumulate the gradients of a batch; return () its mean loss and () the number of correct images.

    Micro-batches run one after another, each weighted by its fraction of the batch: the gradients are those
    of the whole batch, except that batch norms use the statistics of one micro-batch. The gradients are
    multiplied by the loss scale.
    """
    size = batch.indices.shape[0]
    results = [
        _micro_batch_pass(state, part, part.indices.shape[0] / size, config)
        for part in batch.micro_batches(config.train.micro_batch_size or size)
    ]
    losses, correct = zip(*results, strict=True)
    return sum(losses[1:], losses[0]), sum(correct[1:], correct[0])


def _micro_batch_pass(
    state: TrainState, batch: Batch, weight: float, config: Config
) -> tuple[Tensor, Tensor]:
    """Accumulate weighted gradients; return () the weighted loss and () the number of correct images."""
    with devices.autocast(config, batch.images.device):
        logits = state.model(batch.images)
    loss = state.model.head.loss(logits.float(), batch.targets, config.train.label_smoothing) * weight
    scaled = loss if state.loss_scale is None else loss * state.loss_scale.factor
    scaled.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
    with torch.no_grad():
        num_correct = (state.model.head.decode(logits.float()).ids == batch.targets).all(dim=1).sum()
    return loss.detach(), num_correct


def train_step(state: TrainState, batch: Batch, config: Config) -> Step:
    """Run one optimizer step on a batch."""
    model, optimizer, scale = state.model, state.optimizer, state.loss_scale
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    loss, num_correct = forward_and_backward(state, batch, config)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    finite = torch.isfinite(loss) & torch.isfinite(torch.nn.utils.get_total_norm(gradients))
    optim.step(optimizer, finite, None if scale is None else scale.factor)
    optimizer.zero_grad(set_to_none=True)
    diverged = ~finite if scale is None else ~torch.isfinite(loss) | (~finite & scale.is_at_minimum())
    with torch.no_grad():
        if scale is not None:
            scale.update(finite)
        optim.revert_unless(finite, buffers, before)
    return Step(loss, num_correct, finite, diverged)


def init_train_state(config: Config, device: torch.device) -> TrainState:
    """Return the state before the first step; its weights depend only on the seed."""
    torch.manual_seed(seeding.derive_seed(config.seed, "weights"))
    model = networks.build(config.model, config.captcha)
    return make_train_state(networks.to_device(model, device), config, device)


def make_train_state(
    model: networks.Recognizer, config: Config, device: torch.device, on_gpu: bool | None = None
) -> TrainState:
    """Return the initial state of a model on the device; a trace passes `on_gpu`, as it has no device."""
    on_gpu = device.type == "cuda" if on_gpu is None else on_gpu
    model.set_activation_checkpointing(config.train.activation_checkpointing)
    scale = optim.LossScale(device) if config.device.precision == "fp16" else None
    return TrainState(model, optim.build_optimizer(config.train, model.parameters(), on_gpu), scale)
