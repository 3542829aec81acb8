"""A step in fp16: the loss is scaled, overflows are skipped and mend themselves, what cannot mend is told."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from captcha_exp.checkpoint import TrainState
from captcha_exp.config import Config
from captcha_exp.dataset import Batch
from captcha_exp.optim import LossScale
from captcha_exp.step import forward_and_backward, fresh_state, train_step

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture
def half(tiny: Config) -> Config:
    return replace(tiny, device=replace(tiny.device, precision="fp16"))


@pytest.fixture
def batch(tiny: Config) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 16, 32, 3), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.randint(0, 5, (16, 2), generator=generator), torch.arange(16))


def scale_of(state: TrainState) -> LossScale:
    assert state.loss_scale is not None
    return state.loss_scale


def weights(state: TrainState) -> list[Tensor]:
    return [value.clone() for value in state.model.state_dict().values()]


def overflow(gradient: Tensor) -> Tensor:
    return gradient * float("inf")


def test_only_fp16_scales_its_loss(tiny: Config, half: Config) -> None:
    bf16 = replace(tiny, device=replace(tiny.device, precision="bf16"))

    assert fresh_state(tiny, CPU).loss_scale is None
    assert fresh_state(bf16, CPU).loss_scale is None
    assert float(scale_of(fresh_state(half, CPU)).factor) == 65536


def test_the_scale_is_in_the_gradients_and_not_in_the_step(half: Config, tiny: Config, batch: Batch) -> None:
    """Against fp32: gradients are 65,536 times as large, the weights after a step are close."""
    scaled, plain = fresh_state(half, CPU), fresh_state(tiny, CPU)
    forward_and_backward(scaled, batch, half)
    forward_and_backward(plain, batch, tiny)
    for ours, theirs in zip(scaled.model.parameters(), plain.model.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad / 65536, theirs.grad, atol=2e-3, rtol=0.1)
    for state, config in ((scaled, half), (plain, tiny)):
        state.optimizer.zero_grad()
        sgd = torch.optim.SGD(state.model.parameters(), lr=0.1, fused=True)
        state.optimizer = sgd
        train_step(state, batch, config)
    for one, other in zip(weights(scaled), weights(plain), strict=True):
        torch.testing.assert_close(one, other, atol=5e-3, rtol=0.05)


def test_an_overflow_is_skipped_and_halves_the_scale(half: Config, batch: Batch) -> None:
    state = fresh_state(half, CPU)
    train_step(state, batch, half)
    before = weights(state)
    handle = next(state.model.parameters()).register_hook(overflow)  # type: ignore[no-untyped-call]

    step = train_step(state, batch, half)
    handle.remove()

    assert not step.finite
    assert not step.broken
    assert all(torch.equal(a, b) for a, b in zip(before, weights(state), strict=True))
    assert float(scale_of(state).factor) == 32768
    assert train_step(state, batch, half).finite


def test_an_overflow_that_no_scale_mends_is_broken(half: Config, batch: Batch) -> None:
    state = fresh_state(half, CPU)
    next(state.model.parameters()).register_hook(overflow)  # type: ignore[no-untyped-call]

    steps = [train_step(state, batch, half) for _ in range(18)]

    assert [bool(step.broken) for step in steps] == [False] * 16 + [True, True]
    assert float(scale_of(state).factor) == 1.0


def test_a_loss_that_is_not_finite_is_broken_at_once(
    half: Config, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = fresh_state(half, CPU)
    plain = type(state.model.head).loss
    monkeypatch.setattr(type(state.model.head), "loss", lambda *args: plain(*args) * float("nan"))

    assert train_step(state, batch, half).broken


def test_the_scale_doubles_after_many_good_steps_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "STEPS_TO_GROW", 3)
    scale = LossScale(CPU)
    seen = []
    for finite in (True, True, False, True, True, True, True, True, True, True):
        scale.update(torch.tensor(finite))
        seen.append(float(scale.factor))

    half, whole = 32768.0, 65536.0
    assert seen == [whole, whole, half, half, half, whole, whole, whole, 2 * whole, 2 * whole]
