"""Create run directories atomically, and reopen them to resume a run."""

import contextlib
import itertools
import logging
import os
import shutil
from datetime import datetime
from pathlib import Path
from uuid import uuid4

from captcha_exp.config import Config, to_yaml
from captcha_exp.errors import UserError
from captcha_exp.runs.info import Lineage, Resumption, RunInfo, check_has_no_links, now, running_fields
from captcha_exp.runs.run import CONFIG_FILES, INPUT_FILES, Run, config_sha256
from captcha_exp.runs.saved import METRICS, load, read_metrics_rows
from captcha_exp.runtime.files import describe_broken_link, is_abandoned_part, sha256_of, write_atomically
from captcha_exp.runtime.paths import root_dir
from captcha_exp.runtime.process import parent_pids

logger = logging.getLogger(__name__)


def create_run(
    config: Config, requested: Config, run_dir: Path | None = None, lineage: Lineage | None = None
) -> Run:
    """Create a run in `run_dir`, or in a new directory outputs/<date>/<time>-<name>.

    Raises:
        UserError: outputs/ is a symbolic link to nothing; mount its disk, or remove the link.
    """
    info = RunInfo(
        **running_fields(),
        name=config.name,
        started=now(),
        config_sha256=config_sha256(requested),
        lineage=lineage or Lineage(),
    )
    if broken := describe_broken_link(root_dir() / "outputs"):
        raise UserError(broken)
    if run_dir is not None:
        run_dir.mkdir(exist_ok=True)
        return _init_run(run_dir, config, requested, info)
    # Written to a temporary directory and renamed, so a kill never leaves an incomplete run directory.
    temporary = root_dir() / "outputs" / f".{uuid4().hex}.{os.getpid()}.part"
    temporary.mkdir(parents=True)
    run = _init_run(temporary, config, requested, info)
    run.run_dir = make_run_dir(config.name)
    if os.name == "nt":  # Windows cannot rename onto an existing directory, even an empty one
        run.run_dir.rmdir()
    temporary.rename(run.run_dir)
    return run


def remove_partial_runs() -> None:
    """Remove the temporary directories that exited processes left in outputs/."""
    for path in (root_dir() / "outputs").glob(".*.part"):
        if is_abandoned_part(path):
            shutil.rmtree(path, ignore_errors=True)


def _init_run(run_dir: Path, config: Config, requested: Config, info: RunInfo) -> Run:
    # Configs first: a directory with a run.json always has its configs.
    for name, values in zip(CONFIG_FILES, (config, requested), strict=True):
        write_atomically(run_dir / name, to_yaml(values).encode())
    files = {name: sha256_of(run_dir / name) for name in CONFIG_FILES}
    return Run(run_dir, info.model_copy(update={"files": files}))


def reopen_run(run_dir: Path) -> Run:
    """Reopen an unfinished run so that this process can continue it.

    Removes partially written files, and damaged lines of metrics.jsonl, whose epochs are trained again; the
    damaged file is kept as metrics.jsonl.damaged.

    Raises:
        UserError: The run has finished or is running, or one of its files is damaged or was edited; nothing
            is changed.
    """
    saved = load(run_dir)
    info = saved.info
    check_has_no_links(run_dir)
    if info.status == "FINISHED":
        raise UserError(f"{run_dir}: has finished; add epochs with --resume={run_dir} train.epochs=N")
    # The process that claimed the run (`claim.claim`) may resume it in a child, or in one of a fork server.
    if info.has_live_process() and info.pid not in (os.getpid(), *parent_pids()):
        raise UserError(f"{run_dir}: process {info.pid} is still running on {info.host}; stop it first")
    inputs = {name: sha256 for name, sha256 in info.files.items() if name in INPUT_FILES}
    for name in inputs:
        if name in CONFIG_FILES or (run_dir / name).exists():  # not if the run was killed before
            saved.path(name)
    rows, damaged_lines = read_metrics_rows(run_dir)
    damage = saved.damage_of(rows, damaged_lines)
    resumed = [*info.resumed, Resumption(at=now(), host=info.host)]
    fields = {**running_fields(), "resumed": resumed, "files": inputs, "num_metrics_rows": len(rows)}
    run = Run(run_dir, info.model_copy(update=fields))
    for part in run_dir.rglob(".*.part"):
        part.unlink()
    if damage is not None:
        logger.warning(f"{run_dir / METRICS}: {damage}; their epochs are trained again")
    metrics = run_dir / METRICS
    if damaged_lines:
        write_atomically(run_dir / f"{METRICS}.damaged", metrics.read_bytes())
        write_atomically(metrics, "".join(row.to_line() for row in rows).encode())
    elif metrics.exists() and metrics.stat().st_nlink > 1:  # a copy by hard links, as of `cp -al`
        write_atomically(metrics, metrics.read_bytes())
    run.update_mlflow(closed=False)
    return run


def make_run_dir(name: str) -> Path:
    """Create a new, empty directory outputs/<date>/<time>-<name> and return it."""
    now = datetime.now()
    day_dir = root_dir() / "outputs" / f"{now:%Y-%m-%d}"
    day_dir.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        run_dir = day_dir / f"{now:%H%M%S}-{name}{'' if number == 1 else f'-{number}'}"
        with contextlib.suppress(FileExistsError):  # another run started in this second
            run_dir.mkdir()
            break
    return run_dir
