"""The memory of every optimizer of torch, compared with real steps on the CPU."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from support import networks as modules
from torch import nn

from captcha_exp.memory.module_trace import trace_module

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [
    "Adafactor",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
]
OPTIONS: dict[str, dict[str, Any]] = {
    "RMSprop": {"momentum": 0.9, "centered": True},
    "SGD": {"momentum": 0.9},
    "Adam": {"amsgrad": True},
    "ASGD": {"t0": 0},  # averages from the second step on
}
STEPS = 7  # RAdam needs more memory from the sixth step on
SCALARS = 4 * 64  # step counts and similar scalars, which may be on the host


def network() -> nn.Module:
    return nn.Sequential(*(nn.Linear(96, 96) for _ in range(6)))


def cross_entropy(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output, targets)


@pytest.mark.long
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_peak_matches_real_steps(name: str, foreach: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "STEPS", STEPS)
    module, inputs, targets = network(), torch.rand(16, 96), torch.zeros(16, dtype=torch.int64)
    optimizer = partial(getattr(torch.optim, name), lr=1e-3, foreach=foreach, **OPTIONS.get(name, {}))

    traced = trace_module(module, inputs, optimizer, cross_entropy, targets=targets)

    real, _ = modules.train_for_real(module, inputs, targets, optimizer)
    assert real == pytest.approx(traced.peak_bytes("step"), rel=0.01)


@pytest.mark.parametrize("name", [*NAMES, "Muon"])
def test_the_state_matches_a_real_step_with_default_arguments(name: str) -> None:
    module = nn.Sequential(*(nn.Linear(96, 96, bias=False) for _ in range(6)))
    factory = getattr(torch.optim, name)

    traced = trace_module(module, torch.rand(16, 96), factory, lambda output: output.mean())

    module(torch.rand(16, 96)).mean().backward()
    optimizer = factory(module.parameters())
    optimizer.step()
    real = sum(each.nbytes for each in tensors(optimizer) if each.ndim)
    optimizer_bytes = traced.state_bytes - sum(each.nbytes for each in module.parameters())
    assert real <= optimizer_bytes <= real + SCALARS
    assert all(each.grad is not None for each in module.parameters())


def tensors(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    return (x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("name", ["Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adadelta", "ASGD"])
def test_capturable_optimizers_can_be_traced(name: str) -> None:
    """capturable=True, which torch only allows on some devices such as CUDA."""
    optimizer = partial(getattr(torch.optim, name), capturable=True)
    traced = trace_module(network(), torch.rand(16, 96), optimizer, lambda output: output.mean())
    assert traced.state_bytes > sum(each.nbytes for each in network().parameters())


def test_torch_is_restored_after_a_trace() -> None:
    grouped = torch.optim.Optimizer.__dict__["_group_tensors_by_device_and_dtype"]
    trace_module(network(), torch.rand(16, 96), torch.optim.NAdam, lambda output: output.mean())
    assert torch.optim.Optimizer.__dict__["_group_tensors_by_device_and_dtype"] is grouped
    module = network()
    module(torch.rand(16, 96)).mean().backward()
    optimizer = torch.optim.NAdam(module.parameters(), capturable=True, foreach=True)
    with pytest.raises(AssertionError, match="capturable"):
        optimizer.step()
