"""Too little memory: known when it is met, told with what would help, a result where it is to be one."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Heard, training

from captcha_exp import runs
from captcha_exp.config import Config
from captcha_exp.memory.plan import Planner
from captcha_exp.runs import find_run, read_metrics_rows
from captcha_exp.runtime import device as devices
from captcha_exp.sweep.supervisor import _halve_micro_batch
from captcha_exp.training import oom, train

PICTURES = {"train": 150, "validation": 75, "test": 75}


class CudaError(torch.AcceleratorError):
    """One of CUDA's own errors, by its number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"CUDA error {number}")
        self.error_code = number


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (CudaError(2), True),
        (RuntimeError("[enforce fail at x.cpp:1] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (CudaError(700), False),
        (RuntimeError("out of memory, said a friend"), False),
        (ValueError("CUDA out of memory."), False),
        (OSError(12, "Cannot allocate memory"), False),
    ],
    ids=lambda value: str(value)[:24],
)
def test_it_is_told_by_its_type(error: BaseException, known: bool) -> None:
    assert devices.is_out_of_memory(error) is known


def test_the_machines_own_allocator_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert devices.is_out_of_memory(caught.value)


def short(config: Config, monkeypatch: pytest.MonkeyPatch, where: str) -> tuple[dict[str, Any], Path, str]:
    """run.json, the folder and the line of a run that runs out of memory there, in its second epoch."""

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def evaluate(model: Any, *arguments: Any) -> Any:
        model.eval()
        fail()

    original = train.train_epoch

    def train_epoch(state: Any, *arguments: Any) -> Any:
        if state.epoch == 2:
            monkeypatch.setattr(
                *((train, "evaluate", evaluate) if where == "evaluation" else (train, "train_step", fail))
            )
        return original(state, *arguments)

    monkeypatch.setattr(train, "train_epoch", train_epoch)
    with pytest.raises(oom.TrainingOutOfMemoryError) as caught:
        train.train(config, display=Heard())
    folder = find_run("latest")
    return json.loads((folder / "run.json").read_text()), folder, str(caught.value)


@pytest.mark.parametrize(("where", "step"), [("training", 4), ("evaluation", 7)])
def test_the_record_says_where_and_what_was_foretold(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, where: str, step: int
) -> None:
    state, folder, line = short(training(tiny, on_oom="record"), monkeypatch, where)
    said = state["oom"]

    assert (said["during"], said["epoch"], said["step"]) == (where, 2, step)
    assert said["predicted_mib"] == json.loads((folder / "memory.json").read_text())["process_mib"]
    assert state["tags"] == {"oom": "true"}
    rows = read_metrics_rows(folder)[0]
    assert rows[-1].step == 2
    assert rows[-1].metrics["memory/process_peak_mib"] == said["peak_mib"] > 100
    assert rows[-1].metrics["memory/predicted_peak_mib"] == said["predicted_mib"][1]
    assert re.fullmatch(
        rf"out of memory in {where}, epoch 2, step {step}: [\d,]+ MiB taken at most, "
        r"\d+ to \d+ MiB foretold for any CUDA GPU; .+",
        line,
    )
    assert state["error"] == line


@pytest.mark.parametrize(
    ("on_oom", "status", "code"), [("record", "FINISHED", 0), ("split", "FINISHED", 0), ("fail", "FAILED", 1)]
)
def test_what_it_is_taken_for_is_a_choice(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, on_oom: str, status: str, code: int
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(train, "fit", fail)
    with pytest.raises(oom.TrainingOutOfMemoryError) as caught:
        train.train(training(tiny, on_oom=on_oom), display=Heard())

    assert caught.value.exit_code == code
    assert json.loads((find_run("latest") / "run.json").read_text())["status"] == status


def test_alone_it_is_a_failure_unless_somebody_says_otherwise(tiny: Config) -> None:
    from captcha_exp.config import resolve

    assert tiny.train.on_oom == "auto"
    assert resolve(tiny, devices.detect_machine()).train.on_oom == "fail"


def roomy(tiny: Config, budget_mib: int | None) -> Config:
    """A config whose activations outweigh what a card takes by itself; its pictures are larger."""
    zero = replace(tiny.gpu.cudnn_workspace_mib, min=0.0, max=0.0)
    card = replace(
        tiny.gpu,
        context_mib=replace(tiny.gpu.context_mib, min=10.0, max=10.0),
        cudnn_workspace_mib=zero,
        cublas_workspace_mib=zero,
    )
    return replace(
        training(tiny, batch_size=100),
        gpu=card,
        captcha=replace(tiny.captcha, width=512, height=64),
        device=replace(tiny.device, vram_budget_mib=budget_mib, preload_limit_mib=0, threads=2),
    )


@pytest.mark.parametrize("budget_mib", [None, 60, 10_000])
def test_a_remedy_needs_clearly_less(tiny: Config, budget_mib: int | None) -> None:
    config = roomy(tiny, budget_mib)
    planned = Planner(config, PICTURES).plan_for(100)
    named = oom.find_remedies(planned, PICTURES, config, Heard())

    assert 1 <= len(named) <= 3
    for each in named:
        found = re.fullmatch(r"(.+) \(([\d,]+)(?: to ([\d,]+))? MiB\)", each)
        assert found is not None
        overrides, least, most = found.groups()
        needs = float((most or least).replace(",", ""))
        assert needs <= 0.9 * planned.process_mib.max + 1
        assert needs <= (budget_mib or needs)
        assert "=" in overrides
        assert "vram_budget" not in overrides


def test_where_nothing_helps_it_says_so() -> None:
    assert oom.format_remedies([]).startswith("nothing known here needs clearly less")
    assert oom.format_remedies(["a=1 (5 MiB)", "b=2 (6 MiB)"]) == (
        "the cheapest that spare memory: a=1 (5 MiB), or b=2 (6 MiB)"
    )


# -- started again -------------------------------------------------------------------------------------------


def again(config: Config, during: str) -> Config | None:
    """What is tried after a run of this config was short of memory."""
    run = runs.create_run(config, config)
    run.write_json("dataset.json", {"splits": PICTURES})
    run.update(oom={"during": during})
    return _halve_micro_batch(config, run.run_dir)


def test_the_micro_batch_is_halved_down_to_one_picture_and_the_batch_stays(tiny: Config) -> None:
    config: Config | None = training(tiny, on_oom="split", batch_size=100)
    sizes = []
    while config is not None:
        assert config.train.batch_size == 100
        sizes.append(config.train.micro_batch_size)
        config = again(config, "training")

    assert sizes == [None, 50, 25, 13, 7, 4, 2, 1]


def test_a_batch_of_more_than_all_pictures_is_halved_from_all_of_them(tiny: Config) -> None:
    config = training(tiny, on_oom="split", batch_size=1000, eval_batch_size=1000)
    in_training, in_evaluation = again(config, "training"), again(config, "evaluation")

    assert in_training is not None
    assert in_evaluation is not None
    assert (in_training.train.batch_size, in_training.train.micro_batch_size) == (1000, 75)
    assert in_evaluation.train.eval_batch_size == 38


def test_in_evaluation_its_own_batch_is_halved(tiny: Config) -> None:
    config = training(tiny, on_oom="split", eval_batch_size=3)
    smaller = again(config, "evaluation")

    assert smaller == training(config, eval_batch_size=2)
    assert again(training(config, eval_batch_size=1), "evaluation") is None


@pytest.mark.parametrize("on_oom", ["record", "fail"])
def test_it_starts_again_only_if_asked(tiny: Config, on_oom: str) -> None:
    assert again(training(tiny, on_oom=on_oom), "training") is None


def test_what_was_measured_the_first_time_is_kept_the_second(tiny: Config) -> None:
    """train.batch_size=auto may come out otherwise in another run."""
    asked = training(tiny, on_oom="split", batch_size="auto")
    run = runs.create_run(training(asked, batch_size=48), asked)
    run.write_json("dataset.json", {"splits": PICTURES})
    run.update(oom={"during": "training"})
    smaller = _halve_micro_batch(asked, run.run_dir)

    assert smaller is not None
    assert (smaller.train.batch_size, smaller.train.micro_batch_size) == (48, 24)
