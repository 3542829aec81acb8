"""Find the run to resume, and claim it for one process.

A run is resumed automatically if it is unfinished, its process has exited, and both the requested config and
the source code are unchanged; it then ends exactly like an uninterrupted run.
"""

import contextlib
import json
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias

import safetensors

from captcha_exp.config import Config
from captcha_exp.errors import UserError
from captcha_exp.runs.run import (
    CHECKPOINT_DIR,
    config_sha256,
    find_run,
    list_checkpoints,
    list_runs,
    resolve_dir,
)
from captcha_exp.runs.source_code import code_sha256
from captcha_exp.runs.stale import StaleRun, read_stale_run, stale_lock
from captcha_exp.runtime.files import write_json
from captcha_exp.runtime.paths import root_dir
from captcha_exp.runtime.process import is_alive, is_remote, process_identity

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_SECONDS = 60.0  # another process may be syncing many runs to MLflow

_Resumability: TypeAlias = Literal["resumable", "other code", "other host", "no"]


def find_resumable(requested: Config, lineage: Mapping[str, Any] | None = None) -> StaleRun | None:
    """Return the newest resumable run in outputs/ with this requested config, or None.

    Logs the newest run that is skipped because other code started it or because it may still run on
    another host. Jobs of a sweep are resumed with the sweep and not considered.
    """
    code = code_sha256()
    has_logged = False
    for run_dir, _ in reversed(list_runs()):
        stale = read_stale_run(run_dir / "run.json")
        if stale is None or (run_dir.parent / "sweep.json").is_file():
            continue
        resumability = _resumability(stale, requested, code, lineage or {})
        logger.debug(f"{run_dir}: can be resumed: {resumability}")
        if resumability == "resumable":
            return stale
        if resumability != "no" and not has_logged:
            logger.info(_skip_reason(stale, resumability))
            has_logged = True
    return None


def find_resumable_job(run_dir: Path, requested: Config) -> StaleRun | None:
    """Return the run in this job directory of a sweep if it is resumable with this requested config."""
    stale = read_stale_run(run_dir / "run.json")
    if stale is None or _resumability(stale, requested, code_sha256(), {}) != "resumable":
        return None
    return stale


def find_named(name: str) -> StaleRun:
    """Return the run to resume by its directory, by a prefix of its MLflow run ID, or as `latest`.

    Raises:
        UserError: No run matches, or its process or that of its sweep is still running.
    """
    if resolve_dir(name, "sweep.json"):
        raise UserError(f"--resume={name}: is a sweep; add -m to resume it")
    run_dir = find_run(name)
    run, sweep = read_stale_run(run_dir / "run.json"), read_stale_run(run_dir.parent / "sweep.json")
    if run is None:
        raise UserError(f"--resume={name}: {run_dir / 'run.json'} is not a valid run.json")
    if _is_active(run):
        raise UserError(f"--resume={name}: process {run.state['pid']} is still running; stop it first")
    if sweep is not None and _is_active(sweep):
        raise UserError(
            f"--resume={name}: process {sweep.state['pid']} of its sweep is still running; stop it first"
        )
    return run


def has_code_changed(run_dir: Path) -> bool:
    """Check whether the run is known to have been started by different source code."""
    return _recorded_code_sha256(run_dir) not in (None, code_sha256())


@contextlib.contextmanager
def claim(find_candidate: Callable[[], StaleRun | None]) -> Iterator[StaleRun | None]:
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
    for path in list_checkpoints(run_dir / CHECKPOINT_DIR):
        try:
            with safetensors.safe_open(path, "np") as file:
                counters = json.loads(file.metadata()["state"])
            step, epoch = int(counters["step"]), int(counters["epoch"])
            saved = datetime.fromtimestamp(path.stat().st_mtime)
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
            continue  # loading the checkpoint reports the damage
        position = f"epoch {epoch}" if counters.get("progress") else f"the end of epoch {epoch}"
        is_today = saved.date() == datetime.now().date()
        return f"from {position}, step {step} (saved {saved:{'%H:%M' if is_today else '%Y-%m-%d %H:%M'}})"
    return "from the start (no checkpoint yet)"


def _resumability(
    stale: StaleRun, requested: Config, current_code: str, lineage: Mapping[str, Any]
) -> _Resumability:
    """Return whether a run can be resumed with this config, code and lineage, or the obstacle."""
    state, run_dir = stale.state, stale.run_dir
    is_same = state.get("config_sha256") == config_sha256(requested) and state.get("lineage") == lineage
    if not is_same or state["status"] not in ("RUNNING", "KILLED", "FAILED"):
        return "no"
    if not all((run_dir / name).is_file() for name in ("config.yaml", "requested.yaml")):
        return "no"
    if stale.is_running and is_alive(state):  # a process of another host counts as alive
        return "other host" if is_remote(state) else "no"
    has_checkpoint = bool(list_checkpoints(run_dir / CHECKPOINT_DIR))
    if state["status"] == "FAILED" and not has_checkpoint:
        return "no"
    recorded = _recorded_code_sha256(run_dir)
    # A run killed before it wrote environment.json has no checkpoint, so nothing depends on its code.
    is_same_code = recorded == current_code or (recorded is None and not has_checkpoint)
    return "resumable" if is_same_code else "other code"


def _skip_reason(stale: StaleRun, resumability: _Resumability) -> str:
    remedy = f"--resume={shlex.quote(str(stale.run_dir))} resumes it"
    if resumability == "other code":
        return f"{stale.run_dir}: unfinished run with the same config, started by different code; {remedy}"
    return f"{stale.run_dir}: has status RUNNING on host {stale.state['host']}; if it has stopped, {remedy}"


def _recorded_code_sha256(run_dir: Path) -> str | None:
    """Return the SHA-256 of the code that started the run, or None if it is not recorded."""
    try:
        code = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))["code_sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return code if isinstance(code, str) else None


def _is_active(stale: StaleRun) -> bool:
    return stale.is_running and not is_remote(stale.state) and is_alive(stale.state)


# -- one process at a time -----------------------------------------------------------------------------------


def _try_claim(candidate: StaleRun) -> StaleRun | None:
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
            current = read_stale_run(candidate.path)
            if (
                current is None
                or _owner(current) != _owner(candidate)
                or _has_finished_since(candidate, current)
            ):
                return None
            write_json(current.path, current.state | _claim_fields())
            return current
    except OSError as error:
        raise UserError(f"{candidate.run_dir}: cannot resume: {error}") from None


def _has_finished_since(before: StaleRun, current: StaleRun) -> bool:
    return bool(current.state["status"] == "FINISHED" != before.state["status"])


def _release(claimed: StaleRun) -> None:
    current = read_stale_run(claimed.path)
    if current is not None and current.state == claimed.state | _claim_fields():
        with contextlib.suppress(OSError):  # the next start closes it as stale
            write_json(claimed.path, claimed.state)


def _claim_fields() -> dict[str, Any]:
    return {"status": "RUNNING", **process_identity()}


def _owner(stale: StaleRun) -> tuple[Any, ...]:
    return tuple(stale.state.get(key) for key in process_identity())
