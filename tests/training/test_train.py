"""The training: what it says of bad numbers, how the loop ends, what the record says of it."""

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
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
    Heard,
    Optimizer,
    batch_of,
    drawn,
    guarding,
    training,
)

from captcha_exp import compose, load
from captcha_exp.config import Config, MlflowConfig, to_dict
from captcha_exp.data import dataset, sources
from captcha_exp.data.dataset import Batch, Dataset, Split
from captcha_exp.errors import RunFailed, UserError
from captcha_exp.memory.plan import Planner
from captcha_exp.model import networks
from captcha_exp.model.evaluate import Evaluation, evaluate
from captcha_exp.model.state import TrainState
from captcha_exp.model.step import Step, init_train_state, train_step
from captcha_exp.model.weights import load_weights, weights_sha256
from captcha_exp.report import figures
from captcha_exp.runs import MetricsRow, Run, Status, read_metrics_rows
from captcha_exp.runtime.console import NullDisplay
from captcha_exp.runtime.device import MemoryMeter
from captcha_exp.runtime.paths import root_dir as root_of_runs
from captcha_exp.runtime.shutdown import ShutdownHandler, TimeLimitReached
from captcha_exp.training import sanity, train


class Notes:
    """A tracker that remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.rows: list[MetricsRow] = []
        self.status: Status | None = None
        self.folder: Path | None = None

    def start(self, run: Run, config: Config) -> None:
        self.calls.append("start")
        self.folder = run.run_dir

    def log_inputs(self, manifest: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        self.calls.append("log_inputs")

    def log_metrics(self, row: MetricsRow) -> None:
        self.calls.append("log_metrics")
        self.rows.append(row)

    def finish(self, run: Run, status: Status) -> None:
        self.calls.append("finish")
        self.status = status


def state_of(folder: Path | None) -> dict[str, Any]:
    assert folder is not None
    state: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return state


def rows_of(folder: Path) -> list[MetricsRow]:
    return [MetricsRow.from_line(f"{line}\n") for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def config(tiny: Config) -> Config:
    """One epoch of the tiny config on one thread."""
    return replace(training(tiny, epochs=1), device=replace(tiny.device, threads=1))


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures of the report take longer than this training."""
    for name in ("curves", "confusion", "errors", "samples"):
        monkeypatch.setattr(figures, name, lambda *args: None)


# -- numbers that are no numbers -----------------------------------------------------------------------------


GOOD, BAD = torch.tensor(False), torch.tensor(True)  # whether a step was broken


def test_the_first_bad_step_is_the_one_that_is_told(config: Config) -> None:
    """Later good ones do not hide it, later bad ones do not replace it."""
    config, batch = training(config, batch_size=2), batch_of(config, 20)
    guard = guarding(config, batch)
    model = init_train_state(config, CPU).model
    guard.observe(10, torch.tensor(1.0), GOOD)
    guard.check(model, 2)
    guard.observe(17, torch.tensor(math.nan), BAD)
    guard.observe(18, torch.tensor(1.0), BAD)
    guard.observe(19, torch.tensor(1.0), GOOD)
    with pytest.raises(RunFailed, match=r"^step 18 \(epoch 2\): the loss is not a finite number"):
        guard.check(model, 2)


def test_a_bad_gradient_is_told_from_a_bad_loss(config: Config) -> None:
    guard = guarding(config, batch_of(config))
    guard.observe(0, torch.tensor(1.0), BAD)
    with pytest.raises(RunFailed, match=r"^step 1 \(epoch 1\): a gradient is not a finite number"):
        guard.check(init_train_state(config, CPU).model, 1)


def test_a_learning_rate_that_is_too_high_is_said_in_one_line(config: Config, no_report: None) -> None:
    notes = Notes()
    config = training(config, learning_rate=1e30, schedule="constant", batch_size=32, epochs=3)
    with pytest.raises(RunFailed) as failure:
        train.train(config, notes, Heard())
    (line,) = failure.value.lines
    assert line.startswith("step ")
    assert "(epoch 1): the loss is not a finite number, in the batch of" in line
    assert "weights have grown to" in line
    assert "train.learning_rate=1e+30 is too high: try a tenth of it" in line
    state = state_of(notes.folder)
    assert state["status"] == notes.status == "FAILED"
    assert line in state["error"]


def poisoned(config: Config, monkeypatch: pytest.MonkeyPatch, at: int, name: str, value: float) -> str:
    """The line of a training in which one weight is this number from step `at` (counted from 1) on."""
    plain = train_step
    steps = 0

    def step(state: TrainState, batch: Batch, config: Config) -> Step:
        nonlocal steps
        steps += 1
        if steps == at:
            with torch.no_grad():
                parameter = dict(state.model.named_parameters())[name]
                parameter[(0,) * parameter.ndim] = value
        return plain(state, batch, config)

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(RunFailed) as failure:
        train.train(config, None, Heard())
    (line,) = failure.value.lines
    return line


def test_the_line_names_step_epoch_and_batch(
    config: Config, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = training(config, batch_size=32, epochs=3)
    data = dataset.load_or_build(dataset.inspect_dataset(config, NullDisplay()), config, NullDisplay())
    side = data.split("train", CPU, 512)
    per_epoch = math.ceil(len(side) / 32)
    line = poisoned(config, monkeypatch, per_epoch + per_epoch, "head.read.bias", math.inf)
    last = side.permutation(config.seed, 2)[32 * (per_epoch - 1) :]
    labels = ", ".join(repr(data.labels[int(side.indices[n])]) for n in last[:4])
    assert line.startswith(f"step {2 * per_epoch} (epoch 2): the loss is not a finite number")
    assert f"in the batch of {len(last)} pictures that begins with {labels};" in line


@pytest.mark.parametrize("name", ["network.stages.0.0.weight", "head.usual_place", "head.read.bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_line_names_the_weight_that_is_no_number(
    config: Config, no_report: None, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    line = poisoned(config, monkeypatch, 2, name, value)
    assert f"weights have grown to {value:.3g} ({name})" in line


def test_16_bits_that_overflow_are_named_as_the_cause(config: Config) -> None:
    config = replace(config, device=replace(config.device, precision="bf16"))
    guard = guarding(config, batch_of(config))
    guard.observe(0, torch.tensor(math.nan), BAD)
    with pytest.raises(RunFailed, match=r"bf16 overflows where fp32 does not; write device\.precision=fp32"):
        guard.check(init_train_state(config, CPU).model, 1)


# -- losses and readings at chance ---------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["position", "grouped_softmax"])
def test_the_first_loss_of_fresh_weights_is_at_chance(
    config: Config, head: Literal["position", "grouped_softmax"]
) -> None:
    config = replace(config, model=replace(config.model, head=head))
    state = init_train_state(config, CPU)
    step = train_step(state, batch_of(config, 32), config)
    assert sanity.check_first_loss(float(step.loss), state.model) is None


@pytest.mark.parametrize(
    ("loss", "trouble"), [(0.7, True), (0.9, False), (1.61, False), (3.1, False), (3.3, True)]
)
def test_a_first_loss_far_from_chance_is_said(config: Config, loss: float, trouble: bool) -> None:
    """ln 5 is 1.609; half and twice of it are borne."""
    text = sanity.check_first_loss(loss, init_train_state(config, CPU).model)
    assert (text is not None) == trouble
    if text:
        assert f"the first loss is {loss:.3f}, but a head that knows nothing has 1.609" in text


def test_a_first_loss_far_from_chance_is_in_the_record(
    config: Config, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = networks.build

    def large(*args: Any) -> networks.Recognizer:
        model = plain(*args)
        torch.nn.init.normal_(model.head.classifier.weight, std=100)  # type: ignore[union-attr, arg-type]
        return model

    monkeypatch.setattr(networks, "build", large)
    heard = Heard()
    result = train.train(config, None, heard)
    (warning,) = state_of(result.run_dir)["warnings"]
    assert warning.startswith("the first loss is ")
    assert heard.warnings == [warning]


@pytest.fixture
def learnable(config: Config) -> Config:
    """Three characters that the tiny network learns to read in a second."""
    captcha = replace(config.captcha, alphabet="017", length=3, width=40)
    learning = training(config, epochs=20, batch_size=16, learning_rate=0.02, sanity_check_steps=170)
    return replace(learning, captcha=captcha)


def test_characters_that_stay_at_chance_are_told_with_causes(
    learnable: Config, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = dataset.load_or_build

    def shuffled(*args: Any) -> Dataset:
        data = plain(*args)
        return replace(data, targets=data.targets[torch.randperm(len(data.targets))])

    monkeypatch.setattr(dataset, "prepare", shuffled)
    heard = Heard()
    result = train.train(learnable, None, heard)
    (warning,) = heard.warnings  # once, not in every epoch
    assert "characters are read no better than by chance" in warning
    for cause in ("labels that do not belong", "train.learning_rate=0.02", "at 40x16", "patience"):
        assert cause in warning
    assert "  " not in warning
    assert state_of(result.run_dir)["warnings"] == [warning]


def test_a_training_that_learns_is_not_warned(learnable: Config, no_report: None) -> None:
    heard = Heard()
    result = train.train(learnable, None, heard)
    assert heard.warnings == []
    assert result.test.char_accuracy > 0.6


def test_chance_is_not_judged_before_its_time(config: Config) -> None:
    targets = np.array([[0, 1]] * 50 + [[1, 0]] * 50)
    blind = Evaluation(1.0, np.zeros_like(targets), targets, np.ones((100, 2), np.float32), np.arange(100))
    assert sanity.check_above_chance(blind, config, config.train.sanity_check_steps - 1) is None
    assert sanity.check_above_chance(blind, config, config.train.sanity_check_steps) is not None


# -- the same again ------------------------------------------------------------------------------------------


def weights(config: Config) -> str:
    return train.train(config, None, Heard()).weights_sha256


TRAIN = """
import json, sys
from captcha_exp import load, report
from captcha_exp.train import train
report.curves = report.confusion = report.errors = report.samples = lambda *args: None
print(train(load(json.loads(sys.argv[1]))).weights_sha256)
"""


def test_the_weights_are_a_function_of_the_config(config: Config, no_report: None, tmp_path: Path) -> None:
    """Not of how often, with how many drawing processes, or with which memory; nor of what ran before."""
    expected = weights(config)
    torch.rand(7)
    assert weights(config) == expected
    drawn_by_two = replace(drawn(config), workers=2, cache=str(tmp_path / "fresh"))
    assert weights(replace(config, data=drawn_by_two)) == expected
    assert weights(replace(config, device=replace(config.device, preload_limit_mib=0))) == expected
    assert weights(replace(config, seed=1)) != expected


def test_threads_are_the_configs_not_the_environments(config: Config, no_report: None) -> None:
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


def test_another_split_or_order_gives_other_weights(config: Config, no_report: None) -> None:
    """The counterpart: the digest does see a change."""
    one = weights(config)
    assert weights(replace(config, data=replace(config.data, split_seed=5))) != one
    assert weights(training(config, batch_size=63)) != one


def test_the_digest_sees_names_shapes_values_and_statistics(config: Config) -> None:
    def digest() -> str:
        return weights_sha256(model)

    model = init_train_state(config, CPU).model
    before = digest()
    assert weights_sha256(init_train_state(config, CPU).model) == before
    plain = networks.build(config.model, config.captcha)
    plain.load_state_dict(model.state_dict())
    assert weights_sha256(plain) == before  # another layout in memory
    with torch.no_grad():
        next(iter(model.buffers()))[0] += 1e-6
    assert digest() != before


# -- epochs --------------------------------------------------------------------------------------------------


def scripted(monkeypatch: pytest.MonkeyPatch, accuracies: list[float]) -> list[tuple[int, str]]:
    """Gives validation these accuracies; returns (pictures, digest of the weights) of each evaluation."""
    seen: list[tuple[int, str]] = []

    def chosen(model: networks.Recognizer, split: Split, config: Config, *_: object) -> Evaluation:
        number = len(seen)
        seen.append((len(split), weights_sha256(model)))
        made = evaluate(model, split, config)
        if number >= len(accuracies):
            return made
        right = round(accuracies[number] * len(split))
        predicted = made.targets.copy()
        predicted[right:] = (predicted[right:] + 1) % 5
        return replace(made, predicted=predicted, loss=1.6)

    monkeypatch.setattr(train, "evaluate", chosen)
    return seen


def test_the_best_epochs_weights_are_kept_and_tested(
    config: Config, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two equals, in accuracy and loss, is the best one."""
    seen = scripted(monkeypatch, [0.2, 0.6, 0.4, 0.6])
    result = train.train(training(config, epochs=4), None, Heard())
    digests = [digest for _, digest in seen]
    assert len(set(digests[:4])) == 4
    assert result.best_epoch == 2
    assert digests[4] == digests[1] == result.weights_sha256
    stored, _ = load_weights(result.run_dir / "model.safetensors", CPU)
    assert weights_sha256(stored) == digests[1]
    assert state_of(result.run_dir)["result"]["best_epoch"] == 2
    assert state_of(result.run_dir)["result"]["epochs"] == 4


@pytest.mark.parametrize(
    ("patience", "accuracies", "epochs"),
    [
        (1, [0.5, 0.1, 0.5], 3),
        (2, [0.1, 0.5, 0.2, 0.6, 0.1, 0.1, 0.6], 7),
        (1, [0.0, 0.0, 0.0], 3),
        (None, [0.5], 8),
    ],
)
def test_patience_bears_so_many_epochs_and_one_more_stops(
    config: Config,
    no_report: None,
    monkeypatch: pytest.MonkeyPatch,
    patience: int | None,
    accuracies: list[float],
    epochs: int,
) -> None:
    scripted(monkeypatch, accuracies + [0.0] * (8 - len(accuracies)))
    heard = Heard()
    result = train.train(training(config, epochs=8, patience=patience, batch_size=200), None, heard)
    assert state_of(result.run_dir)["result"]["epochs"] == epochs
    assert any("stopping early" in line for line in heard.lines) == (epochs < 8)


def test_an_evaluation_is_finished_though_the_time_is_up(
    config: Config, no_report: None, unplanned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins anew when it is interrupted: with less time than it takes, no start would get past it."""
    seconds = [0.0]

    def evaluated(*arguments: Any) -> Evaluation:
        seconds[0] = 1e9
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", evaluated)
    with pytest.raises(TimeLimitReached):
        train.train(training(config, epochs=4), shutdown=ShutdownHandler(1.0, lambda: seconds[0]))
    (folder,) = (path.parent for path in root_of_runs().glob("outputs/*/*/run.json"))
    assert [row.step for row in read_metrics_rows(folder)[0]] == [1]
    assert state_of(folder)["status"] == "KILLED"


def test_what_changed_while_a_run_was_interrupted_is_told_and_recorded(
    config: Config, no_report: None, unplanned: None
) -> None:
    seconds = iter([0.0, *[1e9] * 9])
    with pytest.raises(TimeLimitReached):
        train.train(config, shutdown=ShutdownHandler(1.0, lambda: next(seconds)))
    (folder,) = (path.parent for path in root_of_runs().glob("outputs/*/*/run.json"))
    path = folder / "environment.json"
    values = json.loads(path.read_text())
    values["packages"]["torch"] = "2.0.0"
    values["code_sha256"] = "0" * 64
    values["host"] = "another one, which computes nothing"
    path.write_text(json.dumps(values))
    heard = Heard()
    train.train(config, None, heard, folder)
    state = state_of(folder)
    (again,) = state["resumed"]
    now = json.loads(path.read_text())
    assert now == values, "it says on what the run began"
    assert again["changed"].keys() == {"packages.torch", "code_sha256"}
    assert again["changed"]["packages.torch"] == ["2.0.0", str(torch.__version__)]
    (told,) = (line for line in heard.warnings if line.startswith("not as it was when the run began: "))
    assert f"packages.torch 2.0.0 -> {torch.__version__}" in told
    assert "code_sha256 000000000000 -> " in told
    assert told in state["warnings"]


def test_validation_is_whole_and_the_test_split_is_opened_once_at_the_end(
    config: Config, no_report: None, unplanned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    plain_split = Dataset.split

    def opened(self: Dataset, name: str, device: torch.device, limit: int) -> Split:
        events.append(f"open {name}")
        return plain_split(self, name, device, limit)

    def evaluated(model: networks.Recognizer, split: Split, config: Config, *_: object) -> Evaluation:
        made = evaluate(model, split, config)
        (side,) = (
            name for name, rows in data.split_indices.items() if set(made.indices) <= set(rows.tolist())
        )
        assert sorted(made.indices) == data.split_indices[side].tolist()
        events.append(f"evaluate {side}")
        return made

    data = dataset.load_or_build(dataset.inspect_dataset(config, NullDisplay()), config, NullDisplay())
    monkeypatch.setattr(Dataset, "split", opened)
    monkeypatch.setattr(train, "evaluate", evaluated)
    train.train(training(config, epochs=3, eval_batch_size=7), None, Heard())
    assert [e for e in events if e.startswith("evaluate")] == ["evaluate validation"] * 3 + ["evaluate test"]
    assert [e for e in events if "test" in e] == ["open test", "evaluate test"]
    assert events[-2:] == ["open test", "evaluate test"]


def test_every_epoch_trains_on_all_training_pictures_in_another_order(
    config: Config, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train_step
    rows: list[int] = []

    def step(state: TrainState, batch: Batch, config: Config) -> Step:
        assert state.model.training
        rows.extend(batch.indices.tolist())
        return plain(state, batch, config)

    monkeypatch.setattr(train, "train_step", step)
    train.train(training(config, epochs=2), None, Heard())
    data = dataset.load_or_build(dataset.inspect_dataset(config, NullDisplay()), config, NullDisplay())
    expected = data.split_indices["train"].tolist()
    first, second = rows[: len(expected)], rows[len(expected) :]
    assert sorted(first) == sorted(second) == expected
    assert first != second
    assert first != expected


def test_the_rate_follows_the_schedule_over_all_steps(
    config: Config, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train_step
    rates: list[float] = []

    def step(state: TrainState, batch: Batch, config: Config) -> Step:
        rates.extend({group["lr"] for group in state.optimizer.param_groups})
        return plain(state, batch, config)

    monkeypatch.setattr(train, "train_step", step)
    config = training(config, epochs=3, schedule="onecycle", warmup_fraction=0.5, learning_rate=0.01)
    train.train(config, None, Heard())
    steps = len(rates)
    assert steps % 3 == 0
    assert steps > 3
    middles = [(n + 0.5) / steps for n in range(steps)]
    assert rates == pytest.approx([0.01 * min(2 * m, 2 - 2 * m) for m in middles])


def test_training_accuracy_and_loss_are_means_over_pictures(
    config: Config, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short last batch counts by its pictures."""
    plain = train_step
    seen: list[tuple[float, int, int]] = []

    def step(state: TrainState, batch: Batch, config: Config) -> Step:
        made = plain(state, batch, config)
        seen.append((float(made.loss), int(made.num_correct), len(batch.indices)))
        return made

    monkeypatch.setattr(train, "train_step", step)
    result = train.train(training(config, batch_size=100), None, Heard())
    count = sum(n for _, _, n in seen)
    assert seen[-1][2] < 100
    metrics = rows_of(result.run_dir)[0].metrics
    assert metrics["train/loss"] == pytest.approx(sum(loss * n for loss, _, n in seen) / count, rel=1e-5)
    assert metrics["train/accuracy"] == pytest.approx(sum(right for _, right, _ in seen) / count)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_optimiser_trains_in_every_precision(
    config: Config, no_report: None, kind: Optimizer, precision: Literal["fp32", "bf16"]
) -> None:
    config = replace(training(config, optimizer=kind), device=replace(config.device, precision=precision))
    result = train.train(config, None, Heard())
    (epoch, test) = rows_of(result.run_dir)
    assert all(math.isfinite(value) for value in (*epoch.metrics.values(), *test.metrics.values()))
    stored, _ = load_weights(result.run_dir / "model.safetensors", CPU)
    assert {p.dtype for p in stored.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=resnet18", "train=constant_lr"),
        ("model=resnet18", "model.head=position"),
        ("captcha.channels=1", "model.head=grouped_softmax", "train.deterministic=false"),
        ("data=wheezy", "train.optimizer=sgd", "train.patience=1"),
    ],
    ids=" ".join,
)
def test_the_choices_of_conf_train(
    overrides: tuple[str, ...], root: Path, cache: Path, no_report: None
) -> None:
    tiny = [text for text in TINY if not text.startswith("model.") and not text.startswith("train.")]
    asked = compose(*tiny, f"data.cache={cache}", "tracking=none", *overrides, "train.epochs=1")
    result = train.train(load(asked), None, Heard())

    assert state_of(result.run_dir)["status"] == "FINISHED"
    assert math.isfinite(result.test.loss)


# -- the record ----------------------------------------------------------------------------------------------


def test_a_finished_run_is_recorded_whole(tiny: Config) -> None:
    """Every name at every epoch, every file with its hash, the report, and the tracker told."""
    notes = Notes()
    result = train.train(tiny, notes, Heard())

    rows = rows_of(result.run_dir)
    assert [row.step for row in rows] == [1, 2, 2]
    assert all(row.metrics.keys() >= EVERY_EPOCH for row in rows[:2])
    names = {"test/loss", "test/accuracy", "test/char_accuracy", "test/accuracy_low", "test/accuracy_high"}
    names |= {"memory/predicted_peak_mib", "memory/predicted_peak_min_mib"}
    assert rows[2].metrics.keys() == names
    assert notes.rows == rows
    assert notes.calls == ["start", "log_inputs", "log", "log", "log", "finish"]

    state = state_of(result.run_dir)
    assert state["status"] == notes.status == "FINISHED"
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
    } <= present.keys()


def test_the_plan_of_the_memory_is_in_the_record(tiny: Config, no_report: None) -> None:
    """And the same as one that is made without the training."""
    heard = Heard()
    result = train.train(training(tiny, epochs=1), None, heard)

    pictures = dataset.inspect_dataset(result.config, Heard()).split_sizes
    plan = Planner(result.config, pictures).plan_for(64)
    assert json.loads((result.run_dir / "memory.json").read_text()) == json.loads(json.dumps(plan.to_json()))
    assert f"memory: {plan.describe('any CUDA GPU')}" in heard.lines
    last = rows_of(result.run_dir)[-1].metrics
    assert last["memory/predicted_peak_mib"] == plan.process_mib.max
    assert last["memory/predicted_peak_min_mib"] == plan.process_mib.min
    assert not any(name.endswith("_error") for name in last)  # a CPU measures no card


def test_what_a_card_measures_stands_beside_the_plan(
    tiny: Config, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With readings of a card that are played: the error is of the worst epoch."""
    readings = {"train": iter([1.0, 40.0]), "eval": iter([0.5, 10_000.0])}

    def peaks(meter: MemoryMeter, phase: str) -> dict[str, float]:
        seen = next(readings[phase])
        return {f"memory/{phase}_peak_allocated_mib": seen, f"memory/{phase}_peak_reserved_mib": seen}

    monkeypatch.setattr(MemoryMeter, "peaks", peaks)
    monkeypatch.setattr(MemoryMeter, "process_peak_mib", lambda _: 20_000.0)
    result = train.train(tiny, None, Heard())

    plan = Planner(result.config, dataset.inspect_dataset(result.config, Heard()).split_sizes).plan_for(64)
    last = rows_of(result.run_dir)[-1].metrics
    assert {name: value for name, value in last.items() if name.endswith("_error")} == {
        "memory/train_peak_allocated_error": plan.training.allocated_mib.relative_error(40.0),
        "memory/train_peak_reserved_error": plan.training.reserved_mib.relative_error(40.0),
        "memory/eval_peak_allocated_error": plan.evaluation.allocated_mib.max / 10_000 - 1,
        "memory/eval_peak_reserved_error": plan.evaluation.reserved_mib.max / 10_000 - 1,
        "memory/process_peak_error": plan.process_mib.max / 20_000 - 1,
    }


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (RuntimeError("the card fell off"), "FAILED"),
        (UserError("a mistake"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_however_a_run_ends_its_record_says_so(
    config: Config, monkeypatch: pytest.MonkeyPatch, raised: BaseException, status: Status
) -> None:
    def broken(state: TrainState, batch: Batch, config: Config) -> Step:
        raise raised

    monkeypatch.setattr(train, "train_step", broken)
    notes = Notes()
    with pytest.raises(type(raised)):
        train.train(config, notes, Heard())
    state = state_of(notes.folder)
    assert state["status"] == notes.status == status
    assert type(raised).__name__ in state["error"]
    assert str(raised) in state["error"] or status == "KILLED"
    assert state["files"].keys() >= {"config.yaml", "dataset.json"}


def test_a_drawing_that_fails_is_a_failed_run(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*args: object) -> None:
        raise RunFailed("a drawing process ended with exit code 1: no more ink")

    monkeypatch.setattr(sources, "draw", broken)
    notes = Notes()
    config = replace(config, data=replace(config.data, cache=str(tmp_path / "empty")))
    with pytest.raises(RunFailed, match="no more ink"):
        train.train(config, notes, Heard())
    assert state_of(notes.folder)["status"] == notes.status == "FAILED"


def test_a_tracker_that_cannot_start_fails_the_run(config: Config) -> None:
    class Away(Notes):
        def start(self, run: Run, config: Config) -> None:
            super().start(run, config)
            raise ConnectionError("nobody there")

    notes = Away()
    with pytest.raises(ConnectionError):
        train.train(config, notes, Heard())
    assert state_of(notes.folder)["status"] == notes.status == "FAILED"


def test_nothing_is_made_when_the_data_cannot_be(config: Config, root: Path) -> None:
    config = replace(config, data=replace(drawn(config), fonts=("Missing.ttf",)))
    with pytest.raises(UserError, match=r"Missing\.ttf"):
        train.train(config, None, Heard())
    assert not (root / "outputs").exists()


def test_the_record_holds_what_was_asked_and_what_ran(config: Config, no_report: None) -> None:
    requested = replace(
        config,
        device=replace(config.device, name="auto"),
        tracking=MlflowConfig(backend="mlflow", uri="auto", experiment="x"),
    )
    result = train.train(requested, None, Heard())
    assert "auto" not in (result.run_dir / "config.yaml").read_text()
    assert "name: auto" in (result.run_dir / "requested.yaml").read_text()
    assert "uri: auto" in (result.run_dir / "requested.yaml").read_text()


def test_the_model_is_on_disk_from_the_first_epoch_on(
    config: Config, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting(Notes):
        def log_metrics(self, row: MetricsRow) -> None:
            super().log_metrics(row)
            if row.step == 2:
                raise KeyboardInterrupt

    notes = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        train.train(training(config, epochs=5), notes, Heard())
    assert notes.folder is not None
    assert len(rows_of(notes.folder)) == 2
    load_weights(notes.folder / "model.safetensors", CPU)
    assert state_of(notes.folder)["status"] == "KILLED"
