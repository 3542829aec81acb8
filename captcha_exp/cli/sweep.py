"""`captcha-exp train -m`: a grid checked whole, run by one of Hydra's launchers, told with a verdict.

Hydra's launcher gets no more than the numbers of the points. What each one is stands in the sweep's folder,
checked and planned: that is what runs, whatever happens to conf/ in the meantime, and whichever process runs
it.
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
from captcha_exp.config import Config, Machine
from captcha_exp.errors import ConfigError, RunFailed, UserError
from captcha_exp.runs import StaleRun, code_sha256, read_stale_run, resume
from captcha_exp.runtime.console import Display
from captcha_exp.sweep import record as recorded
from captcha_exp.sweep.forecast import plan_jobs
from captcha_exp.sweep.record import SWEEP_FILE, Job, Sweep
from captcha_exp.sweep.runner import run_sweep
from captcha_exp.sweep.summary import SweepSummary
from captcha_exp.sweep.supervisor import run_job

if TYPE_CHECKING:
    from omegaconf import DictConfig


def train_sweep(arguments: argparse.Namespace, machine: Machine, display: Display) -> int:
    """Every point of the grid, and the verdict; the exit code is 1 if a point failed.

    Raises:
        ConfigError: every mistake of every point, before the first one starts.
    """
    grid = compose_grid(arguments.overrides, arguments.config_dir)
    points = _compose_jobs(grid, machine)

    def launch(folder: Path, numbers: Sequence[int]) -> None:
        _launch(folder, numbers, grid, arguments.config_dir)

    def tell(sweep: Sweep, verdict: SweepSummary) -> None:
        if arguments.json:
            print(json.dumps({"run_dir": str(sweep.sweep_dir), **verdict.to_json()}, indent=2))
        else:
            output.print_sweep(verdict)
            _print_locations(sweep, verdict)

    with resume.claim(lambda: _find_resumable(arguments, grid, points, display)) as held:
        resumed = None if held is None else Sweep(held.run_dir)
        if resumed is not None and arguments.resume == "auto":
            display.info(f"goes on with {resumed.sweep_dir}, an unfinished sweep of these points")
        found = plan_jobs(points if resumed is None else resumed.jobs, display)
        side_by_side = min(grid.n_jobs, len(found))
        minutes = _max_minutes(points if resumed is None or grid.override_keys else resumed.jobs)
        return (
            1 if run_sweep(found, launch, side_by_side, display, tell, resumed, minutes).has_failures else 0
        )


def _compose_jobs(grid: Grid, machine: Machine) -> list[Job]:
    points: list[Job] = []
    mistakes: dict[str, None] = {}  # each once: points have most of their words in common
    for number, (swept, composed) in enumerate(grid.jobs, 1):
        try:
            config = _with_oom_recorded(composed.to_config(machine))
        except ConfigError as error:
            mistakes |= dict.fromkeys(error.lines)
            continue
        points.append(Job(number=number, swept=swept, choices=composed.choices, requested=config))
    limits = dict.fromkeys(json.dumps(point.requested.train.max_minutes) for point in points)
    if len(limits) > 1:
        words = (
            f"{TIME_LIMIT_KEY}={','.join(limits)}: is the time that the whole sweep may take; write one value"
        )
        mistakes[words] = None
    if mistakes:
        raise ConfigError(*mistakes)
    return points


def _max_minutes(points: Sequence[Job]) -> float | None:
    """What the whole sweep may take; all points say the same."""
    return points[0].requested.train.max_minutes


def _with_oom_recorded(config: Config) -> Config:
    """In a sweep, too little memory is a result unless somebody says otherwise."""
    on_oom = "record" if config.train.on_oom == "auto" else config.train.on_oom
    return replace(config, train=replace(config.train, on_oom=on_oom))


def _find_resumable(
    arguments: argparse.Namespace, grid: Grid, points: Sequence[Job], display: Display
) -> StaleRun | None:
    """The record of the sweep that --resume means; None for a new one."""
    if arguments.resume == "never":
        return None
    if arguments.resume == "auto":
        sweep = _find_latest_unfinished(points, display)
        return None if sweep is None else read_stale_run(sweep.sweep_dir / SWEEP_FILE)
    sweep = recorded.find_sweep(arguments.resume)
    if recorded.is_running(sweep):
        raise UserError(f"--resume={arguments.resume}: its process {sweep.state['pid']} is still at work")
    if grid.override_keys - {TIME_LIMIT_KEY} and not recorded.has_same_jobs(sweep, points):
        raise UserError(
            f"--resume={arguments.resume}: its points are not those that these overrides describe; leave the "
            "overrides out to go on with it as it was, or start a new sweep with --resume=never"
        )
    left = read_stale_run(sweep.sweep_dir / SWEEP_FILE)
    if left is None:
        raise UserError(f"--resume={arguments.resume}: {sweep.sweep_dir / SWEEP_FILE} has no process in it")
    return left


def _find_latest_unfinished(points: Sequence[Job], display: Display) -> Sweep | None:
    """The newest sweep of these points that has not finished and no process any more; one that other code
    began is told of and left."""
    for sweep in reversed(recorded.list_sweeps()):
        is_over = sweep.state["status"] == "FINISHED" or recorded.is_running(sweep)
        if is_over or not recorded.has_same_jobs(sweep, points):
            continue
        if sweep.state.get("code_sha256") == code_sha256():
            return sweep
        again = f"--resume={shlex.quote(str(sweep.sweep_dir))} goes on with it"
        display.info(
            f"{sweep.sweep_dir}: is an unfinished sweep of these points, but other code began it; {again}"
        )
        return None
    return None


def _launch(folder: Path, numbers: Sequence[int], grid: Grid, config_dir: str | None) -> None:
    """The points with these numbers, run by Hydra's launcher.

    Raises:
        RunFailed: the launcher itself failed; the line says how to go on.
    """
    words = [
        "--multirun",
        *(["--config-dir", str(Path(config_dir).resolve())] if config_dir else []),
        *grid.launcher_overrides,
        f"hydra.sweep.dir={_quote_for_hydra(str(folder))}",
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra/job_logging=disabled",
        "hydra/hydra_logging=disabled",
        f"+job={','.join(map(str, numbers))}",
    ]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its exceptions come here, and are not printed by it
    try:
        run_hydra(words, run_hydra_job)
    except UserError:
        raise
    except Exception as error:  # whatever a launcher is made of
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunFailed(
            f"Hydra's launcher failed: {reason}; --resume={shlex.quote(str(folder))} goes on"
        ) from error
    finally:
        (folder / "multirun.yaml").unlink(missing_ok=True)  # Hydra's, of our numbers; sweep.json says it all


def _quote_for_hydra(text: str) -> str:
    """The text as a value that Hydra's grammar and OmegaConf take as it stands; a backslash means itself to
    them, except before what ends or begins something."""
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # no interpolation
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def _print_locations(sweep: Sweep, verdict: SweepSummary) -> None:
    """The folder with the picture, and the pages of MLflow that have it all."""
    out = output.get_console()
    out.print(f"folder {sweep.sweep_dir} (summary.png, .json, .csv)", markup=False)
    noted, runs = sweep.state["mlflow"], [row.run_id for row in verdict.results if row.run_id]
    if noted is None:
        return
    from captcha_exp.tracking import compare_url, ui_url

    server = ui_url(noted["uri"])
    out.print(f"run {noted['run_id']}", markup=False)
    if not noted["uri"].startswith("http"):
        out.print("compare the runs, while captcha-exp ui runs, at", markup=False)
    out.print(compare_url(server, noted["experiment_id"], runs), markup=False)


def run_hydra_job(config: "DictConfig") -> None:
    """A launcher's job: the point with the number that it was given."""
    from hydra.core.hydra_config import HydraConfig

    run_job(Path(HydraConfig.get().sweep.dir), int(config.job))
