"""Training: the loop, which fits on a page, and the steps before and after it.

The loop reports to a `Tracker`, a logger and a progress bar, and knows neither MLflow nor the terminal.
Everything that changes during training is in one `TrainState`: an interrupted training resumes as if it had
not been interrupted.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from captcha_exp import runs
from captcha_exp.config import Config
from captcha_exp.data import dataset
from captcha_exp.data.augment import Augmenter
from captcha_exp.data.dataset import Dataset, Split
from captcha_exp.errors import UserError
from captcha_exp.memory.plan import Plan
from captcha_exp.model import optim
from captcha_exp.model import state as checkpoint
from captcha_exp.model.calibration import calibrate
from captcha_exp.model.evaluate import evaluate
from captcha_exp.model.state import Checkpoint, TrainState
from captcha_exp.model.step import init_train_state, train_step
from captcha_exp.model.weights import max_file_bytes, weights_sha256, weights_to_bytes
from captcha_exp.runs import MetricsRow, Run
from captcha_exp.runs.environment import collect_environment
from captcha_exp.runtime import device as devices
from captcha_exp.runtime import startup
from captcha_exp.runtime.compiler import without_compiler
from captcha_exp.runtime.console import ProgressBar, progress_bar
from captcha_exp.runtime.shutdown import ShutdownHandler, StopRequested
from captcha_exp.training import oom, sanity
from captcha_exp.training.checkpointer import Checkpointer
from captcha_exp.training.prepare import PreparedTraining, prepare
from captcha_exp.training.progress import EpochMeter, format_epoch, log_plan, num_images_seen
from captcha_exp.training.recorder import (
    NullTracker,
    OnResult,
    RunRecorder,
    Tracker,
    TrainResult,
    check_dataset_unchanged,
    record_environment,
    record_outcome,
    record_test_results,
)

logger = logging.getLogger(__name__)


def fit(
    state: TrainState,
    training: Split,
    validation: Split,
    labels: list[str],
    config: Config,
    recorder: RunRecorder,
    shutdown: ShutdownHandler,
) -> None:
    """Run the training loop: train an epoch, validate, log, keep the best weights, stop early.

    If a stop is requested, save a checkpoint and exit as requested.
    """
    run = recorder.run
    memory = devices.MemoryMeter(training.device)
    sanity_checker = sanity.SanityChecker(training, labels, config, recorder.warn)
    checkpointer = Checkpointer(run.checkpoint_dir, config, sanity_checker, shutdown)
    with progress_bar("training", config.train.epochs * len(training)) as bar, shutdown.trap_signals():
        bar.advance(num_images_seen(state, len(training)))
        try:
            while not state.is_finished(config.train):
                progress = state.begin_or_continue_epoch(training.device)
                memory.start_phase()
                augmenter = Augmenter(config, state.epoch, len(labels), training.device)
                metrics = train_epoch(state, training, augmenter, config, sanity_checker, checkpointer, bar)
                metrics |= memory.peaks("train")

                memory.start_phase()
                start_time = time.perf_counter()
                result = evaluate(state.model, validation, config, shutdown.check_signal)
                metrics |= result.metrics("val") | memory.peaks("eval")
                metrics["memory/process_peak_mib"] = memory.process_peak_mib()
                metrics["speed/epoch_seconds"] = progress.seconds + time.perf_counter() - start_time
                recorder.log_metrics(MetricsRow(state.epoch, runs.now_ms(), metrics))

                is_best = state.update_best(result.accuracy, result.loss)
                if is_best:
                    run.write("model.safetensors", weights_to_bytes(state.model, config))
                logger.info(format_epoch(state, metrics, config, is_best))
                sanity_checker.check_validation(result, state.step)
                state.progress = None
                checkpointer.maybe_save(state)
        except StopRequested:
            checkpointer.save(state)
            shutdown.exit()
        checkpointer.save(state)
    if state.should_stop_early(config.train):
        logger.info(
            f"Stopping early: validation accuracy has not improved since epoch {state.last_improved_epoch} "
            "(train.patience)"
        )


def train_epoch(
    state: TrainState,
    training: Split,
    augmenter: Augmenter,
    config: Config,
    sanity_checker: sanity.SanityChecker,
    checkpointer: Checkpointer,
    bar: ProgressBar,
) -> dict[str, float]:
    """Train on the remaining batches of the epoch, augmented; return the training metrics.

    Loss and accuracy are means over the epoch while the weights change.

    Raises:
        RunFailed: a loss or gradient was not finite; the line says where and why.
        StopRequested: training has to stop.
    """
    size = int(config.train.batch_size)
    total_steps = -(-len(training) // size) * config.train.epochs
    progress = state.begin_or_continue_epoch(training.device)
    order = training.epoch_order(config.seed, state.epoch)[progress.num_batches * size :]
    state.model.train()
    meter = EpochMeter(progress, bar, f"epoch {state.epoch}/{config.train.epochs}")
    for batch in training.batches(size, order):
        optim.set_learning_rate(state.optimizer, optim.learning_rate(config.train, state.step, total_steps))
        step = train_step(state, augmenter(batch), config)
        startup.first_step.set()
        sanity_checker.observe(state.step, step.loss, step.diverged)
        state.step += 1
        if meter.update(step, len(batch.indices)):
            sanity_checker.check(state.model, state.epoch)
        checkpointer.maybe_save(state)
    sanity_checker.check(state.model, state.epoch)
    return meter.metrics()


@without_compiler()
def train(
    requested: Config,
    tracker: Tracker | None = None,
    *,
    run_dir: Path | None = None,
    lineage: runs.Lineage | None = None,
    extend_from: Path | None = None,
    on_complete: Callable[[Run], None] | None = None,
    shutdown: ShutdownHandler | None = None,
    on_result: OnResult | None = None,
) -> TrainResult:
    """Train, test and record a model in a new run.

    Args:
        requested: The config, which may contain `auto`.
        tracker: Reports the run, for example to MLflow; by default the run directory is the only record.
        run_dir: An empty directory for the record; by default outputs/<date>/<time>-<name>.
        lineage: How the run is related to others, as in `runs.create_run`.
        extend_from: The directory of a finished run whose final state this one starts from.
        on_complete: Called with the complete run before it is closed, to add to its record.
        shutdown: Decides when to stop; by default a signal or train.max_minutes.
        on_result: Called with the directory and the results before the figures are drawn.

    Raises:
        TrainingOutOfMemoryError: out of memory; train.on_oom says whether the run counts as failed.
        UserError: the config cannot run here, or the run failed; the lines say why.
    """
    start_time = time.perf_counter()
    shutdown = shutdown or ShutdownHandler(requested.train.max_minutes)
    with prepare(requested) as prepared:
        if extend_from is not None:
            _load_final_state(extend_from, prepared.config)  # a mistake does not create a run
        with shutdown:
            run = runs.create_run(prepared.config, requested, run_dir, lineage)
            recorder = RunRecorder(run, tracker or NullTracker(), on_result)
            return _record_training(prepared, recorder, shutdown, start_time, extend_from, on_complete)


@without_compiler()
def resume(
    run_dir: Path,
    tracker: Tracker | None = None,
    *,
    extend_from: Path | None = None,
    shutdown: ShutdownHandler | None = None,
    on_result: OnResult | None = None,
) -> TrainResult:
    """Resume an interrupted run from its latest checkpoint, with its own config and in its own record.

    Args:
        run_dir: The directory of the run.
        tracker: As in `train`.
        extend_from: The finished run that this one extends, if any; used if it has no checkpoint yet.
        shutdown: As in `train`.
        on_result: As in `train`.

    Raises:
        TrainingOutOfMemoryError: as in `train`.
        UserError: the run cannot be resumed, or it failed; the lines say why.
    """
    start_time = time.perf_counter()
    config = runs.load(run_dir).config_to_resume()
    dataset.check_images_exist(config)
    shutdown = shutdown or ShutdownHandler(config.train.max_minutes)
    with shutdown, prepare(dataset.with_trusted_cache(config)) as prepared:
        run = runs.reopen_run(run_dir)
        recorder = RunRecorder(run, tracker or NullTracker(), on_result)
        return _record_training(prepared, recorder, shutdown, start_time, extend_from)


def _load_final_state(run_dir: Path, config: Config) -> Checkpoint:
    """Return the last state of a finished run that is extended by more epochs.

    Raises:
        UserError: the run is damaged or has no checkpoint any more, or the config asks for no more epochs
            than it has.
    """
    finished = runs.load(run_dir)
    finished.metrics_rows()  # will be part of the new run
    for path in runs.list_checkpoints(run_dir / runs.CHECKPOINT_DIR)[:1]:
        size = max_file_bytes(config, checkpoint.MAX_COPIES)
        finished.path(f"{runs.CHECKPOINT_DIR}/{path.name}", size)
    saved = checkpoint.load_latest(run_dir / runs.CHECKPOINT_DIR, config, logger.warning)
    if saved is None:
        raise UserError(f"{run_dir}: has no checkpoint to start from; start a new run with --resume=never")
    epoch, improved = saved.counters.epoch, saved.counters.last_improved_epoch
    if epoch >= config.train.epochs:
        raise UserError(
            f"train.epochs={config.train.epochs}: {run_dir} already has {epoch} epochs; set a larger number"
        )
    if config.train.patience is not None and epoch - improved > config.train.patience:
        raise UserError(
            f"train.patience={config.train.patience}: {run_dir} stopped early in epoch {epoch}, without "
            f"improvement since epoch {improved}; set more than {epoch - improved}, or null"
        )
    return saved


def _is_epoch_row(row: MetricsRow) -> bool:
    """Return whether the row has the metrics of an epoch, not of the test."""
    return "val/loss" in row.metrics


def _record_training(
    prepared: PreparedTraining,
    recorder: RunRecorder,
    shutdown: ShutdownHandler,
    start_time: float,
    extend_from: Path | None,
    on_complete: Callable[[Run], None] | None = None,
) -> TrainResult:
    """Train from the latest checkpoint, the final state of another run, or scratch; record the outcome."""
    run = recorder.run
    with record_outcome(recorder, prepared.config):
        recorded_epochs = {row.step for row in run.metrics_rows() if _is_epoch_row(row)}
        saved = checkpoint.load_latest(run.checkpoint_dir, prepared.config, recorder.warn, recorded_epochs)
        if saved is None and extend_from is not None:
            saved = _load_final_state(extend_from, prepared.config)
            for row in filter(_is_epoch_row, runs.load(extend_from).metrics_rows()):
                recorder.log_metrics(row)
        return _run_training(prepared, recorder, shutdown, start_time, saved, on_complete)


def _run_training(
    prepared: PreparedTraining,
    recorder: RunRecorder,
    shutdown: ShutdownHandler,
    start_time: float,
    saved: Checkpoint | None,
    on_complete: Callable[[Run], None] | None,
) -> TrainResult:
    """Train from the saved state or from scratch, test the best weights, and record the results."""
    config, device, run = prepared.config, prepared.device, recorder.run
    data = _record_inputs(prepared, recorder)
    preload_limit_mib = config.device.preload_limit_mib
    state: TrainState | None = None
    try:
        training = data.split("train", device, preload_limit_mib)
        validation = data.split("validation", device, preload_limit_mib)
        state = init_train_state(config, device)
        state.start_time = start_time
        if saved is not None:
            state.load_state_dict(saved)
        fit(state, training, validation, data.labels, config, recorder, shutdown)

        state.restore_best_weights()
        state.model.calibration = calibrate(state.model, validation, config)
        run.write("model.safetensors", weights_to_bytes(state.model, config))
        test = data.split("test", device, preload_limit_mib)
        test_result = evaluate(state.model, test, devices.in_fp32(config))
    except Exception as error:
        if not devices.is_out_of_memory(error):
            raise
        split_sizes = prepared.dataset_spec.split_sizes
        oom_error, row = oom.record_oom(state, prepared.plan, split_sizes, config, run)
        recorder.log_metrics(row)
        raise oom_error from error
    result = TrainResult(
        run_dir=run.run_dir,
        config=config,
        test=test_result,
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


def _record_inputs(prepared: PreparedTraining, recorder: RunRecorder) -> Dataset:
    """Record the environment, the memory plan and the dataset; return the dataset."""
    config, run = prepared.config, recorder.run
    logger.info(f"run {run.run_dir} on {devices.describe(config)}")
    environment = collect_environment(config) | prepared.trials
    record_environment(environment, recorder)
    is_cached = prepared.dataset_spec.cache_path.is_file()
    if not is_cached:  # rendering may take minutes
        _record_plan(prepared.plan, config, run)
    data = dataset.load_or_build(prepared.dataset_spec)
    if is_cached:  # the plan may still be in the making
        _record_plan(prepared.plan, config, run)
    check_dataset_unchanged(data.manifest, run)
    run.write_json("dataset.json", data.manifest)
    return data


def _record_plan(plan: Plan, config: Config, run: Run) -> None:
    """Log the memory plan, and write it."""
    log_plan(plan, config)
    run.write_json("memory.json", plan.to_json())
