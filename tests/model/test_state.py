"""The train state is restored exactly; a damaged checkpoint is skipped for the one before it."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
from conftest import CPU, OPTIMIZERS, Optimizer, make_batch, with_train
from torch import Tensor

from captcha_exp.config import Config, Precision
from captcha_exp.errors import UserError
from captcha_exp.model import networks, weights
from captcha_exp.model import state as checkpoint
from captcha_exp.model.state import TrainState
from captcha_exp.model.step import init_train_state, train_step

pytestmark = pytest.mark.usefixtures("one_thread")


def trained_state(config: Config, steps: int = 3) -> TrainState:
    """Return a state in the middle of its second epoch."""
    state = init_train_state(config, CPU)
    state.epoch = 1
    state.update_best(0.25, math.inf)
    progress = state.begin_or_continue_epoch(CPU)
    for state.step in range(1, steps + 1):
        step = train_step(state, make_batch(config), config)
        progress.loss += step.loss
        progress.num_correct += step.num_correct
        progress.num_batches += 1
        progress.num_images += 8
    progress.seconds = 0.1 + 0.2
    return state


def counters_without_time(state: TrainState) -> dict[str, object]:
    return {key: value for key, value in state.counters().items() if key != "seconds"}


def fail_on_warning(message: str) -> None:
    raise AssertionError(message)


def restored_state(config: Config, checkpoint_dir: Path) -> TrainState:
    state = init_train_state(config, CPU)
    saved = checkpoint.load_latest(checkpoint_dir, config, fail_on_warning)
    assert saved is not None
    state.load_state_dict(saved)
    return state


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- round trip ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_tensor_and_every_counter_is_restored(
    tiny: Config, tmp_path: Path, optimizer: Optimizer, precision: Precision
) -> None:
    config = with_train(tiny, optimizer=optimizer)
    config = replace(config, device=replace(config.device, precision=precision))
    state = trained_state(config)
    if state.loss_scale is not None:
        state.loss_scale.good_steps += 7
        state.loss_scale.factor /= 4
    checkpoint.save(tmp_path / "checkpoint", state)
    tensors = {name: value.clone() for name, value in state.state_dict().items()}
    torch.rand(5)  # changes the global RNG state, which is restored

    restored = restored_state(config, tmp_path / "checkpoint")
    assert equal(restored.state_dict(), tensors)
    assert counters_without_time(restored) == counters_without_time(state)
    assert restored.best_weights is not None
    assert restored.best_loss == math.inf
    assert (restored.loss_scale is None) == (precision == "fp32")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_after_a_restore_equal_uninterrupted_steps(
    tiny: Config, tmp_path: Path, optimizer: Optimizer
) -> None:
    config = with_train(tiny, optimizer=optimizer)
    state = trained_state(config)
    checkpoint.save(tmp_path, state)
    restored = restored_state(config, tmp_path)
    for each in (state, restored):
        for _ in range(3):
            train_step(each, make_batch(config), config)
    assert equal(state.state_dict(), restored.state_dict())


def test_the_memory_format_is_kept(tiny: Config, tmp_path: Path) -> None:
    state = trained_state(tiny)
    checkpoint.save(tmp_path, state)
    restored = restored_state(tiny, tmp_path)
    strides = [value.stride() for value in state.model.state_dict().values()]
    assert strides == [value.stride() for value in restored.model.state_dict().values()]


def test_a_checkpoint_between_epochs_has_no_progress(tiny: Config, tmp_path: Path) -> None:
    state = trained_state(tiny)
    state.progress = None
    checkpoint.save(tmp_path, state)
    restored = restored_state(tiny, tmp_path)
    assert restored.progress is None
    assert restored.begin_or_continue_epoch(CPU).num_batches == 0
    assert restored.epoch == 3


def test_seconds_are_summed_over_processes(tiny: Config, tmp_path: Path) -> None:
    state = trained_state(tiny)
    state.start_time -= 1000
    checkpoint.save(tmp_path, state)
    restored = restored_state(tiny, tmp_path)
    assert 1000 <= restored.elapsed_seconds() < 1100
    restored.start_time -= 500
    checkpoint.save(tmp_path, restored)
    assert 1500 <= restored_state(tiny, tmp_path).elapsed_seconds() < 1600


def test_a_checkpoint_of_another_network_or_optimizer_is_reported(tiny: Config, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, trained_state(tiny))
    other = replace(tiny, captcha=replace(tiny.captcha, alphabet="012"))
    saved = checkpoint.load_latest(tmp_path, tiny, fail_on_warning)
    assert saved is not None
    with pytest.raises(UserError, match=r"step-3.safetensors: does not match .*--resume=never"):
        init_train_state(other, CPU).load_state_dict(saved)
    with pytest.raises(UserError, match=r"does not match the config of the run \(optimizer/"):
        init_train_state(with_train(tiny, optimizer="sgd"), CPU).load_state_dict(saved)


# -- files ---------------------------------------------------------------------------------------------------


def names(checkpoint_dir: Path) -> list[str]:
    return sorted(path.name for path in checkpoint_dir.iterdir())


def test_the_two_latest_checkpoints_by_step_are_kept(tiny: Config, tmp_path: Path) -> None:
    state = trained_state(tiny)
    for state.step in (8, 9, 10, 11):
        checkpoint.save(tmp_path, state)
    assert names(tmp_path) == ["step-10.safetensors", "step-11.safetensors"]
    checkpoint.prune(tmp_path, 1)
    assert names(tmp_path) == ["step-11.safetensors"]


def test_a_directory_without_checkpoints_has_no_latest(tiny: Config, tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path / "nowhere", tiny, fail_on_warning) is None
    (tmp_path / "step-x.safetensors").write_text("?")
    (tmp_path / ".step-3.safetensors.77.part").write_text("?")
    assert checkpoint.load_latest(tmp_path, tiny, fail_on_warning) is None


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_a_weight(content: bytes) -> bytes:
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


def flip_a_counter(content: bytes) -> bytes:
    return content.replace(b'\\"step\\": 4', b'\\"step\\": 5')


def remove_metadata(content: bytes) -> bytes:
    return content.replace(b"__metadata__", b"__metaxxta__")


def test_a_checkpoint_after_an_unrecorded_epoch_is_skipped(tiny: Config, tmp_path: Path) -> None:
    """The epoch is trained again from the checkpoint before, and recorded."""
    state = trained_state(tiny)
    state.epoch = 1
    before = checkpoint.save(tmp_path, state)
    state.epoch, state.step = 2, 4
    after = checkpoint.save(tmp_path, state)
    assert checkpoint.load_latest(tmp_path, tiny, fail_on_warning, {1}) is not None

    warnings: list[str] = []
    saved = checkpoint.load_latest(tmp_path, tiny, warnings.append, set())
    assert saved is not None
    assert saved.counters.step == 3
    assert warnings == [
        f"{after}: skipped: metrics.jsonl has no valid line for epoch 1; "
        "using the previous checkpoint, if any"
    ]
    assert {path.name for path in tmp_path.iterdir()} == {before.name, f"{after.name}.damaged"}


ODD_COUNTERS = [
    {"step": "3"},
    {"step": -1},
    {"epoch": 1.5},
    {"best_accuracy": None},
    {"seconds": math.nan},
    {"progress": []},
    {"progress": {"num_batches": 1, "num_images": 8, "seconds": 0.1, "chunks": [[8, 0.0, 0, 0, 0, 0, 0]]}},
    {"progress": {"num_batches": 1, "num_images": 8, "seconds": 0.1, "chunks": [[8]]}},
]


@pytest.mark.parametrize("counters", ODD_COUNTERS, ids=str)
def test_counters_of_another_type_are_damage_whatever_the_hash(
    tiny: Config, tmp_path: Path, counters: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = trained_state(tiny)
    values = {**state.counters(), **counters}
    monkeypatch.setattr(TrainState, "counters", lambda _: values)
    path = checkpoint.save(tmp_path, state)

    warnings: list[str] = []
    assert checkpoint.load_latest(tmp_path, tiny, warnings.append) is None
    (warning,) = warnings
    assert warning.startswith(f"{path}: damaged, skipped (")


def test_the_epochs_of_a_hostile_checkpoint_are_not_listed(tiny: Config, tmp_path: Path) -> None:
    state = trained_state(tiny)
    state.epoch = 10**18
    checkpoint.save(tmp_path, state)
    warnings: list[str] = []
    assert checkpoint.load_latest(tmp_path, tiny, warnings.append, {1, 2}) is None
    assert "no valid line for epoch 3" in warnings[0]


def test_a_checkpoint_much_larger_than_its_network_is_not_read(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint.save(tmp_path, trained_state(tiny))
    monkeypatch.setattr(weights, "HEADER_BYTES", 0)
    monkeypatch.setattr(checkpoint, "MAX_COPIES", 1)
    warnings: list[str] = []
    assert checkpoint.load_latest(tmp_path, tiny, warnings.append) is None
    assert warnings[0].startswith(f"{path}: damaged, skipped (has ")
    assert "bytes, but its network at most" in warnings[0]


@pytest.mark.parametrize("name", ["rng/cpu", "best/head.weight", "optimizer/x", "model/x"])
def test_a_tensor_of_another_shape_is_reported(tiny: Config, tmp_path: Path, name: str) -> None:
    checkpoint.save(tmp_path, trained_state(tiny))
    saved = checkpoint.load_latest(tmp_path, tiny, fail_on_warning)
    assert saved is not None
    tensors = {**saved.tensors, name: torch.zeros(3)}
    with pytest.raises(UserError, match=rf"step-3.safetensors: does not match .*\({name} differs\)"):
        init_train_state(tiny, CPU).load_state_dict(saved._replace(tensors=tensors))


DAMAGES = [truncate, flip_a_weight, flip_a_counter, remove_metadata, lambda _: b"", lambda _: b"\xff" * 64]


@pytest.mark.parametrize("damage", DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(
    tiny: Config, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    state = trained_state(tiny)
    checkpoint.save(tmp_path, state)
    state.step = 4
    path = checkpoint.save(tmp_path, state)
    content = path.read_bytes()
    assert damage(content) != content
    path.write_bytes(damage(content))

    warnings: list[str] = []
    saved = checkpoint.load_latest(tmp_path, tiny, warnings.append)
    assert saved is not None
    assert saved.counters.step == 3
    (warning,) = warnings
    assert warning.startswith(f"{path}: damaged, skipped (")
    assert "\n" not in warning
    assert checkpoint.load_latest(tmp_path, tiny, fail_on_warning) is not None, "it is reported only once"

    state.step = 5
    checkpoint.save(tmp_path, state)
    assert names(tmp_path) == ["step-3.safetensors", "step-5.safetensors"]


def test_the_file_can_be_read_with_safetensors_alone(tiny: Config, tmp_path: Path) -> None:
    state = trained_state(tiny)
    path = checkpoint.save(tmp_path, state)
    with safetensors.safe_open(path, "pt") as opened:
        values = json.loads(opened.metadata()["state"])
        assert set(opened.keys()) == set(state.state_dict())
    assert (values["step"], values["epoch"], values["progress"]["num_batches"]) == (3, 2, 3)


# -- best weights --------------------------------------------------------------------------------------------


def test_the_best_weights_are_copied_and_restored(tiny: Config) -> None:
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
    assert state.last_improved_epoch == 5, "the accuracy has not improved since epoch 5"
    state.restore_best_weights()
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
