"""Predict the peak GPU memory of training any `nn.Module`, without a GPU and without captchas.

See docs/plan_module.md for examples and for the parts of the prediction, which are those of `plan`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from captcha_exp.config import GpuSpec, load_gpu
from captcha_exp.errors import UserError
from captcha_exp.memory.interval import Fits, MiBRange
from captcha_exp.memory.module_checks import check_budget_and_steps
from captcha_exp.memory.module_trace import (
    AUTOCAST_DTYPES,
    LossFunction,
    ModulePrecision,
    OptimizerFactory,
    trace_module,
)
from captcha_exp.memory.plan import make_plan, memory_budget
from captcha_exp.memory.replay import TraceReplayer
from captcha_exp.runtime import paths


@dataclass(frozen=True)
class ModulePlan:
    """The predicted peak memory of a training step, and whether it fits. All figures in MiB."""

    gpu: str
    tensors_mib: float  # all tensors at the peak
    state_mib: float  # of them parameters, buffers and the optimizer's state
    activations_mib: float  # of them everything else: activations, gradients, the batch
    workspace_mib: MiBRange  # of cuBLAS and cuDNN, at most at one time
    reserved_mib: MiBRange  # as torch.cuda.max_memory_reserved
    process_mib: MiBRange  # as nvidia-smi shows it: reserved memory and the CUDA context
    budget_mib: MiBRange | None  # available to the process; None: unknown
    fits: Fits | None  # "fits", "does not fit" or "unsure", which counts as no; None without a budget

    def describe(self) -> str:
        """Return the prediction in one line."""
        text = f"predicted {self.process_mib} MiB on {self.gpu} (tensors {self.tensors_mib:,.0f})"
        if self.budget_mib is None:
            return f"{text}; set budget_mib for a verdict"
        return f"{text}, budget {self.budget_mib} MiB: {self.fits}"


def plan_module(
    module: nn.Module,
    example_batch: Any,
    optimizer: OptimizerFactory,
    loss: LossFunction,
    *,
    targets: Any = None,
    precision: ModulePrecision = "fp32",
    gpu: str | Path | GpuSpec = "generic",
    budget_mib: float | None = None,
    steps: int = 3,
) -> ModulePlan:
    """Predict the peak GPU memory of a training step of `module`, which is not changed.

    `example_batch` is passed to the module: a tensor as `module(x)`, a tuple or list as `module(*x)`, a dict
    as `module(**x)`. Only shapes and dtypes are used. `optimizer` is called with the parameters: a class such
    as torch.optim.AdamW, or a lambda or partial with its arguments. `loss` is called as
    `loss(output, targets)`, which allows nn.CrossEntropyLoss(), and without targets as `loss(output)`.
    Targets are an argument of their own because they occupy memory of the device, too. `precision` is fp32 or
    that of autocast. `gpu` is the name of a file in conf/gpu/, the path of another file, or a GpuSpec.

    Raises:
        UserError: an argument is invalid, or the module cannot be traced. The message names the argument, or
            the operator and the submodule (`encoder.layer.3`), and the remedy.
    """
    if precision not in ("fp32", *AUTOCAST_DTYPES):
        raise UserError(f"precision={precision!r}: must be one of fp32, bf16, fp16")
    check_budget_and_steps(budget_mib, steps)
    spec = gpu if isinstance(gpu, GpuSpec) else load_gpu(_gpu_spec_path(gpu))
    traced = trace_module(
        module, example_batch, optimizer, loss, targets=targets, precision=precision, steps=steps
    )
    replayer = TraceReplayer(traced)
    unlimited = make_plan(replayer, spec, batch_size=0, budget_mib=None)
    plan = make_plan(replayer, spec, batch_size=0, budget_mib=memory_budget(spec, budget_mib))
    return ModulePlan(
        gpu=spec.name,
        tensors_mib=plan.tensors_mib,
        state_mib=plan.state_mib,
        activations_mib=plan.activations_mib,
        workspace_mib=plan.workspace_mib,
        reserved_mib=unlimited.reserved_mib,
        process_mib=unlimited.process_mib,
        budget_mib=plan.budget_mib,
        fits=plan.fits,
    )


def _gpu_spec_path(gpu: str | Path) -> Path:
    path = Path(gpu) if str(gpu).endswith((".yaml", ".yml")) else paths.conf_dir() / "gpu" / f"{gpu}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(each.stem for each in (paths.conf_dir() / "gpu").glob("*.yaml")))
        raise UserError(f"gpu={str(gpu)!r}: no such file; must be one of {names}, or the path of a YAML file")
    return path
