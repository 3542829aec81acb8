"""The training: the one-page loop, and what stands around it.

The loop talks to a `Tracker` and a `Display` and knows neither MLflow nor the terminal. All that changes
while it runs stands in one `TrainState`, so that a training that was interrupted goes on as if nothing had
happened.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from captcha_exp import runs
from captcha_exp.config import Config, load, resolve
from captcha_exp.data import dataset
from captcha_exp.data.augment import Changes
from captcha_exp.data.dataset import Outline, Split
from captcha_exp.errors import UserError
from captcha_exp.memory.plan import Plan, Planner
from captcha_exp.model import optim
from captcha_exp.model import state as checkpoint
from captcha_exp.model.evaluate import evaluate
from captcha_exp.model.state import Checkpoint, TrainState
from captcha_exp.model.step import fresh_state, train_step
from captcha_exp.model.weights import weights_sha256, weights_to_bytes
from captcha_exp.runs import MetricsRow, Run
from captcha_exp.runs.environment import environment
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.console import Bar, Display, Silent
from captcha_exp.runtime.shutdown import Asked, Leaving
from captcha_exp.training import autotune, oom, sanity
from captcha_exp.training.progress import Sums, epoch_line, pictures_seen
from captcha_exp.training.recorder import (
    NoTracker,
    Recording,
    Result,
    Tracker,
    check_same_pictures,
    record_machine,
    record_test,
    recorded,
)


def fit(
    state: TrainState,
    training: Split,
    validation: Split,
    labels: list[str],
    config: Config,
    recording: Recording,
    leaving: Leaving,
) -> None:
    """The loop: train an epoch, look at the whole validation split, log, keep the best, stop early.

    Asked to end, it saves what it has reached and ends as it was asked.
    """
    run, display = recording.run, recording.display
    memory = devices.MemoryMeter(training.device)
    guard = sanity.Guard(training, labels, config, recording.tell)
    keeper = Keeper(run.checkpoints, config, guard, leaving, display)
    with display.bar("training", config.train.epochs * len(training)) as bar, leaving.listening():
        bar.advance(pictures_seen(state, len(training)))
        try:
            while not state.has_ended(config.train):
                progress = state.epoch_under_way(training.device)
                memory.start()
                change = Changes(config, state.epoch, len(labels), training.device)
                metrics = train_epoch(state, training, change, config, guard, keeper, bar)
                metrics |= memory.peaks("train")

                memory.start()
                began = time.perf_counter()
                result = evaluate(state.model, validation, config, leaving.look_for_signal)
                metrics |= result.metrics("val") | memory.peaks("eval")
                metrics["memory/process_peak_mib"] = memory.process_peak_mib()
                metrics["speed/epoch_seconds"] = progress.seconds + time.perf_counter() - began
                recording.log(MetricsRow(state.epoch, runs.now_ms(), metrics))

                better = state.keep_if_better(result.accuracy, result.loss)
                if better:
                    run.write("model.safetensors", weights_to_bytes(state.model, config))
                display.line(epoch_line(state, metrics, config, better))
                guard.look_at(result, state.step)
                state.progress = None
                keeper.between(state)
        except Asked:
            keeper.save(state)
            leaving.leave()
        keeper.save(state)
    if state.stops_early(config.train):
        display.line(f"no better accuracy since epoch {state.gain_epoch}: stopping early (train.patience)")


def train_epoch(
    state: TrainState,
    training: Split,
    change: Changes,
    config: Config,
    guard: sanity.Guard,
    keeper: "Keeper",
    bar: Bar,
) -> dict[str, float]:
    """Every picture once, changed, from where the epoch stands; loss and accuracy as they were on the way,
    and pictures per second.

    Raises:
        RunFailed: a loss or a gradient was not a finite number; the line says where and why.
        Asked: the training is to end.
    """
    size = int(config.train.batch_size)
    steps = -(-len(training) // size) * config.train.epochs
    progress = state.epoch_under_way(training.device)
    order = training.shuffled(config.seed, state.epoch)[progress.batches * size :]
    state.model.train()
    sums = Sums(progress, bar, f"epoch {state.epoch}/{config.train.epochs}")
    for batch in training.batches(size, order):
        optim.set_learning_rate(state.optimizer, optim.learning_rate(config.train, state.step, steps))
        step = train_step(state, change(batch), config)
        guard.note(state.step, step.loss, step.broken)
        state.step += 1
        if sums.add(step, len(batch.rows)):
            guard.look(state.model, state.epoch)
        keeper.between(state)
    guard.look(state.model, state.epoch)
    return sums.metrics()


class Keeper:
    """Between two steps: saves what was reached when it is time to, and hears whether to end."""

    def __init__(
        self, folder: Path, config: Config, guard: sanity.Guard, leaving: Leaving, display: Display
    ) -> None:
        self._folder, self._guard, self._leaving, self._display = folder, guard, leaving, display
        self._rhythm = checkpoint.Rhythm(config.train.checkpoint_every)
        self._saved: tuple[int, bool] | None = None

    def between(self, state: TrainState) -> None:
        """After a step, or an epoch.

        Raises:
            Asked: the training is to end.
        """
        if self._rhythm.is_due(state):
            self.save(state)
        self._leaving.look()

    def save(self, state: TrainState) -> None:
        """The state on the disk; where it cannot be written, the training goes on without.

        Raises:
            RunFailed: a step was not finite: a state that does not know it is not saved.
        """
        place = state.step, state.progress is None
        if place == self._saved:
            return
        self._guard.look(state.model, state.epoch)
        try:
            checkpoint.save(self._folder, state)
            self._saved = place
        except OSError as error:
            self._display.warn(f"{self._folder}: no checkpoint can be written: {error}")
        self._rhythm.was_saved()


def train(
    requested: Config,
    tracker: Tracker | None = None,
    display: Display | None = None,
    folder: Path | None = None,
    links: Mapping[str, Any] | None = None,
    at_end: Callable[[Run], None] | None = None,
    start_from: Path | None = None,
    leaving: Leaving | None = None,
) -> Result:
    """A trained, tested and recorded model; its record is in this empty folder, or in a new one.

    The folder of an unfinished run is gone on with: its own config is what runs, from where it stands.
    `start_from` is the folder of a finished run from whose last state this one starts. `links` is as
    `record.create` has it; `at_end` writes what else belongs into a record that is complete, and not closed
    yet. `leaving` says when to end; without it, that is what is `requested`.

    Raises:
        OutOfMemory: there was too little memory; its record says what train.on_oom takes that for.
        UserError: the run cannot be made or cannot go on; the lines say why. Its record says FAILED.
    """
    tracker, display = tracker or NoTracker(), display or Silent()
    began = time.perf_counter()
    leaving = leaving or Leaving(requested.train.stop_after_minutes)
    if folder is not None and (folder / "run.json").exists():
        config = load(folder / "config.yaml")
        with leaving:
            recording = Recording(runs.reopen(folder), tracker, display)
            with recorded(recording, config):
                job = _prepared(config, display)
                epochs = {row.step for row in recording.run.rows() if _is_of_epoch(row)}
                saved = checkpoint.newest(recording.run.checkpoints, recording.tell, epochs)
                if saved is None and start_from is not None:  # killed before its first checkpoint
                    saved = _last_of(start_from, job.config, display)
                    _take_over_rows(start_from, recording)
                return _work(job, recording, leaving, began, saved, at_end)
    job = _prepared(requested, display)
    saved = _last_of(start_from, job.config, display)
    with leaving:
        run = runs.create(job.config, requested, folder, links)
        recording = Recording(run, tracker, display)
        with recorded(recording, job.config):
            if start_from is not None:
                _take_over_rows(start_from, recording)
            return _work(job, recording, leaving, began, saved, at_end)


@dataclass(frozen=True)
class _Job:
    """A training that can begin."""

    config: Config
    device: torch.device
    outline: Outline
    planned: Plan
    trials: autotune.Trials


def _prepared(asked: Config, display: Display) -> _Job:
    trials = autotune.Trials(display)
    config = resolve(asked, devices.this_machine(trials.precision, trials.batch_size))
    device = devices.set_up(config)
    devices.hold_to_budget(config, device)
    outline = trials.outline or dataset.outline(config, display)
    planned = Planner(config, outline.counts, devices.card_total_mib(config)).at(int(config.train.batch_size))
    return _Job(config, device, outline, planned, trials)


def _last_of(folder: Path | None, config: Config, display: Display) -> Checkpoint | None:
    """The last state of a finished run that is to have more epochs.

    Raises:
        UserError: it has none any more, or there is nothing more to do.
    """
    if folder is None:
        return None
    saved = checkpoint.newest(folder / runs.CHECKPOINTS, display.warn)
    if saved is None:
        raise UserError(f"{folder}: has no checkpoint to start from; train anew, with --resume=never")
    epoch, gain = saved.counters["epoch"], saved.counters["gain_epoch"]
    if epoch >= config.train.epochs:
        raise UserError(f"train.epochs={config.train.epochs}: {folder} has {epoch} already; write more")
    if config.train.patience is not None and epoch - gain > config.train.patience:
        raise UserError(
            f"train.patience={config.train.patience}: {folder} stopped early in epoch {epoch}, with no gain "
            f"since epoch {gain}; write more than {epoch - gain}, or null"
        )
    return saved


def _take_over_rows(folder: Path, recording: Recording) -> None:
    """The epochs that a finished run has, without its test: this run has one of its own."""
    for row in runs.read_rows(folder)[0]:
        if _is_of_epoch(row):
            recording.log(row)


def _is_of_epoch(row: MetricsRow) -> bool:
    """Whether it is not the test's."""
    return "val/loss" in row.metrics


def _work(
    job: _Job,
    recording: Recording,
    leaving: Leaving,
    began: float,
    saved: Checkpoint | None,
    at_end: Callable[[Run], None] | None,
) -> Result:
    config, device, run, display = job.config, job.device, recording.run, recording.display
    display.line(f"run {run.folder} on {devices.describe(config)}")
    _tell_plan(job.planned, config, display)
    ran_on = environment(config)
    ran_on |= {"precisions_tried": job.trials.precisions, "batch_sizes_tried": job.trials.batch_sizes}
    record_machine(ran_on, recording)
    run.write_json("memory.json", job.planned.to_json())
    data = dataset.prepare(job.outline, config, display)
    check_same_pictures(data.manifest, run)
    run.write_json("dataset.json", data.manifest)
    recording.tracker.describe(data.manifest, ran_on)
    state: TrainState | None = None
    try:
        training = data.split("train", device, config.device.resident_limit_mib)
        validation = data.split("validation", device, config.device.resident_limit_mib)
        state = fresh_state(config, device)
        state.started = began
        if saved is not None:
            state.restore(saved)
        fit(state, training, validation, data.labels, config, recording, leaving)

        state.restore_best()
        run.write("model.safetensors", weights_to_bytes(state.model, config))
        test = data.split("test", device, config.device.resident_limit_mib)
        tested = evaluate(state.model, test, config)
    except Exception as error:
        if not devices.is_out_of_memory(error):
            raise
        short, row = oom.noted(state, job.planned, job.outline.counts, config, run, display)
        recording.log(row)
        raise short from error
    result = Result(
        folder=run.folder,
        config=config,
        test=tested,
        best_epoch=state.best_epoch,
        weights_sha256=weights_sha256(state.model),
        seconds=state.seconds(),
        process_peak_mib=max(row.metrics.get("memory/process_peak_mib", 0.0) for row in run.rows()),
    )
    record_test(result, data, job.planned, state, recording)
    if at_end is not None:
        at_end(run)
    checkpoint.keep(run.checkpoints, 1)
    return result


def _tell_plan(planned: Plan, config: Config, display: Display) -> None:
    """What the training will need, and what it does otherwise to need less."""
    words = f"memory: {planned.words(config.card.name)}"
    if planned.fits == "does not fit":
        display.warn(f"{words}; captcha-exp plan --advise names what fits")
    else:
        display.line(words)
    if micro := config.train.micro_batch_size:
        display.line(f"train.micro_batch_size={micro}: batch norms see so many pictures at a time")
