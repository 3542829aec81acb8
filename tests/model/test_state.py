"""A state that comes back to the bit, and files of it that are damaged: the one before is used."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
from conftest import CPU, OPTIMIZERS, Optimizer, batch_of, training
from torch import Tensor

from captcha_exp.config import Config, Precision
from captcha_exp.errors import UserError
from captcha_exp.model import networks
from captcha_exp.model import state as checkpoint
from captcha_exp.model.networks import Recognizer
from captcha_exp.model.state import CheckpointInterval, EpochProgress, TrainState
from captcha_exp.model.step import init_train_state, train_step

pytestmark = pytest.mark.usefixtures("one_thread")


def stepped(config: Config, steps: int = 3) -> TrainState:
    """A state in the middle of its second epoch."""
    state = init_train_state(config, CPU)
    state.epoch = 1
    state.update_best(0.25, math.inf)
    progress = state.begin_or_continue_epoch(CPU)
    for state.step in range(1, steps + 1):
        step = train_step(state, batch_of(config), config)
        progress.loss += step.loss
        progress.num_correct += step.num_correct
        progress.num_batches += 1
        progress.num_images += 8
    progress.seconds = 0.1 + 0.2
    return state


def untimed(state: TrainState) -> dict[str, object]:
    return {key: value for key, value in state.counters().items() if key != "seconds"}


def refuse(trouble: str) -> None:
    raise AssertionError(trouble)


def restored(config: Config, folder: Path) -> TrainState:
    state = init_train_state(config, CPU)
    saved = checkpoint.load_latest(folder, refuse)
    assert saved is not None
    state.load_state_dict(saved)
    return state


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- all of it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_tensor_and_every_counter_comes_back(
    tiny: Config, tmp_path: Path, optimizer: Optimizer, precision: Precision
) -> None:
    config = training(tiny, optimizer=optimizer)
    config = replace(config, device=replace(config.device, precision=precision))
    state = stepped(config)
    if state.loss_scale is not None:
        state.loss_scale.good_steps += 7
        state.loss_scale.factor /= 4
    checkpoint.save(tmp_path / "checkpoint", state)
    tensors = {name: value.clone() for name, value in state.state_dict().items()}
    torch.rand(5)  # global chance goes on, and is to come back

    again = restored(config, tmp_path / "checkpoint")
    assert same(again.state_dict(), tensors)
    assert untimed(again) == untimed(state)
    assert again.best_weights is not None
    assert again.best_loss == math.inf
    assert (again.loss_scale is None) == (precision == "fp32")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_after_it_are_the_same_steps(tiny: Config, tmp_path: Path, optimizer: Optimizer) -> None:
    config = training(tiny, optimizer=optimizer)
    state = stepped(config)
    checkpoint.save(tmp_path, state)
    again = restored(config, tmp_path)
    for each in (state, again):
        for _ in range(3):
            train_step(each, batch_of(config), config)
    assert same(state.state_dict(), again.state_dict())


def test_the_layout_in_memory_stays(tiny: Config, tmp_path: Path) -> None:
    state = stepped(tiny)
    checkpoint.save(tmp_path, state)
    again = restored(tiny, tmp_path)
    strides = [value.stride() for value in state.model.state_dict().values()]
    assert strides == [value.stride() for value in again.model.state_dict().values()]


def test_between_epochs_there_is_no_epoch_under_way(tiny: Config, tmp_path: Path) -> None:
    state = stepped(tiny)
    state.progress = None
    checkpoint.save(tmp_path, state)
    again = restored(tiny, tmp_path)
    assert again.progress is None
    assert again.begin_or_continue_epoch(CPU).num_batches == 0
    assert again.epoch == 3


def test_seconds_add_up_over_processes(tiny: Config, tmp_path: Path) -> None:
    state = stepped(tiny)
    state.start_time -= 1000
    checkpoint.save(tmp_path, state)
    again = restored(tiny, tmp_path)
    assert 1000 <= again.elapsed_seconds() < 1100
    again.start_time -= 500
    checkpoint.save(tmp_path, again)
    assert 1500 <= restored(tiny, tmp_path).elapsed_seconds() < 1600


def test_a_state_of_another_network_is_one_line(tiny: Config, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, stepped(tiny))
    other = replace(tiny, captcha=replace(tiny.captcha, alphabet="012"))
    saved = checkpoint.load_latest(tmp_path, refuse)
    assert saved is not None
    with pytest.raises(UserError, match=r"step-3.safetensors: does not fit .*--resume=never"):
        init_train_state(other, CPU).load_state_dict(saved)
    with pytest.raises(UserError, match=r"does not fit the run's config: optimizer/"):
        init_train_state(training(tiny, optimizer="sgd"), CPU).load_state_dict(saved)


# -- generations ---------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_generations_are_kept_by_the_number_of_their_step(tiny: Config, tmp_path: Path) -> None:
    state = stepped(tiny)
    for state.step in (8, 9, 10, 11):
        checkpoint.save(tmp_path, state)
    assert names(tmp_path) == ["step-10.safetensors", "step-11.safetensors"]
    checkpoint.prune(tmp_path, 1)
    assert names(tmp_path) == ["step-11.safetensors"]


def test_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path / "nowhere", refuse) is None
    (tmp_path / "step-x.safetensors").write_text("?")
    (tmp_path / ".step-3.safetensors.77.part").write_text("?")
    assert checkpoint.load_latest(tmp_path, refuse) is None


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_a_weight(content: bytes) -> bytes:
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


def flip_a_counter(content: bytes) -> bytes:
    return content.replace(b'\\"step\\": 4', b'\\"step\\": 5')


def without_its_text(content: bytes) -> bytes:
    return content.replace(b"__metadata__", b"__metaxxta__")


def test_one_after_an_epoch_that_is_not_recorded_is_set_aside(tiny: Config, tmp_path: Path) -> None:
    """Its row was lost: from the checkpoint before, the epoch is trained again and recorded."""
    state = stepped(tiny)
    state.epoch = 1
    before = checkpoint.save(tmp_path, state)
    state.epoch, state.step = 2, 4
    after = checkpoint.save(tmp_path, state)
    assert checkpoint.load_latest(tmp_path, refuse, {1}) is not None

    told: list[str] = []
    saved = checkpoint.load_latest(tmp_path, told.append, set())
    assert saved is not None
    assert saved.counters["step"] == 3
    assert told == [
        f"{after}: is not used, since metrics.jsonl has no whole line of epoch 1; the checkpoint before it "
        "is, if there is one"
    ]
    assert {path.name for path in tmp_path.iterdir()} == {before.name, f"{after.name}.damaged"}


DAMAGES = [cut, flip_a_weight, flip_a_counter, without_its_text, lambda _: b"", lambda _: b"\xff" * 64]


@pytest.mark.parametrize("damage", DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_one_is_told_and_the_one_before_used(
    tiny: Config, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    state = stepped(tiny)
    checkpoint.save(tmp_path, state)
    state.step = 4
    path = checkpoint.save(tmp_path, state)
    content = path.read_bytes()
    assert damage(content) != content
    path.write_bytes(damage(content))

    told: list[str] = []
    saved = checkpoint.load_latest(tmp_path, told.append)
    assert saved is not None
    assert saved.counters["step"] == 3
    (line,) = told
    assert line.startswith(f"{path}: is damaged and not used (")
    assert "\n" not in line
    assert checkpoint.load_latest(tmp_path, refuse) is not None, "it is told of once"

    state.step = 5
    checkpoint.save(tmp_path, state)
    assert names(tmp_path) == ["step-3.safetensors", "step-5.safetensors"]


def test_the_file_can_be_read_without_this_project(tiny: Config, tmp_path: Path) -> None:
    state = stepped(tiny)
    path = checkpoint.save(tmp_path, state)
    with safetensors.safe_open(path, "pt") as opened:
        values = json.loads(opened.metadata()["state"])
        assert set(opened.keys()) == set(state.state_dict())
    assert (values["step"], values["epoch"], values["progress"]["batches"]) == (3, 2, 3)


# -- when ----------------------------------------------------------------------------------------------------


def due(every: str | None, places: list[tuple[int, int, bool]]) -> list[bool]:
    """Whether it is, after (step, epoch, whether the epoch has ended); each look at the clock is a minute."""
    clock = iter(range(0, 60_000, 60))
    rhythm = CheckpointInterval(every, lambda: next(clock))
    model = networks.Recognizer.__new__(Recognizer)
    found = []
    for step, epoch, ended in places:
        progress = None if ended else EpochProgress.zeros(CPU)
        state = TrainState(model, None, None, step, epoch, progress)  # type: ignore[arg-type]  # not looked at
        found.append(rhythm.is_due(state))
        if found[-1] and every and "minute" in every:
            rhythm.reset()
    return found


PLACES = [(1, 1, False), (2, 1, False), (2, 1, True), (3, 2, False), (4, 2, False), (4, 2, True)]


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (None, [False] * 6),
        ("1 step", [True, True, False, True, True, False]),
        ("2 steps", [False, True, False, False, True, False]),
        ("1 epoch", [False, False, True, False, False, True]),
        ("2 epochs", [False, False, False, False, False, True]),
        ("3 minutes", [False, False, True, False, False, True]),
    ],
)
def test_the_rhythm(every: str | None, expected: list[bool]) -> None:
    """Asking when it was saved takes a minute of this clock, too."""
    assert due(every, PLACES) == expected


# -- the best ------------------------------------------------------------------------------------------------


def test_the_best_weights_are_a_copy_and_come_back(tiny: Config) -> None:
    model = networks.to_device(networks.build(tiny.model, tiny.captcha), CPU)
    state = TrainState(model, torch.optim.SGD(model.parameters()), None)

    def move() -> None:
        with torch.no_grad():
            for value in model.state_dict().values():
                value += 1

    epochs = [
        (0.0, 2.0),
        (0.5, 1.0),
        (0.5, 1.0),
        (0.4, 0.1),
        (0.7, 3.0),
        (0.7, 2.5),
        (0.7, 2.7),
        (0.7, math.nan),
    ]
    better = []
    for state.epoch, (accuracy, loss) in enumerate(epochs, start=1):
        move()
        better.append(state.update_best(accuracy, loss))
        if better[-1]:
            best = {name: value.clone() for name, value in model.state_dict().items()}
    assert better == [True, True, False, False, True, True, False, False]
    assert (state.best_epoch, state.best_accuracy, state.best_loss) == (6, 0.7, 2.5)
    assert state.epochs_since_improvement() == 3, "the accuracy has not gained since epoch 5"
    state.restore_best_weights()
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
