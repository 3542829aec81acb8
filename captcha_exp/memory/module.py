"""Predict the peak GPU memory of training any `nn.Module`, without a GPU and without captchas.

See docs/plan_module.md for examples and for the parts of the prediction, which are those of `plan`.
"""

import math
from pathlib import Path
from typing import Any

from torch import nn

from captcha_exp.config import GpuSpec, Precision, load_gpu
from captcha_exp.errors import UserError
from captcha_exp.memory.module_trace import (
    AUTOCAST_DTYPES,
    LossFunction,
    OptimizerFactory,
    trace_module,
)
from captcha_exp.memory.plan import Plan, make_plan, memory_budget
from captcha_exp.runtime.paths import find_gpu_file


def plan_module(
    module: nn.Module,
    example_batch: Any,
    optimizer: OptimizerFactory,
    loss: LossFunction,
    *,
    targets: Any = None,
    precision: Precision = "fp32",
    gpu: str | Path | GpuSpec = "generic",
    budget_mib: float | None = None,
) -> Plan:
    """Predict the peak GPU memory of a training step of `module`, which is not changed.

    `example_batch` is passed to the module: a tensor as `module(x)`, a tuple or list as `module(*x)`, a dict
    as `module(**x)`. Only shapes and dtypes are used. `optimizer` is called with the parameters: a class such
    as torch.optim.AdamW, or a lambda or partial with its arguments. `loss` is called as
    `loss(output, targets)`, which allows nn.CrossEntropyLoss(), and without targets as `loss(output)`.
    Targets are an argument of their own because they occupy memory of the device, too. `precision` is fp32 or
    that of autocast. `gpu` is the name of a file in conf/gpu/, the path of another file, or a GpuSpec. In the
    plan, `training` is the step; there is no batch size, no evaluation and no resident image, so these are 0.

    Raises:
        UserError: an argument is invalid, or the module cannot be traced. The message names the argument, or
            the operator and the submodule (`encoder.layer.3`), and the remedy.
    """
    if precision not in AUTOCAST_DTYPES:
        raise UserError(f"precision={precision!r}: must be one of {', '.join(AUTOCAST_DTYPES)}")
    if budget_mib is not None and not (isinstance(budget_mib, (int, float)) and 0 < budget_mib < math.inf):
        raise UserError(f"budget_mib={budget_mib!r}: must be a finite number of MiB above 0")
    if not isinstance(gpu, GpuSpec):
        gpu = load_gpu(find_gpu_file(str(gpu)))
    traced = trace_module(module, example_batch, optimizer, loss, targets=targets, precision=precision)
    return make_plan(traced, gpu, batch_size=0, budget_mib=memory_budget(gpu, budget_mib))
