"""Trace the training steps of any `nn.Module`: which memory they ask of a GPU, in order, without a GPU.

As `trace` does for a training of this project: a copy of the module whose parameters and buffers have shapes
and no values takes a few steps of the usual training loop, and `recorder` sees memory come and go.
"""

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from captcha_exp.errors import UserError
from captcha_exp.memory.gpu_kernels import cuda_operators
from captcha_exp.memory.module_path import ModulePath
from captcha_exp.memory.recorder import DEVICE, HOST, Recorder, Untraceable
from captcha_exp.memory.trace import Trace, phases_of, steps_counted_on_device, without_collector

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Loss: TypeAlias = Callable[..., Tensor]
ModulePrecision: TypeAlias = Literal["fp32", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def trace_module(
    module: nn.Module,
    example_batch: Any,
    optimizer: OptimizerFactory,
    loss: Loss,
    *,
    targets: Any = None,
    precision: ModulePrecision = "fp32",
    steps: int = 3,
) -> Trace:
    """Return the trace of this many training steps; the arguments are those of `plan_module`.

    Raises: UserError for a module that cannot be traced; it names the operator, the submodule and a remedy.
    """
    recorder = Recorder()
    sizes: dict[str, int] = {}
    with (
        without_collector(),
        _rng_state_kept(),
        torch.device(HOST),
        steps_counted_on_device(),
        cuda_operators(),
        recorder,
    ):
        recorder.begin("state")
        _run(module, (example_batch, targets), optimizer, loss, precision, steps, recorder, sizes)
    return Trace(
        recorder.events,
        phases_of(recorder.events, recorder.marks),
        recorder.convolutions,
        **sizes,
        resident_bytes=0,
    )


def _run(
    module: nn.Module,
    example: tuple[Any, Any],
    optimizer: OptimizerFactory,
    loss: Loss,
    precision: ModulePrecision,
    steps: int,
    recorder: Recorder,
    sizes: dict[str, int],
) -> None:
    """Train a copy, which is freed at the end."""
    on_device = _copy(module)
    path = ModulePath(on_device)
    recorder.locate = path.current
    with _errors_named(path):
        _train(on_device, example, optimizer, loss, precision, steps, recorder, path, sizes)


@contextmanager
def _rng_state_kept() -> Iterator[None]:
    """Put the states of torch's and Python's generators back, which the module's own code may advance."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(state)


def _copy(module: nn.Module) -> nn.Module:
    """Return a copy of the module with parameters and buffers of the device.

    No value is copied. Tied parameters stay tied.
    """
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise UserError(f"{name}: the shape of a lazy parameter is unknown; call the module once before")
        memo[id(parameter)] = nn.Parameter(_sent(parameter), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = _sent(buffer)
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise UserError(
            f"{type(module).__name__}: copy.deepcopy cannot copy it ({_first_line(error)})"
        ) from error


def _sent(tensor: Tensor) -> Tensor:
    """Return a tensor of the device with this shape, as `tensor.to(device)`."""
    here = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=HOST)
    return here.to(DEVICE)


def _batch_on_device(batch: Any) -> Any:
    return tree_map(lambda each: _sent(each) if isinstance(each, Tensor) else each, batch)


def _train(
    module: nn.Module,
    example: tuple[Any, Any],
    optimizer_factory: OptimizerFactory,
    loss_function: Loss,
    precision: ModulePrecision,
    steps: int,
    recorder: Recorder,
    path: ModulePath,
    sizes: dict[str, int],
) -> None:
    """Take the steps of the usual loop. Batch, output and loss live until the next ones replace them."""
    loss_scale = torch.zeros((), device=DEVICE) if precision == "fp16" else None
    optimizer = optimizer_factory(module.parameters())
    _use_foreach(optimizer)
    for number in range(1, steps + 1):
        recorder.begin(f"epoch 1: step {number}")
        path.begin_step()
        batch, targets = _batch_on_device(example)
        optimizer.zero_grad()
        autocast = torch.autocast("cpu", DTYPES[precision]) if precision != "fp32" else nullcontext()
        with autocast:
            output = _call(module, batch)
            loss = loss_function(output) if targets is None else loss_function(output, targets)
        scaled = loss if loss_scale is None else loss * loss_scale
        scaled.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        with recorder.reads_answered():  # most read their step count, a tensor of the host
            optimizer.step()
    recorder.begin("end")
    kept = [value for values in optimizer.state.values() for value in values.values()]
    sizes["parameters_bytes"] = _bytes(module.parameters())
    sizes["buffers_bytes"] = _bytes(module.buffers())
    sizes["optimizer_bytes"] = _bytes(value for value in kept if isinstance(value, Tensor))


def _call(module: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return module(**batch)
    return module(*batch) if isinstance(batch, (tuple, list)) else module(batch)


def _use_foreach(optimizer: torch.optim.Optimizer) -> None:
    """Choose the multi-tensor implementation, torch's default on CUDA, where the user chose none."""
    for group in (optimizer.defaults, *optimizer.param_groups):
        is_open = group.get("foreach") is None and not group.get("fused")
        if "foreach" in group and is_open and not group.get("differentiable"):
            group["foreach"] = True


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(each.nbytes for each in tensors if each.device == DEVICE)


@contextmanager
def _errors_named(path: ModulePath) -> Iterator[None]:
    """Turn an error of the steps into one line that says where it came from and what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = _untraceable(error)
        if cause is not None:
            where = cause.module_path or path.current() or "the loss or the optimizer"
            text = f"{where}: {cause.operator} {cause.reason}; {cause.remedy}"
        else:
            where = path.current() or "outside of the module (loss or optimizer)"
            text = (
                f"{where}: {type(error).__name__}: {_first_line(error)}; check that the step runs on the CPU"
            )
        raise UserError(text) from error


def _untraceable(error: BaseException | None) -> Untraceable | None:
    while error is not None and not isinstance(error, Untraceable):
        error = error.__cause__ or error.__context__
    return error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
