"""The training step: correct, without host synchronization, and without effect if it is not finite.

In fp16 the loss is scaled; overflows are skipped and reduce the scale until it is at its minimum.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import CPU, OPTIMIZERS, Optimizer, make_batch, make_checker, with_train
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from captcha_exp import compose, load
from captcha_exp.config import Config, Precision
from captcha_exp.data.dataset import Batch, Split
from captcha_exp.model import networks, optim
from captcha_exp.model.evaluate import evaluate
from captcha_exp.model.optim import LossScale
from captcha_exp.model.state import TrainState
from captcha_exp.model.step import forward_and_backward, init_train_state, train_step

pytestmark = pytest.mark.usefixtures("one_thread")

# -- one step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 3, "activation_checkpointing": True}])
def test_a_step_reads_no_tensor_on_the_host(
    tiny: Config,
    kind: Optimizer,
    precision: Precision,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = with_train(tiny, optimizer=kind, **options)
    config = replace(config, device=replace(tiny.device, precision=precision))
    state, batch = init_train_state(config, CPU), make_batch(config)
    checker = make_checker(config, batch)
    train_step(state, batch, config)  # an optimizer may read tensors while it initializes its state

    def fail(self: Tensor, *args: object, **kwargs: object) -> None:
        raise AssertionError("a tensor was read on the host")

    with monkeypatch.context() as patch:
        names = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__len__")
        for name in (*names, "__array__", "__contains__"):
            patch.setattr(torch.Tensor, name, fail)
        step = train_step(state, batch, config)
        checker.observe(0, step.loss, step.diverged)
    checker.check(state.model, 1)
    assert step.loss.isfinite()


@pytest.mark.parametrize("model", ["compact", "resnet18"])
@pytest.mark.parametrize("head", ["position", "grouped_softmax", "end_class", "ctc"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_can_be_traced_on_fake_tensors(model: str, head: str, kind: str) -> None:
    """They have shapes and no values: reading a value would fail."""
    config = load(
        compose(f"model={model}", f"model.head={head}", f"train.optimizer={kind}", "device.name=cpu")
    )
    recognizer = networks.build(config.model, config.captcha)
    fake = FakeTensorMode()
    for module in recognizer.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(fake.from_tensor(weight.detach())))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, fake.from_tensor(buffer))
    with fake:
        state = TrainState(recognizer, optim.build_optimizer(config.train, recognizer.parameters()), None)
        images = torch.zeros(8, config.captcha.height, config.captcha.width, 3, dtype=torch.uint8)
        batch = Batch(images, torch.zeros(8, 4, dtype=torch.int64), torch.arange(8))
        for _ in range(3):
            step = train_step(state, batch, config)

    assert isinstance(step.loss, FakeTensor)
    assert step.finite.shape == ()


def test_a_step_equals_a_plain_torch_step(tiny: Config) -> None:
    """Compared with a standard torch loop with its for-loop optimizer and loss."""
    config = with_train(tiny, optimizer="sgd", weight_decay=0.0, learning_rate=0.01, label_smoothing=0.0)
    state = init_train_state(config, CPU)
    plain = copy.deepcopy(state.model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9, nesterov=True, foreach=False)
    for seed in range(3):
        batch = make_batch(config, 8 + seed)
        ours = train_step(state, batch, config)
        optimizer.zero_grad()
        logits = plain(batch.images)
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 5), batch.targets.reshape(-1))
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        optimizer.step()
        torch.testing.assert_close(ours.loss, loss.detach(), atol=1e-5, rtol=1e-4)
        assert int(ours.num_correct) == int((logits.argmax(dim=2) == batch.targets).all(dim=1).sum())
        assert bool(ours.finite)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state.model.state_dict()[name], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("implementation", ["foreach", "for_loop"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_implementations_of_an_optimizer_agree(
    tiny: Config, kind: Optimizer, implementation: str
) -> None:
    states = []
    for config in (
        with_train(tiny, optimizer=kind, optimizer_impl=implementation),
        with_train(tiny, optimizer=kind),
    ):
        state = init_train_state(config, CPU)
        for seed in range(3):
            train_step(state, make_batch(config, 8 + seed), config)
        states.append(snapshot(state))
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, atol=1e-5, rtol=1e-3)


def test_label_smoothing_applies_to_training_only(tiny: Config) -> None:
    smooth, plain = (with_train(tiny, label_smoothing=value) for value in (0.5, 0.0))
    batch = make_batch(tiny)
    losses = [float(train_step(init_train_state(c, CPU), batch, c).loss) for c in (smooth, plain)]
    assert losses[0] != losses[1]
    split = Split(batch.images, batch.targets, batch.indices, CPU)
    model = init_train_state(tiny, CPU).model
    assert evaluate(model, split, smooth).loss == evaluate(model, split, plain).loss


# -- options that save memory --------------------------------------------------------------------------------


@pytest.fixture(
    params=[
        *("compact position", "compact grouped_softmax", "compact end_class", "compact ctc"),
        *("resnet18 position", "article"),
    ]
)
def network(request: pytest.FixtureRequest) -> Config:
    """A network with a head for small images with 2 characters of 5 classes."""
    model, _, head = request.param.partition(" ")
    chosen = ["experiment=article"] if model == "article" else [f"model={model}", f"model.head={head}"]
    size = ("captcha.width=24", "captcha.height=16", "captcha.alphabet='01234'", "captcha.length=2")
    return load(compose(*chosen, *size, "device.name=cpu", "device.precision=fp32"))


def gradients(config: Config, batch: Batch, frozen: bool) -> tuple[Tensor, list[Tensor], TrainState]:
    """Return the loss, the gradients and the state; `frozen` sets batch norms to evaluation mode."""
    state = init_train_state(config, CPU)
    for norm in (each for each in state.model.modules() if isinstance(each, torch.nn.BatchNorm2d)):
        norm.train(not frozen)
    loss, _ = forward_and_backward(state, batch, config)
    found = [parameter.grad for parameter in state.model.parameters()]
    return loss, [each for each in found if each is not None], state


@pytest.mark.long
@pytest.mark.parametrize("frozen", [True, False])
def test_checkpointing_changes_no_gradient_and_no_statistic(network: Config, frozen: bool) -> None:
    batch = make_batch(network, 12)
    loss, plain, state = gradients(network, batch, frozen)
    checkpointed = with_train(network, activation_checkpointing=True)
    again, ours, other = gradients(checkpointed, batch, frozen)
    assert float(again) == float(loss)
    assert len(ours) == len(plain) == len(list(state.model.parameters()))
    for one, two in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    for one, two in zip(other.model.buffers(), state.model.buffers(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("size", [5, *(pytest.param(size, marks=pytest.mark.long) for size in (1, 4, 12))])
def test_micro_batches_add_up_to_the_gradients_of_the_batch(network: Config, size: int) -> None:
    """With frozen batch norms."""
    batch = make_batch(network, 12)
    loss, plain, _ = gradients(network, batch, frozen=True)
    parts, ours, _ = gradients(with_train(network, micro_batch_size=size), batch, frozen=True)
    assert float(parts) == pytest.approx(float(loss), rel=1e-5)
    for one, two in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_a_batch_norm_sees_one_micro_batch_alone(tiny: Config) -> None:
    batch = make_batch(tiny, 12)
    _, whole, _ = gradients(tiny, batch, frozen=False)
    _, parts, state = gradients(with_train(tiny, micro_batch_size=4), batch, frozen=False)
    assert any(not torch.allclose(one, two, atol=1e-3) for one, two in zip(parts, whole, strict=True))
    counted = [int(value) for name, value in state.model.named_buffers() if "num_batches" in name]
    assert set(counted) == {3}


def test_a_step_of_micro_batches_counts_all_images(tiny: Config) -> None:
    config = with_train(tiny, micro_batch_size=5)
    state, batch = init_train_state(config, CPU), make_batch(config, 12)
    for _ in range(40):
        step = train_step(state, batch, config)
    assert int(step.num_correct) > 5  # more than in any micro-batch


# -- non-finite steps ----------------------------------------------------------------------------------------


def snapshot(state: TrainState) -> dict[str, Tensor]:
    """Return copies of the weights, the running statistics and the optimizer state."""
    found = dict(state.model.state_dict())
    for number, values in state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{number}.{name}": x for name, x in values.items() if x is not None}
    return {name: value.clone() for name, value in found.items()}


@contextlib.contextmanager
def not_finite(what: str, state: TrainState) -> Iterator[None]:
    """Make the loss, or a single gradient, NaN or infinite."""
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


OPTIONS: list[dict[str, Any]] = [
    {},
    {"optimizer_impl": "foreach"},
    {"optimizer_impl": "for_loop"},
    {"activation_checkpointing": True, "micro_batch_size": 3},
]
CAUSES = ["loss nan", "loss inf", "gradient nan", "gradient inf", "gradient -inf"]


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_non_finite_step_changes_nothing(
    tiny: Config, kind: Optimizer, cause: str, options: dict[str, Any]
) -> None:
    config = with_train(tiny, optimizer=kind, **options)
    state, batch = init_train_state(config, CPU), make_batch(config)
    for _ in range(2):
        train_step(state, batch, config)
    before = snapshot(state)
    with not_finite(cause, state):
        step = train_step(state, batch, config)
    assert not step.finite
    after = snapshot(state)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert train_step(state, batch, config).finite
    assert not torch.equal(snapshot(state)["head.classifier.weight"], before["head.classifier.weight"])


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """Fill uninitialized memory with NaN, which reveals reads of it."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # added at run time
    yield
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_non_finite_first_step_changes_nothing(
    tiny: Config, kind: Optimizer, options: dict[str, Any], fresh_memory_is_nan: None
) -> None:
    """The steps after it are the same as without it."""
    config = with_train(tiny, optimizer=kind, **options)
    batch = make_batch(config)
    interrupted, expected_state = init_train_state(config, CPU), init_train_state(config, CPU)
    with not_finite("loss nan", interrupted):
        train_step(interrupted, batch, config)
    for state in (interrupted, expected_state):
        train_step(state, batch, config)
        train_step(state, batch, config)
    actual, expected = snapshot(interrupted), snapshot(expected_state)
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


# -- fp16 ----------------------------------------------------------------------------------------------------


@pytest.fixture
def half(tiny: Config) -> Config:
    return replace(tiny, device=replace(tiny.device, precision="fp16"))


@pytest.fixture
def batch(tiny: Config) -> Batch:
    return make_batch(tiny, 16)


def scale_of(state: TrainState) -> LossScale:
    assert state.loss_scale is not None
    return state.loss_scale


def weights(state: TrainState) -> list[Tensor]:
    return [value.clone() for value in state.model.state_dict().values()]


def overflow(gradient: Tensor) -> Tensor:
    return gradient * float("inf")


def test_only_fp16_scales_its_loss(tiny: Config, half: Config) -> None:
    bf16 = replace(tiny, device=replace(tiny.device, precision="bf16"))

    assert init_train_state(tiny, CPU).loss_scale is None
    assert init_train_state(bf16, CPU).loss_scale is None
    assert float(scale_of(init_train_state(half, CPU)).factor) == 65536


def test_gradients_are_scaled_and_steps_are_not(half: Config, tiny: Config, batch: Batch) -> None:
    """Compared with fp32, gradients are 65,536 times as large, and the weights after a step are close."""
    scaled, plain = init_train_state(half, CPU), init_train_state(tiny, CPU)
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
    state = init_train_state(half, CPU)
    train_step(state, batch, half)
    before = weights(state)
    handle = next(state.model.parameters()).register_hook(overflow)  # type: ignore[no-untyped-call]

    step = train_step(state, batch, half)
    handle.remove()

    assert not step.finite
    assert not step.diverged
    assert all(torch.equal(a, b) for a, b in zip(before, weights(state), strict=True))
    assert float(scale_of(state).factor) == 32768
    assert train_step(state, batch, half).finite


def test_an_overflow_at_the_minimum_scale_diverges(half: Config, batch: Batch) -> None:
    state = init_train_state(half, CPU)
    next(state.model.parameters()).register_hook(overflow)  # type: ignore[no-untyped-call]

    steps = [train_step(state, batch, half) for _ in range(18)]

    assert [bool(step.diverged) for step in steps] == [False] * 16 + [True, True]
    assert float(scale_of(state).factor) == 1.0


def test_a_non_finite_loss_diverges_at_once(
    half: Config, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = init_train_state(half, CPU)
    plain = type(state.model.head).loss
    monkeypatch.setattr(type(state.model.head), "loss", lambda *args: plain(*args) * float("nan"))

    assert train_step(state, batch, half).diverged


def test_the_scale_doubles_after_growth_interval_finite_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "GROWTH_INTERVAL", 3)
    scale = LossScale(CPU)
    factors = []
    for finite in (True, True, False, True, True, True, True, True, True, True):
        scale.update(torch.tensor(finite))
        factors.append(float(scale.factor))

    half, whole = 32768.0, 65536.0
    assert factors == [whole, whole, half, half, half, whole, whole, whole, 2 * whole, 2 * whole]
