"""Run torch without importing its compiler, which takes longer than several traces of a training.

An optimizer imports `torch._dynamo` when it is built and in each step, a kernel of the device `meta` when
it is called, only to exclude themselves from compilation. Nothing here is compiled: a stub suffices.

Source: torch/_compile.py, `_disable_dynamo`, and torch/optim/optimizer.py, `_use_grad_for_differentiable`.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

DYNAMO_MODULE = "torch._dynamo"


class _DynamoStub(ModuleType):
    """A stub with the two functions that an optimizer calls; any other attribute imports the real module."""

    def __init__(self) -> None:
        super().__init__(DYNAMO_MODULE)
        self._disabled_functions: list[Any] = []

    def disable(self, function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        """Return the function itself, because nothing is compiled."""
        self._disabled_functions.append(function)
        return function

    def graph_break(self, *_: Any, **__: Any) -> None:
        """Do nothing, as in code that is not compiled."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.uninstall()
        return getattr(importlib.import_module(DYNAMO_MODULE), name)

    def uninstall(self) -> None:
        """Restore torch, whose later calls import the real module."""
        if sys.modules.get(DYNAMO_MODULE) is self:
            del sys.modules[DYNAMO_MODULE]
        for function in self._disabled_functions:
            if getattr(function, "__dynamo_disable", None) is function:
                delattr(function, "__dynamo_disable")  # `del` would mangle the name
        self._disabled_functions.clear()


@contextmanager
def without_compiler() -> Iterator[None]:
    """Replace `torch._dynamo` by a stub unless the process has imported it already."""
    if DYNAMO_MODULE in sys.modules:
        yield
        return
    sys.modules[DYNAMO_MODULE] = stub = _DynamoStub()
    try:
        yield
    finally:
        stub.uninstall()
