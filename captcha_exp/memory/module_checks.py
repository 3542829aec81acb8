"""Check the arguments of `plan_module` and the results of the caller's functions; an error is one line."""

import inspect
import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from captcha_exp.errors import UserError


def check_budget_and_steps(budget_mib: Any, steps: Any) -> None:
    """Raise UserError for an invalid budget or number of steps."""
    if isinstance(steps, bool) or not isinstance(steps, Integral) or int(steps) < 2:
        raise UserError(
            f"steps={steps!r}: must be at least 2, as an integer; the optimizer's state exists from the "
            "second step on"
        )
    if budget_mib is None:
        return
    if isinstance(budget_mib, bool) or not isinstance(budget_mib, Real):
        raise UserError(f"budget_mib={budget_mib!r}: must be a number of MiB or None")
    if not (float(budget_mib) > 0 and math.isfinite(budget_mib)):
        raise UserError(f"budget_mib={float(budget_mib):g}: must be above 0 and finite")


def check_functions(module: Any, optimizer: Any, loss: Any, has_targets: bool) -> None:
    """Raise UserError unless this is a trainable module, an optimizer factory and a loss for its output."""
    _check_module(module)
    if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
        given = "an instance" if isinstance(optimizer, torch.optim.Optimizer) else _type_name(optimizer)
        raise UserError(
            f"optimizer: must be callable with the parameters, e.g. torch.optim.AdamW, not {given}"
        )
    if not callable(loss):
        raise UserError(f"loss: must be callable with the output, not {_type_name(loss)}")
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except (TypeError, ValueError):  # implemented in C
        return
    one, two = (_accepts_num_args(signature, count) for count in (1, 2))
    if not has_targets and not one and two:
        second = list(signature.parameters)[1]
        raise UserError(
            f"loss: missing its argument {second!r}; pass targets=..., of which only the shape is used"
        )
    if has_targets and one and not two:
        raise UserError("loss: takes the output only; leave targets out, or take them as a second argument")


def _check_module(module: Any) -> None:
    """Raise UserError if this is not a module, or has nothing to train."""
    if not isinstance(module, nn.Module):
        raise UserError(f"module: must be a torch.nn.Module, not {_type_name(module)}")
    for name, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise UserError(
                f"{name or 'module'}: a TorchScript module cannot be traced; pass the original nn.Module"
            )
    kind, parameters = _type_name(module), list(module.parameters())
    if not parameters:
        raise UserError(f"module: {kind} has no parameters to train")
    if not any(each.requires_grad for each in parameters):
        raise UserError(f"module: all parameters of {kind} are frozen; set requires_grad of some")


def check_optimizer(optimizer: Any, module: nn.Module) -> None:
    """Raise UserError unless this is an optimizer of the module's parameters that steps without a closure."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"optimizer: must return a torch.optim.Optimizer, not {_type_name(optimizer)}")
    given = {id(each) for each in module.parameters()}
    if any(id(each) not in given for group in optimizer.param_groups for each in group["params"]):
        raise UserError(
            "optimizer: returns an optimizer of parameters other than those it is called with; use "
            "lambda parameters: torch.optim.AdamW(parameters)"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UserError(
            "optimizer: SparseAdam needs sparse gradients, which are not supported; use torch.optim.Adam"
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        name = type(optimizer).__name__
        raise UserError(
            f"optimizer: {name}.step needs a closure, which is not supported; use one that needs none, e.g. "
            "torch.optim.AdamW"
        )


def _accepts_num_args(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def check_loss_value(value: Any) -> None:
    """Raise UserError unless the loss is a scalar tensor that depends on the parameters."""
    if not isinstance(value, Tensor):
        raise UserError(f"loss: must return a tensor, not {_type_name(value)}")
    if value.numel() != 1:
        raise UserError(
            f"loss: must return one number, not shape {tuple(value.shape)}; reduce it, e.g. with .mean()"
        )
    if not value.requires_grad:
        raise UserError(
            "loss: does not depend on a parameter that requires a gradient; check .detach(), torch.no_grad() "
            "and requires_grad"
        )


def _type_name(value: Any) -> str:
    return "None" if value is None else type(value).__name__
