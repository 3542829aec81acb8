"""Changes to torch while a trace or a training runs.

`without_compiler` runs torch's optimizers without importing torch's compiler, which takes longer than several
traces. An optimizer imports `torch._dynamo` when it is built and in each step, only to exclude itself from
compilation. Neither a trace nor a training compiles anything, so a stub suffices.

Source: torch/_compile.py, `_disable_dynamo`, and torch/optim/optimizer.py, `_use_grad_for_differentiable`.
"""

import gc
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

from torch.optim import Optimizer

from captcha_exp.memory.fake_device import DEVICE

DYNAMO_MODULE = "torch._dynamo"


@contextmanager
def replace_attributes(replacements: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Replace attributes inside the block, each given as its owner, name and value."""
    replacements = list(replacements)
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in replacements]
    for owner, name, value in replacements:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)


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


@contextmanager
def disable_gc() -> Iterator[None]:
    """Disable garbage collection, which would visit every object of the imported modules to no effect."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def allow_device_step_counts() -> AbstractContextManager[None]:
    """Allow torch's optimizers to count steps on the device or on the host, which are not CUDA and CPU here.

    Each module of torch.optim imports the list of devices that may count steps, which lacks the CPU. And
    torch groups the tensors of a multi-tensor step only if each is on its parameter's device or the CPU.
    """
    name = "_get_capturable_supported_devices"
    modules = [each for path, each in sorted(sys.modules.items()) if path.startswith("torch.optim.")]
    replacements = [(each, name, lambda *_, **__: [DEVICE.type]) for each in modules if hasattr(each, name)]
    grouping = staticmethod(_group_tensors)
    return replace_attributes([*replacements, (Optimizer, "_group_tensors_by_device_and_dtype", grouping)])


def _group_tensors(tensors: list[list[Any]], with_indices: bool = False) -> dict[Any, Any]:
    """Return the lists of tensors, grouped by device and dtype of the first list, with indices on request.

    Source: torch/csrc/Module.cpp and aten/src/ATen/native/ForeachUtils.h, without their device checks.
    """
    groups: dict[Any, tuple[list[list[Any]], list[int]]] = {}
    for index, first in enumerate(tensors[0]):
        lists, indices = groups.setdefault((first.device, first.dtype), ([[] for _ in tensors], []))
        for group, values in zip(lists, tensors, strict=True):
            if values:
                group.append(values[index])
        if with_indices:
            indices.append(index)
    return groups
