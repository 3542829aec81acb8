"""Autotuning: the check of the precision, and the smallest batch size close to the best throughput."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from conftest import CPU, infos, warnings, with_train

from captcha_exp import load
from captcha_exp.config import Config, Precision, resolve, to_dict, with_default_batch_size
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.model.step import Step, init_train_state, train_step
from captcha_exp.runtime import cpu_time
from captcha_exp.runtime.device import detect_machine
from captcha_exp.runtime.files import sha256_of
from captcha_exp.training import autotune, train

pytestmark = pytest.mark.usefixtures("one_thread")


def with_precision(config: Config, precision: Precision | Literal["auto"]) -> Config:
    return replace(config, device=replace(config.device, precision=precision))


@pytest.mark.parametrize(
    ("finite", "cosine", "problem"),
    [
        (True, 0.99, ""),
        (False, 0.99, "is not finite"),
        (True, 0.10, "has another gradient (cosine 0.100)"),
        (True, float("nan"), "has another gradient (cosine nan)"),
    ],
)
def test_a_precision_with_wrong_results_becomes_fp32(
    tiny: Config,
    monkeypatch: pytest.MonkeyPatch,
    finite: bool,
    cosine: float,
    problem: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trial = autotune.PrecisionTrial("bf16", finite, cosine)
    monkeypatch.setattr(autotune, "_try_precision", lambda *_: (trial, torch.zeros(1)))
    caplog.clear()

    precision, recorded = autotune.check_precision(with_precision(tiny, "bf16"))

    assert precision == ("fp32" if problem else "bf16")
    assert [row["precision"] for row in recorded] == ["bf16"]
    warning = f"device.precision=auto: bf16 {problem} on this device; the training is in fp32"
    assert warnings(caplog) == ([warning] if problem else [])


def test_the_bf16_gradient_on_the_cpu_agrees_with_fp32(tiny: Config) -> None:
    precision, (trial,) = autotune.check_precision(with_precision(tiny, "bf16"))

    assert precision == trial["precision"] == "bf16"
    assert trial["finite"]
    assert isinstance(trial["cosine"], float)
    assert 0.9 < trial["cosine"] < 1.0


def test_a_non_finite_precision_is_rejected(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU whose 16-bit convolutions return NaN: every bf16 step is not finite."""

    def step(state: Any, batch: Any, config: Config) -> Step:
        result = train_step(state, batch, config)
        return result._replace(finite=torch.tensor(config.device.precision == "fp32"))

    monkeypatch.setattr(autotune, "train_step", step)
    caplog.clear()

    assert autotune.check_precision(with_precision(tiny, "bf16"))[0] == "fp32"
    assert warnings(caplog)[0].startswith("device.precision=auto: bf16 is not finite on this device; ")


def test_fp32_needs_no_check(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_try_precision", pytest.fail)
    assert autotune.check_precision(tiny) == ("fp32", [])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_auto_trains_like_the_precision_of_the_hardware(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    """The weights are equal, whatever else runs, and the check is recorded."""
    monkeypatch.setattr("captcha_exp.runtime.device.precision_of_cpu", lambda _: precision)
    monkeypatch.setattr(cpu_time, "is_disturbed", lambda *_: True)
    requested = with_precision(tiny, "auto")

    result = train.train(requested)
    again = train.train(with_precision(tiny, precision))

    assert result.config.device.precision == precision
    assert result.weights_sha256 == again.weights_sha256
    recorded = json.loads((result.run_dir / "environment.json").read_text())["precisions_tried"]
    assert [row["precision"] for row in recorded] == (["bf16"] if precision == "bf16" else [])
    assert to_dict(requested)["device"]["precision"] == "auto"
    assert sha256_of(result.run_dir / "config.yaml") == sha256_of(again.run_dir / "config.yaml")


def test_autotuning_does_not_change_the_initial_weights(tiny: Config) -> None:
    before = init_train_state(tiny, torch.device("cpu")).model.state_dict()
    autotune.check_precision(with_precision(tiny, "bf16"))
    after = init_train_state(tiny, torch.device("cpu")).model.state_dict()

    assert all(torch.equal(before[name], after[name]) for name in before)


# -- the batch size ------------------------------------------------------------------------------------------

SPLIT_SIZES = {"train": 150, "validation": 75, "test": 75}


def auto(config: Config) -> Config:
    return with_train(config, batch_size="auto")


def script_speeds(
    monkeypatch: pytest.MonkeyPatch, speeds: Mapping[int, float | None], clock: list[float] | None = None
) -> list[int]:
    """Script the speed of each batch size, None for out of memory; return the list of sizes tried."""
    tried: list[int] = []

    def speed(config: Config, device: torch.device) -> float | None:
        tried.append(int(config.train.batch_size))
        if clock is not None:
            clock.append(clock[-1] + 25.0)
        return speeds[tried[-1]]

    monkeypatch.setattr(autotune, "_measure_images_per_second", speed)
    return tried


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [
        ({8: 10, 16: 20, 32: 40, 64: 80, 128: 160}, 128),  # up to the size of the split
        ({8: 10, 16: 50, 32: 94, 64: 99, 128: 100}, 64),  # 95% of the best
        ({8: 10, 16: 50, 32: 95, 64: 99, 128: 100}, 32),
        ({8: 96, 16: 97, 32: 97}, 8),  # two in a row without improvement
        ({8: 50, 16: 100, 32: 101, 64: 101}, 16),
        ({8: 50, 16: 100, 32: 90, 64: 103, 128: 100}, 16),  # one without improvement does not end the search
        ({8: 10, 16: 20, 32: 40, 64: None}, 32),  # out of memory
    ],
    ids=["all", "near the best", "at 95%", "plateau at once", "plateau", "dip", "out of memory"],
)
def test_the_smallest_batch_size_close_to_the_best_is_chosen(
    tiny: Config,
    monkeypatch: pytest.MonkeyPatch,
    speeds: dict[int, float | None],
    chosen: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes = script_speeds(monkeypatch, speeds)
    caplog.clear()

    chosen_size, recorded = autotune.choose_batch_size(auto(tiny), SPLIT_SIZES)

    assert chosen_size == chosen
    assert sizes == list(speeds)
    assert [row["images_per_second"] for row in recorded] == list(speeds.values())
    assert [row["batch_size"] for row in recorded] == sizes
    assert infos(caplog)[0].startswith(f"batch size {chosen}: images/s by batch size 8: ")
    assert infos(caplog)[0].endswith("; 64 does not fit") == (None in speeds.values())


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call every speed disturbed, whatever the machine does."""
    monkeypatch.setattr(cpu_time, "is_disturbed", lambda *_: True)


@pytest.mark.parametrize(
    ("disturbed", "chosen"), [({8, 16, 32, 64, 128}, 64), ({32, 64, 128}, 16), ({128}, 64)]
)
def test_undisturbed_batch_sizes_are_preferred_and_others_are_warned_of(
    tiny: Config,
    monkeypatch: pytest.MonkeyPatch,
    disturbed: set[int],
    chosen: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried = script_speeds(monkeypatch, {8: 10, 16: 50, 32: 94, 64: 99, 128: 100})
    monkeypatch.setattr(cpu_time, "is_disturbed", lambda *_: tried[-1] in disturbed)

    size, recorded = autotune.choose_batch_size(auto(tiny), SPLIT_SIZES)

    assert size == chosen
    assert [row["disturbed"] for row in recorded] == [n in disturbed for n in (8, 16, 32, 64, 128)]
    assert warnings(caplog) == [
        "train.batch_size=auto: other processes disturbed the speed of batch sizes "
        f"{', '.join(map(str, sorted(disturbed)))}; {chosen} may be wrong: set train.batch_size, or start "
        "again when the cores are idle"
    ]


@pytest.mark.parametrize(("images", "sizes"), [(5, [5]), (8, [8]), (31, [8, 16]), (32, [8, 16, 32])])
def test_no_batch_size_exceeds_the_training_split(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, images: int, sizes: list[int]
) -> None:
    tried = script_speeds(monkeypatch, {size: float(size) for size in (5, 8, 16, 32, 64)})
    assert autotune.choose_batch_size(auto(tiny), SPLIT_SIZES | {"train": images})[0] == sizes[-1]
    assert tried == sizes


def test_a_batch_size_that_does_not_fit_is_recorded_and_ends_the_search(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = script_speeds(monkeypatch, {8: 10.0, 16: 20.0, 64: 80.0})
    monkeypatch.setattr(
        autotune, "_check_fit", lambda plan, _: (float(plan.batch_size), plan.batch_size != 32)
    )
    caplog.clear()

    chosen_size, recorded = autotune.choose_batch_size(auto(tiny), SPLIT_SIZES)

    assert (chosen_size, tried) == (16, [8, 16])
    assert recorded[-1] == {
        "batch_size": 32,
        "predicted_mib": 32.0,
        "fits": False,
        "images_per_second": None,
        "disturbed": False,
    }
    assert infos(caplog)[0].endswith("16: 20; 32 does not fit")


def test_autotuning_respects_the_budget(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the budget applies to the memory predicted for a GPU."""
    script_speeds(monkeypatch, {8: 10.0})
    small = replace(tiny, device=replace(tiny.device, vram_budget_mib=30))
    with pytest.raises(UserError, match=r"not even 8 images fit \(predicted .+ MiB\)") as caught:
        autotune.choose_batch_size(auto(small), SPLIT_SIZES)
    assert len(caught.value.lines) == 1


def test_out_of_memory_at_the_first_size_is_an_error_of_one_line(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_speeds(monkeypatch, {8: None})
    with pytest.raises(UserError, match=r"train\.batch_size=auto: not even 8 images fit"):
        autotune.choose_batch_size(auto(tiny), SPLIT_SIZES)


def test_a_step_out_of_memory_has_no_speed(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: object) -> None:
        raise torch.OutOfMemoryError("simulated")

    assert autotune._measure_images_per_second(tiny, CPU) is not None
    monkeypatch.setattr(autotune, "train_step", step)
    assert autotune._measure_images_per_second(tiny, CPU) is None


def test_the_search_has_a_time_limit(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 25 seconds per size it ends after the third."""
    clock = [0.0]
    tried = script_speeds(monkeypatch, {8 * 2**n: 2.0**n for n in range(5)}, clock)
    monkeypatch.setattr(autotune, "time", SimpleNamespace(perf_counter=lambda: clock[-1]))
    assert autotune.choose_batch_size(auto(tiny), SPLIT_SIZES)[0] == 32
    assert tried == [8, 16, 32]


def test_batch_size_auto_trains_like_the_chosen_batch_size(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The micro-batch size, which is larger than the chosen batch size, is dropped."""
    monkeypatch.setattr(autotune, "MIN_TIMED_SECONDS", 0.01)
    monkeypatch.setattr(autotune, "TARGET_FRACTION", 0.0)  # choose the smallest, whatever the speed
    tiny = replace(tiny, device=replace(tiny.device, threads=1))
    requested = with_train(tiny, batch_size="auto", micro_batch_size=10, epochs=1)

    result = train.train(requested)
    again = train.train(with_train(tiny, batch_size=8, epochs=1))

    assert result.config.train.batch_size == 8
    assert result.weights_sha256 == again.weights_sha256
    assert load(result.run_dir / "config.yaml").train.batch_size == 8
    assert load(result.run_dir / "requested.yaml").train.batch_size == "auto"
    assert sha256_of(result.run_dir / "config.yaml") == sha256_of(again.run_dir / "config.yaml")
    recorded = json.loads((result.run_dir / "environment.json").read_text())["batch_sizes_tried"]
    assert [row["batch_size"] for row in recorded][:2] == [8, 16]
    assert all(row["fits"] and row["images_per_second"] > 0 for row in recorded)
    assert json.loads((again.run_dir / "environment.json").read_text())["batch_sizes_tried"] == []
    assert json.loads((result.run_dir / "memory.json").read_text())["batch_size"] == 8


def test_resolve_runs_no_trials(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_time_step", pytest.fail)
    machine = replace(detect_machine(), precisions={"cpu": "bf16"})
    resolved = resolve(auto(with_precision(tiny, "auto")), machine)
    assert (resolved.device.precision, resolved.train.batch_size) == ("bf16", "auto")


def test_values_that_are_not_auto_are_not_tuned(tiny: Config, caplog: pytest.LogCaptureFixture) -> None:
    assert autotune.autotune(tiny, tiny, SPLIT_SIZES) == (
        tiny,
        {"precisions_tried": [], "batch_sizes_tried": []},
    )
    assert infos(caplog) == []


@pytest.mark.parametrize(("micro", "size"), [(None, 1), (7, 8)])
def test_the_default_batch_size_is_larger_than_the_micro_batch(
    tiny: Config, micro: int | None, size: int
) -> None:
    config = with_train(tiny, batch_size="auto", micro_batch_size=micro)
    assert with_default_batch_size(config).train.batch_size == size
    assert with_default_batch_size(tiny) == tiny


def test_a_missing_gpu_is_reported_before_any_trial(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    monkeypatch.setattr("captcha_exp.runtime.device._is_cuda_available", lambda: False)
    on_gpu = replace(tiny, device=replace(tiny.device, name="cuda"))
    with pytest.raises(ConfigError, match=r"^device\.name=cuda: .+; available here: auto, "):
        train.train(auto(on_gpu))
    assert not (root / "outputs").exists()


@pytest.mark.parametrize(
    ("micro", "size", "expected"), [(8, 4, None), (8, 8, None), (8, 16, 8), (None, 4, None)]
)
def test_a_micro_batch_larger_than_the_chosen_batch_is_dropped(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, micro: int | None, size: int, expected: int | None
) -> None:
    monkeypatch.setattr(autotune, "choose_batch_size", lambda *_: (size, []))
    config = with_train(tiny, batch_size="auto", micro_batch_size=micro)
    tuned, _ = autotune.autotune(config, config, SPLIT_SIZES)
    assert (tuned.train.batch_size, tuned.train.micro_batch_size) == (size, expected)
