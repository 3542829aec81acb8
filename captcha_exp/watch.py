"""Watches a training for the trouble that people most often have, and says what it is.

A loss that starts far from chance, numbers that are no numbers, characters that are still read at chance:
each is told with its likely causes. Flags are kept on the device and looked at now and then, so that no step
waits.
"""

import math

import torch
from torch import Tensor

from captcha_exp.config import Config
from captcha_exp.dataset import Batch
from captcha_exp.errors import RunFailed
from captcha_exp.evaluate import Evaluation
from captcha_exp.models import Recogniser


class FiniteWatch:
    """Remembers, on the device, the first step whose loss or gradient was not finite."""

    def __init__(self, device: torch.device) -> None:
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.loss_was_bad = torch.zeros((), dtype=torch.bool, device=device)

    def note(self, step: int, loss: Tensor, finite: Tensor) -> None:
        """One step more; all three are tensors () on the device."""
        new = ~finite & (self.first_bad < 0)
        self.loss_was_bad = torch.where(new, ~torch.isfinite(loss), self.loss_was_bad)
        self.first_bad = torch.where(new, step, self.first_bad)

    def bad_step(self) -> int | None:
        """The number of the first bad step, or None. Waits for the device."""
        step = int(self.first_bad)
        return None if step < 0 else step


def explain_not_finite(
    watch: FiniteWatch, model: Recogniser, batch: Batch, labels: list[str], config: Config, epoch: int
) -> RunFailed:
    """The step, the batch and the cause, found by doing the step once more in fp32.

    A bad step changes nothing, so the weights are those that it met, or little older.
    """
    what = "the loss" if bool(watch.loss_was_bad) else "a gradient"
    largest, name = max((float(p.detach().abs().max()), name) for name, p in model.named_parameters())
    loss = model.head.loss(model(batch.images).float(), batch.targets, config.train.label_smoothing)
    if config.device.precision != "fp32" and math.isfinite(float(loss)):
        cause = f"{config.device.precision} overflows where fp32 does not; write device.precision=fp32"
    elif not math.isfinite(largest) or largest > 1e3:
        cause = (
            f"weights have grown to {largest:.3g} ({name}); "
            f"train.learning_rate={config.train.learning_rate:g} is too high: try a tenth of it"
        )
    else:
        cause = (
            f"the weights are small ({largest:.3g}); lower train.learning_rate={config.train.learning_rate:g}"
        )
    shown = ", ".join(repr(labels[int(row)]) for row in batch.rows[:4])
    return RunFailed(
        f"step {int(watch.first_bad) + 1} (epoch {epoch}): {what} is not a finite number, in the batch of "
        f"{len(batch.rows)} pictures that begins with {shown}; {cause}"
    )


def check_first_loss(loss: float, model: Recogniser) -> str | None:
    """What is wrong with the loss of the first step, or None; fresh weights know nothing: it is at chance."""
    chance = model.head.loss_at_chance()
    if not math.isfinite(loss) or chance / 2 <= loss <= chance * 2:
        return None
    return (
        f"the first loss is {loss:.3f}, but a head that knows nothing has {chance:.3f}: "
        "the weights do not start small, or targets and logits do not belong together"
    )


def check_moving(validation: Evaluation, config: Config, steps: int) -> str | None:
    """What to look for when characters are still read as if by chance, or None."""
    chance = validation.chance_char_accuracy()
    characters = validation.targets.size
    spread = 4 * math.sqrt(chance * (1 - chance) / characters)
    if steps < config.train.chance_after_steps or validation.char_accuracy > chance + spread:
        return None
    size = f"{config.captcha.width}x{config.captcha.height}"
    rate = f"{config.train.learning_rate:g}"
    return (
        f"after {steps:,} steps characters are read no better than by chance "
        f"({validation.char_accuracy:.1%}, chance {chance:.1%}). Likely causes: labels that do not belong to "
        f"their pictures; train.learning_rate={rate} too high or far too low; pictures that "
        f" nobody could read at {size} (captcha-exp data shows some); or only patience: the "
        "article's network takes more steps than compact"
    )
