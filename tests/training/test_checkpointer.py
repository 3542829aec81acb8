"""Checkpoints are saved when train.checkpoint_every asks for them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CPU, make_batch, make_checker, with_train

from captcha_exp.config import Config
from captcha_exp.model.state import EpochProgress, TrainState
from captcha_exp.model.step import init_train_state
from captcha_exp.runtime.shutdown import ShutdownHandler
from captcha_exp.training import checkpointer

# (step, epoch, whether the epoch has ended)
POSITIONS = [(1, 1, False), (2, 1, False), (2, 1, True), (3, 2, False), (4, 2, False), (4, 2, True)]


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (None, []),
        ("1 step", [(1, False), (2, False), (3, False), (4, False)]),
        ("2 steps", [(2, False), (4, False)]),
        ("1 epoch", [(2, True), (4, True)]),
        ("2 epochs", [(4, True)]),
        ("3 minutes", [(2, True), (4, True)]),
    ],
)
def test_checkpoint_every(
    tiny: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: str | None,
    expected: list[tuple[int, bool]],
) -> None:
    """Each reading of the clock takes a minute; a saved checkpoint reads it as well."""
    clock = iter(range(0, 60_000, 60))
    saved: list[tuple[int, bool]] = []

    def save(_: Path, state: TrainState) -> None:
        saved.append((state.step, state.progress is None))

    monkeypatch.setattr(checkpointer, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr("captcha_exp.model.state.save", save)
    config = with_train(tiny, checkpoint_every=every)
    checker = make_checker(config, make_batch(config))
    saver = checkpointer.Checkpointer(tmp_path, config, checker, ShutdownHandler(None))
    state = init_train_state(config, CPU)
    for state.step, state.epoch, ended in POSITIONS:
        state.progress = None if ended else EpochProgress.zeros(CPU)
        saver.maybe_save(state)
    assert saved == expected
