"""Changes to torch while a trace runs.

Source: torch/optim/optimizer.py and the modules of torch.optim.
"""

import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch.optim import Optimizer

from captcha_exp.memory.fake_device import DEVICE


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
