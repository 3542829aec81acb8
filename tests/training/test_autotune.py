"""A precision is taken when its numbers are right and it pays, a batch size when more brings nothing."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CPU, Heard, training

from captcha_exp import load
from captcha_exp.config import Config, Precision, resolve, to_dict
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.model.step import Step, init_train_state, train_step
from captcha_exp.runtime.device import detect_machine
from captcha_exp.runtime.files import sha256_of
from captcha_exp.training import autotune, train

pytestmark = pytest.mark.usefixtures("one_thread")


def tried(precision: Precision, finite: bool, cosine: float, seconds: float) -> autotune.PrecisionTrial:
    return autotune.PrecisionTrial(precision, finite, cosine, seconds)


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
    tiny: Config,
    monkeypatch: pytest.MonkeyPatch,
    bf16: autotune.PrecisionTrial,
    fp16: autotune.PrecisionTrial,
    chosen: str,
) -> None:
    outcomes = {"fp32": PLAIN, "bf16": bf16, "fp16": fp16}
    monkeypatch.setattr("captcha_exp.runtime.device.half_precisions", lambda _: ("bf16", "fp16"))
    monkeypatch.setattr(autotune, "_try", lambda name, *_: (outcomes[name], torch.zeros(1)))
    heard = Heard()

    precision, seen = autotune.choose_precision(tiny, heard)

    assert precision == chosen
    assert [row["precision"] for row in seen] == ["fp32", "bf16", "fp16"]
    assert heard.lines[0].startswith(f"precision {chosen}: bf16 ")


def test_bf16_on_this_cpu_points_where_fp32_does(tiny: Config) -> None:
    _, seen = autotune.choose_precision(tiny, Heard())

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

    monkeypatch.setattr(autotune, "train_step", step)
    heard = Heard()

    assert autotune.choose_precision(tiny, heard)[0] == "fp32"
    assert heard.lines == ["precision fp32: bf16 is not finite here"]


def test_auto_becomes_a_value_and_leaves_the_weights_alone(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained with auto and with what it became: the same weights, and the table is in the record."""
    monkeypatch.setattr(autotune, "LEAST_GAIN", 0.0)  # whatever it costs: the test is not about speed
    monkeypatch.setattr("captcha_exp.training.autotune.devices.half_precisions", lambda _: ("bf16",))
    asked = replace(tiny, device=replace(tiny.device, precision="auto"))

    result = train.train(asked)
    chosen = result.config.device.precision
    again = train.train(replace(tiny, device=replace(tiny.device, precision=chosen)))

    assert chosen in ("fp32", "bf16")
    assert result.weights_sha256 == again.weights_sha256
    assert '"precision": "bf16"' in (result.run_dir / "environment.json").read_text()
    assert to_dict(asked)["device"]["precision"] == "auto"
    assert sha256_of(result.run_dir / "config.yaml") == sha256_of(again.run_dir / "config.yaml")


def test_the_probe_draws_from_its_own_chance(tiny: Config) -> None:
    before = init_train_state(tiny, torch.device("cpu")).model.state_dict()
    autotune.choose_precision(tiny, Heard())
    after = init_train_state(tiny, torch.device("cpu")).model.state_dict()

    assert all(torch.equal(before[name], after[name]) for name in before)


# -- the batch size ------------------------------------------------------------------------------------------

ALL = {"train": 150, "validation": 75, "test": 75}


def auto(config: Config) -> Config:
    return training(config, batch_size="auto")


def playing(
    monkeypatch: pytest.MonkeyPatch, speeds: Mapping[int, float | None], clock: list[float] | None = None
) -> list[int]:
    """Batch sizes have these speeds; None is out of memory. The sizes that are tried."""
    tried: list[int] = []

    def speed(config: Config, device: torch.device) -> float | None:
        tried.append(int(config.train.batch_size))
        if clock is not None:
            clock.append(clock[-1] + 25.0)
        return speeds[tried[-1]]

    monkeypatch.setattr(autotune, "_pictures_per_second", speed)
    return tried


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [
        ({8: 10, 16: 20, 32: 40, 64: 80, 128: 160}, 128),  # to the split's size
        ({8: 10, 16: 50, 32: 94, 64: 99, 128: 100}, 64),  # 95 of the best
        ({8: 10, 16: 50, 32: 95, 64: 99, 128: 100}, 32),
        ({8: 96, 16: 97, 32: 97}, 8),  # two in a row bring nothing
        ({8: 50, 16: 100, 32: 101, 64: 101}, 16),
        ({8: 50, 16: 100, 32: 90, 64: 103, 128: 100}, 16),  # one that brings nothing is no end
        ({8: 10, 16: 20, 32: 40, 64: None}, 32),  # out of memory
    ],
    ids=["all", "near the best", "at 95 %", "stalled at once", "stalled", "a dent", "out of memory"],
)
def test_the_smallest_batch_near_the_best_is_taken(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, speeds: dict[int, float | None], chosen: int
) -> None:
    sizes = playing(monkeypatch, speeds)
    heard = Heard()

    found, table = autotune.choose_batch_size(auto(tiny), ALL, heard)

    assert found == chosen
    assert sizes == list(speeds)
    assert [row["images_per_second"] for row in table] == list(speeds.values())
    assert [row["batch_size"] for row in table] == sizes
    assert heard.lines[0].startswith(f"batch size {chosen}: pictures/s by batch size 8: ")
    assert heard.lines[0].endswith("; 64 does not fit") == (None in speeds.values())


@pytest.mark.parametrize(("images", "sizes"), [(5, [5]), (8, [8]), (31, [8, 16]), (32, [8, 16, 32])])
def test_no_batch_is_larger_than_the_training_split(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, pictures: int, sizes: list[int]
) -> None:
    tried = playing(monkeypatch, {size: float(size) for size in (5, 8, 16, 32, 64)})
    assert autotune.choose_batch_size(auto(tiny), ALL | {"train": pictures}, Heard())[0] == sizes[-1]
    assert tried == sizes


def test_what_does_not_fit_is_recorded_and_not_tried(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the plan says, and so what comes after it is not tried either."""
    tried = playing(monkeypatch, {8: 10.0, 16: 20.0, 64: 80.0})
    monkeypatch.setattr(autotune, "_room", lambda plan, _: (float(plan.batch_size), plan.batch_size != 32))
    heard = Heard()

    found, table = autotune.choose_batch_size(auto(tiny), ALL, heard)

    assert (found, tried) == (16, [8, 16])
    assert table[-1] == {
        "batch_size": 32,
        "predicted_mib": 32.0,
        "fits": False,
        "images_per_second": None,
    }
    assert heard.lines[0].endswith("16: 20; 32 does not fit")


def test_a_budget_holds_in_the_probe_too(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it holds for what is foretold of a card; none is needed here but the plan's verdict."""
    playing(monkeypatch, {8: 10.0})
    small = replace(tiny, device=replace(tiny.device, vram_budget_mib=30))
    with pytest.raises(UserError, match=r"not even 8 pictures fit; they need .+ MiB") as caught:
        autotune.choose_batch_size(auto(small), ALL, Heard())
    assert len(caught.value.lines) == 1


def test_out_of_memory_at_the_first_size_is_a_line(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    playing(monkeypatch, {8: None})
    with pytest.raises(UserError, match=r"train\.batch_size=auto: not even 8 pictures fit"):
        autotune.choose_batch_size(auto(tiny), ALL, Heard())


def test_a_step_without_memory_has_no_speed(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: object) -> None:
        raise torch.OutOfMemoryError("played")

    assert autotune._measure_images_per_second(tiny, CPU) is not None
    monkeypatch.setattr(autotune, "train_step", step)
    assert autotune._measure_images_per_second(tiny, CPU) is None


def test_the_probe_has_its_time(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """25 seconds for each size end it after the third; the best of them is taken."""
    clock = [0.0]
    tried = playing(monkeypatch, {8 * 2**n: 2.0**n for n in range(5)}, clock)
    monkeypatch.setattr(autotune, "time", SimpleNamespace(perf_counter=lambda: clock[-1]))
    assert autotune.choose_batch_size(auto(tiny), ALL, Heard())[0] == 32
    assert tried == [8, 16, 32]


def test_a_batch_size_that_was_found_trains_as_one_that_was_written(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For real, with parts that are larger than what was found: they are then none."""
    monkeypatch.setattr(autotune, "TIMED_SECONDS", 0.01)
    monkeypatch.setattr(autotune, "ENOUGH", 0.0)  # the smallest: the test is not about speed
    tiny = replace(tiny, device=replace(tiny.device, threads=1))
    asked = training(tiny, batch_size="auto", micro_batch_size=10, epochs=1)

    result = train.train(asked)
    again = train.train(training(tiny, batch_size=8, epochs=1))

    assert result.config.train.batch_size == 8
    assert result.weights_sha256 == again.weights_sha256
    assert load(result.run_dir / "config.yaml").train.batch_size == 8
    assert load(result.run_dir / "requested.yaml").train.batch_size == "auto"
    assert sha256_of(result.run_dir / "config.yaml") == sha256_of(again.run_dir / "config.yaml")
    table = json.loads((result.run_dir / "environment.json").read_text())["batch_sizes_tried"]
    assert [row["batch_size"] for row in table][:2] == [8, 16]
    assert all(row["fits"] and row["images_per_second"] > 0 for row in table)
    assert json.loads((again.run_dir / "environment.json").read_text())["batch_sizes_tried"] == []
    assert json.loads((result.run_dir / "memory.json").read_text())["batch_size"] == 8


def test_only_who_trains_can_find_a_batch_size(tiny: Config) -> None:
    with pytest.raises(ConfigError, match="when it trains; write a number") as caught:
        resolve(auto(tiny), detect_machine())
    assert len(caught.value.lines) == 1


def test_a_card_that_is_not_here_is_told_before_anything_is_tried(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    monkeypatch.setattr("captcha_exp.runtime.device._cuda_works", lambda: False)
    on_card = replace(tiny, device=replace(tiny.device, name="cuda"))
    with pytest.raises(ConfigError, match=r"^device\.name=cuda: .+; available here: auto, "):
        train.train(auto(on_card))
    assert not (root / "outputs").exists()


@pytest.mark.parametrize(("micro", "size", "left"), [(8, 4, None), (8, 8, None), (8, 16, 8), (None, 4, None)])
def test_a_found_batch_smaller_than_its_parts_has_none(
    tiny: Config, micro: int | None, size: int, left: int | None
) -> None:
    config = training(tiny, batch_size="auto", micro_batch_size=micro)
    resolved = resolve(config, detect_machine(best_batch_size=lambda _: size))
    assert (resolved.train.batch_size, resolved.train.micro_batch_size) == (size, left)
