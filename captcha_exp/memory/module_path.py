"""Name the submodule that calls an operator, in the forward pass and in the backward pass.

In the forward pass hooks keep a stack of the modules that are running. In the backward pass no module runs;
there the autograd node that is running has the sequence number of the forward operator that made it, and the
module that was running at this number is known.
"""

from bisect import bisect_right
from typing import Any

import torch
from torch import nn


class ModulePath:
    """Follows which submodule is running."""

    def __init__(self, module: nn.Module) -> None:
        """Add hooks to each submodule of `module`, which is a copy that nobody else uses."""
        self._names: list[str] = []
        self._numbers: list[int] = []  # autograd sequence numbers, at which another module began to run
        self._running: list[str] = []
        for name, child in module.named_modules():
            child.register_forward_pre_hook(self._enter(name or type(module).__name__))
            child.register_forward_hook(self._exit)

    def begin_step(self) -> None:
        """Forget the step before this one."""
        self._names, self._numbers, self._running = [], [], []

    def current(self) -> str | None:
        """Return the path of the submodule that is running or whose backward pass is; None outside of all."""
        node = torch._C._current_autograd_node()
        if node is None or self._running:
            return self._running[-1] if self._running else None
        place = bisect_right(self._numbers, node._sequence_nr()) - 1
        return (self._names[place] or None) if place >= 0 else None

    def _enter(self, name: str) -> Any:
        def hook(*_: Any) -> None:
            self._running.append(name)
            self._mark()

        return hook

    def _exit(self, *_: Any) -> None:
        self._running.pop()
        self._mark()

    def _mark(self) -> None:
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._names.append(self._running[-1] if self._running else "")
