"""Record the memory that training steps of any `nn.Module` allocate on a GPU, in order, without a GPU.

As `trace` does for this project's own training: a copy of the module whose parameters and buffers have shapes
but no values takes a few steps of the usual training loop, and `fake_device` records the allocations.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from captcha_exp.errors import UserError, first_line
from captcha_exp.memory.fake_device import DEVICE, HOST, TensorRecorder, UntraceableError
from captcha_exp.memory.gpu_kernels import emulate_cuda_operators
from captcha_exp.memory.module_checks import (
    check_loss,
    check_loss_value,
    check_module,
    check_optimizer,
    check_optimizer_factory,
)
from captcha_exp.memory.module_copy import (
    SavedGradients,
    copy_to_fake_device,
    preserve_global_state,
    to_fake_device,
)
from captcha_exp.memory.module_path import ModulePathTracker
from captcha_exp.memory.trace import Trace, allow_device_step_counts, compute_phases, disable_gc

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
LossFunction: TypeAlias = Callable[..., Tensor]
ModulePrecision: TypeAlias = Literal["fp32", "bf16", "fp16"]
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def trace_module(
    module: nn.Module,
    example_batch: Any,
    optimizer: OptimizerFactory,
    loss: LossFunction,
    *,
    targets: Any = None,
    precision: ModulePrecision = "fp32",
    steps: int = 3,
) -> Trace:
    """Return the trace of this many training steps; the arguments are those of `plan_module`.

    Raises:
        UserError: the module cannot be traced; the message names the operator, the submodule and a remedy.
    """
    check_module(module)
    check_optimizer_factory(optimizer)
    check_loss(loss, targets is not None)
    recorder = TensorRecorder()
    sizes: dict[str, int] = {}
    with (
        preserve_global_state(),
        disable_gc(),
        torch.device(HOST),
        allow_device_step_counts(),
        emulate_cuda_operators(),
        recorder,
    ):
        recorder.begin_phase("state")
        _run_on_copy(module, (example_batch, targets), optimizer, loss, precision, steps, recorder, sizes)
    return Trace(
        recorder.events,
        compute_phases(recorder.events, recorder.phase_starts),
        recorder.convolutions,
        **sizes,
        resident_bytes=0,
    )


def _run_on_copy(
    module: nn.Module,
    example: tuple[Any, Any],
    optimizer: OptimizerFactory,
    loss: LossFunction,
    precision: ModulePrecision,
    steps: int,
    recorder: TensorRecorder,
    sizes: dict[str, int],
) -> None:
    """Train a copy of the module, which is freed at the end."""
    memo: dict[int, Any] = {}
    on_device = copy_to_fake_device(module, memo)
    if isinstance(loss, nn.Module):
        loss = copy_to_fake_device(loss, memo)
    memo.clear()  # it holds references to the originals
    path, grads = ModulePathTracker(on_device), SavedGradients()
    recorder.get_module_path = path.current
    try:
        with _raise_user_errors(path):
            _train(on_device, example, optimizer, loss, precision, steps, recorder, path, grads, sizes)
    finally:
        grads.restore()


def _batch_to_fake_device(batch: Any) -> Any:
    return tree_map(lambda each: to_fake_device(each) if isinstance(each, Tensor) else each, batch)


def _train(
    module: nn.Module,
    example: tuple[Any, Any],
    optimizer_factory: OptimizerFactory,
    loss_function: LossFunction,
    precision: ModulePrecision,
    steps: int,
    recorder: TensorRecorder,
    path: ModulePathTracker,
    grads: SavedGradients,
    sizes: dict[str, int],
) -> None:
    """Run steps of the usual loop. Batch, output and loss live until the next ones replace them."""
    loss_scale = torch.zeros((), device=DEVICE) if precision == "fp16" else None
    optimizer = optimizer_factory(module.parameters())
    check_optimizer(optimizer, module)
    _use_foreach(optimizer)
    for step in range(1, steps + 1):
        recorder.begin_phase(f"epoch 1: step {step}")
        path.begin_step()
        batch, targets = _batch_to_fake_device(example)
        optimizer.zero_grad()
        with torch.autocast(
            "cpu", AUTOCAST_DTYPES.get(precision, torch.bfloat16), enabled=precision in AUTOCAST_DTYPES
        ):
            output = _call(module, batch)
            loss = loss_function(output) if targets is None else loss_function(output, targets)
        check_loss_value(loss)
        grads.save(loss)
        scaled = loss if loss_scale is None else loss * loss_scale
        scaled.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        with recorder.allow_value_reads():  # most optimizers read their step count
            optimizer.step()
    recorder.begin_phase("end")
    state = [value for values in optimizer.state.values() for value in values.values()]
    parts = nn.ModuleList([module, *([loss_function] if isinstance(loss_function, nn.Module) else [])])
    sizes["parameters_bytes"] = _device_bytes(parts.parameters())
    sizes["buffers_bytes"] = _device_bytes(parts.buffers())
    sizes["optimizer_bytes"] = _device_bytes(value for value in state if isinstance(value, Tensor))


def _call(module: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return module(**batch)
    return module(*batch) if isinstance(batch, (tuple, list)) else module(batch)


def _use_foreach(optimizer: torch.optim.Optimizer) -> None:
    """Select the multi-tensor implementation, torch's default on CUDA, unless the user chose one."""
    for group in (optimizer.defaults, *optimizer.param_groups):
        is_default = group.get("foreach") is None and not group.get("fused")
        if "foreach" in group and is_default and not group.get("differentiable"):
            group["foreach"] = True


def _device_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(each.nbytes for each in tensors if each.device == DEVICE)


@contextmanager
def _raise_user_errors(path: ModulePathTracker) -> Iterator[None]:
    """Convert an exception of a step into a UserError with the submodule and a remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = _find_untraceable(error)
        if cause is not None:
            where = cause.module_path or path.current() or "the loss or the optimizer"
            text = f"{where}: {cause.operator} {cause.reason}; {cause.remedy}"
        else:
            where = path.current() or "outside of the module (loss or optimizer)"
            no_cuda = "not compiled with CUDA" in str(error) or "NVIDIA driver" in str(error)
            remedy = (
                "use the device of the input, e.g. x.device, instead of 'cuda'"
                if no_cuda
                else "check that the step runs on the CPU"
            )
            text = f"{where}: {type(error).__name__}: {first_line(error)}; {remedy}"
        raise UserError(text) from error


def _find_untraceable(error: BaseException | None) -> UntraceableError | None:
    while error is not None and not isinstance(error, UntraceableError):
        error = error.__cause__ or error.__context__
    return error
