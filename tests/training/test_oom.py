"""Out of memory: recognized by its type, recorded with remedies, and retried with smaller micro-batches."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import dataset_json, out_of_memory, with_train

from captcha_exp import runs
from captcha_exp.config import Config, resolve
from captcha_exp.memory.plan import Planner
from captcha_exp.runs import find_run, read_metrics_rows
from captcha_exp.runtime import device as devices
from captcha_exp.sweep.supervisor import _halve_micro_batch
from captcha_exp.training import oom, train

SPLIT_SIZES = {"train": 150, "validation": 75, "test": 75}


class CudaError(torch.AcceleratorError):
    """One of CUDA's own errors, by its number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"CUDA error {number}")
        self.error_code = number


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (CudaError(2), True),
        (RuntimeError("[enforce fail at x.cpp:1] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (CudaError(700), False),
        (RuntimeError("out of memory in a message only"), False),
        (ValueError("CUDA out of memory."), False),
        (OSError(12, "Cannot allocate memory"), False),
    ],
    ids=lambda value: str(value)[:24],
)
def test_out_of_memory_errors_are_recognized(error: BaseException, expected: bool) -> None:
    assert devices.is_out_of_memory(error) is expected


def test_an_error_of_the_cpu_allocator_is_recognized() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert devices.is_out_of_memory(caught.value)


def run_out_of_memory(
    config: Config, monkeypatch: pytest.MonkeyPatch, where: str
) -> tuple[dict[str, Any], Path, str]:
    """Run out of memory in the second epoch; return run.json, the run directory and the error message."""

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
        train.train(config)
    run_dir = find_run("latest")
    return json.loads((run_dir / "run.json").read_text()), run_dir, str(caught.value)


@pytest.mark.parametrize(("where", "step"), [("training", 4), ("evaluation", 7)])
def test_the_record_has_the_position_and_the_prediction(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, where: str, step: int
) -> None:
    state, run_dir, message = run_out_of_memory(with_train(tiny, on_oom="record"), monkeypatch, where)
    recorded = state["oom"]

    assert (recorded["during"], recorded["epoch"], recorded["step"]) == (where, 2, step)
    assert recorded["predicted_mib"] == json.loads((run_dir / "memory.json").read_text())["process_mib"]
    assert state["tags"] == {"oom": "true"}
    rows = read_metrics_rows(run_dir)[0]
    assert rows[-1].step == 2
    assert rows[-1].metrics["memory/process_peak_mib"] == recorded["peak_mib"] > 100
    assert rows[-1].metrics["memory/predicted_peak_mib"] == recorded["predicted_mib"][1]
    assert re.fullmatch(
        rf"out of memory in {where}, epoch 2, step {step}: peak [\d,]+ MiB, "
        r"predicted \d+ to \d+ MiB for any CUDA GPU; .+",
        message,
    )
    assert state["error"] == message


@pytest.mark.parametrize(
    ("on_oom", "status", "code"), [("record", "FINISHED", 0), ("split", "FINISHED", 0), ("fail", "FAILED", 1)]
)
def test_on_oom_decides_whether_the_run_has_failed(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, on_oom: str, status: str, code: int
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(train, "fit", fail)
    with pytest.raises(oom.TrainingOutOfMemoryError) as caught:
        train.train(with_train(tiny, on_oom=on_oom))

    assert caught.value.exit_code == code
    assert json.loads((find_run("latest") / "run.json").read_text())["status"] == status


def test_on_oom_auto_resolves_to_fail(tiny: Config) -> None:
    assert tiny.train.on_oom == "auto"
    assert resolve(tiny, devices.detect_machine()).train.on_oom == "fail"


def roomy(tiny: Config, budget_mib: int | None) -> Config:
    """Return a config with larger images, whose activations dominate the memory of the GPU."""
    zero = replace(tiny.gpu.cudnn_workspace_mib, min=0.0, max=0.0)
    gpu = replace(
        tiny.gpu,
        context_mib=replace(tiny.gpu.context_mib, min=10.0, max=10.0),
        cudnn_workspace_mib=zero,
        cublas_workspace_mib=zero,
    )
    return replace(
        with_train(tiny, batch_size=100),
        gpu=gpu,
        captcha=replace(tiny.captcha, width=512, height=64),
        device=replace(tiny.device, vram_budget_mib=budget_mib, preload_limit_mib=0, threads=2),
    )


@pytest.mark.long
@pytest.mark.parametrize("budget_mib", [None, 60, 10_000])
def test_a_remedy_needs_clearly_less_memory(tiny: Config, budget_mib: int | None) -> None:
    config = roomy(tiny, budget_mib)
    plan = Planner(config, SPLIT_SIZES).plan_for(100)
    remedies = oom.find_remedies(plan, SPLIT_SIZES, config)

    assert 1 <= len(remedies) <= 3
    for remedy in remedies:
        match = re.fullmatch(r"(.+) \(([\d,]+)(?: to ([\d,]+))? MiB\)", remedy)
        assert match is not None
        overrides, low, high = match.groups()
        needed = float((high or low).replace(",", ""))
        assert needed <= 0.9 * plan.process_mib.max + 1
        assert needed <= (budget_mib or needed)
        assert "=" in overrides
        assert "vram_budget" not in overrides


def test_remedies_are_formatted_in_one_line() -> None:
    assert oom.format_remedies([]).startswith("no setting needs clearly less memory")
    assert oom.format_remedies(["a=1 (5 MiB)", "b=2 (6 MiB)"]) == (
        "to need less memory, set a=1 (5 MiB), or b=2 (6 MiB)"
    )


# -- retries -------------------------------------------------------------------------------------------------


def retry(config: Config, during: Literal["training", "evaluation"]) -> Config | None:
    """Return the config that is tried after a run of this config was out of memory."""
    run = runs.create_run(config, config)
    run.write_json("dataset.json", dataset_json(splits=SPLIT_SIZES))
    run.update(oom=out_of_memory(during))
    return _halve_micro_batch(config, run.run_dir)


def test_the_micro_batch_is_halved_down_to_one_image_and_the_batch_size_is_kept(tiny: Config) -> None:
    config: Config | None = with_train(tiny, on_oom="split", batch_size=100)
    sizes = []
    while config is not None:
        assert config.train.batch_size == 100
        sizes.append(config.train.micro_batch_size)
        config = retry(config, "training")

    assert sizes == [None, 50, 25, 13, 7, 4, 2, 1]


def test_a_batch_larger_than_the_split_is_halved_from_the_size_of_the_split(tiny: Config) -> None:
    config = with_train(tiny, on_oom="split", batch_size=1000, eval_batch_size=1000)
    in_training, in_evaluation = retry(config, "training"), retry(config, "evaluation")

    assert in_training is not None
    assert in_evaluation is not None
    assert (in_training.train.batch_size, in_training.train.micro_batch_size) == (1000, 75)
    assert in_evaluation.train.eval_batch_size == 38


def test_out_of_memory_in_evaluation_halves_the_evaluation_batch(tiny: Config) -> None:
    config = with_train(tiny, on_oom="split", eval_batch_size=3)
    smaller = retry(config, "evaluation")

    assert smaller == with_train(config, eval_batch_size=2)
    assert retry(with_train(config, eval_batch_size=1), "evaluation") is None


@pytest.mark.parametrize("on_oom", ["record", "fail"])
def test_only_on_oom_split_retries(tiny: Config, on_oom: str) -> None:
    assert retry(with_train(tiny, on_oom=on_oom), "training") is None


def test_an_autotuned_batch_size_is_kept_in_a_retry(tiny: Config) -> None:
    """train.batch_size=auto might choose another value in the next run."""
    requested = with_train(tiny, on_oom="split", batch_size="auto")
    run = runs.create_run(with_train(requested, batch_size=48), requested)
    run.write_json("dataset.json", dataset_json(splits=SPLIT_SIZES))
    run.update(oom=out_of_memory())
    smaller = _halve_micro_batch(requested, run.run_dir)

    assert smaller is not None
    assert (smaller.train.batch_size, smaller.train.micro_batch_size) == (48, 24)
