"""Find the submodule that calls an operator, in the forward pass and in the backward pass.

In the forward pass, hooks keep a stack of the running modules. In the backward pass no module runs, but the
current autograd node has the sequence number of the forward operator that created it, and the module that was
running at that number is known.
"""

from bisect import bisect_right
from typing import Any

import torch
from torch import nn


class ModulePathTracker:
    """Tracks the running submodule."""

    def __init__(self, module: nn.Module) -> None:
        """Add hooks to each submodule of `module`, which must be a private copy."""
        self._names: list[str] = []
        self._sequence_numbers: list[int] = []  # of autograd, at each change of the running module
        self._module_stack: list[str] = []
        for name, child in module.named_modules():
            child.register_forward_pre_hook(self._make_pre_hook(name or type(module).__name__))
            child.register_forward_hook(self._forward_hook)

    def begin_step(self) -> None:
        """Clear the records of the previous step."""
        self._names, self._sequence_numbers, self._module_stack = [], [], []

    def current(self) -> str | None:
        """Return the path of the submodule whose forward or backward pass is running; None outside of all."""
        node = torch._C._current_autograd_node()
        if node is None or self._module_stack:
            return self._module_stack[-1] if self._module_stack else None
        index = bisect_right(self._sequence_numbers, node._sequence_nr()) - 1
        return (self._names[index] or None) if index >= 0 else None

    def _make_pre_hook(self, name: str) -> Any:
        def hook(*_: Any) -> None:
            self._module_stack.append(name)
            self._record_current()

        return hook

    def _forward_hook(self, *_: Any) -> None:
        self._module_stack.pop()
        self._record_current()

    def _record_current(self) -> None:
        self._sequence_numbers.append(torch._C._autograd._get_sequence_nr())
        self._names.append(self._module_stack[-1] if self._module_stack else "")
