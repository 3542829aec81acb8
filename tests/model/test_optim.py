"""The learning rate schedule, and the fused optimizers compared with torch's for-loop ones."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from captcha_exp.config import TrainConfig
from captcha_exp.model.optim import build_optimizer, learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")

ONECYCLE = TrainConfig(
    batch_size=8,
    micro_batch_size=None,
    activation_checkpointing=False,
    eval_batch_size=8,
    epochs=1,
    patience=None,
    optimizer="adamw",
    optimizer_impl="fused",
    learning_rate=0.01,
    weight_decay=0.1,
    schedule="onecycle",
    warmup_fraction=0.2,
    label_smoothing=0.0,
    deterministic=True,
    checkpoint_every=None,
    max_minutes=None,
    sanity_check_steps=500,
    on_oom="fail",
)
CONSTANT = replace(ONECYCLE, schedule="constant")


# -- learning rate -------------------------------------------------------------------------------------------


def test_onecycle_is_piecewise_linear() -> None:
    """100 steps with a peak of 0.01 after 20; each rate is that of the middle of its step."""
    expected = [0.01 * (n + 0.5) / 20 for n in range(20)] + [0.01 * (79.5 - n) / 80 for n in range(80)]
    rates = [learning_rate(ONECYCLE, step, 100) for step in range(100)]
    assert rates == pytest.approx(expected, rel=1e-9)


def test_onecycle_peaks_where_the_warmup_ends() -> None:
    rates = [learning_rate(ONECYCLE, step, 1000) for step in range(1000)]
    assert rates.index(max(rates)) in (199, 200)
    assert max(rates) == pytest.approx(0.01, rel=0.01)
    assert rates[-1] < 0.01 / 500


@given(steps=st.integers(1, 5000), warmup=st.floats(0, 0.99), fraction=st.floats(0, 0.999999))
def test_onecycle_is_positive_and_at_most_the_peak(steps: int, warmup: float, fraction: float) -> None:
    rate = learning_rate(replace(ONECYCLE, warmup_fraction=warmup), int(fraction * steps), steps)
    assert 0 < rate <= 0.01 * (1 + 1e-9)


def test_onecycle_without_warmup_decreases() -> None:
    rates = [learning_rate(replace(ONECYCLE, warmup_fraction=0.0), step, 50) for step in range(50)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(0.01 * 99 / 100)


def test_constant_is_constant() -> None:
    assert {learning_rate(CONSTANT, step, 77) for step in range(77)} == {0.01}


# -- optimizers ----------------------------------------------------------------------------------------------

Kind = Literal["adam", "adamw", "sgd"]


def network() -> nn.Sequential:
    """Return a network without a bias before the norm, whose gradient would be rounding noise."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)
    )


def loss(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    images, targets = torch.randn(8, 1, 6, 6, generator=generator), torch.arange(8) % 4
    value: Tensor = nn.functional.cross_entropy(model(images), targets)
    return value


def reference_optimizer(kind: Kind, model: nn.Module) -> torch.optim.Optimizer:
    """Return torch's for-loop optimizer with the values documented in conf/ and schema.py."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    if kind == "adam":
        return torch.optim.Adam(groups, lr=0.01, foreach=False)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), foreach=False)
    return torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True, foreach=False)


def descend(model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer], steps: int) -> Tensor:
    """Return all parameters after these steps, with a learning rate that changes at each."""
    optimizer = make(model)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        optimizer.zero_grad()
        loss(model, step).backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_fused_optimizers_equal_the_for_loop_ones(kind: Kind) -> None:
    train = replace(ONECYCLE, optimizer=kind)
    fused = descend(network(), lambda model: build_optimizer(train, model.parameters()), 20)
    slow = descend(network(), lambda model: reference_optimizer(kind, model), 20)
    start = torch.cat([p.detach().flatten() for p in network().parameters()])
    assert (fused - start).abs().max() > 1e-3
    torch.testing.assert_close(fused, slow, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_weight_decay_applies_to_weights_only(kind: Kind) -> None:
    model = network()
    groups = build_optimizer(replace(ONECYCLE, optimizer=kind), model.parameters()).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.1,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "4.weight": 0.1,
        "4.bias": 0.0,
    }


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_weights_without_gradient_do_not_change_without_weight_decay(kind: Kind) -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(replace(ONECYCLE, optimizer=kind, weight_decay=0.0), model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
