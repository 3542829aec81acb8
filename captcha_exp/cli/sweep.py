"""`captcha-exp train -m`: check a grid, run it with a launcher of Hydra, and print the summary.

Hydra's launcher receives only job numbers. The configs of the jobs are saved in the sweep directory, so later
changes to conf/ do not affect them.
"""

import argparse
import contextlib
import json
import logging
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from captcha_exp.cli import output
from captcha_exp.cli.grid import Grid, compose_grid, name_jobs
from captcha_exp.cli.launcher import run_hydra
from captcha_exp.cli.overrides import quote
from captcha_exp.cli.resume import TIME_LIMIT_KEY
from captcha_exp.config import Machine, untrusted_keys
from captcha_exp.errors import ConfigError, RunFailed, UserError, one_line
from captcha_exp.runs import RecordedDir, StaleRun, SweepInfo, check_has_no_links, claim, code_sha256, load
from captcha_exp.runtime.console import get_log_level, set_up_logging
from captcha_exp.runtime.files import write_atomically
from captcha_exp.runtime.paths import root_dir
from captcha_exp.sweep import record
from captcha_exp.sweep.planner import PlannedJob, plan_jobs
from captcha_exp.sweep.record import Job, Sweep
from captcha_exp.sweep.results import collect_results
from captcha_exp.sweep.runner import run_sweep
from captcha_exp.sweep.summary import SweepSummary
from captcha_exp.sweep.supervisor import run_job
from captcha_exp.tracking import check_tracking

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)


def train_sweep(arguments: argparse.Namespace, machine: Machine) -> int:
    """Run every job of the grid and print the summary; return exit code 1 if a job failed.

    Raises:
        ConfigError: every mistake of every job, before the first one starts.
    """

    def print_summary(sweep: Sweep, summary: SweepSummary) -> None:
        url = _write_compare_url(sweep, summary)
        if arguments.json:
            print(json.dumps({"run_dir": str(sweep.run_dir), **summary.to_json()}, indent=2))
        else:
            output.print_sweep(summary)
            _print_locations(sweep, url)

    grid = compose_grid(arguments.overrides, arguments.config_dir)
    summary = _train_grid(grid, _compose_jobs(grid, machine), arguments, machine, print_summary)
    return 1 if summary.has_failures else 0


def train_folds(arguments: argparse.Namespace, machine: Machine, dataset_key: str) -> list[Path]:
    """Return the run directories of a training per fold of the dataset, which are trained unless they exist.

    Args:
        arguments: The overrides, and `folds`: their number.
        machine: This machine.
        dataset_key: The key of the dataset, by which trainings of other images are recognized.

    Raises:
        RunFailed: a training has failed; the line names the sweep.
    """
    swept = f"data.fold={','.join(map(str, range(arguments.folds)))}"
    overrides = [*arguments.overrides, f"data.folds={arguments.folds}", swept]
    grid = compose_grid(overrides, arguments.config_dir)
    jobs = _compose_jobs(grid, machine)
    for sweep in reversed(record.list_sweeps()):
        is_same = sweep.info.status == "FINISHED" and sweep.info.code_sha256 == code_sha256()
        if is_same and record.has_same_jobs(sweep, jobs):
            run_dirs = finished_runs(sweep)
            keys = {load(run_dir).read_json("dataset.json")["key"] for run_dir in run_dirs}
            if len(run_dirs) == len(jobs) and keys == {dataset_key}:
                logger.info(f"Using {sweep.run_dir}, a finished sweep over the same folds")
                return run_dirs
    flags = argparse.Namespace(resume="auto", rerun_disturbed=False)
    done: list[Sweep] = []
    summary = _train_grid(grid, jobs, flags, machine, lambda sweep, _: done.append(sweep))
    if summary.has_failures:
        raise RunFailed(
            f"{done[0].run_dir}: a fold has no result; run the same command again to train the missing folds"
        )
    return finished_runs(done[0])


def finished_runs(sweep: Sweep) -> list[Path]:
    """Return the run directories of the jobs of a sweep that have finished."""
    results = collect_results(sweep)
    return [Path(each.run_dir) for each in results if each.run_dir and each.outcome == "finished"]


def _train_grid(
    grid: Grid,
    jobs: Sequence[Job],
    arguments: argparse.Namespace,
    machine: Machine,
    print_summary: Callable[[Sweep, SweepSummary], None],
) -> SweepSummary:
    """Run the jobs of a grid in a new sweep or, by the flags in `arguments`, in an earlier one."""
    if arguments.rerun_disturbed and arguments.resume == "never":
        raise UserError("--rerun-disturbed: trains jobs of an earlier sweep again; remove --resume=never")
    check_tracking(jobs[0].requested)

    def launch(sweep_dir: Path, numbers: Sequence[int]) -> None:
        _launch(sweep_dir, numbers, grid)

    with claim.claim(lambda: _find_resumable(arguments, grid, jobs)) as stale:
        resumed = None if stale is None else Sweep(stale.run_dir)
        if stale is not None:
            check_has_no_links(stale.run_dir)
        if stale is not None and arguments.resume == "auto":
            kind = "a finished" if stale.info.status == "FINISHED" else "an unfinished"
            logger.info(f"Resuming {stale.run_dir}, {kind} sweep with the same jobs")
        planned = plan_jobs(jobs if resumed is None else resumed.jobs)
        parallelism = min(grid.n_jobs, len(planned))
        if parallelism > 1:
            _print_threads(planned, parallelism, machine)
        # The time limit of the whole sweep is the same in all jobs.
        limiting_job = jobs[0] if resumed is None or grid.override_keys else resumed.jobs[0]
        minutes = limiting_job.requested.train.max_minutes
        return run_sweep(
            planned, launch, parallelism, print_summary, resumed, minutes, arguments.rerun_disturbed
        )


def _compose_jobs(grid: Grid, machine: Machine) -> list[Job]:
    jobs: list[Job] = []
    parallelism = min(grid.n_jobs, len(grid.jobs))
    mistakes: dict[str, list[int]] = {}  # jobs have most overrides in common
    for number, (swept, composed) in enumerate(grid.jobs, 1):
        try:
            config = composed.to_config(machine)
        except ConfigError as error:
            for line in error.lines:
                mistakes.setdefault(line, []).append(number - 1)
            continue
        if config.train.on_oom == "auto":  # in a sweep, running out of memory is recorded as a result
            config = replace(config, train=replace(config.train, on_oom="record"))
        if parallelism > 1 and config.device.threads == "auto":  # a job does not know of the others
            num_threads = max(1, machine.num_cores // parallelism)
            config = replace(config, device=replace(config.device, threads=num_threads))
        jobs.append(Job(number=number, swept=swept, choices=composed.choices, requested=config))
    lines = name_jobs(mistakes, [swept for swept, _ in grid.jobs])
    limits = dict.fromkeys(json.dumps(job.requested.train.max_minutes) for job in jobs)
    if len(limits) > 1:
        lines.append(f"{TIME_LIMIT_KEY}={','.join(limits)}: limits the whole sweep; write one value")
    if lines:
        raise ConfigError(*lines)
    return jobs


def _print_threads(planned: Sequence[PlannedJob], parallelism: int, machine: Machine) -> None:
    """Print the threads of jobs in parallel, as a warning if they have to wait for each other."""
    num_threads = max(int(each.config.device.threads) for each in planned)
    text = f"{parallelism} jobs in parallel, device.threads={num_threads} each, on {machine.num_cores} cores"
    if parallelism * num_threads > machine.num_cores:
        logger.warning(
            f"{text}: their speeds will be disturbed; use device.threads=auto and a smaller "
            "hydra.launcher.n_jobs"
        )
    else:
        logger.info(f"{text} (weights and metrics depend on it)")


def _find_resumable(
    arguments: argparse.Namespace, grid: Grid, jobs: Sequence[Job]
) -> StaleRun[SweepInfo] | None:
    """Return the sweep to resume; None to start a new one.

    Raises:
        UserError: the named sweep is running or has other jobs; the line says which.
    """
    if arguments.resume == "never":
        return None
    if arguments.resume == "auto":
        sweep = _find_latest(jobs, arguments.rerun_disturbed)
        if sweep is None and arguments.rerun_disturbed:
            raise UserError(
                "--rerun-disturbed: no sweep of this code has exactly these jobs; run the sweep first, or "
                "name it with --resume=SWEEP"
            )
        return None if sweep is None else StaleRun(sweep.run_dir, sweep.info)
    sweep = record.find_sweep(arguments.resume)
    if sweep.info.has_live_process():
        raise UserError(f"--resume={arguments.resume}: its process {sweep.info.pid} is still running")
    if grid.override_keys - {TIME_LIMIT_KEY} and not record.has_same_jobs(sweep, jobs):
        raise UserError(
            f"--resume={arguments.resume}: has other jobs than these overrides; remove the overrides to "
            "resume it unchanged, or start a new sweep with --resume=never"
        )
    if not grid.override_keys - {TIME_LIMIT_KEY}:  # else these overrides name the same addresses
        _check_addresses(sweep)
    return StaleRun(sweep.run_dir, sweep.info)


def _check_addresses(sweep: Sweep) -> None:
    """Check that the saved jobs of a sweep write nothing to places that the user has not named.

    Raises:
        UserError: the cache or the store of a job is a new one outside the root directory.
    """
    for job in sweep.jobs:
        for key, value in untrusted_keys(job.requested, root_dir()).items():
            raise UserError(
                f"{sweep.run_dir}: job {job.number} would create {key}={value}, which is outside "
                f"{root_dir()}; add the overrides of the sweep to allow that"
            )


def _find_latest(jobs: Sequence[Job], include_finished: bool) -> Sweep | None:
    """Return the latest sweep with these jobs if it is unfinished, not running, and has the same code."""
    for sweep in reversed(record.list_sweeps()):
        is_over = sweep.info.status == "FINISHED" and not include_finished
        if is_over or sweep.info.has_live_process() or not record.has_same_jobs(sweep, jobs):
            continue
        if sweep.info.code_sha256 == code_sha256():
            return sweep
        kind = "finished" if sweep.info.status == "FINISHED" else "unfinished"
        logger.info(
            f"{sweep.run_dir}: {kind} sweep with the same jobs, but started with different code; "
            f"resume it with --resume={shlex.quote(str(sweep.run_dir))}"
        )
        return None
    return None


def _launch(sweep_dir: Path, numbers: Sequence[int], grid: Grid) -> None:
    """Run the jobs with these numbers with Hydra's launcher.

    Raises:
        RunFailed: the launcher itself failed; the line says how to resume.
    """
    argv = [
        "--multirun",
        *grid.launcher_overrides,
        f"hydra.sweep.dir={quote(str(sweep_dir))}",
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
        f"+job={','.join(map(str, numbers))}",
        f"+log_level={get_log_level()}",
    ]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise exceptions instead of printing them
    try:
        run_hydra(argv, run_hydra_job)
    except UserError:
        raise
    except Exception as error:  # of any launcher plugin
        reason = one_line(f"{type(error).__name__}: {error}")
        raise RunFailed(
            f"Hydra's launcher failed: {reason}; resume with --resume={shlex.quote(str(sweep_dir))}"
        ) from error
    finally:
        (sweep_dir / "multirun.yaml").unlink(missing_ok=True)  # Hydra's file, has only the job numbers


def _write_compare_url(sweep: RecordedDir[SweepInfo], summary: SweepSummary) -> str | None:
    """Append the URL of the page that compares the runs in MLflow to summary.md; None without MLflow."""
    mlflow, run_ids = sweep.info.mlflow, [result.run_id for result in summary.results if result.run_id]
    if mlflow is None or mlflow.run_id is None or mlflow.experiment_id is None:
        return None
    from captcha_exp.tracking.views import compare_url, ui_url

    url = compare_url(ui_url(mlflow.uri), mlflow.experiment_id, run_ids)
    file = sweep.run_dir / "summary.md"
    with contextlib.suppress(OSError):  # no summary was written to a full disk
        write_atomically(file, file.read_bytes() + f"\n[Compare the runs in MLflow](<{url}>)\n".encode())
    return url


def _print_locations(sweep: RecordedDir[SweepInfo], url: str | None) -> None:
    """Print the sweep directory and the MLflow pages of the sweep; a terminal that can has a short link."""
    out = output.get_console()
    out.print(f"sweep directory {sweep.run_dir} (summary.png, .json, .csv)", markup=False)
    mlflow = sweep.info.mlflow
    if mlflow is None:
        return
    if mlflow.run_id is not None:
        out.print(f"run {mlflow.run_id}", markup=False)
    output.print_owed(mlflow)
    if url is None:
        return
    start = "" if mlflow.uri.startswith("http") else "start captcha-exp ui, then "
    if out.is_terminal and out.color_system and not out.legacy_windows:
        link = ("compare the runs in MLflow", f"underline link {url}")
        out.print(Text.assemble(start, link, " (address in summary.md)"))
    else:
        out.print(f"{start}compare the runs at\n{url}", markup=False)


def run_hydra_job(config: "DictConfig") -> None:
    """Run the job whose number the launcher passes, in this process or another one."""
    from hydra.core.hydra_config import HydraConfig

    set_up_logging(int(config.log_level))
    run_job(Path(HydraConfig.get().sweep.dir), int(config.job))
