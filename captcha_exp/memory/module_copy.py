"""Copy a module to the device of a trace, without changes to the caller's objects."""

import copy
import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captcha_exp.errors import UserError, first_line
from captcha_exp.memory.fake_device import DEVICE, HOST, DeviceTensor
from captcha_exp.memory.torch_patches import replace_attributes

_trace_lock = threading.RLock()  # a trace replaces operators and settings of the process


@contextmanager
def preserve_global_state() -> Iterator[None]:
    """Trace in one thread at a time, and restore global state that the module may change.

    Restored are the RNG states of torch and Python and the default dtype. The caller's no_grad,
    inference_mode and autocast do not apply inside.
    """
    with (
        _trace_lock,
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=False),
        torch.random.fork_rng(devices=[]),
    ):
        state, dtype = random.getstate(), torch.get_default_dtype()
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            random.setstate(state)


def to_fake_device(tensor: Tensor) -> Tensor:
    """Return a device tensor with this shape, as `tensor.to(device)`."""
    on_host = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=HOST)
    return on_host.to(DEVICE)


def copy_to_fake_device(original: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a copy of a module whose parameters, buffers and other tensors are device tensors.

    No value is copied. Tied parameters stay tied, also across modules copied with the same `memo`.

    Raises:
        UserError: copy.deepcopy fails.
    """
    replacements = [(each, "__deepcopy__", _deepcopy_to_fake_device) for each in (Tensor, nn.Parameter)]
    try:
        with replace_attributes(replacements):
            return copy.deepcopy(original, memo)
    except Exception as error:
        raise UserError(
            f"{type(original).__name__}: copy.deepcopy cannot copy it ({first_line(error)})"
        ) from error


def _deepcopy_to_fake_device(tensor: Tensor, _: dict[int, Any]) -> Tensor:
    """Return a device tensor instead of a copy, also for attributes that are no buffer."""
    copied = to_fake_device(tensor)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copied, tensor.requires_grad)
    return copied.requires_grad_(tensor.requires_grad and tensor.is_leaf)


@contextmanager
def preserve_gradients(loss: Tensor) -> Iterator[None]:
    """Restore the gradients of the caller's tensors, such as a parameter that the loss closes over."""
    saved = [(leaf, leaf.grad) for leaf in _grad_leaves(loss) if not isinstance(leaf, DeviceTensor)]
    for leaf, _ in saved:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, gradient in saved:
            leaf.grad = gradient


def _grad_leaves(loss: Tensor) -> Iterable[Tensor]:
    """Return the tensors whose gradient `loss.backward()` accumulates."""
    if loss.grad_fn is None:
        return [loss]
    pending, visited, leaves = [loss.grad_fn], {loss.grad_fn}, []
    while pending:
        node = pending.pop()
        variable = getattr(node, "variable", None)  # of an AccumulateGrad
        if isinstance(variable, Tensor):
            leaves.append(variable)
        for next_node, _ in node.next_functions:
            if next_node is not None and next_node not in visited:
                visited.add(next_node)
                pending.append(next_node)
    return leaves
