"""Training: sanity checks, the end of the loop, and the record of the run."""

import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from conftest import (
    CPU,
    EVERY_EPOCH,
    OPTIMIZERS,
    TINY,
    Optimizer,
    generator_config,
    infos,
    make_batch,
    make_checker,
    rewrite,
    warnings,
    with_train,
)

from captcha_exp import compose, load
from captcha_exp.config import Config, HeadName, MlflowConfig, to_dict
from captcha_exp.data import dataset, sources
from captcha_exp.data.dataset import Batch, Dataset, Split
from captcha_exp.errors import RunFailed, UserError
from captcha_exp.memory.plan import Planner
from captcha_exp.model import networks
from captcha_exp.model.evaluate import Evaluation, evaluate
from captcha_exp.model.saved import evaluate_run
from captcha_exp.model.state import TrainState
from captcha_exp.model.step import Step, init_train_state, train_step
from captcha_exp.model.weights import load_weights, weights_sha256
from captcha_exp.report import figures
from captcha_exp.runs import MetricsRow, Run, RunInfo, Status, read_metrics_rows
from captcha_exp.runs.info import ResultSummary
from captcha_exp.runtime.device import MemoryMeter
from captcha_exp.runtime.paths import root_dir as root_of_runs
from captcha_exp.runtime.shutdown import ShutdownHandler, TimeLimitReached
from captcha_exp.training import sanity, train


class RecordingTracker:
    """A tracker that records its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.rows: list[MetricsRow] = []
        self.status: Status | None = None
        self.run_dir: Path | None = None

    def start(self, run: Run, config: Config) -> None:
        self.calls.append("start")
        self.run, self.run_dir = run, run.run_dir

    def log_metrics(self, row: MetricsRow) -> None:
        self.calls.append("log_metrics")
        self.rows.append(row)

    def finish(self) -> None:
        self.calls.append("finish")
        self.status = self.run.info.status


def state_of(run_dir: Path | None) -> dict[str, Any]:
    assert run_dir is not None
    state: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return state


def rows_of(run_dir: Path) -> list[MetricsRow]:
    return [
        MetricsRow.from_line(f"{line}\n") for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.fixture
def config(tiny: Config) -> Config:
    """The tiny config with one epoch on one thread."""
    return replace(with_train(tiny, epochs=1), device=replace(tiny.device, threads=1))


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the figures of the report, which take longer than this training."""
    for name in ("plot_curves", "plot_confusion_matrix", "plot_misreads", "plot_samples"):
        monkeypatch.setattr(figures, name, lambda *args: None)


# -- non-finite losses and gradients -------------------------------------------------------------------------


FINITE, DIVERGED = torch.tensor(False), torch.tensor(True)


def test_the_first_diverged_step_is_reported(config: Config) -> None:
    """Later finite steps do not hide it, and later diverged steps do not replace it."""
    config, batch = with_train(config, batch_size=2), make_batch(config, 20)
    checker = make_checker(config, batch)
    model = init_train_state(config, CPU).model
    checker.observe(10, torch.tensor(1.0), FINITE)
    checker.check(model, 2)
    checker.observe(17, torch.tensor(math.nan), DIVERGED)
    checker.observe(18, torch.tensor(1.0), DIVERGED)
    checker.observe(19, torch.tensor(1.0), FINITE)
    with pytest.raises(RunFailed, match=r"^step 18 \(epoch 2\): the loss is not finite"):
        checker.check(model, 2)


def test_a_non_finite_gradient_is_distinguished_from_a_non_finite_loss(config: Config) -> None:
    checker = make_checker(config, make_batch(config))
    checker.observe(0, torch.tensor(1.0), DIVERGED)
    with pytest.raises(RunFailed, match=r"^step 1 \(epoch 1\): a gradient is not finite"):
        checker.check(init_train_state(config, CPU).model, 1)


def test_a_too_high_learning_rate_is_reported_in_one_line(config: Config, no_report: None) -> None:
    tracker = RecordingTracker()
    config = with_train(config, learning_rate=1e30, schedule="constant", batch_size=32, epochs=3)
    with pytest.raises(RunFailed) as failure:
        train.train(config, tracker)
    (line,) = failure.value.lines
    assert line.startswith("step ")
    assert "(epoch 1): the loss is not finite, in a batch of" in line
    assert "weights have grown to" in line
    assert "train.learning_rate=1e+30 is too high, try a tenth of it" in line
    state = state_of(tracker.run_dir)
    assert state["status"] == tracker.status == "FAILED"
    assert line in state["error"]


def diverge(config: Config, monkeypatch: pytest.MonkeyPatch, at: int, name: str, value: float) -> str:
    """Set one weight to a value at step `at` (from 1) of a training; return the message of its error."""
    original = train_step
    steps = 0

    def step(state: TrainState, batch: Batch, config: Config) -> Step:
        nonlocal steps
        steps += 1
        if steps == at:
            with torch.no_grad():
                parameter = dict(state.model.named_parameters())[name]
                parameter[(0,) * parameter.ndim] = value
        return original(state, batch, config)

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(RunFailed) as failure:
        train.train(config, None)
    (line,) = failure.value.lines
    return line


def test_the_error_names_step_epoch_and_batch(
    config: Config, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_train(config, batch_size=32, epochs=3)
    data = dataset.load_or_build(dataset.inspect_dataset(config))
    split = data.split("train", CPU, 512)
    per_epoch = math.ceil(len(split) / 32)
    line = diverge(config, monkeypatch, per_epoch + per_epoch, "head.classifier.bias", math.inf)
    last = split.epoch_order(config.seed, 2)[32 * (per_epoch - 1) :]
    labels = ", ".join(repr(data.labels[int(split.indices[n])]) for n in last[:4])
    assert line.startswith(f"step {2 * per_epoch} (epoch 2): the loss is not finite")
    assert f"in a batch of {len(last)} images that starts with {labels};" in line


@pytest.mark.parametrize("name", ["network.stages.0.0.weight", "head.pos_bias", "head.classifier.bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_error_names_the_non_finite_weight(
    config: Config, no_report: None, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    line = diverge(config, monkeypatch, 2, name, value)
    assert f"weights have grown to {value:.3g} ({name})" in line


def test_a_16_bit_overflow_is_reported_as_the_cause(config: Config) -> None:
    config = replace(config, device=replace(config.device, precision="bf16"))
    checker = make_checker(config, make_batch(config))
    checker.observe(0, torch.tensor(math.nan), DIVERGED)
    with pytest.raises(RunFailed, match=r"bf16 overflows and fp32 does not; set device\.precision=fp32"):
        checker.check(init_train_state(config, CPU).model, 1)


# -- loss and accuracy at chance -----------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["position", "grouped_softmax", "end_class", "ctc"])
def test_the_first_loss_is_at_chance(config: Config, head: HeadName) -> None:
    config = replace(config, model=replace(config.model, head=head))
    state = init_train_state(config, CPU)
    step = train_step(state, make_batch(config, 32), config)
    chance = state.model.head.loss_at_chance(make_batch(config, 32).targets)
    assert sanity.check_first_loss(float(step.loss), chance) is None


@pytest.mark.parametrize(
    ("loss", "warns"), [(0.7, True), (0.9, False), (1.61, False), (3.1, False), (3.3, True)]
)
def test_a_first_loss_far_from_chance_gives_a_warning(loss: float, warns: bool) -> None:
    """ln 5 is 1.609; from half to twice of it is allowed."""
    text = sanity.check_first_loss(loss, math.log(5))
    assert (text is not None) == warns
    if text:
        assert f"the first loss is {loss:.3f}, but the loss at chance is 1.609" in text


def test_the_warning_of_the_first_loss_is_recorded(
    config: Config, no_report: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build = networks.build

    def build_large(*args: Any) -> networks.Recognizer:
        model = build(*args)
        torch.nn.init.normal_(model.head.classifier.weight, std=100)  # type: ignore[union-attr, arg-type]
        return model

    monkeypatch.setattr(networks, "build", build_large)
    caplog.clear()
    result = train.train(config, None)
    (warning,) = state_of(result.run_dir)["warnings"]
    assert warning.startswith("the first loss is ")
    assert warnings(caplog) == [warning]


@pytest.fixture
def learnable(config: Config) -> Config:
    """A task with three characters that the tiny network learns in a second."""
    captcha = replace(config.captcha, alphabet="017", length=3, width=40)
    learning = with_train(config, epochs=20, batch_size=16, learning_rate=0.02, sanity_check_steps=170)
    return replace(learning, captcha=captcha)


def test_an_accuracy_at_chance_gives_a_warning_with_causes(
    learnable: Config, no_report: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load_or_build = dataset.load_or_build

    def shuffled(*args: Any) -> Dataset:
        data = load_or_build(*args)
        return replace(data, targets=data.targets[torch.randperm(len(data.targets))])

    monkeypatch.setattr(dataset, "load_or_build", shuffled)
    caplog.clear()
    result = train.train(learnable, None)
    (warning,) = warnings(caplog)  # once, not per epoch
    assert "the character accuracy is still at chance" in warning
    for cause in ("labels that do not match", "train.learning_rate=0.02", "at 40x16", "too few steps"):
        assert cause in warning
    assert "  " not in warning
    assert state_of(result.run_dir)["warnings"] == [warning]


def test_a_training_that_learns_gives_no_warning(
    learnable: Config, no_report: None, caplog: pytest.LogCaptureFixture
) -> None:
    result = train.train(learnable, None)
    assert warnings(caplog) == []
    assert result.test.char_accuracy > 0.6


def test_accuracy_at_chance_is_not_checked_before_sanity_check_steps(config: Config) -> None:
    targets = np.array([[0, 1]] * 50 + [[1, 0]] * 50)
    ones = np.ones((100, 2), np.float32)
    constant = Evaluation(1.0, np.zeros_like(targets), targets, ones, ones[:, 0], np.arange(100))
    assert sanity.check_above_chance(constant, config, config.train.sanity_check_steps - 1) is None
    assert sanity.check_above_chance(constant, config, config.train.sanity_check_steps) is not None


# -- reproducibility -----------------------------------------------------------------------------------------


def weights(config: Config) -> str:
    return train.train(config, None).weights_sha256


TRAIN = """
import json, sys
from captcha_exp import load
from captcha_exp.report import figures
from captcha_exp.training.train import train
for name in ("plot_curves", "plot_confusion_matrix", "plot_misreads", "plot_samples"):
    setattr(figures, name, lambda *args: None)
print(train(load(json.loads(sys.argv[1]))).weights_sha256)
"""


def test_a_run_whose_figure_cannot_be_drawn_is_finished(
    config: Config, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plot(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(figures, "plot_confusion_matrix", plot)
    info = RunInfo.load(train.train(config).run_dir)
    assert info.status == "FINISHED"
    assert [line for line in info.warnings if line.endswith("could not be drawn: MemoryError: MemoryError")]


def test_the_weights_are_a_function_of_the_config(config: Config, no_report: None, tmp_path: Path) -> None:
    """They do not depend on earlier runs, the number of rendering processes, or preloading."""
    expected = weights(config)
    torch.rand(7)
    assert weights(config) == expected
    two_workers = replace(generator_config(config), workers=2, cache=str(tmp_path / "fresh"))
    assert weights(replace(config, data=two_workers)) == expected
    assert weights(replace(config, device=replace(config.device, preload_limit_mib=0))) == expected
    assert weights(replace(config, seed=1)) != expected


@pytest.mark.long
def test_the_number_of_threads_comes_from_the_config(config: Config, no_report: None) -> None:
    config = replace(config, device=replace(config.device, threads=2))
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, json.dumps(to_dict(config))],
        env={**os.environ, **dict.fromkeys(variables, "1")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == weights(config)


def test_another_split_or_batch_size_gives_other_weights(config: Config, no_report: None) -> None:
    expected = weights(config)
    assert weights(replace(config, data=replace(config.data, split_seed=5))) != expected
    assert weights(with_train(config, batch_size=63)) != expected


def test_weights_sha256_covers_weights_and_statistics_in_any_memory_format(config: Config) -> None:
    def digest() -> str:
        return weights_sha256(model)

    model = init_train_state(config, CPU).model
    before = digest()
    assert weights_sha256(init_train_state(config, CPU).model) == before
    contiguous = networks.build(config.model, config.captcha)
    contiguous.load_state_dict(model.state_dict())
    assert weights_sha256(contiguous) == before
    with torch.no_grad():
        next(iter(model.buffers()))[0] += 1e-6
    assert digest() != before


# -- epochs --------------------------------------------------------------------------------------------------


def scripted(monkeypatch: pytest.MonkeyPatch, accuracies: list[float]) -> list[tuple[int, str]]:
    """Script the validation accuracies; return (images, SHA-256 of the weights) of each evaluation."""
    evaluations: list[tuple[int, str]] = []

    def scripted_evaluate(model: networks.Recognizer, split: Split, config: Config, *_: object) -> Evaluation:
        number = len(evaluations)
        evaluations.append((len(split), weights_sha256(model)))
        result = evaluate(model, split, config)
        if number >= len(accuracies):
            return result
        num_correct = round(accuracies[number] * len(split))
        predicted = result.targets.copy()
        predicted[num_correct:] = (predicted[num_correct:] + 1) % 5
        return replace(result, predicted=predicted, loss=1.6)

    monkeypatch.setattr(train, "evaluate", scripted_evaluate)
    return evaluations


def test_the_best_weights_are_kept_and_tested(
    config: Config, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two epochs with equal accuracy and loss, the first is the best."""
    evaluations = scripted(monkeypatch, [0.2, 0.6, 0.4, 0.6])
    result = train.train(with_train(config, epochs=4), None)
    digests = [digest for _, digest in evaluations]
    assert len(set(digests[:4])) == 4
    assert result.best_epoch == 2
    assert digests[4] == digests[1] == result.weights_sha256
    stored, _ = load_weights(result.run_dir / "model.safetensors", CPU)
    assert weights_sha256(stored) == digests[1]
    assert state_of(result.run_dir)["result"]["best_epoch"] == 2
    assert state_of(result.run_dir)["result"]["epochs"] == 4


def test_the_final_test_is_in_fp32(config: Config, no_report: None) -> None:
    half = replace(config, device=replace(config.device, precision="bf16"))
    result = train.train(with_train(half, epochs=1), None)
    evaluation, _ = evaluate_run(result.run_dir, "test", "cpu")
    assert result.config.device.precision == "bf16"
    assert result.test.loss == evaluation.loss
    assert np.array_equal(result.test.text_confidences, evaluation.text_confidences)
    model, _ = load_weights(result.run_dir / "model.safetensors", CPU)
    assert model.calibration.images > 0


@pytest.mark.parametrize(
    ("patience", "accuracies", "epochs"),
    [
        (1, [0.5, 0.1, 0.5], 3),
        (2, [0.1, 0.5, 0.2, 0.6, 0.1, 0.1, 0.6], 7),
        (1, [0.0, 0.0, 0.0], 3),
        (None, [0.5], 8),
    ],
)
def test_early_stopping_comes_after_more_than_patience_epochs_without_improvement(
    config: Config,
    no_report: None,
    monkeypatch: pytest.MonkeyPatch,
    patience: int | None,
    accuracies: list[float],
    epochs: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scripted(monkeypatch, accuracies + [0.0] * (8 - len(accuracies)))
    caplog.clear()
    result = train.train(with_train(config, epochs=8, patience=patience, batch_size=200), None)
    assert state_of(result.run_dir)["result"]["epochs"] == epochs
    assert any("Stopping early" in line for line in infos(caplog)) == (epochs < 8)


def test_an_evaluation_is_not_interrupted_by_the_time_limit(
    config: Config, no_report: None, unplanned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It restarts from zero: a limit shorter than one evaluation would never make progress."""
    seconds = [0.0]

    def slow_evaluate(*arguments: Any) -> Evaluation:
        seconds[0] = 1e9
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", slow_evaluate)
    with pytest.raises(TimeLimitReached):
        train.train(with_train(config, epochs=4), shutdown=ShutdownHandler(1.0, lambda: seconds[0]))
    (run_dir,) = (path.parent for path in root_of_runs().glob("outputs/*/*/run.json"))
    assert [row.step for row in read_metrics_rows(run_dir)[0]] == [1]
    state = state_of(run_dir)
    assert (state["status"], state["error"], state["stop_reason"]) == ("KILLED", None, "time limit")


def test_a_changed_environment_is_reported_and_recorded_on_resume(
    config: Config, no_report: None, unplanned: None, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = iter([0.0, *[1e9] * 9])
    with pytest.raises(TimeLimitReached):
        train.train(config, shutdown=ShutdownHandler(1.0, lambda: next(seconds)))
    (run_dir,) = (path.parent for path in root_of_runs().glob("outputs/*/*/run.json"))
    path = run_dir / "environment.json"
    values = json.loads(path.read_text())
    values["packages"]["torch"] = "2.0.0"
    values["code_sha256"] = "0" * 64
    values["host"] = "another host, which does not affect the numbers"
    rewrite(run_dir, path.name, json.dumps(values))
    caplog.clear()
    train.resume(run_dir, None)
    state = state_of(run_dir)
    (resumed,) = state["resumed"]
    assert json.loads(path.read_text()) == values, "the environment of the start is kept"
    assert resumed["changed"].keys() == {"packages.torch", "code_sha256"}
    assert resumed["changed"]["packages.torch"] == ["2.0.0", str(torch.__version__)]
    start = "the environment has changed since the run started: "
    (warning,) = (line for line in warnings(caplog) if line.startswith(start))
    assert f"packages.torch 2.0.0 -> {torch.__version__}" in warning
    assert "code_sha256 000000000000 -> " in warning
    assert warning in state["warnings"]


@pytest.mark.parametrize("name", ["dataset.json", "environment.json"])
@pytest.mark.parametrize("damage", ["{", "[1]", ""])
def test_a_run_with_a_damaged_file_is_not_resumed_and_keeps_its_status(
    config: Config, no_report: None, unplanned: None, name: str, damage: str
) -> None:
    seconds = iter([0.0, *[1e9] * 9])
    with pytest.raises(TimeLimitReached):
        train.train(config, shutdown=ShutdownHandler(1.0, lambda: next(seconds)))
    (run_dir,) = (path.parent for path in root_of_runs().glob("outputs/*/*/run.json"))
    before = state_of(run_dir)
    (run_dir / name).write_text(damage)
    with pytest.raises(UserError, match=rf"{name}: was edited, or is damaged .+; restore it"):
        train.resume(run_dir)
    assert state_of(run_dir) == before


def test_a_finished_run_is_not_resumed(config: Config, no_report: None, unplanned: None) -> None:
    result = train.train(config)
    before = state_of(result.run_dir)
    with pytest.raises(UserError, match="has finished; add epochs with --resume="):
        train.resume(result.run_dir)
    assert state_of(result.run_dir) == before


def test_validation_uses_its_whole_split_and_the_test_split_is_used_once_at_the_end(
    config: Config, no_report: None, unplanned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    original_split = Dataset.split

    def recorded_split(self: Dataset, name: str, device: torch.device, limit: int) -> Split:
        events.append(f"open {name}")
        return original_split(self, name, device, limit)

    def recorded_evaluate(model: networks.Recognizer, split: Split, config: Config, *_: object) -> Evaluation:
        result = evaluate(model, split, config)
        (name,) = (
            name
            for name, indices in data.split_indices.items()
            if set(result.indices) <= set(indices.tolist())
        )
        assert sorted(result.indices) == data.split_indices[name].tolist()
        events.append(f"evaluate {name}")
        return result

    data = dataset.load_or_build(dataset.inspect_dataset(config))
    monkeypatch.setattr(Dataset, "split", recorded_split)
    monkeypatch.setattr(train, "evaluate", recorded_evaluate)
    train.train(with_train(config, epochs=3, eval_batch_size=7), None)
    assert [e for e in events if e.startswith("evaluate")] == ["evaluate validation"] * 3 + ["evaluate test"]
    assert [e for e in events if "test" in e] == ["open test", "evaluate test"]
    assert events[-2:] == ["open test", "evaluate test"]


def test_every_epoch_trains_on_all_images_in_another_order(
    config: Config, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train_step
    indices: list[int] = []

    def step(state: TrainState, batch: Batch, config: Config) -> Step:
        assert state.model.training
        indices.extend(batch.indices.tolist())
        return original(state, batch, config)

    monkeypatch.setattr(train, "train_step", step)
    train.train(with_train(config, epochs=2), None)
    data = dataset.load_or_build(dataset.inspect_dataset(config))
    expected = data.split_indices["train"].tolist()
    first, second = indices[: len(expected)], indices[len(expected) :]
    assert sorted(first) == sorted(second) == expected
    assert first != second
    assert first != expected


def test_the_learning_rate_follows_the_schedule_over_all_steps(
    config: Config, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train_step
    rates: list[float] = []

    def step(state: TrainState, batch: Batch, config: Config) -> Step:
        rates.extend({group["lr"] for group in state.optimizer.param_groups})
        return original(state, batch, config)

    monkeypatch.setattr(train, "train_step", step)
    config = with_train(config, epochs=3, schedule="onecycle", warmup_fraction=0.5, learning_rate=0.01)
    train.train(config, None)
    steps = len(rates)
    assert steps % 3 == 0
    assert steps > 3
    middles = [(n + 0.5) / steps for n in range(steps)]
    assert rates == pytest.approx([0.01 * min(2 * m, 2 - 2 * m) for m in middles])


def test_training_accuracy_and_loss_are_means_over_images(
    config: Config, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short last batch is weighted by its number of images."""
    original = train_step
    results: list[tuple[float, int, int]] = []

    def step(state: TrainState, batch: Batch, config: Config) -> Step:
        result = original(state, batch, config)
        results.append((float(result.loss), int(result.num_correct), len(batch.indices)))
        return result

    monkeypatch.setattr(train, "train_step", step)
    result = train.train(with_train(config, batch_size=100), None)
    count = sum(n for _, _, n in results)
    assert results[-1][2] < 100
    metrics = rows_of(result.run_dir)[0].metrics
    assert metrics["train/loss"] == pytest.approx(sum(loss * n for loss, _, n in results) / count, rel=1e-5)
    assert metrics["train/accuracy"] == pytest.approx(
        sum(num_correct for _, num_correct, _ in results) / count
    )


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_optimizer_trains_in_every_precision(
    config: Config, no_report: None, kind: Optimizer, precision: Literal["fp32", "bf16"]
) -> None:
    config = replace(with_train(config, optimizer=kind), device=replace(config.device, precision=precision))
    result = train.train(config, None)
    (epoch, test) = rows_of(result.run_dir)
    assert all(math.isfinite(value) for value in (*epoch.metrics.values(), *test.metrics.values()))
    stored, _ = load_weights(result.run_dir / "model.safetensors", CPU)
    assert {p.dtype for p in stored.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("model=resnet18", "train=constant_lr"), marks=pytest.mark.long),
        pytest.param(("model=resnet18", "model.head=position"), marks=pytest.mark.long),
        ("captcha.channels=1", "model.head=grouped_softmax", "train.deterministic=false"),
        ("data=wheezy", "train.optimizer=sgd", "train.patience=1"),
        ("captcha.min_length=1", "model.head=auto"),
        ("captcha.min_length=1", "captcha.length=3", "model.head=ctc", "augment=mild"),
    ],
    ids=" ".join,
)
def test_the_options_of_conf_train(
    overrides: tuple[str, ...], root: Path, cache: Path, no_report: None
) -> None:
    tiny = [text for text in TINY if not text.startswith("model.") and not text.startswith("train.")]
    asked = compose(*tiny, f"data.cache={cache}", "tracking=none", *overrides, "train.epochs=1")
    result = train.train(load(asked), None)

    assert state_of(result.run_dir)["status"] == "FINISHED"
    assert math.isfinite(result.test.loss)


# -- the record ----------------------------------------------------------------------------------------------


def test_a_finished_run_is_recorded_completely(tiny: Config) -> None:
    """All metrics of every epoch, every file with its hash, the report, and the calls of the tracker."""
    tracker = RecordingTracker()
    result = train.train(tiny, tracker)

    rows = rows_of(result.run_dir)
    assert [row.step for row in rows] == [1, 2, 2]
    assert all(row.metrics.keys() >= EVERY_EPOCH for row in rows[:2])
    names = {"test/loss", "test/accuracy", "test/char_accuracy", "test/accuracy_low", "test/accuracy_high"}
    names |= {"memory/predicted_peak_mib", "memory/predicted_peak_min_mib"}
    assert rows[2].metrics.keys() == names
    assert tracker.rows == rows
    assert tracker.calls == ["start", *["log_metrics"] * 3, "finish"]

    state = state_of(result.run_dir)
    assert state["status"] == tracker.status == "FINISHED"
    assert state["error"] is None
    assert state["ended"] is not None
    assert state["result"]["weights_sha256"] == result.weights_sha256
    assert state["result"]["test_accuracy"] == result.test.accuracy == rows[2].metrics["test/accuracy"]
    present = {
        path.relative_to(result.run_dir).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in result.run_dir.rglob("*")
        if path.is_file() and path.name != "run.json"
    }
    assert state["files"] == present
    assert {
        "config.yaml",
        "requested.yaml",
        "environment.json",
        "dataset.json",
        "metrics.jsonl",
        "model.safetensors",
        "test.json",
        "report/curves.png",
        "report/confusion.png",
        "report/misreads.png",
        "report/images.png",
        "report/run.html",
    } <= present.keys()


def test_the_memory_plan_is_recorded(tiny: Config, no_report: None, caplog: pytest.LogCaptureFixture) -> None:
    """It equals a plan made without the training."""
    result = train.train(with_train(tiny, epochs=1), None)

    split_sizes = dataset.inspect_dataset(result.config).split_sizes
    plan = Planner(result.config, split_sizes).plan_for(64)
    assert json.loads((result.run_dir / "memory.json").read_text()) == json.loads(json.dumps(plan.to_json()))
    assert f"GPU memory: batch size {plan.batch_size}: {plan.describe('any CUDA GPU')}" in infos(caplog)
    last = rows_of(result.run_dir)[-1].metrics
    assert last["memory/predicted_peak_mib"] == plan.process_mib.max
    assert last["memory/predicted_peak_min_mib"] == plan.process_mib.min
    assert not any(name.endswith("_error") for name in last)  # a CPU has no GPU memory


def test_measured_gpu_memory_is_compared_with_the_plan(
    tiny: Config, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With simulated measurements of a GPU: the error is that of the worst epoch."""
    measured = {"train": iter([1.0, 40.0]), "eval": iter([0.5, 10_000.0])}

    def peaks(meter: MemoryMeter, phase: str) -> dict[str, float]:
        mib = next(measured[phase])
        return {f"memory/{phase}_peak_allocated_mib": mib, f"memory/{phase}_peak_reserved_mib": mib}

    monkeypatch.setattr(MemoryMeter, "peaks", peaks)
    monkeypatch.setattr(MemoryMeter, "process_peak_mib", lambda _: 20_000.0)
    result = train.train(tiny, None)

    plan = Planner(result.config, dataset.inspect_dataset(result.config).split_sizes).plan_for(64)
    last = rows_of(result.run_dir)[-1].metrics
    assert {name: value for name, value in last.items() if name.endswith("_error")} == {
        "memory/train_peak_allocated_error": plan.training.allocated_mib.relative_error(40.0),
        "memory/train_peak_reserved_error": plan.training.reserved_mib.relative_error(40.0),
        "memory/eval_peak_allocated_error": plan.evaluation.allocated_mib.max / 10_000 - 1,
        "memory/eval_peak_reserved_error": plan.evaluation.reserved_mib.max / 10_000 - 1,
        "memory/process_peak_error": plan.process_mib.max / 20_000 - 1,
    }


@pytest.mark.parametrize(
    ("raised", "status", "error", "stop_reason"),
    [
        (RuntimeError("the GPU is lost"), "FAILED", "RuntimeError: the GPU is lost", None),
        (UserError("a mistake"), "FAILED", "UserError: a mistake", None),
        (KeyboardInterrupt(), "KILLED", None, "SIGINT"),
        (SystemExit(143), "KILLED", None, "SIGTERM"),
        (TimeLimitReached("train.max_minutes"), "KILLED", None, "time limit"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_status_of_a_run_is_recorded_however_it_ends(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    status: Status,
    error: str | None,
    stop_reason: str | None,
) -> None:
    def failing_step(state: TrainState, batch: Batch, config: Config) -> Step:
        raise raised

    monkeypatch.setattr(train, "train_step", failing_step)
    tracker = RecordingTracker()
    with pytest.raises(type(raised)):
        train.train(config, tracker)
    state = state_of(tracker.run_dir)
    assert state["status"] == tracker.status == status
    assert (state["error"], state["stop_reason"], state["result"]) == (error, stop_reason, None)
    assert state["files"].keys() >= {"config.yaml", "dataset.json"}


def test_a_failed_rendering_process_fails_the_run(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing_render(*args: object) -> None:
        raise RunFailed("a rendering process exited with code 1: font error")

    monkeypatch.setattr(sources, "render_images", failing_render)
    tracker = RecordingTracker()
    config = replace(config, data=replace(config.data, cache=str(tmp_path / "empty")))
    with pytest.raises(RunFailed, match="font error"):
        train.train(config, tracker)
    assert state_of(tracker.run_dir)["status"] == tracker.status == "FAILED"


def test_the_results_come_before_the_figures(config: Config) -> None:
    seen = []

    def on_result(run_dir: Path, result: ResultSummary) -> None:
        figures_drawn = list((run_dir / "report").glob("*.png"))
        seen.append((json.loads((run_dir / "test.json").read_text())["accuracy"], result, figures_drawn))

    trained = train.train(config, on_result=on_result)
    info = RunInfo.load(trained.run_dir)
    assert seen == [(trained.test.accuracy, info.result, [])]
    assert list((trained.run_dir / "report").glob("*.png"))


def test_a_tracker_that_cannot_start_fails_the_run(config: Config) -> None:
    class UnreachableTracker(RecordingTracker):
        def start(self, run: Run, config: Config) -> None:
            super().start(run, config)
            raise ConnectionError("unreachable")

    tracker = UnreachableTracker()
    with pytest.raises(ConnectionError):
        train.train(config, tracker)
    assert state_of(tracker.run_dir)["status"] == tracker.status == "FAILED"


def test_no_run_is_created_if_the_dataset_config_is_invalid(config: Config, root: Path) -> None:
    config = replace(config, data=replace(generator_config(config), fonts=("Missing.ttf",)))
    with pytest.raises(UserError, match=r"Missing\.ttf"):
        train.train(config, None)
    assert not (root / "outputs").exists()


def test_the_record_has_the_requested_and_the_resolved_config(config: Config, no_report: None) -> None:
    requested = replace(
        config,
        device=replace(config.device, name="auto"),
        tracking=MlflowConfig(backend="mlflow", uri="auto", experiment="x", required=False),
    )
    result = train.train(requested, None)
    assert "auto" not in (result.run_dir / "config.yaml").read_text()
    assert "name: auto" in (result.run_dir / "requested.yaml").read_text()
    assert "uri: auto" in (result.run_dir / "requested.yaml").read_text()


def test_the_weights_are_written_after_the_first_epoch(
    config: Config, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting(RecordingTracker):
        def log_metrics(self, row: MetricsRow) -> None:
            super().log_metrics(row)
            if row.step == 2:
                raise KeyboardInterrupt

    tracker = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        train.train(with_train(config, epochs=5), tracker)
    assert tracker.run_dir is not None
    assert len(rows_of(tracker.run_dir)) == 2
    load_weights(tracker.run_dir / "model.safetensors", CPU)
    assert state_of(tracker.run_dir)["status"] == "KILLED"
