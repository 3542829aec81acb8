"""One training step: the textbook's, and no look at the device; one that is not finite changes nothing.

In fp16 the loss is scaled, overflows are skipped and mend themselves, what cannot mend is told.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import CPU, OPTIMIZERS, Optimizer, batch_of, guarding, training
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from captcha_exp import compose, load, models, optim
from captcha_exp.checkpoint import TrainState
from captcha_exp.config import Config, Precision
from captcha_exp.dataset import Batch, Split
from captcha_exp.evaluate import evaluate
from captcha_exp.optim import LossScale
from captcha_exp.step import forward_and_backward, fresh_state, train_step

pytestmark = pytest.mark.usefixtures("one_thread")

# -- one step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_reads_no_tensor_on_the_host(
    tiny: Config, kind: Optimizer, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(training(tiny, optimizer=kind), device=replace(tiny.device, precision=precision))
    state, batch = fresh_state(config, CPU), batch_of(config)
    guard = guarding(config, batch)
    train_step(state, batch, config)  # an optimiser may look while it makes its own state

    def read(self: Tensor, *args: object, **kwargs: object) -> None:
        raise AssertionError("a tensor was read on the host")

    with monkeypatch.context() as patch:
        names = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__len__")
        for name in (*names, "__array__", "__contains__"):
            patch.setattr(torch.Tensor, name, read)
        step = train_step(state, batch, config)
        guard.note(0, step.loss, step.broken)
    guard.look(state.model, 1)
    assert step.loss.isfinite()


@pytest.mark.parametrize("model", ["compact", "resnet18"])
@pytest.mark.parametrize("head", ["position", "grouped_softmax"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_can_be_traced_without_a_number_being_computed(model: str, head: str, kind: str) -> None:
    """On fake tensors, which have shapes and no values: whatever looked at one would fail."""
    config = load(
        compose(f"model={model}", f"model.head={head}", f"train.optimizer={kind}", "device.name=cpu")
    )
    recogniser = models.build(config.model, config.captcha)
    fake = FakeTensorMode()
    for module in recogniser.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(fake.from_tensor(weight.detach())))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, fake.from_tensor(buffer))
    with fake:
        state = TrainState(recogniser, optim.optimizer(config.train, recogniser.parameters()), None)
        images = torch.zeros(8, config.captcha.height, config.captcha.width, 3, dtype=torch.uint8)
        batch = Batch(images, torch.zeros(8, 4, dtype=torch.int64), torch.arange(8))
        for _ in range(3):
            step = train_step(state, batch, config)

    assert isinstance(step.loss, FakeTensor)
    assert step.finite.shape == ()


def test_a_step_is_the_textbooks(tiny: Config) -> None:
    """Against torch's plain loop with the plain optimiser, the loss without any of our code."""
    config = training(tiny, optimizer="sgd", weight_decay=0.0, learning_rate=0.01, label_smoothing=0.0)
    state = fresh_state(config, CPU)
    plain = copy.deepcopy(state.model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9, nesterov=True, foreach=False)
    for seed in range(3):
        batch = batch_of(config, 8 + seed)
        ours = train_step(state, batch, config)
        optimizer.zero_grad()
        logits = plain(batch.images)
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 5), batch.targets.reshape(-1))
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        optimizer.step()
        torch.testing.assert_close(ours.loss, loss.detach(), atol=1e-5, rtol=1e-4)
        assert int(ours.right) == int((logits.argmax(dim=2) == batch.targets).all(dim=1).sum())
        assert bool(ours.finite)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state.model.state_dict()[name], value, atol=1e-4, rtol=1e-3)


def test_label_smoothing_is_in_the_training_loss_alone(tiny: Config) -> None:
    smooth, plain = (training(tiny, label_smoothing=value) for value in (0.5, 0.0))
    batch = batch_of(tiny)
    losses = [float(train_step(fresh_state(c, CPU), batch, c).loss) for c in (smooth, plain)]
    assert losses[0] != losses[1]
    split = Split(batch.images, batch.targets, batch.rows, CPU)
    model = fresh_state(tiny, CPU).model
    assert evaluate(model, split, smooth).loss == evaluate(model, split, plain).loss


# -- a step that is not finite -------------------------------------------------------------------------------


def everything(state: TrainState) -> dict[str, Tensor]:
    """Weights, batch-norm statistics and the optimiser's state, copied."""
    found = dict(state.model.state_dict())
    for number, values in state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{number}.{name}": x for name, x in values.items() if x is not None}
    return {name: value.clone() for name, value in found.items()}


@contextlib.contextmanager
def not_finite(what: str, state: TrainState) -> Iterator[None]:
    """Makes the loss, or one gradient alone, NaN or infinite."""
    cause, _, value = what.partition(" ")
    if cause == "gradient":
        parameter = list(state.model.parameters())[-1]
        handle = parameter.register_hook(  # type: ignore[no-untyped-call]  # torch has no types for it
            lambda gradient: gradient.index_fill(0, torch.tensor([0]), float(value))
        )
        yield
        handle.remove()
    else:
        plain = type(state.model.head).loss
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(state.model.head), "loss", lambda *args: plain(*args) * float(value))
            yield


CAUSES = ["loss nan", "loss inf", "gradient nan", "gradient inf", "gradient -inf"]


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_nothing(tiny: Config, kind: Optimizer, cause: str) -> None:
    config = training(tiny, optimizer=kind)
    state, batch = fresh_state(config, CPU), batch_of(config)
    for _ in range(2):
        train_step(state, batch, config)
    before = everything(state)
    with not_finite(cause, state):
        step = train_step(state, batch, config)
    assert not step.finite
    after = everything(state)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert train_step(state, batch, config).finite
    assert not torch.equal(everything(state)["head.read.weight"], before["head.read.weight"])


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """What nobody has written is NaN, so that a read of it is seen."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # added at run time
    yield
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_first_step_that_is_not_finite_leaves_no_trace(
    tiny: Config, kind: Optimizer, fresh_memory_is_nan: None
) -> None:
    """The good steps after it do what they would have done without it."""
    config = training(tiny, optimizer=kind)
    batch = batch_of(config)
    hurt, whole = fresh_state(config, CPU), fresh_state(config, CPU)
    with not_finite("loss nan", hurt):
        train_step(hurt, batch, config)
    for state in (hurt, whole):
        train_step(state, batch, config)
        train_step(state, batch, config)
    ours, expected = everything(hurt), everything(whole)
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []


# -- 16 bits -------------------------------------------------------------------------------------------------


@pytest.fixture
def half(tiny: Config) -> Config:
    return replace(tiny, device=replace(tiny.device, precision="fp16"))


@pytest.fixture
def batch(tiny: Config) -> Batch:
    return batch_of(tiny, 16)


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
