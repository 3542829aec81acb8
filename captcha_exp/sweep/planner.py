"""Predict the memory of every job of a sweep before the first one starts, and record skipped jobs."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from captcha_exp import runs
from captcha_exp.config import (
    CaptchaConfig,
    Config,
    DataConfig,
    resolve,
    with_captcha,
    with_default_batch_size,
    with_planned_precision,
)
from captcha_exp.data import dataset
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.memory.plan import Plan, Planner
from captcha_exp.runs.info import Skipped
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.console import progress_bar
from captcha_exp.sweep.record import Job
from captcha_exp.training import oom
from captcha_exp.training.recorder import RunRecorder, Tracker, record_outcome

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedJob:
    """A job and its predicted memory."""

    job: Job
    config: Config
    """resolved as far as possible before the run"""
    split_sizes: Mapping[str, int]
    """split -> number of images"""
    plan: Plan | None
    """None for train.batch_size=auto, which is measured at run time"""

    @property
    def should_train(self) -> bool:
        """Whether to train the job: always on CUDA, where the allocator enforces the budget; elsewhere only
        if it is predicted to fit, no budget is known, or sweep.run_over_budget is set."""
        if self.plan is None or self.plan.fits in ("fits", None):
            return True
        return self.config.device.name.startswith("cuda") or self.config.sweep.run_over_budget


def plan_jobs(jobs: Sequence[Job]) -> list[PlannedJob]:
    """Plan the memory of each job.

    Raises:
        ConfigError: the images of some jobs are missing or invalid; one line per problem, for all jobs.
    """
    machine = devices.detect_machine()
    # Each dataset is read once.
    inspected: dict[tuple[DataConfig, CaptchaConfig], tuple[CaptchaConfig, Mapping[str, int]]] = {}
    planned = []
    errors: dict[str, None] = {}  # without duplicates
    with progress_bar("planning", len(jobs)) as bar:
        for job in jobs:
            config = with_default_batch_size(resolve(job.requested, machine))
            if not config.device.name.startswith("cuda"):
                config = with_planned_precision(config, job.requested)
            key = (config.data, config.captcha)
            try:
                if key not in inspected:
                    spec = dataset.inspect_dataset(config)
                    inspected[key] = spec.config.captcha, spec.split_sizes
                captcha, split_sizes = inspected[key]
                config = with_captcha(config, captcha)
            except UserError as error:
                errors |= dict.fromkeys(error.lines)
                continue
            planner = Planner(config, split_sizes, devices.gpu_total_mib(config))
            size = job.requested.train.batch_size
            plan = None if size == "auto" else planner.plan_for(size)
            planned.append(PlannedJob(job, config, split_sizes, plan))
            bar.advance(1)
    if errors:
        raise ConfigError(*errors)
    return planned


def record_skipped(planned_job: PlannedJob, run_dir: Path, tracker: Tracker) -> None:
    """Record a job that is skipped because it is not predicted to fit as a finished, tagged run."""
    plan, job, config = planned_job.plan, planned_job.job, planned_job.config
    assert plan is not None
    run = runs.create_run(config, job.requested, run_dir)
    remedies = oom.find_remedies(plan, planned_job.split_sizes, config)
    run.update(tags={"fits": str(plan.fits), "trained": "false"}, skipped=Skipped(remedies=remedies))
    prediction = plan.describe(config.gpu.name)
    logger.info(f"{job.name}: {prediction}; skipped; {oom.format_remedies(remedies)}")
    recorder = RunRecorder(run, tracker)
    with record_outcome(recorder, config):
        run.write_json("memory.json", plan.to_json())
        recorder.log_metrics(runs.MetricsRow(0, runs.now_ms(), plan.prediction_error_metrics([])))
