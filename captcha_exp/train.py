"""The training: the one-page loop, and what stands around it.

The loop talks to a `Tracker` and a `Display` and knows neither MLflow nor the terminal.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from captcha_exp import dataset, oom, optim, probe, record, report, watch
from captcha_exp import device as devices
from captcha_exp.augment import Changes
from captcha_exp.checkpoint import TrainState, weights_sha256, weights_to_bytes
from captcha_exp.config import Config, resolve
from captcha_exp.dataset import Dataset, Split
from captcha_exp.display import Bar, Display, Silent
from captcha_exp.evaluate import Evaluation, evaluate
from captcha_exp.memory.plan import Plan, Planner
from captcha_exp.record import MetricsRow, Run, Status
from captcha_exp.record.environment import environment
from captcha_exp.step import Step, fresh_state, train_step


class Tracker(Protocol):
    """Where a run is reported to, beside its own folder."""

    def start(self, run: Run, config: Config) -> None: ...

    def describe(self, manifest: Mapping[str, Any], environment: Mapping[str, Any]) -> None: ...

    def log(self, row: MetricsRow) -> None: ...

    def finish(self, run: Run, status: Status) -> None: ...


class NoTracker:
    """The run's folder is the only record."""

    def start(self, run: Run, config: Config) -> None:
        pass

    def describe(self, manifest: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        pass

    def log(self, row: MetricsRow) -> None:
        pass

    def finish(self, run: Run, status: Status) -> None:
        pass


@dataclass(frozen=True)
class Result:
    """What a training leaves behind."""

    folder: Path
    config: Config
    test: Evaluation
    best_epoch: int
    weights_sha256: str
    seconds: float
    process_peak_mib: float


def fit(
    state: TrainState,
    training: Split,
    validation: Split,
    labels: list[str],
    config: Config,
    run: Run,
    tracker: Tracker,
    display: Display,
) -> None:
    """The loop: train an epoch, look at the whole validation split, log, keep the best, stop early."""
    memory = devices.MemoryMeter(training.device)

    def tell(trouble: str) -> None:
        display.warn(trouble)
        run.note(warnings=[*run.state["warnings"], trouble])

    guard = watch.Guard(training, labels, config, tell)
    with display.bar("training", config.train.epochs * len(training)) as bar:
        for state.epoch in range(1, config.train.epochs + 1):
            began = time.perf_counter()
            memory.start()
            change = Changes(config, state.epoch, len(labels), training.device)
            metrics = train_epoch(state, training, change, config, guard, bar)
            metrics |= memory.peaks("train")

            memory.start()
            result = evaluate(state.model, validation, config)
            metrics |= result.metrics("val") | memory.peaks("eval")
            metrics["memory/process_peak_mib"] = memory.process_peak_mib()
            metrics["speed/epoch_seconds"] = time.perf_counter() - began
            row = MetricsRow(state.epoch, record.now_ms(), metrics)
            run.log(row)
            tracker.log(row)

            better = state.keep_if_better(result.accuracy, result.loss)
            if better:
                run.write("model.safetensors", weights_to_bytes(state.model, config))
            display.line(_epoch_line(state, metrics, config, better))
            guard.look_at(result, state.step)
            if config.train.patience and state.epochs_without_gain() > config.train.patience:
                display.line(
                    f"no better accuracy since epoch {state.gain_epoch}: stopping early (train.patience)"
                )
                break


def train_epoch(
    state: TrainState, training: Split, change: Changes, config: Config, guard: watch.Guard, bar: Bar
) -> dict[str, float]:
    """Every picture once, changed; loss and accuracy as they were on the way, and pictures per second.

    Raises:
        RunFailed: a loss or a gradient was not a finite number; the line says where and why.
    """
    size = int(config.train.batch_size)
    steps = -(-len(training) // size) * config.train.epochs
    state.model.train()
    sums = _Sums(training.device, bar, f"epoch {state.epoch}/{config.train.epochs}")
    for batch in training.batches(size, training.shuffled(config.seed, state.epoch)):
        optim.set_learning_rate(state.optimizer, optim.learning_rate(config.train, state.step, steps))
        step = train_step(state, change(batch), config)
        guard.note(state.step, step.loss, step.broken)
        state.step += 1
        if sums.add(step, len(batch.rows)):
            guard.look(state.model, state.epoch)
    guard.look(state.model, state.epoch)
    return sums.metrics()


def train(
    requested: Config,
    tracker: Tracker | None = None,
    display: Display | None = None,
    folder: Path | None = None,
    links: Mapping[str, Any] | None = None,
    at_end: Callable[[Run], None] | None = None,
) -> Result:
    """A trained, tested and recorded model; its record is in this empty folder, or in a new one.

    `links` is as `record.create` has it; `at_end` writes what else belongs into a record that is complete,
    and not closed yet.

    Raises:
        OutOfMemory: there was too little memory; its record says what train.on_oom takes that for.
        UserError: the run cannot be made or cannot go on; the lines say why. Its record says FAILED.
    """
    tracker, display = tracker or NoTracker(), display or Silent()
    began = time.perf_counter()
    trials = probe.Trials(display)
    config = resolve(requested, devices.this_machine(trials.precision, trials.batch_size))
    device = devices.set_up(config)
    devices.hold_to_budget(config, device)
    outline = trials.outline or dataset.outline(config, display)
    planned = Planner(config, outline.counts, devices.card_total_mib(config)).at(int(config.train.batch_size))
    run = record.create(config, requested, folder, links)
    display.line(f"run {run.folder} on {devices.describe(config)}")
    _tell_plan(planned, config, display)
    with recorded(run, tracker, config, display):
        data = dataset.prepare(outline, config, display)
        ran_on = environment(config)
        ran_on |= {"precisions_tried": trials.precisions, "batch_sizes_tried": trials.batch_sizes}
        run.write_json("memory.json", planned.to_json())
        run.write_json("dataset.json", data.manifest)
        run.write_json("environment.json", ran_on)
        tracker.describe(data.manifest, ran_on)
        state: TrainState | None = None
        try:
            training = data.split("train", device, config.device.resident_limit_mib)
            validation = data.split("validation", device, config.device.resident_limit_mib)
            state = fresh_state(config, device)
            fit(state, training, validation, data.labels, config, run, tracker, display)

            state.restore_best()
            test = data.split("test", device, config.device.resident_limit_mib)
            tested = evaluate(state.model, test, config)
        except Exception as error:
            if not devices.is_out_of_memory(error):
                raise
            short, row = oom.noted(state, planned, outline.counts, config, run, display)
            run.log(row)
            tracker.log(row)
            raise short from error
        result = Result(
            folder=run.folder,
            config=config,
            test=tested,
            best_epoch=state.best_epoch,
            weights_sha256=weights_sha256(state.model),
            seconds=time.perf_counter() - began,
            process_peak_mib=max(row.metrics["memory/process_peak_mib"] for row in run.rows()),
        )
        _record_test(result, data, planned, state, run, tracker)
        if at_end is not None:
            at_end(run)
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


def _record_test(
    result: Result, data: Dataset, planned: Plan, state: TrainState, run: Run, tracker: Tracker
) -> None:
    """What is known at the end, and the pictures of the report, in the run's folder and at the tracker."""
    tested, alphabet = result.test, data.alphabet
    low, high = tested.interval
    metrics = tested.metrics("test") | {"test/accuracy_low": low, "test/accuracy_high": high}
    metrics |= planned.beside([row.metrics for row in run.rows()])
    row = MetricsRow(state.epoch, record.now_ms(), metrics)
    run.log(row)
    tracker.log(row)
    run.write_json("test.json", tested.summary(data))
    report.curves(run.rows(), run.report / "curves.png")
    report.confusion(tested, alphabet, run.report / "confusion.png")
    report.errors(tested, data, run.report / "errors.png")
    report.samples(data.images[:30].numpy(), data.labels[:30], run.report / "pictures.png")
    run.note(
        result={
            "epochs": state.epoch,
            "best_epoch": state.best_epoch,
            "val_accuracy": state.best_accuracy,
            "test_accuracy": tested.accuracy,
            "weights_sha256": result.weights_sha256,
            "seconds": result.seconds,
            "process_peak_mib": result.process_peak_mib,
        }
    )


@contextlib.contextmanager
def recorded(run: Run, tracker: Tracker, config: Config, display: Display) -> Iterator[None]:
    """However it ends, the record says so: in the folder first, then at the tracker."""
    status: Status = "FAILED"
    error: str | None = None
    try:
        tracker.start(run, config)
        yield
        status = "FINISHED"
    except oom.OutOfMemory as short:
        status, error = ("FINISHED" if short.is_result else "FAILED"), str(short)
        raise
    except (KeyboardInterrupt, SystemExit) as interruption:
        status, error = "KILLED", type(interruption).__name__
        display.line(f"interrupted: {run.folder} keeps what was reached, as KILLED")
        raise
    except BaseException as exception:
        error = f"{type(exception).__name__}: {exception}"
        raise
    finally:
        run.close(status, error)
        tracker.finish(run, status)


class _Sums:
    """Sums of one epoch, kept on the device; read when a person may look, twice a second."""

    def __init__(self, device: torch.device, bar: Bar, title: str) -> None:
        self.loss = torch.zeros((), device=device)
        self.right = torch.zeros((), dtype=torch.int64, device=device)
        self.seen = self.shown = 0
        self.bar, self.title = bar, title
        self.began = self.looked = time.perf_counter()

    def add(self, step: Step, pictures: int) -> bool:
        """Whether this was a moment to look."""
        self.loss += step.loss * pictures
        self.right += step.right
        self.seen += pictures
        if time.perf_counter() - self.looked < 0.5:
            return False
        self._show()
        self.looked = time.perf_counter()
        return True

    def metrics(self) -> dict[str, float]:
        loss, right = float(self.loss), int(self.right)  # waits for the device, before the clock is read
        self._show()
        return {
            "train/loss": loss / self.seen,
            "train/accuracy": right / self.seen,
            "speed/images_per_second": self.seen / (time.perf_counter() - self.began),
        }

    def _show(self) -> None:
        loss, share = float(self.loss) / self.seen, int(self.right) / self.seen
        speed = self.seen / (time.perf_counter() - self.began)
        peak = devices.process_peak_mib(self.loss.device)
        note = f"{self.title}  loss {loss:.4f}  accuracy {share:.1%}  {speed:,.0f} pictures/s"
        self.bar.advance(self.seen - self.shown, f"{note}  peak {peak:,.0f} MiB")
        self.shown = self.seen


def _epoch_line(state: TrainState, metrics: Mapping[str, float], config: Config, better: bool) -> str:
    width = len(str(config.train.epochs))
    return (
        f"epoch {state.epoch:{width}}/{config.train.epochs}  "
        f"train loss {metrics['train/loss']:.4f} accuracy {metrics['train/accuracy']:7.2%}  "
        f"val loss {metrics['val/loss']:.4f} accuracy {metrics['val/accuracy']:7.2%}  "
        f"{metrics['speed/images_per_second']:,.0f} pictures/s  "
        f"peak {metrics['memory/process_peak_mib']:,.0f} MiB{'  best' if better else ''}"
    )
