"""Unfinished runs: which one a call goes on with, from where, and the right to do so for one process.

A run is gone on with on its own where it was asked for with the same config and by the same code, so that its
end is that of a run that nobody interrupted, and where its process is gone.
"""

import contextlib
import json
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

LOCK_TIMEOUT_SECONDS = 60.0  # another process may be telling MLflow the end of many runs

_Resumability: TypeAlias = Literal["free", "other code", "other host", "no"]


def find_resumable(
    requested: Config, warn: Callable[[str], None], lineage: Mapping[str, Any] | None = None
) -> StaleRun | None:
    """The newest run in outputs/ that was asked for just so, is unfinished, and has no process any more.

    Told of and left is one that other code began, or that says it runs on another machine. Points of a sweep
    belong to the sweep.
    """
    code = code_sha256()
    told = False
    for folder, _ in reversed(list_runs()):
        left = read_stale_run(folder / "run.json")
        if left is None or (folder.parent / "sweep.json").is_file():
            continue
        stand = _resumability(left, requested, code, lineage or {})
        if stand == "free":
            return left
        if stand != "no" and not told:
            warn(_skip_reason(left, stand))
            told = True
    return None


def find_resumable_job(run_dir: Path, requested: Config) -> StaleRun | None:
    """The run in this folder of a sweep, if it is what `newest` looks for."""
    left = read_stale_run(run_dir / "run.json")
    return left if left is not None and _resumability(left, requested, code_sha256(), {}) == "free" else None


def find_named(name: str) -> StaleRun:
    """The run that somebody wants to go on with: a folder, the beginning of an MLflow run id, or `latest`.

    Raises:
        UserError: there is none, or somebody is at work on it.
    """
    if resolve_dir(name, "sweep.json"):
        raise UserError(f"--resume={name}: is a sweep; add -m to go on with it")
    folder = find_run(name)
    left, sweep = read_stale_run(folder / "run.json"), read_stale_run(folder.parent / "sweep.json")
    if left is None:
        raise UserError(f"--resume={name}: {folder / 'run.json'} cannot be read as the record of a run")
    if _is_active(left):
        raise UserError(f"--resume={name}: its process {left.state['pid']} is still at work")
    if sweep is not None and _is_active(sweep):
        raise UserError(f"--resume={name}: the process {sweep.state['pid']} of its sweep is still at work")
    return left


def has_code_changed(run_dir: Path) -> bool:
    """Whether it is known that the run was begun by other code than today's."""
    return _recorded_code_sha256(run_dir) not in (None, code_sha256())


@contextlib.contextmanager
def claim(find_candidate: Callable[[], StaleRun | None]) -> Iterator[StaleRun | None]:
    """What `look` finds, held for this process: another one that found it too looks again.

    Its record says RUNNING by this process. At the end it says again what it said, unless somebody has gone
    on with it in the meantime.

    Raises:
        UserError: its record cannot be written now; the line says why.
    """
    mine = None
    while (found := find_candidate()) is not None and (mine := _try_claim(found)) is None:
        pass
    try:
        yield mine
    finally:
        if mine is not None:
            _release(mine)


def describe_progress(run_dir: Path) -> str:
    """From where a run goes on, in words."""
    for path in list_checkpoints(run_dir / CHECKPOINT_DIR):
        try:
            with safetensors.safe_open(path, "np") as file:
                counters = json.loads(file.metadata()["state"])
            step, epoch = int(counters["step"]), int(counters["epoch"])
            saved = datetime.fromtimestamp(path.stat().st_mtime)
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
            continue  # who reads the whole of it tells so
        where = f"epoch {epoch}" if counters.get("progress") else f"the end of epoch {epoch}"
        today = saved.date() == datetime.now().date()
        return f"from {where}, step {step} (saved {saved:{'%H:%M' if today else '%Y-%m-%d %H:%M'}})"
    return "from its beginning: it had no checkpoint yet"


def _resumability(
    stale: StaleRun, requested: Config, current_code: str, lineage: Mapping[str, Any]
) -> _Resumability:
    """Whether a run may be gone on with where this is asked for, or what is against it."""
    state, folder = stale.state, stale.run_dir
    is_same = state.get("config_sha256") == config_sha256(requested) and state.get("links") == lineage
    if not is_same or state["status"] not in ("RUNNING", "KILLED", "FAILED"):
        return "no"
    if not all((folder / name).is_file() for name in ("config.yaml", "requested.yaml")):
        return "no"  # killed before it said what it is
    if stale.is_running and is_alive(state):  # which for another machine nobody knows
        return "other host" if is_remote(state) else "no"
    has_checkpoint = bool(list_checkpoints(folder / CHECKPOINT_DIR))
    if state["status"] == "FAILED" and not has_checkpoint:
        return "no"
    known = _recorded_code_sha256(folder)
    # Killed before it wrote what it runs on, it reached nothing that other code could have had a part in.
    return "free" if known == current_code or (known is None and not has_checkpoint) else "other code"


def _skip_reason(stale: StaleRun, resumability: _Resumability) -> str:
    again = f"--resume={shlex.quote(str(stale.run_dir))} goes on with it"
    if resumability == "other code":
        return f"{stale.run_dir}: is unfinished and was asked for the same, but other code began it; {again}"
    host = stale.state["host"]
    return f"{stale.run_dir}: runs on {host}, if that is still so; if it is not, {again}"


def _recorded_code_sha256(run_dir: Path) -> str | None:
    """The SHA-256 of the code that began the run; None where its record does not say."""
    try:
        code = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))["code_sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return code if isinstance(code, str) else None


def _is_active(stale: StaleRun) -> bool:
    return stale.is_running and not is_remote(stale.state) and is_alive(stale.state)


# -- one process at a time -----------------------------------------------------------------------------------


def _try_claim(candidate: StaleRun) -> StaleRun | None:
    """The record, which says from now on that this process is at work, as it was until then; None if that is
    not any more what was seen."""
    (root_dir() / "outputs").mkdir(parents=True, exist_ok=True)
    try:
        with stale_lock(LOCK_TIMEOUT_SECONDS) as granted:
            if not granted:
                raise UserError(
                    f"{candidate.run_dir}: cannot be gone on with now, since another process has been "
                    "closing runs "
                    f"for {LOCK_TIMEOUT_SECONDS:.0f} s; start again when it is done"
                )
            now = read_stale_run(candidate.path)
            if now is None or _owner(now) != _owner(candidate) or _has_finished_since(candidate, now):
                return None
            write_json(now.path, now.state | _claim_fields())
            return now
    except OSError as error:
        raise UserError(f"{candidate.run_dir}: cannot be gone on with: {error}") from None


def _has_finished_since(before: StaleRun, current: StaleRun) -> bool:
    return bool(current.state["status"] == "FINISHED" != before.state["status"])


def _release(claimed: StaleRun) -> None:
    now = read_stale_run(claimed.path)
    if now is not None and now.state == claimed.state | _claim_fields():
        with contextlib.suppress(OSError):  # the next start closes it
            write_json(claimed.path, claimed.state)


def _claim_fields() -> dict[str, Any]:
    return {"status": "RUNNING", **process_identity()}


def _owner(stale: StaleRun) -> tuple[Any, ...]:
    return tuple(stale.state.get(key) for key in process_identity())
