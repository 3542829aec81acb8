"""Check the arguments of `plan_module` and the results of the caller's functions; an error is one line."""

from typing import Any

import torch
from torch import Tensor, nn

from captcha_exp.errors import UserError


def check_functions(module: Any, optimizer: Any, loss: Any) -> None:
    """Raise UserError unless this is a trainable module, an optimizer factory and a loss function."""
    if not isinstance(module, nn.Module) or not any(each.requires_grad for each in module.parameters()):
        raise UserError(
            "module: must be a torch.nn.Module with a parameter that requires a gradient, not this "
            f"{type(module).__name__}"
        )
    for name, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise UserError(
                f"{name or 'module'}: a TorchScript module cannot be traced; pass the original nn.Module"
            )
    for name, function in (("optimizer", optimizer), ("loss", loss)):
        if not callable(function):
            raise UserError(
                f"{name}: must be callable, e.g. torch.optim.AdamW or nn.CrossEntropyLoss(), not an instance "
                f"of {type(function).__name__}"
            )


def check_optimizer(optimizer: Any, module: nn.Module) -> None:
    """Raise UserError unless this is an optimizer of the module's parameters."""
    parameters = {id(each) for each in module.parameters()}
    if not isinstance(optimizer, torch.optim.Optimizer) or any(
        id(each) not in parameters for group in optimizer.param_groups for each in group["params"]
    ):
        raise UserError(
            "optimizer: must return a torch.optim.Optimizer of the parameters that it is called with, as "
            "lambda parameters: torch.optim.AdamW(parameters)"
        )


def check_loss_value(value: Any) -> None:
    """Raise UserError unless the loss is a scalar tensor that depends on the parameters."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise UserError(
            "loss: must return a scalar tensor that depends on a parameter that requires a gradient; reduce "
            "it, e.g. with .mean(), and check .detach() and torch.no_grad()"
        )
