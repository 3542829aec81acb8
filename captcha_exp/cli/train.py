"""The command `train`: one training, new or resumed, or a sweep."""

import argparse
import json
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from captcha_exp import runs
from captcha_exp.cli import output, resume
from captcha_exp.cli.hydra_config import ComposedConfig, try_compose
from captcha_exp.cli.overrides import quote
from captcha_exp.config import Machine, plain_values
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.runs import RunInfo
from captcha_exp.runs.info import ResultSummary
from captcha_exp.runtime.fork import run_in_child
from captcha_exp.runtime.shutdown import ShutdownHandler, TimeLimitReached
from captcha_exp.tracking import check_tracking, make_tracker, registered_name
from captcha_exp.tracking.sync import close_stale_runs

MAX_COMMAND = 60  # characters of a suggested command that the descriptions are aligned to


def train(arguments: argparse.Namespace, detect_machine: Callable[[], Machine], program: str) -> int:
    """Train, print the result, and return the exit code.

    Raises:
        UserError: the config is invalid, or there is nothing to resume; the lines say what to change.
    """
    close_stale_runs()
    composed = None
    if not arguments.multirun:
        composed = _compose_and_import_torch(arguments)
    if composed is None or composed.multirun:
        from captcha_exp.cli.sweep import train_sweep

        return train_sweep(arguments, detect_machine())
    if arguments.rerun_disturbed:
        raise UserError(
            "--rerun-disturbed: trains jobs of a sweep again; add -m and the overrides of the sweep"
        )
    printer = ResultPrinter(arguments.json)
    with resume.plan_resume(arguments, composed, detect_machine()) as plan:
        run_dir = _train(plan, arguments.resume, printer)
    return _report(run_dir, arguments.json, program, printer)


def _compose_and_import_torch(arguments: argparse.Namespace) -> ComposedConfig:
    """Compose the config in a child process, while this one imports torch."""

    def compose() -> dict[str, Any] | None:
        composed = try_compose(arguments.overrides, arguments.config_dir)
        try:
            return {**vars(composed), "config": plain_values(composed.config)}
        except ConfigError:  # of an interpolation; `to_config` reports it with all other mistakes
            return None

    with run_in_child(compose) as wait:
        import torch  # noqa: F401

        values = wait()
    if values is None:
        return try_compose(arguments.overrides, arguments.config_dir)
    return ComposedConfig(**values)


class ResultPrinter:
    """Prints the results of a training, by default before its figures are drawn."""

    def __init__(self, as_json: bool) -> None:
        self.error: OSError | SystemExit | None = None
        self._is_done = as_json  # as a part of the JSON

    def __call__(self, run_dir: Path, result: ResultSummary) -> None:
        """Print the results, once; an error is kept, as a closed pipe is no reason to fail the run."""
        if self._is_done:
            return
        self._is_done = True
        try:
            print_result(run_dir, result)
        except (OSError, SystemExit) as error:
            self.error = error


def _train(plan: resume.ResumePlan, resumed: str, on_result: ResultPrinter) -> Path:
    """Train one run; return its directory."""
    from captcha_exp.training.train import resume as resume_training
    from captcha_exp.training.train import train as start_training

    config = plan.requested
    check_tracking(config if plan.run_dir is None else runs.load(plan.run_dir).config_to_resume())
    if config.train.on_oom == "split":  # each attempt needs a process without leftover allocations
        from captcha_exp.sweep.supervisor import TrainJob, train_with_oom_retry

        minutes = config.train.max_minutes  # of all processes together
        deadline = None if minutes is None else time.time() + 60 * minutes
        job = TrainJob(
            config, plan.choices, lineage=plan.lineage, extend_from=plan.extend_from, deadline=deadline
        )
        return train_with_oom_retry(job, resume.run_dir_factory(plan, resumed))
    tracker = make_tracker(config, plan.choices)
    if plan.run_dir is None:
        result = start_training(
            config, tracker, lineage=plan.lineage, extend_from=plan.extend_from, on_result=on_result
        )
    else:
        stop = ShutdownHandler(config.train.max_minutes)  # may differ from that of the run
        result = resume_training(
            plan.run_dir, tracker, extend_from=plan.extend_from, shutdown=stop, on_result=on_result
        )
    if registered_name(result.config) is not None:
        from captcha_exp.export.register import register_after_training

        register_after_training(result.run_dir)
    return result.run_dir


def _report(run_dir: Path, as_json: bool, program: str, printer: ResultPrinter) -> int:
    info = RunInfo.load(run_dir)
    if as_json:
        result = {} if info.result is None else info.result.model_dump()
        output.print_json({"run_dir": str(run_dir), "status": info.status, **result})
    elif info.result is not None:
        printer(run_dir, info.result)  # unless it has: another process may have trained
        if printer.error is not None:
            raise printer.error
        print_record(run_dir, info, program)
    if info.stop_reason == "time limit":  # raised in a child process
        return TimeLimitReached.exit_code
    return 0 if info.status == "FINISHED" else 1


def print_result(run_dir: Path, result: ResultSummary) -> None:
    """Print test accuracy, cost and weights of a training."""
    test = json.loads((run_dir / "test.json").read_text(encoding="utf-8"))
    interval = (test["accuracy_low"], test["accuracy_high"])
    accuracy = output.format_accuracy(test["accuracy"], interval, test["correct"], test["images"])
    out = output.get_console()
    out.print()
    out.print(f"[bold]test accuracy {accuracy}[/bold], best epoch {result.best_epoch}")
    if not test["correct"]:
        out.print(
            f"the model cannot read yet: it has {test['char_accuracy']:.1%} of the characters, "
            f"{test['char_accuracy_at_chance']:.1%} would be chance; train for more epochs (train.epochs)"
        )
    out.print(f"time {result.seconds:.0f} s, peak memory {result.process_peak_mib:,.0f} MiB (whole process)")
    if result.speed_disturbed:
        out.print("training speed disturbed: other processes took cores that the training asked for")
    out.print(f"weights {result.weights_sha256}", markup=False)


def print_record(run_dir: Path, info: RunInfo, program: str) -> None:
    """Print where a finished run is recorded, and suggested next commands."""
    out = output.get_console()
    if info.run_id:
        out.print(f"run {info.run_id}", markup=False)
    if info.mlflow is not None:
        output.print_owed(info.mlflow)
    out.print(f"run directory {run_dir}", markup=False)
    if (page := run_dir / "report" / "run.html").is_file():
        out.print(f"report {page}", markup=False)
    out.print("\nnext:")
    commands = [
        ("evaluate latest", "accuracy per character and position, confusions"),
        ("predict latest IMAGE", "the text of an image"),
        ("export latest", "one ONNX file for use without torch"),
        ("ui", "learning curves of all runs, in MLflow"),
        _suggest_data(run_dir, info.name),
    ]
    width = max(len(words) for words, _ in commands if len(words) <= MAX_COMMAND)
    for words, description in commands:
        out.print(f"  {program} {words:<{width}}  {description}", markup=False)


def _suggest_data(run_dir: Path, name: str) -> tuple[str, str]:
    """Return the command that looks for wrong labels; for rendered images, another training."""
    if not json.loads((run_dir / "dataset.json").read_text(encoding="utf-8"))["files"]:
        other = "experiment=alnum" if name != "alnum" else "experiment=quickstart"
        return f"train {other}", "another alphabet; see conf/experiment/ for more"
    paths = runs.load(run_dir).flat_config()["data.path"]
    value = _quote(paths) if isinstance(paths, str) else f"[{','.join(map(_quote, paths))}]"
    return shlex.join(["data", "--folds", "5", "data=folder", f"data.path={value}"]), "wrong labels"


def _quote(path: str) -> str:
    """Return a path as the value of an override, with quotes where Hydra needs them."""
    return path if re.fullmatch(r"[\w./-]+", path) else quote(path)
