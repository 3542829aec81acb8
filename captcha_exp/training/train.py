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
from captcha_exp.data.augment import Augmenter
from captcha_exp.data.dataset import DatasetSpec, Split
from captcha_exp.errors import UserError
from captcha_exp.memory.plan import Plan, Planner
from captcha_exp.model import optim
from captcha_exp.model import state as checkpoint
from captcha_exp.model.evaluate import evaluate
from captcha_exp.model.state import Checkpoint, TrainState
from captcha_exp.model.step import init_train_state, train_step
from captcha_exp.model.weights import weights_sha256, weights_to_bytes
from captcha_exp.runs import MetricsRow, Run
from captcha_exp.runs.environment import collect_environment
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.console import Display, NullDisplay, ProgressBar
from captcha_exp.runtime.shutdown import ShutdownHandler, StopRequested
from captcha_exp.training import autotune, oom, sanity
from captcha_exp.training.progress import EpochMeter, format_epoch, num_images_seen
from captcha_exp.training.recorder import (
    NullTracker,
    RunRecorder,
    Tracker,
    TrainResult,
    check_dataset_unchanged,
    record_environment,
    record_outcome,
    record_test_results,
)


def fit(
    state: TrainState,
    training: Split,
    validation: Split,
    labels: list[str],
    config: Config,
    recorder: RunRecorder,
    shutdown: ShutdownHandler,
) -> None:
    """The loop: train an epoch, look at the whole validation split, log, keep the best, stop early.

    Asked to end, it saves what it has reached and ends as it was asked.
    """
    run, display = recorder.run, recorder.display
    memory = devices.MemoryMeter(training.device)
    guard = sanity.SanityChecker(training, labels, config, recorder.warn)
    keeper = Checkpointer(run.checkpoint_dir, config, guard, shutdown, display)
    with (
        display.progress_bar("training", config.train.epochs * len(training)) as bar,
        shutdown.trap_signals(),
    ):
        bar.advance(num_images_seen(state, len(training)))
        try:
            while not state.is_finished(config.train):
                progress = state.begin_or_continue_epoch(training.device)
                memory.start_phase()
                change = Augmenter(config, state.epoch, len(labels), training.device)
                metrics = train_epoch(state, training, change, config, guard, keeper, bar)
                metrics |= memory.peaks("train")

                memory.start_phase()
                began = time.perf_counter()
                result = evaluate(state.model, validation, config, shutdown.check_signal)
                metrics |= result.metrics("val") | memory.peaks("eval")
                metrics["memory/process_peak_mib"] = memory.process_peak_mib()
                metrics["speed/epoch_seconds"] = progress.seconds + time.perf_counter() - began
                recorder.log_metrics(MetricsRow(state.epoch, runs.now_ms(), metrics))

                better = state.update_best(result.accuracy, result.loss)
                if better:
                    run.write("model.safetensors", weights_to_bytes(state.model, config))
                display.info(format_epoch(state, metrics, config, better))
                guard.check_validation(result, state.step)
                state.progress = None
                keeper.maybe_save(state)
        except StopRequested:
            keeper.save(state)
            shutdown.exit()
        keeper.save(state)
    if state.should_stop_early(config.train):
        display.info(
            f"no better accuracy since epoch {state.last_improved_epoch}: stopping early (train.patience)"
        )


def train_epoch(
    state: TrainState,
    training: Split,
    augmenter: Augmenter,
    config: Config,
    sanity_checker: sanity.SanityChecker,
    checkpointer: "Checkpointer",
    bar: ProgressBar,
) -> dict[str, float]:
    """Every picture once, changed, from where the epoch stands; loss and accuracy as they were on the way,
    and pictures per second.

    Raises:
        RunFailed: a loss or a gradient was not a finite number; the line says where and why.
        Asked: the training is to end.
    """
    size = int(config.train.batch_size)
    steps = -(-len(training) // size) * config.train.epochs
    progress = state.begin_or_continue_epoch(training.device)
    order = training.permutation(config.seed, state.epoch)[progress.num_batches * size :]
    state.model.train()
    sums = EpochMeter(progress, bar, f"epoch {state.epoch}/{config.train.epochs}")
    for batch in training.batches(size, order):
        optim.set_learning_rate(state.optimizer, optim.learning_rate(config.train, state.step, steps))
        step = train_step(state, augmenter(batch), config)
        sanity_checker.observe(state.step, step.loss, step.diverged)
        state.step += 1
        if sums.update(step, len(batch.indices)):
            sanity_checker.check(state.model, state.epoch)
        checkpointer.maybe_save(state)
    sanity_checker.check(state.model, state.epoch)
    return sums.metrics()


class Checkpointer:
    """Between two steps: saves what was reached when it is time to, and hears whether to end."""

    def __init__(
        self,
        checkpoint_dir: Path,
        config: Config,
        sanity_checker: sanity.SanityChecker,
        shutdown: ShutdownHandler,
        display: Display,
    ) -> None:
        self._checkpoint_dir, self._sanity_checker, self._shutdown, self._display = (
            checkpoint_dir,
            sanity_checker,
            shutdown,
            display,
        )
        self._interval = checkpoint.CheckpointInterval(config.train.checkpoint_every)
        self._last_position: tuple[int, bool] | None = None

    def maybe_save(self, state: TrainState) -> None:
        """After a step, or an epoch.

        Raises:
            Asked: the training is to end.
        """
        if self._interval.is_due(state):
            self.save(state)
        self._shutdown.check_stop()

    def save(self, state: TrainState) -> None:
        """The state on the disk; where it cannot be written, the training goes on without.

        Raises:
            RunFailed: a step was not finite: a state that does not know it is not saved.
        """
        place = state.step, state.progress is None
        if place == self._last_position:
            return
        self._sanity_checker.check(state.model, state.epoch)
        try:
            checkpoint.save(self._checkpoint_dir, state)
            self._last_position = place
        except OSError as error:
            self._display.warn(f"{self._checkpoint_dir}: no checkpoint can be written: {error}")
        self._interval.reset()


def train(
    requested: Config,
    tracker: Tracker | None = None,
    display: Display | None = None,
    run_dir: Path | None = None,
    lineage: Mapping[str, Any] | None = None,
    on_complete: Callable[[Run], None] | None = None,
    extend_from: Path | None = None,
    shutdown: ShutdownHandler | None = None,
) -> TrainResult:
    """A trained, tested and recorded model; its record is in this empty folder, or in a new one.

    The folder of an unfinished run is gone on with: its own config is what runs, from where it stands.
    `start_from` is the folder of a finished run from whose last state this one starts. `links` is as
    `record.create` has it; `at_end` writes what else belongs into a record that is complete, and not closed
    yet. `leaving` says when to end; without it, that is what is `requested`.

    Raises:
        OutOfMemory: there was too little memory; its record says what train.on_oom takes that for.
        UserError: the run cannot be made or cannot go on; the lines say why. Its record says FAILED.
    """
    tracker, display = tracker or NullTracker(), display or NullDisplay()
    began = time.perf_counter()
    shutdown = shutdown or ShutdownHandler(requested.train.max_minutes)
    if run_dir is not None and (run_dir / "run.json").exists():
        config = load(run_dir / "config.yaml")
        with shutdown:
            recording = RunRecorder(runs.reopen_run(run_dir), tracker, display)
            with record_outcome(recording, config):
                job = _prepare(config, display)
                epochs = {row.step for row in recording.run.metrics_rows() if _is_epoch_row(row)}
                saved = checkpoint.load_latest(recording.run.checkpoint_dir, recording.warn, epochs)
                if saved is None and extend_from is not None:  # killed before its first checkpoint
                    saved = _load_final_state(extend_from, job.config, display)
                    _copy_epoch_rows(extend_from, recording)
                return _run_training(job, recording, shutdown, began, saved, on_complete)
    job = _prepare(requested, display)
    saved = _load_final_state(extend_from, job.config, display)
    with shutdown:
        run = runs.create_run(job.config, requested, run_dir, lineage)
        recording = RunRecorder(run, tracker, display)
        with record_outcome(recording, job.config):
            if extend_from is not None:
                _copy_epoch_rows(extend_from, recording)
            return _run_training(job, recording, shutdown, began, saved, on_complete)


@dataclass(frozen=True)
class _PreparedTraining:
    """A training that can begin."""

    config: Config
    device: torch.device
    dataset_spec: DatasetSpec
    plan: Plan
    autotuner: autotune.Autotuner


def _prepare(requested: Config, display: Display) -> _PreparedTraining:
    trials = autotune.Autotuner(display)
    config = resolve(requested, devices.detect_machine(trials.choose_precision, trials.choose_batch_size))
    device = devices.setup_device(config)
    devices.set_memory_limit(config, device)
    outline = trials.dataset_spec or dataset.inspect_dataset(config, display)
    planned = Planner(config, outline.split_sizes, devices.gpu_total_mib(config)).plan_for(
        int(config.train.batch_size)
    )
    return _PreparedTraining(config, device, outline, planned, trials)


def _load_final_state(run_dir: Path | None, config: Config, display: Display) -> Checkpoint | None:
    """The last state of a finished run that is to have more epochs.

    Raises:
        UserError: it has none any more, or there is nothing more to do.
    """
    if run_dir is None:
        return None
    saved = checkpoint.load_latest(run_dir / runs.CHECKPOINT_DIR, display.warn)
    if saved is None:
        raise UserError(f"{run_dir}: has no checkpoint to start from; train anew, with --resume=never")
    epoch, gain = saved.counters["epoch"], saved.counters["last_improved_epoch"]
    if epoch >= config.train.epochs:
        raise UserError(f"train.epochs={config.train.epochs}: {run_dir} has {epoch} already; write more")
    if config.train.patience is not None and epoch - gain > config.train.patience:
        raise UserError(
            f"train.patience={config.train.patience}: {run_dir} stopped early in epoch {epoch}, with no gain "
            f"since epoch {gain}; write more than {epoch - gain}, or null"
        )
    return saved


def _copy_epoch_rows(source_dir: Path, recorder: RunRecorder) -> None:
    """The epochs that a finished run has, without its test: this run has one of its own."""
    for row in runs.read_metrics_rows(source_dir)[0]:
        if _is_epoch_row(row):
            recorder.log_metrics(row)


def _is_epoch_row(row: MetricsRow) -> bool:
    """Whether it is not the test's."""
    return "val/loss" in row.metrics


def _run_training(
    prepared: _PreparedTraining,
    recorder: RunRecorder,
    shutdown: ShutdownHandler,
    start_time: float,
    saved: Checkpoint | None,
    on_complete: Callable[[Run], None] | None,
) -> TrainResult:
    config, device, run, display = prepared.config, prepared.device, recorder.run, recorder.display
    display.info(f"run {run.run_dir} on {devices.describe(config)}")
    _print_plan(prepared.plan, config, display)
    ran_on = collect_environment(config)
    ran_on |= {
        "precisions_tried": prepared.autotuner.precision_trials,
        "batch_sizes_tried": prepared.autotuner.batch_size_trials,
    }
    record_environment(ran_on, recorder)
    run.write_json("memory.json", prepared.plan.to_json())
    data = dataset.load_or_build(prepared.dataset_spec, config, display)
    check_dataset_unchanged(data.manifest, run)
    run.write_json("dataset.json", data.manifest)
    recorder.tracker.log_inputs(data.manifest, ran_on)
    state: TrainState | None = None
    try:
        training = data.split("train", device, config.device.preload_limit_mib)
        validation = data.split("validation", device, config.device.preload_limit_mib)
        state = init_train_state(config, device)
        state.start_time = start_time
        if saved is not None:
            state.load_state_dict(saved)
        fit(state, training, validation, data.labels, config, recorder, shutdown)

        state.restore_best_weights()
        run.write("model.safetensors", weights_to_bytes(state.model, config))
        test = data.split("test", device, config.device.preload_limit_mib)
        tested = evaluate(state.model, test, config)
    except Exception as error:
        if not devices.is_out_of_memory(error):
            raise
        short, row = oom.record_oom(
            state, prepared.plan, prepared.dataset_spec.split_sizes, config, run, display
        )
        recorder.log_metrics(row)
        raise short from error
    result = TrainResult(
        run_dir=run.run_dir,
        config=config,
        test=tested,
        best_epoch=state.best_epoch,
        weights_sha256=weights_sha256(state.model),
        seconds=state.elapsed_seconds(),
        process_peak_mib=max(row.metrics.get("memory/process_peak_mib", 0.0) for row in run.metrics_rows()),
    )
    record_test_results(result, data, prepared.plan, state, recorder)
    if on_complete is not None:
        on_complete(run)
    checkpoint.prune(run.checkpoint_dir, 1)
    return result


def _print_plan(plan: Plan, config: Config, display: Display) -> None:
    """What the training will need, and what it does otherwise to need less."""
    words = f"memory: {plan.describe(config.gpu.name)}"
    if plan.fits == "does not fit":
        display.warn(f"{words}; captcha-exp plan --advise names what fits")
    else:
        display.info(words)
    if micro := config.train.micro_batch_size:
        display.info(f"train.micro_batch_size={micro}: batch norms see so many pictures at a time")
