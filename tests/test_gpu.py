"""What only a CUDA card can show. Run by `pytest -m gpu`."""

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from captcha_exp import dataset
from captcha_exp.config import Config, Precision
from captcha_exp.device import set_up
from captcha_exp.display import Silent
from captcha_exp.step import fresh_state, train_step
from captcha_exp.train import train

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda(tiny: Config) -> Config:
    return replace(tiny, device=replace(tiny.device, name="cuda"))


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Within the test, whatever waits for the device is an error."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_every_epoch_has_the_peaks_of_the_card(cuda: Config) -> None:
    result = train(cuda)
    rows = [
        json.loads(line)["metrics"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()
    ]

    for row in rows[:2]:
        for phase in ("train", "eval"):
            allocated = row[f"memory/{phase}_peak_allocated_mib"]
            assert 0 < allocated <= row[f"memory/{phase}_peak_reserved_mib"] < row["memory/process_peak_mib"]


def test_the_same_bits_twice_and_whether_the_pictures_live_on_the_card_or_not(cuda: Config) -> None:
    sent = replace(cuda, device=replace(cuda.device, resident_limit_mib=0))

    assert len({train(config).weights_sha256 for config in (cuda, cuda, sent)}) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_never_waits_for_the_card(cuda: Config, precision: Precision, no_waiting: None) -> None:
    config = replace(cuda, device=replace(cuda.device, precision=precision))
    device = set_up(config)
    data = dataset.prepare(dataset.outline(config, Silent()), config, Silent())
    split = data.split("train", device, config.device.resident_limit_mib)
    state = fresh_state(config, device)
    batches = list(split.batches(64, split.shuffled(0, 1)))
    train_step(state, batches[0], config)  # the first step loads kernels, which may wait

    torch.cuda.set_sync_debug_mode("error")
    for batch in batches:
        step = train_step(state, batch, config)
    torch.cuda.set_sync_debug_mode("default")
    assert bool(step.finite)
