"""plan_module against real steps on the CPU and manual calculations, and its effects on the caller."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import CASES, Tagger, ViT, compared
from torch import Tensor, nn

from captcha_exp.errors import UserError
from captcha_exp.memory import plan_module
from captcha_exp.memory.module_trace import trace_module
from captcha_exp.memory.plan import Plan

pytestmark = pytest.mark.usefixtures("one_thread")
DOCS = Path(__file__).parents[2] / "docs" / "plan_module.md"
MIB = 2**20


def peak(module: nn.Module, batch: Any, **arguments: Any) -> int:
    """Return the peak of a training step, in bytes."""
    loss = arguments.pop("loss", lambda output: output.float().mean())
    return trace_module(module, batch, torch.optim.SGD, loss, **arguments).peak_bytes("step")


# -- against real steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] if name in ("resnet50", "lstm") else []) for name in CASES],
)
def test_the_peak_matches_real_steps(name: str, record_property: Any) -> None:
    found = compared(name, 32)
    record_property("errors", found)
    assert abs(found["error"]) <= 0.03
    assert found["state_bytes"] < found["bytes"] / 2  # otherwise mainly the weights are compared


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_peak_of_a_larger_batch_matches_real_steps(name: str) -> None:
    found = compared(name, 48)
    assert abs(found["error"]) <= 0.03
    assert abs(found["raw_error"]) <= 0.06


# -- arithmetic -----------------------------------------------------------------------------------------


def test_state_matches_a_manual_calculation() -> None:
    module = nn.Sequential(nn.Linear(100, 50), nn.BatchNorm1d(50))
    traced = trace_module(module, torch.empty(64, 100), torch.optim.AdamW, lambda output: output.mean())

    num_params = 100 * 50 + 3 * 50
    buffers_bytes, optimizer_bytes = 4 * 2 * 50 + 8, 2 * 4 * num_params + 4 * 4
    assert traced.state_bytes == 4 * num_params + buffers_bytes + optimizer_bytes
    assert sum(event.requested_bytes is None for event in traced.events) == len(traced.events) / 2


def test_adam_uses_foreach_by_default() -> None:
    """foreach holds one more copy of all weights during its step."""
    module = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))

    def step_peak(**options: Any) -> int:
        traced = trace_module(
            module, torch.empty(2, 64), lambda p: torch.optim.Adam(p, **options), lambda x: x.mean()
        )
        return traced.peak_bytes("step")

    assert step_peak() == step_peak(foreach=True)
    assert step_peak() - step_peak(foreach=False) >= 5 * 4 * 64 * 64


def test_dropout_saves_one_byte_per_element_as_on_cuda() -> None:
    """Its input is freed and replaced by its output."""

    def block(dropout: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 8, 1), dropout, nn.Sigmoid())

    batch = torch.empty(32, 1, 32, 32)
    elements = 32 * 8 * 32 * 32
    assert peak(block(nn.Dropout(0.3)), batch) - peak(block(nn.Identity()), batch) == elements


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_fused_attention_saves_no_attention_matrix(dropout: float) -> None:
    """Four times the length, four times the memory: the matrix would take sixteen times."""
    layer = nn.TransformerEncoderLayer(16, 2, 16, dropout=dropout, batch_first=True)

    short, long = (peak(layer, torch.empty(32, length, 16)) for length in (64, 256))

    weights = 4 * sum(each.numel() for each in layer.parameters())
    assert long - 2 * weights == pytest.approx(4 * (short - 2 * weights), rel=0.02)


def test_autocast_normalizes_in_fp32_as_on_cuda() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    dtypes: list[torch.dtype] = []

    def loss(output: Tensor) -> Tensor:
        dtypes.append(output.dtype)
        return output.mean()

    peak(module, torch.empty(32, 64), loss=loss, precision="bf16")
    peak(module[0], torch.empty(32, 64), loss=loss, precision="fp16")
    assert set(dtypes[:3]) == {torch.float32}
    assert set(dtypes[3:]) == {torch.float16}


def test_an_lstm_saves_at_least_gates_and_cells_of_each_time_step() -> None:
    width, size = 32, 32
    short, long = (peak(nn.LSTM(width, width), torch.empty(n, size, width), loss=_first) for n in (20, 40))
    tensors = (long - short) / (20 * size * width * 4)
    assert 5 + 2 <= tensors <= 5 + 2 + 8  # plus input and output; more is used temporarily


@pytest.mark.parametrize("layer", [nn.GRU, nn.RNN, nn.LSTM])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers_with_batch_first_can_be_traced(layer: Any, bidirectional: bool) -> None:
    """torch transposes the output of some in place, which tensors without values do not support."""
    width, steps, size = 16, 12, 8
    by_time = layer(width, 32, bidirectional=bidirectional)
    by_image = layer(width, 32, bidirectional=bidirectional, batch_first=True)

    expected = peak(by_time, torch.empty(steps, size, width), loss=_first)

    found = peak(by_image, torch.empty(size, steps, width), loss=_first)
    assert expected <= found <= expected + 2 * 4 * steps * size * width  # its input is copied, at most twice


def _first(output: Any) -> Tensor:
    loss: Tensor = output[0].mean()
    return loss


# -- arguments ------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    """A module with two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        y: Tensor = self.layer(left) + right
        return y


def test_a_batch_may_be_a_tuple_or_a_dict_and_a_module_on_meta() -> None:
    left, right = torch.empty(32, 4), torch.empty(32, 4)
    with torch.device("meta"):
        meta = TwoInputs()
    expected = peak(TwoInputs(), (left, right))
    assert peak(TwoInputs(), {"right": right, "left": left}) == expected
    assert peak(meta, [left, right]) == expected


def test_the_verdict_follows_the_budget() -> None:
    def make_plan(budget_mib: float | None) -> Plan:
        loss = nn.CrossEntropyLoss()
        targets = torch.zeros(64, dtype=torch.int64)
        return plan_module(
            ViT(), torch.empty(64, 3, 64, 64), torch.optim.Adam, loss, targets=targets, budget_mib=budget_mib
        )

    plans = [make_plan(budget) for budget in (None, 60, 500, 4000)]
    assert [plan.fits for plan in plans] == [None, "does not fit", "unsure", "fits"]
    plan = plans[-1]
    assert plan.tensors_mib == pytest.approx(plan.state_mib + plan.activations_mib)
    assert plan.tensors_mib < plan.reserved_mib.min <= plan.reserved_mib.max < plan.process_mib.max
    assert (plan.batch_size, plan.images_mib, plan.evaluation.reserved_mib) == (0, 0, (0, 0))
    assert plan.describe("a GPU").endswith("budget 4,000 MiB: fits")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int8"}, "precision='int8': must be one of fp32, bf16, fp16"),
        ({"budget_mib": 0}, "budget_mib=0: must be a finite number of MiB above 0"),
        ({"gpu": "voodoo"}, "gpu=voodoo: no such file in conf/gpu; one of a10, "),
    ],
)
def test_an_invalid_argument_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        plan_module(nn.Linear(2, 2), torch.empty(2, 2), torch.optim.Adam, lambda x: x.mean(), **arguments)


# -- what must not change -------------------------------------------------------------------------------


def test_objects_of_the_caller_do_not_change() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout())
    module[1].eval()
    module(torch.rand(4, 8)).sum().backward()
    batch = torch.rand(32, 8)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    gradients = [each.grad.clone() for each in module.parameters() if each.grad is not None]
    modes = [each.training for each in module.modules()]
    hooks = [len(each._forward_hooks) for each in module.modules()]
    states = torch.get_rng_state(), random.getstate(), torch._C._get_mkldnn_enabled()
    dropped = nn.functional.dropout(batch, 0.5)
    torch.set_rng_state(states[0])

    noise = torch.zeros(3)  # draws from the real generator
    plan_module(module, batch, torch.optim.Adam, lambda x: (x.mean(), noise.normal_(), random.random())[0])

    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), torch._C._get_mkldnn_enabled()) == states[1:]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(type(each) is nn.Parameter for each in module.parameters())
    after = [each.grad for each in module.parameters() if each.grad is not None]
    assert len(after) == len(gradients)
    assert all(torch.equal(one, other) for one, other in zip(after, gradients, strict=True))
    assert [each.training for each in module.modules()] == modes
    assert [len(each._forward_hooks) for each in module.modules()] == hooks
    assert torch.equal(nn.functional.dropout(batch, 0.5), dropped)  # torch's own operator is back


def test_tied_weights_are_counted_once() -> None:
    module = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    module[1].weight = module[0].weight
    traced = trace_module(module, torch.empty(32, 8), torch.optim.SGD, lambda x: x.mean())
    assert traced.state_bytes == 4 * 64


# -- what cannot be traced ------------------------------------------------------------------------------


class ReadsValueInBackward(torch.autograd.Function):
    """ReadsValueInBackward a value in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * gradients[0].sum().item()


class CallsFunction(nn.Module):
    """CallsFunction a function after a layer."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(8, 8), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x))


UNTRACEABLE: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "item": (lambda x: x * x.sum().item(), "aten._local_scalar_dense.default reads a value"),
    "bool": (lambda x: x if x.sum() > 0 else -x, "aten._local_scalar_dense.default reads a value"),
    "mask": (lambda x: x[x > 0], "aten.index.Tensor has a result whose shape depends on values"),
    "nonzero": (lambda x: x[x.nonzero()[:, 0]], "aten.nonzero.default has a result"),
    "unique": (lambda x: x * torch.unique(x).sum(), "aten._unique2.default has a result"),
    "in place": (lambda x: x.t_(), "aten.t_.default changes the shape"),
    "backward": (ReadsValueInBackward.apply, "aten._local_scalar_dense.default reads a value"),
    "numpy": (lambda x: x.detach().numpy(), "Tensor.numpy reads values"),
    "tolist": (lambda x: x.tolist(), "Tensor.tolist reads values"),
    "sparse": (
        lambda x: nn.functional.embedding(torch.zeros(4, dtype=torch.int64, device=x.device), x, sparse=True),
        "aten._sparse_coo_tensor_with_dims_and_tensors.default returns a sparse tensor",
    ),
    "invalid step": (lambda x: x @ torch.zeros(3, 3, device=x.device), "RuntimeError: a and b must have"),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_an_operator_that_cannot_be_traced_is_named_with_its_module(name: str) -> None:
    function, message = UNTRACEABLE[name]
    module = nn.ModuleDict(
        {"encoder": nn.Sequential(nn.Linear(8, 8), CallsFunction(function), nn.Linear(8, 8))}
    )
    parent = UsesOnePart(module)
    with pytest.raises(UserError) as raised:
        plan_module(parent, torch.empty(32, 8), torch.optim.Adam, lambda output: output.mean())
    assert str(raised.value).startswith(f"parts.encoder.1: {message}")
    assert "; " in str(raised.value)
    assert len(raised.value.lines) == 1
    assert "\n" not in str(raised.value)


class UsesOnePart(nn.Module):
    """CallsFunction one part of several."""

    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Any:
        return self.parts["encoder"](x)


def test_a_loss_that_cannot_be_traced_is_not_attributed_to_the_module() -> None:
    with pytest.raises(UserError, match=r"^the loss or the optimizer: aten\._local_scalar_dense"):
        plan_module(
            nn.Linear(8, 8), torch.empty(32, 8), torch.optim.Adam, lambda x: x.mean() * x.max().item()
        )


def test_integer_indices_can_be_traced() -> None:
    rows = torch.zeros(5, dtype=torch.int64)
    assert peak(CallsFunction(lambda x: x[rows]), torch.empty(32, 8)) > 0
    assert peak(Tagger(), torch.zeros(4, 5, dtype=torch.int64), precision="bf16") > 0


def test_a_lazy_parameter_cannot_be_copied() -> None:
    with pytest.raises(UserError, match=r"LazyLinear: copy\.deepcopy cannot copy it"):
        plan_module(nn.LazyLinear(8), torch.empty(32, 8), torch.optim.Adam, lambda x: x.mean())


# -- docs -----------------------------------------------------------------------------------------------


def test_the_examples_of_the_docs_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), names)  # noqa: S102 - the project's own page
        assert isinstance(names["plan"], Plan)
    assert "budget 4,000 MiB: fits" in capsys.readouterr().out
