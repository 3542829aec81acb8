"""The arguments of plan_module, the caller's objects, which do not change, and error messages."""

import random
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captcha_exp.errors import UserError
from captcha_exp.memory import plan_module
from captcha_exp.memory.module_trace import trace_module
from captcha_exp.memory.trace import Trace

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH = torch.empty(4, 8)


def mean(output: Tensor) -> Tensor:
    return output.float().mean()


def traced(module: nn.Module, **arguments: Any) -> Trace:
    options: dict[str, Any] = {"optimizer": torch.optim.SGD, "loss": mean, **arguments}
    return trace_module(module, options.pop("batch", BATCH), **options)


# -- tensors that are neither parameters nor buffers ----------------------------------------------------


class KeepsTensors(nn.Module):
    """A module with a tensor that is no buffer; it also keeps its last output."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.layer, self.positions, self.kept = nn.Linear(8, 8), torch.zeros(size, 8), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.positions += 1
        y: Tensor = self.layer(x) + self.positions[0]
        self.last, self.kept = y, [y.detach()]
        return y


def test_a_plain_tensor_attribute_is_counted() -> None:
    small, large = (traced(KeepsTensors(size)).peak_bytes("step") for size in (8, 1008))
    assert large - small == 1000 * 8 * 4


def test_a_module_may_keep_its_last_output() -> None:
    module = KeepsTensors()
    output = module(torch.rand(4, 8))
    positions = module.positions.clone()

    assert traced(module).peak_bytes("step") > 0

    assert module.last is output
    assert torch.equal(module.positions, positions)
    assert type(module.kept[0]) is Tensor


# -- the caller's objects ------------------------------------------------------------------------------


def test_an_optimizer_of_other_parameters_is_rejected_unchanged() -> None:
    module = nn.Linear(8, 8)
    module(torch.rand(4, 8)).sum().backward()
    optimizer = torch.optim.SGD(module.parameters(), momentum=0.9)
    gradient = module.weight.grad

    with pytest.raises(UserError, match=r"optimizer: must return a .+ of the parameters that"):
        traced(module, optimizer=lambda _: optimizer)

    assert module.weight.grad is gradient
    assert optimizer.param_groups[0]["foreach"] is None
    assert not optimizer.state


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_of_a_closure_keep_their_gradients(fails: bool) -> None:
    critic = nn.Linear(8, 8)
    critic.weight.grad = gradient = torch.ones(8, 8)
    critic.weight.grad.requires_grad_(False)
    calls = []

    def loss(output: Tensor) -> Tensor:
        calls.append(output.shape)
        if fails and len(calls) == 2:
            raise ValueError("second step")
        result: Tensor = critic(output).sum()
        return result

    if fails:
        with pytest.raises(UserError, match="second step"):
            traced(nn.Linear(8, 8), loss=loss)
    else:
        traced(nn.Linear(8, 8), loss=loss)
    assert critic.weight.grad is gradient
    assert torch.equal(gradient, torch.ones(8, 8))
    assert critic.bias.grad is None


def test_a_loss_with_parameters_is_copied_and_counted() -> None:
    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.calls = 0

        def forward(self, output: Tensor) -> Tensor:
            self.calls += 1
            result: Tensor = self.layer(output).sum()
            return result

    critic = Critic()
    found = traced(nn.Linear(8, 8), loss=critic)
    assert found.state_bytes == 2 * 4 * (8 * 8 + 8)
    assert critic.layer.weight.grad is None
    assert critic.calls == 0


def test_a_loss_shares_parameters_with_the_module() -> None:
    module = nn.Linear(8, 8)

    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of = module

        def forward(self, output: Tensor) -> Tensor:
            return output.sum() + self.of.weight.square().sum()

    assert traced(module, loss=Decay()).state_bytes == 4 * (8 * 8 + 8)


@pytest.mark.parametrize("fails", [False, True])
def test_the_settings_of_the_process_are_restored(fails: bool) -> None:
    def loss(output: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        random.random()
        if fails:
            raise ValueError("invalid")
        return output.mean()

    state, deepcopy = random.getstate(), Tensor.__deepcopy__
    try:
        if fails:
            with pytest.raises(UserError, match="invalid"):
                traced(nn.Linear(8, 8), loss=loss)
        else:
            traced(nn.Linear(8, 8), loss=loss)
        assert torch.get_default_dtype() == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert random.getstate() == state
    assert Tensor.__deepcopy__ is deepcopy


def test_traces_of_several_threads_take_turns() -> None:
    """Otherwise each trace would restore state that another one has set."""
    thread_ids: list[int] = []
    peaks: list[int] = []

    def loss(output: Tensor) -> Tensor:
        thread_ids.append(threading.get_ident())
        return output.mean()

    def plan() -> None:
        barrier.wait(timeout=60)
        peaks.append(traced(nn.Sequential(nn.Linear(8, 8), nn.Dropout()), loss=loss).peak_bytes())

    onednn, count = torch._C._get_mkldnn_enabled(), 4
    barrier = threading.Barrier(count)
    threads = [threading.Thread(target=plan) for _ in range(count)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(timeout=60)
    assert len(set(peaks)) == 1
    assert len(peaks) == count
    assert [a != b for a, b in pairwise(thread_ids)].count(True) == count - 1
    assert torch._C._get_mkldnn_enabled() == onednn


def test_grad_and_autocast_modes_of_the_caller_do_not_apply() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    batch = torch.empty(256, 64)
    expected = traced(module, batch=batch).peak_bytes("step")
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            assert traced(module, batch=batch).peak_bytes("step") == expected


def test_a_loss_may_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    traced(nn.Linear(8, 8), loss=lambda output: (print(output), output.mean())[1])  # noqa: T201
    assert "DeviceTensor(shape=(4, 8), dtype=torch.float32)" in capsys.readouterr().out


# -- errors --------------------------------------------------------------------------------------------


BUDGET = "must be a finite number of MiB above 0"
MODULE = "module: must be a torch.nn.Module with a parameter that requires a gradient, not this "
RUNS = "; check that a step runs on the CPU, on the device of its input"
OPTIMIZER = "optimizer: must return a torch.optim.Optimizer of the parameters that it is called with"
LOSS = "loss: must return a scalar tensor that depends on a parameter that requires a gradient"
INVALID: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "infinite budget": (lambda: {"budget_mib": float("inf")}, f"budget_mib=inf: {BUDGET}"),
    "text budget": (lambda: {"budget_mib": "4000"}, f"budget_mib='4000': {BUDGET}"),
    "function": (lambda: {"module": mean}, f"{MODULE}function"),
    "no parameters": (lambda: {"module": nn.ReLU()}, f"{MODULE}ReLU"),
    "frozen": (lambda: {"module": nn.Linear(8, 8).requires_grad_(False)}, f"{MODULE}Linear"),
    "instance": (
        lambda: {"optimizer": torch.optim.SGD(nn.Linear(8, 8).parameters())},
        "optimizer: must be callable, e.g. torch.optim.AdamW ",
    ),
    "name": (lambda: {"optimizer": "adam"}, "optimizer: must be callable, e.g. torch.optim.AdamW "),
    "nothing": (lambda: {"optimizer": lambda _: None}, OPTIMIZER),
    "closure": (
        lambda: {"optimizer": torch.optim.LBFGS},
        "the loss or the optimizer: TypeError: LBFGS.step() missing 1 required positional argument",
    ),
    "sparse": (
        lambda: {"optimizer": torch.optim.SparseAdam},
        "the loss or the optimizer: RuntimeError: SparseAdam does not support dense gradients",
    ),
    "no targets": (
        lambda: {"loss": nn.MSELoss()},
        "the loss or the optimizer: TypeError: MSELoss.forward() missing 1 required positional argument: "
        f"'target'{RUNS}",
    ),
    "targets": (
        lambda: {"targets": BATCH},
        "the loss or the optimizer: TypeError: mean() takes 1 positional",
    ),
    "no loss": (lambda: {"loss": None}, "loss: must be callable, e.g. "),
    "many losses": (lambda: {"loss": lambda x: x}, LOSS),
    "number": (lambda: {"loss": lambda x: 1.0}, LOSS),
    "detached": (lambda: {"loss": lambda x: x.detach().sum()}, LOSS),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_argument_is_a_one_line_error(name: str) -> None:
    make_options, message = INVALID[name]
    options = {"module": nn.Linear(8, 8), "optimizer": torch.optim.SGD, "loss": mean, **make_options()}
    with pytest.raises(UserError) as raised:
        plan_module(options.pop("module"), BATCH, **options)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_is_rejected() -> None:
    part = torch.jit.trace(nn.Linear(8, 8), torch.rand(4, 8))  # type: ignore[no-untyped-call]
    with pytest.raises(UserError, match=r"^1: a TorchScript module cannot be traced"):
        traced(nn.Sequential(nn.Linear(8, 8), part))


@pytest.mark.skipif(torch.cuda.is_available(), reason="works with CUDA")
def test_a_tensor_moved_to_cuda_has_its_own_remedy() -> None:
    with pytest.raises(UserError, match="on the device of its input"):
        traced(nn.Linear(8, 8), loss=lambda output: output.cuda().mean())
