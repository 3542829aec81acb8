"""The command `train`: one training, new or resumed, or a sweep."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from captcha_exp import runs
from captcha_exp.cli import output, resume
from captcha_exp.cli.hydra_config import try_compose
from captcha_exp.config import Machine
from captcha_exp.errors import UserError
from captcha_exp.runs import RunInfo
from captcha_exp.runtime.shutdown import ShutdownHandler, TimeLimitReached
from captcha_exp.tracking import check_tracking, make_tracker, registered_name
from captcha_exp.tracking.sync import close_stale_runs


def train(arguments: argparse.Namespace, detect_machine: Callable[[], Machine], program: str) -> int:
    """Train, print the result, and return the exit code.

    Raises:
        UserError: the config is invalid, or there is nothing to resume; the lines say what to change.
    """
    close_stale_runs()
    composed = None
    if not arguments.multirun:
        composed = try_compose(arguments.overrides, arguments.config_dir)
    if composed is None or composed.multirun:
        from captcha_exp.cli.sweep import train_sweep

        return train_sweep(arguments, detect_machine())
    if arguments.rerun_disturbed:
        raise UserError(
            "--rerun-disturbed: trains jobs of a sweep again; add -m and the overrides of the sweep"
        )
    with resume.plan_resume(arguments, composed, detect_machine()) as plan:
        run_dir = _train(plan, arguments.resume)
    return _report(run_dir, arguments.json, program)


def _train(plan: resume.ResumePlan, resumed: str) -> Path:
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
        result = start_training(config, tracker, lineage=plan.lineage, extend_from=plan.extend_from)
    else:
        stop = ShutdownHandler(config.train.max_minutes)  # may differ from that of the run
        result = resume_training(plan.run_dir, tracker, extend_from=plan.extend_from, shutdown=stop)
    if registered_name(result.config) is not None:
        from captcha_exp.export.register import register_after_training

        register_after_training(result.run_dir)
    return result.run_dir


def _report(run_dir: Path, as_json: bool, program: str) -> int:
    info = RunInfo.load(run_dir)
    if as_json:
        result = {} if info.result is None else info.result.model_dump()
        output.print_json({"run_dir": str(run_dir), "status": info.status, **result})
    elif info.result is not None:
        output.print_training(run_dir, info, program)
    if info.stop_reason == "time limit":  # raised in a child process
        return TimeLimitReached.exit_code
    return 0 if info.status == "FINISHED" else 1
