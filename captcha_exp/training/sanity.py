"""Watches a training for the trouble that people most often have, and says what it is.

A loss that starts far from chance, numbers that are no numbers, characters that are still read at chance:
each is told with its likely causes. Flags are kept on the device and looked at now and then, so that no step
waits.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from captcha_exp.config import Config
from captcha_exp.data.dataset import Batch, Split
from captcha_exp.errors import RunFailed
from captcha_exp.model.evaluate import Evaluation
from captcha_exp.model.networks import Recognizer


class SanityChecker:
    """Watches one training, and tells of each trouble once.

    Remembers, on the device, the loss of the first step and the first step that was broken: not finite, for
    good.
    """

    def __init__(
        self, training: Split, labels: list[str], config: Config, warn: Callable[[str], None]
    ) -> None:
        device = training.device
        self._training, self._labels, self._config, self._warn = training, labels, config, warn
        self._diverged_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._loss_diverged = torch.zeros((), dtype=torch.bool, device=device)
        self._first_loss: Tensor | None = None
        self._has_warned_at_chance = False

    def observe(self, step: int, loss: Tensor, diverged: Tensor) -> None:
        """One step more, counted from 0; both tensors () on the device."""
        if step == 0:
            self._first_loss = loss
        new = diverged & (self._diverged_step < 0)
        self._loss_diverged = torch.where(new, ~torch.isfinite(loss), self._loss_diverged)
        self._diverged_step = torch.where(new, step, self._diverged_step)

    def check(self, model: Recognizer, epoch: int) -> None:
        """Tell of a first loss far from chance; stop at a step that was not finite. Waits for the device.

        Raises:
            RunFailed: the line names the step, the batch and the cause.
        """
        if self._first_loss is not None:
            if trouble := check_first_loss(float(self._first_loss), model):
                self._warn(trouble)
            self._first_loss = None
        bad = int(self._diverged_step)
        if bad < 0:
            return
        size = int(self._config.train.batch_size)
        number = bad % -(-len(self._training) // size)  # of the batch in its epoch
        order = self._training.permutation(self._config.seed, epoch)[number * size : (number + 1) * size]
        batch = next(self._training.batches(size, order))
        what = "the loss" if bool(self._loss_diverged) else "a gradient"
        shown = ", ".join(repr(self._labels[int(row)]) for row in batch.indices[:4])
        cause = diagnose_divergence(model, batch, self._config)
        raise RunFailed(
            f"step {bad + 1} (epoch {epoch}): {what} is not a finite number, in the batch of "
            f"{len(batch.indices)} pictures that begins with {shown}; {cause}"
        )

    def check_validation(self, validation: Evaluation, steps: int) -> None:
        """Tell of characters that are read no better than by chance, after steps enough to have moved."""
        if not self._has_warned_at_chance and (
            trouble := check_above_chance(validation, self._config, steps)
        ):
            self._warn(trouble)
            self._has_warned_at_chance = True


def diagnose_divergence(model: Recognizer, batch: Batch, config: Config) -> str:
    """Why a step was not finite, found by doing it once more in fp32.

    A bad step changes nothing, so the weights are those that it met, or little older.
    """
    sizes = [(float(p.detach().abs().max()), name) for name, p in model.named_parameters()]
    largest, name = max(sizes, key=lambda size: math.inf if math.isnan(size[0]) else size[0])
    rate = f"train.learning_rate={config.train.learning_rate:g}"
    with torch.no_grad():
        loss = model.head.loss(model(batch.images).float(), batch.targets, config.train.label_smoothing)
    if config.device.precision != "fp32" and math.isfinite(float(loss)):
        return f"{config.device.precision} overflows where fp32 does not; write device.precision=fp32"
    if not math.isfinite(largest) or largest > 1e3:
        return f"weights have grown to {largest:.3g} ({name}); {rate} is too high: try a tenth of it"
    return f"the weights are small ({largest:.3g}); try a tenth of {rate}"


def check_first_loss(loss: float, model: Recognizer) -> str | None:
    """What is wrong with the loss of the first step, or None; fresh weights know nothing: it is at chance."""
    chance = model.head.loss_at_chance()
    if not math.isfinite(loss) or chance / 2 <= loss <= chance * 2:
        return None
    return (
        f"the first loss is {loss:.3f}, but a head that knows nothing has {chance:.3f}: "
        "the weights do not start small, or targets and logits do not belong together"
    )


def check_above_chance(validation: Evaluation, config: Config, steps: int) -> str | None:
    """What to look for when characters are still read as if by chance, or None."""
    chance = validation.chance_char_accuracy()
    characters = validation.targets.size
    spread = 4 * math.sqrt(chance * (1 - chance) / characters)
    if steps < config.train.sanity_check_steps or validation.char_accuracy > chance + spread:
        return None
    size = f"{config.captcha.width}x{config.captcha.height}"
    rate = f"{config.train.learning_rate:g}"
    return (
        f"after {steps:,} steps characters are read no better than by chance "
        f"({validation.char_accuracy:.1%}, chance {chance:.1%}). Likely causes: labels that do not belong to "
        f"their pictures; train.learning_rate={rate} too high or far too low; pictures that "
        f"nobody could read at {size} (captcha-exp data shows some); or only patience: the "
        "article's network takes more steps than compact"
    )
