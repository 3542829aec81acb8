"""Record the memory that training steps of any `nn.Module` allocate on a GPU, in order, without a GPU.

As `trace` does for this project's own training: a copy of the module whose parameters and buffers have shapes
but no values takes a few steps of the usual training loop, and `fake_device` records the allocations.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from captcha_exp.config import Precision
from captcha_exp.errors import UserError, first_line
from captcha_exp.memory.fake_device import DEVICE, HOST, TensorRecorder, UntraceableError
from captcha_exp.memory.gpu_kernels import emulate_cuda_operators
from captcha_exp.memory.module_copy import (
    copy_to_fake_device,
    preserve_global_state,
    preserve_gradients,
    to_fake_device,
)
from captcha_exp.memory.torch_patches import allow_device_step_counts, disable_gc
from captcha_exp.memory.trace import NUM_FIRST_EPOCH_STEPS, Trace, make_trace, state_bytes
from captcha_exp.runtime.compiler import without_compiler

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
LossFunction: TypeAlias = Callable[..., Tensor]
AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def trace_module(
    module: nn.Module,
    example_batch: Any,
    optimizer: OptimizerFactory,
    loss: LossFunction,
    *,
    targets: Any = None,
    precision: Precision = "fp32",
) -> Trace:
    """Return the trace of the first training steps; the arguments are those of `plan_module`.

    Raises:
        UserError: the module cannot be traced; the message names the operator, the submodule and a remedy.
    """
    _check_functions(module, optimizer, loss)
    recorder = TensorRecorder()
    with (
        preserve_global_state(),
        disable_gc(),
        without_compiler(),
        torch.device(HOST),
        allow_device_step_counts(),
        emulate_cuda_operators(),
        recorder,
    ):
        recorder.begin_phase("state")
        size = _train_copy(module, (example_batch, targets), optimizer, loss, precision, recorder)
    return make_trace(recorder, state_bytes=size, resident_bytes=0)


def _train_copy(
    module: nn.Module,
    example: tuple[Any, Any],
    optimizer_factory: OptimizerFactory,
    loss_function: LossFunction,
    precision: Precision,
    recorder: TensorRecorder,
) -> int:
    """Run steps of the usual loop on a copy of the module, freed on return; return the bytes of its state.

    Batch, output and loss live until the next ones replace them.
    """
    memo: dict[int, Any] = {}
    parts = nn.ModuleList([module := copy_to_fake_device(module, memo)])
    if isinstance(loss_function, nn.Module):
        parts.append(loss_function := copy_to_fake_device(loss_function, memo))
    memo.clear()  # it holds references to the originals
    path = ModulePathTracker(module)
    recorder.get_module_path = path.current
    dtype = AUTOCAST_DTYPES[precision]
    with _raise_user_errors(path):
        loss_scale = torch.zeros((), device=DEVICE) if precision == "fp16" else None
        optimizer = optimizer_factory(module.parameters())
        _check_optimizer(optimizer, module)
        _use_foreach(optimizer)
        for step in range(1, NUM_FIRST_EPOCH_STEPS + 1):
            recorder.begin_phase(f"epoch 1: step {step}")
            batch, targets = tree_map_only(Tensor, to_fake_device, example)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                output = _call(module, batch)
                loss = loss_function(output) if targets is None else loss_function(output, targets)
            _check_loss_value(loss)
            with preserve_gradients(loss):
                scaled = loss if loss_scale is None else loss * loss_scale
                scaled.backward()
            recorder.allows_value_reads = True  # most optimizers read their step count
            optimizer.step()
            recorder.allows_value_reads = False
        recorder.begin_phase("end")
        return state_bytes(parts, optimizer)


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


def _check_functions(module: Any, optimizer: Any, loss: Any) -> None:
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


def _check_optimizer(optimizer: Any, module: nn.Module) -> None:
    """Raise UserError unless this is an optimizer of the module's parameters."""
    parameters = {id(each) for each in module.parameters()}
    if not isinstance(optimizer, torch.optim.Optimizer) or any(
        id(each) not in parameters for group in optimizer.param_groups for each in group["params"]
    ):
        raise UserError(
            "optimizer: must return a torch.optim.Optimizer of the parameters that it is called with, as "
            "lambda parameters: torch.optim.AdamW(parameters)"
        )


def _check_loss_value(value: Any) -> None:
    """Raise UserError unless the loss is a scalar tensor that depends on the parameters."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise UserError(
            "loss: must return a scalar tensor that depends on a parameter that requires a gradient; reduce "
            "it, e.g. with .mean(), and check .detach() and torch.no_grad()"
        )


class ModulePathTracker:
    """Finds the submodule that calls an operator, in the forward pass and in the backward pass.

    In the forward pass, hooks keep a stack of the running modules. In the backward pass no module runs, but
    the current autograd node has the sequence number of the forward operator that created it, and the module
    that was running at that number is known.
    """

    def __init__(self, module: nn.Module) -> None:
        """Add hooks to each submodule of `module`, which must be a private copy."""
        self._module_stack: list[str] = []
        # Autograd's sequence number at each change of the running module, and that module.
        self._changes: list[tuple[int, str | None]] = []
        for name, child in module.named_modules():
            child.register_forward_pre_hook(partial(self._enter, name or type(module).__name__))
            child.register_forward_hook(self._leave)

    def current(self) -> str | None:
        """Return the path of the submodule whose forward or backward pass is running; None outside of all."""
        node = torch._C._current_autograd_node()
        if node is None or self._module_stack:
            return self._module_stack[-1] if self._module_stack else None
        index = bisect_right(self._changes, node._sequence_nr(), key=itemgetter(0)) - 1
        return self._changes[index][1] if index >= 0 else None

    def _enter(self, name: str, *_: Any) -> None:
        self._module_stack.append(name)
        self._record_change()

    def _leave(self, *_: Any) -> None:
        self._module_stack.pop()
        self._record_change()

    def _record_change(self) -> None:
        running = self._module_stack[-1] if self._module_stack else None
        self._changes.append((torch._C._autograd._get_sequence_nr(), running))


@contextmanager
def _raise_user_errors(path: ModulePathTracker) -> Iterator[None]:
    """Convert an exception of a step into a UserError with the submodule and a remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        where = path.current() or "the loss or the optimizer"
        if isinstance(error, UntraceableError):
            raise UserError(f"{error.module_path or where}: {error}") from error
        remedy = "check that a step runs on the CPU, on the device of its input"
        raise UserError(f"{where}: {type(error).__name__}: {first_line(error)}; {remedy}") from error
