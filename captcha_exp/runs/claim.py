"""Find the run to resume, and claim it for one process.

A run is resumed automatically if it is unfinished, its process has exited, and both the requested config and
the source code are unchanged; it then ends exactly like an uninterrupted run.
"""

import contextlib
import logging
import shlex
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import safetensors

from captcha_exp.config import Config
from captcha_exp.config.documents import parse_json
from captcha_exp.errors import UserError
from captcha_exp.runs.info import InfoT, Lineage, Record, RunInfo, SweepInfo
from captcha_exp.runs.run import (
    CHECKPOINT_DIR,
    CONFIG_FILES,
    config_sha256,
    find_run,
    list_checkpoints,
    list_runs,
    resolve_dir,
)
from captcha_exp.runs.saved import SavedRun
from captcha_exp.runs.source_code import code_sha256
from captcha_exp.runs.stale import StaleRun, stale_lock
from captcha_exp.runtime.paths import root_dir
from captcha_exp.runtime.process import ProcessIdentity, identify_process

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_SECONDS = 60.0  # another process may be syncing many runs to MLflow


def find_resumable(requested: Config, lineage: Lineage) -> StaleRun[RunInfo] | None:
    """Return the newest resumable run in outputs/ with this requested config, or None.

    Logs the newest run that is skipped because other code started it or because it may still run on
    another host. Jobs of a sweep are resumed with the sweep and not considered.
    """
    code = code_sha256()
    has_logged = False
    for run in reversed(list_runs()):
        if (run.run_dir.parent / SweepInfo.filename).is_file():
            continue
        stale = StaleRun(run.run_dir, run.info)
        obstacle = _obstacle(stale, requested, code, lineage)
        if obstacle is None:
            return stale
        if obstacle and not has_logged:
            name = shlex.quote(str(run.run_dir))
            logger.info(f"{run.run_dir}: {obstacle}; --resume={name} resumes it anyway")
            has_logged = True
    return None


def find_resumable_job(run_dir: Path, requested: Config) -> StaleRun[RunInfo] | None:
    """Return the run in this job directory of a sweep if it is resumable with this requested config."""
    stale = StaleRun.load(RunInfo, run_dir)
    if stale is None or _obstacle(stale, requested, code_sha256(), Lineage()) is not None:
        return None
    return stale


def find_named(name: str) -> StaleRun[RunInfo]:
    """Return the run to resume by its directory, by a prefix of its MLflow run ID, or as `latest`.

    Raises:
        UserError: No run matches, or its process or that of its sweep is still running.
    """
    if resolve_dir(name, SweepInfo.filename):
        raise UserError(f"--resume={name}: is a sweep; add -m to resume it")
    run_dir = find_run(name)
    info, sweep = RunInfo.load(run_dir), StaleRun.load(SweepInfo, run_dir.parent)
    records: list[Record] = [info] if sweep is None else [info, sweep.info]
    for record in records:
        if record.has_live_process() and not record.is_remote():
            raise UserError(f"--resume={name}: process {record.pid} is still running; stop it first")
    return StaleRun(run_dir, info)


def has_code_changed(stale: StaleRun[RunInfo]) -> bool:
    """Check whether the run is known to have been started by different source code."""
    return _recorded_code_sha256(stale) not in (None, code_sha256())


@contextlib.contextmanager
def claim(find_candidate: Callable[[], StaleRun[InfoT] | None]) -> Iterator[StaleRun[InfoT] | None]:
    """Claim the run that `find_candidate` returns, so no other process resumes it.

    If another process claims the same run first, `find_candidate` is called again. While claimed, run.json
    has the status RUNNING and this process; on exit it is restored, unless the run was continued meanwhile.

    Raises:
        UserError: run.json cannot be written, or another process holds the lock; try again later.
    """
    claimed = None
    while (candidate := find_candidate()) is not None and (claimed := _try_claim(candidate)) is None:
        pass
    try:
        yield claimed
    finally:
        if claimed is not None:
            _release(claimed)


def describe_progress(run_dir: Path) -> str:
    """Describe the position from which a run resumes, for status lines."""
    for path in filter(Path.is_file, list_checkpoints(run_dir / CHECKPOINT_DIR)):
        try:
            with safetensors.safe_open(path, "np") as file:
                counters = parse_json(file.metadata()["state"])
            step, epoch = int(counters["step"]), int(counters["epoch"])
            saved = datetime.fromtimestamp(path.stat().st_mtime)
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
            continue  # loading the checkpoint reports the damage
        position = f"epoch {epoch}" if counters.get("progress") else f"the end of epoch {epoch}"
        is_today = saved.date() == datetime.now().date()
        return f"from {position}, step {step} (saved {saved:{'%H:%M' if is_today else '%Y-%m-%d %H:%M'}})"
    return "from the start (no checkpoint yet)"


def _obstacle(stale: StaleRun[RunInfo], requested: Config, current_code: str, lineage: Lineage) -> str | None:
    """Return why a run cannot be resumed with this config, code and lineage; None if it can be.

    The text is empty if the user need not know: the run is another one, has finished, or is running here.
    """
    info, run_dir = stale.info, stale.run_dir
    is_same = info.config_sha256 == config_sha256(requested) and info.lineage == lineage
    has_configs = all((run_dir / name).is_file() for name in CONFIG_FILES)
    if not is_same or not has_configs or info.status == "FINISHED":
        return ""
    if info.has_live_process():  # a process of another host counts as alive
        return f"has status RUNNING on host {info.host}" if info.is_remote() else ""
    has_checkpoint = bool(list_checkpoints(run_dir / CHECKPOINT_DIR))
    if info.status == "FAILED" and not has_checkpoint:
        return ""
    recorded = _recorded_code_sha256(stale)
    # A run killed before it wrote environment.json has no checkpoint, so nothing depends on its code.
    is_same_code = recorded == current_code or (recorded is None and not has_checkpoint)
    return None if is_same_code else "unfinished run with the same config, started by different code"


def _recorded_code_sha256(stale: StaleRun[RunInfo]) -> str | None:
    """Return the SHA-256 of the code that started the run, or None if it is not recorded."""
    if not (stale.run_dir / "environment.json").exists():  # killed before
        return None
    code = SavedRun(stale.run_dir, stale.info).read_json("environment.json").get("code_sha256")
    return code if isinstance(code, str) else None


# -- one process at a time -----------------------------------------------------------------------------------


def _try_claim(candidate: StaleRun[InfoT]) -> StaleRun[InfoT] | None:
    """Claim a run by writing this process to its run.json.

    Returns the run as it was before, or None if it has changed since `candidate` was read.
    """
    (root_dir() / "outputs").mkdir(parents=True, exist_ok=True)
    try:
        with stale_lock(LOCK_TIMEOUT_SECONDS) as granted:
            if not granted:
                raise UserError(
                    f"{candidate.run_dir}: cannot resume: another process held the lock for "
                    f"{LOCK_TIMEOUT_SECONDS:.0f} s; try again later"
                )
            current = StaleRun.load(type(candidate.info), candidate.run_dir)
            if current is None or _owner(current.info) != _owner(candidate.info):
                return None
            StaleRun(current.run_dir, _claimed(current.info)).save()
            return current
    except OSError as error:
        raise UserError(f"{candidate.run_dir}: cannot resume: {error}") from None


def _release(claimed: StaleRun[InfoT]) -> None:
    current = StaleRun.load(type(claimed.info), claimed.run_dir)
    if current is not None and current.info == _claimed(claimed.info):
        with contextlib.suppress(OSError):  # the next start closes it as stale
            claimed.save()


def _claimed(info: InfoT) -> InfoT:
    return info.model_copy(update={"status": "RUNNING", **dict(identify_process())})


def _owner(info: Record) -> tuple[Any, ...]:
    """Return the values that differ once another process has claimed or finished the run."""
    return info.status == "FINISHED", *(getattr(info, key) for key in ProcessIdentity.model_fields)
