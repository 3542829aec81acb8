"""What the points of a sweep will need, told before the first one starts; and those that are not trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captcha_exp import runs
from captcha_exp.config import CaptchaConfig, Config, DataConfig, resolve, with_untuned_defaults
from captcha_exp.data import dataset
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.memory.plan import Plan, Planner
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.console import Display
from captcha_exp.sweep.record import Job
from captcha_exp.training import oom
from captcha_exp.training.recorder import RunRecorder, Tracker, record_outcome


@dataclass(frozen=True)
class PlannedJob:
    """A point, and what it will need."""

    job: Job
    config: Config
    """resolved, as far as it can be before it runs"""
    split_sizes: Mapping[str, int]
    """of each split"""
    plan: Plan | None
    """None where the batch size is measured when it runs"""

    @property
    def should_train(self) -> bool:
        """Whether there is a reason to try: on a CUDA card the allocator keeps to the budget and shows what
        is true; elsewhere only the prediction can."""
        if self.plan is None or self.plan.fits in ("fits", None):
            return True
        return self.config.device.name.startswith("cuda") or self.config.sweep.run_over_budget

    def to_json(self) -> dict[str, Any] | None:
        """The plan as plain values."""
        return None if self.plan is None else self.plan.to_json()


def plan_jobs(jobs: Sequence[Job], display: Display) -> list[PlannedJob]:
    """What each point will need.

    Raises:
        ConfigError: the pictures of points cannot be had; the lines say why, for all points.
    """
    machine = devices.detect_machine()
    outlines: dict[
        tuple[DataConfig, CaptchaConfig], Mapping[str, int]
    ] = {}  # a folder is read once for all points
    found = []
    mistakes: dict[str, None] = {}  # each once
    with display.progress_bar("planning", len(jobs)) as bar:
        for point in jobs:
            config = with_untuned_defaults(resolve(point.requested, machine))
            seen = (config.data, config.captcha)
            try:
                if seen not in outlines:
                    outlines[seen] = dataset.inspect_dataset(config, display).split_sizes
            except UserError as error:
                mistakes |= dict.fromkeys(error.lines)
                continue
            planner = Planner(config, outlines[seen], devices.gpu_total_mib(config))
            size = point.requested.train.batch_size
            plan = None if size == "auto" else planner.plan_for(size)
            found.append(PlannedJob(point, config, outlines[seen], plan))
            bar.advance(1)
    if mistakes:
        raise ConfigError(*mistakes)
    return found


def record_skipped(planned_job: PlannedJob, run_dir: Path, tracker: Tracker, display: Display) -> None:
    """The run of a point that is not trained, since it is foretold not to fit: finished, with a tag."""
    plan, point, config = planned_job.plan, planned_job.job, planned_job.config
    assert plan is not None
    run = runs.create_run(config, point.requested, run_dir)
    spared = oom.find_remedies(plan, planned_job.split_sizes, config, display)
    run.update(tags={"fits": str(plan.fits), "trained": "false"}, unfit={"remedies": spared})
    display.info(
        f"{point.name}: {plan.describe(config.gpu.name)}; not trained; {oom.format_remedies(spared)}"
    )
    recording = RunRecorder(run, tracker, display)
    with record_outcome(recording, config):
        run.write_json("memory.json", plan.to_json())
        recording.log_metrics(runs.MetricsRow(0, runs.now_ms(), plan.prediction_error_metrics([])))
