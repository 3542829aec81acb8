"""Copy a module to the device of a trace, without changes to the caller's objects."""

import copy
import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from captcha_exp.errors import UserError, first_line
from captcha_exp.memory.fake_device import DEVICE, HOST, DeviceTensor

CopiedT = TypeVar("CopiedT")
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


def parameter_to_fake_device(parameter: Tensor) -> nn.Parameter:
    """Return a device parameter with this shape."""
    return nn.Parameter(to_fake_device(parameter), parameter.requires_grad)


def copy_to_fake_device(original: CopiedT, memo: dict[int, Any]) -> CopiedT:
    """Return a copy of a module whose parameters, buffers and other tensors are device tensors.

    No value is copied. Tied parameters stay tied, also across modules copied with the same `memo`.

    Raises:
        UserError: a parameter is lazy, or copy.deepcopy fails; the message names it.
    """
    if isinstance(original, nn.Module):
        for name, parameter in original.named_parameters():
            if nn.parameter.is_lazy(parameter):
                raise UserError(
                    f"{name}: the shape of a lazy parameter is unknown; call the module once first"
                )
    try:
        with _deepcopy_to_fake_device():
            return copy.deepcopy(original, memo)
    except Exception as error:
        name = type(original).__name__
        raise UserError(f"{name}: copy.deepcopy cannot copy it ({first_line(error)})") from error


@contextmanager
def _deepcopy_to_fake_device() -> Iterator[None]:
    """Make copy.deepcopy move tensors to the device, including attributes that are no buffer."""
    originals = {each: each.__dict__["__deepcopy__"] for each in (Tensor, nn.Parameter)}

    def deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        if id(tensor) not in memo:
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = (
                parameter_to_fake_device(tensor) if is_parameter else _leaf_to_fake_device(tensor)
            )
        copied: Tensor = memo[id(tensor)]
        return copied

    for each in originals:
        setattr(each, "__deepcopy__", deepcopy)  # noqa: B010 - mypy rejects an assignment to a method
    try:
        yield
    finally:
        for each, function in originals.items():
            setattr(each, "__deepcopy__", function)  # noqa: B010


def _leaf_to_fake_device(tensor: Tensor) -> Tensor:
    """Return a device tensor with this shape; a leaf keeps its requires_grad."""
    return to_fake_device(tensor).requires_grad_(tensor.requires_grad and tensor.is_leaf)


class SavedGradients:
    """The gradients of the caller's tensors, such as a parameter that a loss closes over."""

    def __init__(self) -> None:
        self._saved: dict[int, tuple[Tensor, Tensor | None]] = {}

    def save(self, loss: Tensor) -> None:
        """Save and clear the gradient of each leaf of the loss that the trace did not create."""
        for leaf in _grad_leaves(loss):
            if not isinstance(leaf, DeviceTensor) and id(leaf) not in self._saved:
                self._saved[id(leaf)] = leaf, leaf.grad
                leaf.grad = None

    def restore(self) -> None:
        """Restore the gradients."""
        for leaf, gradient in self._saved.values():
            leaf.grad = gradient
        self._saved.clear()


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
