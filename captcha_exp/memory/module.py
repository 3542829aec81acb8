"""Predict the peak GPU memory of training any `nn.Module`, without a GPU and without captchas.

See docs/plan_module.md for examples, and for what the prediction includes. The parts are those of `plan`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from captcha_exp.config import Card, load_card
from captcha_exp.errors import UserError
from captcha_exp.memory.allocator import MIB
from captcha_exp.memory.interval import Between, Fits
from captcha_exp.memory.module_checks import check_numbers
from captcha_exp.memory.module_trace import DTYPES, Loss, ModulePrecision, OptimizerFactory, trace_module
from captcha_exp.memory.plan import ERROR, limits, verdict
from captcha_exp.memory.replay import bounds_of, play
from captcha_exp.memory.trace import Trace
from captcha_exp.memory.workspaces import workspaces_of
from captcha_exp.runtime import paths


@dataclass(frozen=True)
class ModulePlan:
    """The predicted peak memory of a training step, and whether it fits. All figures in MiB."""

    card: str
    tensors_mib: float  # all tensors at the peak
    state_mib: float  # of them parameters, buffers and the optimizer's state
    activations_mib: float  # of them everything else: activations, gradients, the batch
    workspace_mib: Between  # of cuBLAS and cuDNN, at most at one time
    reserved_mib: Between  # as torch.cuda.max_memory_reserved
    process_mib: Between  # as nvidia-smi shows it: reserved memory and the CUDA context
    budget_mib: Between | None  # available to the process; None: unknown
    fits: Fits | None  # "fits", "does not fit" or "unsure", which counts as no; None without a budget

    def describe(self) -> str:
        """Return the prediction in one line."""
        text = f"predicted {self.process_mib} MiB on {self.card} (tensors {self.tensors_mib:,.0f})"
        if self.budget_mib is None:
            return f"{text}; set budget_mib for a verdict"
        return f"{text}, budget {self.budget_mib} MiB: {self.fits}"


def plan_module(
    module: nn.Module,
    example_batch: Any,
    optimizer: OptimizerFactory,
    loss: Loss,
    *,
    targets: Any = None,
    precision: ModulePrecision = "fp32",
    card: str | Path | Card = "generic",
    budget_mib: float | None = None,
    steps: int = 3,
) -> ModulePlan:
    """Predict the peak GPU memory of a training step of `module`, which is not changed.

    `example_batch` is passed to the module: a tensor as `module(x)`, a tuple or list as `module(*x)`, a dict
    as `module(**x)`. Only shapes and dtypes are used. `optimizer` is called with the parameters: a class such
    as torch.optim.AdamW, or a lambda or partial with its arguments. `loss` is called as
    `loss(output, targets)`, which allows nn.CrossEntropyLoss(), and without targets as `loss(output)`.
    Targets are an argument of their own because they occupy memory of the device, too. `precision` is fp32 or
    that of autocast. `card` is the name of a file in conf/card/, the path of another, or a Card.

    Raises: UserError, one line that names the argument, or the operator and the submodule that cannot be
    traced (`encoder.layer.3`), and the remedy.
    """
    if precision not in ("fp32", *DTYPES):
        raise UserError(f"precision={precision!r}: must be one of fp32, bf16, fp16")
    check_numbers(budget_mib, steps)
    known = card if isinstance(card, Card) else load_card(_card_path(card))
    traced = trace_module(
        module, example_batch, optimizer, loss, targets=targets, precision=precision, steps=steps
    )
    return _plan_trace(traced, known, _budget(known, budget_mib))


def _card_path(card: str | Path) -> Path:
    path = Path(card) if str(card).endswith((".yaml", ".yml")) else paths.conf() / "card" / f"{card}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(each.stem for each in (paths.conf() / "card").glob("*.yaml")))
        raise UserError(
            f"card={str(card)!r}: no such file; must be one of {names}, or the path of a YAML file"
        )
    return path


def _budget(card: Card, asked_mib: float | None) -> Between | None:
    """Return the budget that was asked for, else what other programs leave of the card; None if unknown."""
    if card.total_mib is not None and (asked_mib is None or asked_mib > card.total_mib.most):
        least = card.total_mib.least - card.others_mib.most
        return Between(max(0.0, least), max(0.0, card.total_mib.most - card.others_mib.least))
    return None if asked_mib is None else Between(asked_mib, asked_mib)


def _plan_trace(traced: Trace, card: Card, budget_mib: Between | None) -> ModulePlan:
    """Return the plan of a trace."""
    context, workspaces = card.context_mib, workspaces_of(card)
    peaks = [found for each in workspaces if (found := play(traced, each)) is not None]
    reserved = bounds_of(peaks, "reserved_bytes")
    fits = None
    if budget_mib is not None:
        tight_mib, wide_mib = limits(card, budget_mib)
        fits = verdict(
            all(play(traced, each, tight_mib) is not None for each in workspaces),
            any(play(traced, each, wide_mib) is not None for each in workspaces),
        )
    state_bytes = traced.parameters_bytes + traced.buffers_bytes + traced.optimizer_bytes
    tensors_bytes = traced.peak_bytes("step")
    return ModulePlan(
        card=card.name,
        tensors_mib=tensors_bytes / MIB,
        state_mib=state_bytes / MIB,
        activations_mib=(tensors_bytes - state_bytes) / MIB,
        workspace_mib=Between(workspaces[0].most_mib(traced), workspaces[-1].most_mib(traced)),
        reserved_mib=reserved,
        process_mib=Between(
            context.least + reserved.least * (1 - ERROR), context.most + reserved.most * (1 + ERROR)
        ),
        budget_mib=budget_mib,
        fits=fits,
    )
