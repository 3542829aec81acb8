"""Sanity checks of a training, which report the most frequent problems with their likely causes.

They are an initial loss far from chance, non-finite numbers, and a character accuracy that stays at chance.
Flags are kept on the device and read from time to time, so no step waits for the device.
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
    """Checks one training and reports each problem once.

    Keeps on the device the loss of the first step and the number of the first diverged step.
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
        """Observe a step, counted from 0; both tensors are () on the device."""
        if step == 0:
            self._first_loss = loss
        is_first = diverged & (self._diverged_step < 0)
        self._loss_diverged = torch.where(is_first, ~torch.isfinite(loss), self._loss_diverged)
        self._diverged_step = torch.where(is_first, step, self._diverged_step)

    def check(self, model: Recognizer, epoch: int) -> None:
        """Check the first loss and whether a step diverged. Waits for the device.

        Raises:
            RunFailed: a step diverged; the line names the step, the batch and the likely cause.
        """
        if self._first_loss is not None:
            chance = model.head.loss_at_chance(self._training.targets)
            if problem := check_first_loss(float(self._first_loss), chance):
                self._warn(problem)
            self._first_loss = None
        step = int(self._diverged_step)
        if step < 0:
            return
        size = int(self._config.train.batch_size)
        number = step % -(-len(self._training) // size)  # of the batch in its epoch
        order = self._training.epoch_order(self._config.seed, epoch)[number * size : (number + 1) * size]
        batch = next(self._training.batches(size, order))
        quantity = "the loss" if bool(self._loss_diverged) else "a gradient"
        labels = ", ".join(repr(self._labels[int(index)]) for index in batch.indices[:4])
        cause = diagnose_divergence(model, batch, self._config)
        raise RunFailed(
            f"step {step + 1} (epoch {epoch}): {quantity} is not finite, in a batch of {len(batch.indices)} "
            f"images that starts with {labels}; {cause}"
        )

    def check_validation(self, validation: Evaluation, steps: int) -> None:
        """Warn once if the character accuracy is at chance after train.sanity_check_steps."""
        if not self._has_warned_at_chance and (
            problem := check_above_chance(validation, self._config, steps)
        ):
            self._warn(problem)
            self._has_warned_at_chance = True


def diagnose_divergence(model: Recognizer, batch: Batch, config: Config) -> str:
    """Return the likely cause of a non-finite step, found by repeating it in fp32.

    A non-finite step changes nothing, so the weights are still about those it started from.
    """
    maxima = [(float(p.detach().abs().max()), name) for name, p in model.named_parameters()]
    largest, name = max(maxima, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
    rate = f"train.learning_rate={config.train.learning_rate:g}"
    with torch.no_grad():
        loss = model.head.loss(model(batch.images).float(), batch.targets, config.train.label_smoothing)
    if config.device.precision != "fp32" and math.isfinite(float(loss)):
        return f"{config.device.precision} overflows and fp32 does not; set device.precision=fp32"
    if not math.isfinite(largest) or largest > 1e3:
        return f"weights have grown to {largest:.3g} ({name}); {rate} is too high, try a tenth of it"
    return f"the weights are small ({largest:.3g}); try a tenth of {rate}"


def check_first_loss(loss: float, chance: float) -> str | None:
    """Return a warning if the loss of the first step is far from chance, where it should be; else None."""
    if not math.isfinite(loss) or chance / 2 <= loss <= chance * 2:
        return None
    return (
        f"the first loss is {loss:.3f}, but the loss at chance is {chance:.3f}: the initial weights are too "
        "large, or targets and logits do not match"
    )


def check_above_chance(validation: Evaluation, config: Config, steps: int) -> str | None:
    """Return a warning with likely causes if the character accuracy is still at chance; else None."""
    chance = validation.chance_char_accuracy()
    tolerance = 4 * math.sqrt(chance * (1 - chance) / validation.num_chars)
    if steps < config.train.sanity_check_steps or validation.char_accuracy > chance + tolerance:
        return None
    size = f"{config.captcha.width}x{config.captcha.height}"
    rate = f"{config.train.learning_rate:g}"
    return (
        f"after {steps:,} steps the character accuracy is still at chance ({validation.char_accuracy:.1%}, "
        f"chance {chance:.1%}). Likely causes: labels that do not match their images; "
        f"train.learning_rate={rate} too high or far too low; images that are illegible at {size} "
        "(captcha-exp data shows some); or too few steps: the article's network needs more than compact"
    )
