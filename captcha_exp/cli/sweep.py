"""`captcha-exp train -m`: check a grid, run it with a launcher of Hydra, and print the summary.

Hydra's launcher receives only job numbers. The configs of the jobs are saved in the sweep directory, so later
changes to conf/ do not affect them.
"""

import argparse
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from captcha_exp.cli import output
from captcha_exp.cli.grid import Grid, compose_grid
from captcha_exp.cli.hydra_config import run_hydra
from captcha_exp.cli.resume import TIME_LIMIT_KEY
from captcha_exp.config import Machine
from captcha_exp.errors import ConfigError, RunFailed, UserError
from captcha_exp.runs import StaleRun, code_sha256, read_stale_run, resume
from captcha_exp.runtime.console import Display
from captcha_exp.sweep import record
from captcha_exp.sweep.forecast import plan_jobs
from captcha_exp.sweep.record import SWEEP_FILE, Job, Sweep
from captcha_exp.sweep.runner import run_sweep
from captcha_exp.sweep.summary import SweepSummary
from captcha_exp.sweep.supervisor import run_job

if TYPE_CHECKING:
    from omegaconf import DictConfig


def train_sweep(arguments: argparse.Namespace, machine: Machine, display: Display) -> int:
    """Run every job of the grid and print the summary; return exit code 1 if a job failed.

    Raises:
        ConfigError: every mistake of every job, before the first one starts.
    """
    grid = compose_grid(arguments.overrides, arguments.config_dir)
    jobs = _compose_jobs(grid, machine)

    def launch(sweep_dir: Path, numbers: Sequence[int]) -> None:
        _launch(sweep_dir, numbers, grid, arguments.config_dir)

    def print_summary(sweep: Sweep, summary: SweepSummary) -> None:
        if arguments.json:
            print(json.dumps({"run_dir": str(sweep.sweep_dir), **summary.to_json()}, indent=2))
        else:
            output.print_sweep(summary)
            _print_locations(sweep, summary)

    with resume.claim(lambda: _find_resumable(arguments, grid, jobs, display)) as stale:
        resumed = None if stale is None else Sweep(stale.run_dir)
        if resumed is not None and arguments.resume == "auto":
            display.info(f"Resuming {resumed.sweep_dir}, an unfinished sweep with the same jobs")
        planned = plan_jobs(jobs if resumed is None else resumed.jobs, display)
        parallelism = min(grid.n_jobs, len(planned))
        # The time limit of the whole sweep is the same in all jobs.
        limiting_job = jobs[0] if resumed is None or grid.override_keys else resumed.jobs[0]
        minutes = limiting_job.requested.train.max_minutes
        summary = run_sweep(planned, launch, parallelism, display, print_summary, resumed, minutes)
        return 1 if summary.has_failures else 0


def _compose_jobs(grid: Grid, machine: Machine) -> list[Job]:
    jobs: list[Job] = []
    mistakes: dict[str, None] = {}  # without duplicates: jobs have most overrides in common
    for number, (swept, composed) in enumerate(grid.jobs, 1):
        try:
            config = composed.to_config(machine)
        except ConfigError as error:
            mistakes |= dict.fromkeys(error.lines)
            continue
        if config.train.on_oom == "auto":  # in a sweep, running out of memory is recorded as a result
            config = replace(config, train=replace(config.train, on_oom="record"))
        jobs.append(Job(number=number, swept=swept, choices=composed.choices, requested=config))
    limits = dict.fromkeys(json.dumps(job.requested.train.max_minutes) for job in jobs)
    if len(limits) > 1:
        text = f"{TIME_LIMIT_KEY}={','.join(limits)}: limits the whole sweep; write one value"
        mistakes[text] = None
    if mistakes:
        raise ConfigError(*mistakes)
    return jobs


def _find_resumable(
    arguments: argparse.Namespace, grid: Grid, jobs: Sequence[Job], display: Display
) -> StaleRun | None:
    """Return the sweep to resume; None to start a new one.

    Raises:
        UserError: the named sweep is running, has other jobs, or has no process id; the line says which.
    """
    if arguments.resume == "never":
        return None
    if arguments.resume == "auto":
        sweep = _find_latest_unfinished(jobs, display)
        return None if sweep is None else read_stale_run(sweep.sweep_dir / SWEEP_FILE)
    sweep = record.find_sweep(arguments.resume)
    if record.is_running(sweep):
        raise UserError(f"--resume={arguments.resume}: its process {sweep.state['pid']} is still running")
    if grid.override_keys - {TIME_LIMIT_KEY} and not record.has_same_jobs(sweep, jobs):
        raise UserError(
            f"--resume={arguments.resume}: has other jobs than these overrides; remove the overrides to "
            "resume it unchanged, or start a new sweep with --resume=never"
        )
    stale = read_stale_run(sweep.sweep_dir / SWEEP_FILE)
    if stale is None:
        raise UserError(f"--resume={arguments.resume}: {sweep.sweep_dir / SWEEP_FILE} has no process id")
    return stale


def _find_latest_unfinished(jobs: Sequence[Job], display: Display) -> Sweep | None:
    """Return the latest sweep with these jobs if it is unfinished, not running, and has the same code."""
    for sweep in reversed(record.list_sweeps()):
        is_over = sweep.state["status"] == "FINISHED" or record.is_running(sweep)
        if is_over or not record.has_same_jobs(sweep, jobs):
            continue
        if sweep.state.get("code_sha256") == code_sha256():
            return sweep
        display.info(
            f"{sweep.sweep_dir}: unfinished sweep with the same jobs, but started with different code; "
            f"resume it with --resume={shlex.quote(str(sweep.sweep_dir))}"
        )
        return None
    return None


def _launch(sweep_dir: Path, numbers: Sequence[int], grid: Grid, config_dir: str | None) -> None:
    """Run the jobs with these numbers with Hydra's launcher.

    Raises:
        RunFailed: the launcher itself failed; the line says how to resume.
    """
    argv = [
        "--multirun",
        *(["--config-dir", str(Path(config_dir).resolve())] if config_dir else []),
        *grid.launcher_overrides,
        f"hydra.sweep.dir={_quote_for_hydra(str(sweep_dir))}",
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra/job_logging=disabled",
        "hydra/hydra_logging=disabled",
        f"+job={','.join(map(str, numbers))}",
    ]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise exceptions instead of printing them
    try:
        run_hydra(argv, run_hydra_job)
    except UserError:
        raise
    except Exception as error:  # of any launcher plugin
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunFailed(
            f"Hydra's launcher failed: {reason}; resume with --resume={shlex.quote(str(sweep_dir))}"
        ) from error
    finally:
        (sweep_dir / "multirun.yaml").unlink(missing_ok=True)  # Hydra's file, has only the job numbers


def _quote_for_hydra(text: str) -> str:
    r"""Quote text for Hydra's grammar and OmegaConf. Both keep backslashes, except before `'` and `${`."""
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # no interpolation
    return "'" + re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text) + "'"


def _print_locations(sweep: Sweep, summary: SweepSummary) -> None:
    """Print the sweep directory and the MLflow pages of the sweep."""
    out = output.get_console()
    out.print(f"sweep directory {sweep.sweep_dir} (summary.png, .json, .csv)", markup=False)
    mlflow, run_ids = sweep.state["mlflow"], [result.run_id for result in summary.results if result.run_id]
    if mlflow is None:
        return
    from captcha_exp.tracking import compare_url, ui_url

    server = ui_url(mlflow["uri"])
    out.print(f"run {mlflow['run_id']}", markup=False)
    if not mlflow["uri"].startswith("http"):
        out.print("start captcha-exp ui, then compare the runs at", markup=False)
    out.print(compare_url(server, mlflow["experiment_id"], run_ids), markup=False)


def run_hydra_job(config: "DictConfig") -> None:
    """Run the job whose number the launcher passes."""
    from hydra.core.hydra_config import HydraConfig

    run_job(Path(HydraConfig.get().sweep.dir), int(config.job))
