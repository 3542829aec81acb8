"""A precision is taken when its numbers are right and it pays, and for no other reason."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Heard

from captcha_exp import probe, train
from captcha_exp.config import Config, Precision, to_dict
from captcha_exp.record.files import sha256_of
from captcha_exp.step import Step, fresh_state, train_step

pytestmark = pytest.mark.usefixtures("one_thread")


def tried(precision: Precision, finite: bool, cosine: float, seconds: float) -> probe.Tried:
    return probe.Tried(precision, finite, cosine, seconds)


PLAIN = tried("fp32", True, 1.0, 1.0)


@pytest.mark.parametrize(
    ("bf16", "fp16", "chosen"),
    [
        (tried("bf16", True, 0.99, 0.5), tried("fp16", True, 0.99, 0.6), "bf16"),
        (tried("bf16", True, 0.99, 0.6), tried("fp16", True, 0.99, 0.5), "fp16"),
        (tried("bf16", True, 0.99, 0.6), tried("fp16", False, 0.0, 0.5), "bf16"),
        (tried("bf16", True, 0.10, 0.5), tried("fp16", True, float("nan"), 0.5), "fp32"),
        (tried("bf16", True, 0.99, 0.95), tried("fp16", True, 0.99, 3.0), "fp32"),
    ],
    ids=["the faster", "the faster, turned", "not finite", "points elsewhere", "does not pay"],
)
def test_the_fastest_that_is_right_is_taken(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, bf16: probe.Tried, fp16: probe.Tried, chosen: str
) -> None:
    outcomes = {"fp32": PLAIN, "bf16": bf16, "fp16": fp16}
    monkeypatch.setattr("captcha_exp.device.half_precisions", lambda _: ("bf16", "fp16"))
    monkeypatch.setattr(probe, "_try", lambda name, *_: (outcomes[name], torch.zeros(1)))
    heard = Heard()

    precision, seen = probe.precision(tiny, heard)

    assert precision == chosen
    assert [row["precision"] for row in seen] == ["fp32", "bf16", "fp16"]
    assert heard.lines[0].startswith(f"precision {chosen}: bf16 ")


def test_bf16_on_this_cpu_points_where_fp32_does(tiny: Config) -> None:
    _, seen = probe.precision(tiny, Heard())

    plain, half = seen
    assert plain["cosine"] == 1.0
    assert half["precision"] == "bf16"
    assert half["finite"]
    assert isinstance(half["cosine"], float)
    assert 0.9 < half["cosine"] < 1.0


def test_numbers_that_are_not_finite_are_seen(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card whose 16-bit convolutions give NaN: every step of bf16 is not finite."""

    def step(state: Any, batch: Any, config: Config) -> Step:
        done = train_step(state, batch, config)
        return done._replace(finite=torch.tensor(config.device.precision == "fp32"))

    monkeypatch.setattr(probe, "train_step", step)
    heard = Heard()

    assert probe.precision(tiny, heard)[0] == "fp32"
    assert heard.lines == ["precision fp32: bf16 is not finite here"]


def test_auto_becomes_a_value_and_leaves_the_weights_alone(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained with auto and with what it became: the same weights, and the table is in the record."""
    monkeypatch.setattr(probe, "LEAST_GAIN", 0.0)  # whatever it costs: the test is not about speed
    monkeypatch.setattr("captcha_exp.probe.devices.half_precisions", lambda _: ("bf16",))
    asked = replace(tiny, device=replace(tiny.device, precision="auto"))

    result = train.train(asked)
    chosen = result.config.device.precision
    again = train.train(replace(tiny, device=replace(tiny.device, precision=chosen)))

    assert chosen in ("fp32", "bf16")
    assert result.weights_sha256 == again.weights_sha256
    assert '"precision": "bf16"' in (result.folder / "environment.json").read_text()
    assert to_dict(asked)["device"]["precision"] == "auto"
    assert sha256_of(result.folder / "config.yaml") == sha256_of(again.folder / "config.yaml")


def test_the_probe_draws_from_its_own_chance(tiny: Config) -> None:
    before = fresh_state(tiny, torch.device("cpu")).model.state_dict()
    probe.precision(tiny, Heard())
    after = fresh_state(tiny, torch.device("cpu")).model.state_dict()

    assert all(torch.equal(before[name], after[name]) for name in before)
