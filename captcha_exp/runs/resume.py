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
from captcha_exp.runs.run import CHECKPOINTS, checkpoints_in, config_sha256, find, place_of, runs
from captcha_exp.runs.source_code import code_sha256
from captcha_exp.runs.stale import Left, alone, read_left
from captcha_exp.runtime.files import write_json
from captcha_exp.runtime.paths import root
from captcha_exp.runtime.process import identity, is_alive, is_elsewhere

SECONDS_FOR_THE_LOCK = 60.0  # another process may be telling MLflow the end of many runs

_Stand: TypeAlias = Literal["free", "other code", "other host", "no"]


def newest(
    requested: Config, tell: Callable[[str], None], links: Mapping[str, Any] | None = None
) -> Left | None:
    """The newest run in outputs/ that was asked for just so, is unfinished, and has no process any more.

    Told of and left is one that other code began, or that says it runs on another machine. Points of a sweep
    belong to the sweep.
    """
    code = code_sha256()
    told = False
    for folder, _ in reversed(runs()):
        left = read_left(folder / "run.json")
        if left is None or (folder.parent / "sweep.json").is_file():
            continue
        stand = _stand(left, requested, code, links or {})
        if stand == "free":
            return left
        if stand != "no" and not told:
            tell(_why_left(left, stand))
            told = True
    return None


def of_point(folder: Path, requested: Config) -> Left | None:
    """The run in this folder of a sweep, if it is what `newest` looks for."""
    left = read_left(folder / "run.json")
    return left if left is not None and _stand(left, requested, code_sha256(), {}) == "free" else None


def named(name: str) -> Left:
    """The run that somebody wants to go on with: a folder, the beginning of an MLflow run id, or `latest`.

    Raises:
        UserError: there is none, or somebody is at work on it.
    """
    if place_of(name, "sweep.json"):
        raise UserError(f"--resume={name}: is a sweep; add -m to go on with it")
    folder = find(name)
    left, sweep = read_left(folder / "run.json"), read_left(folder.parent / "sweep.json")
    if left is None:
        raise UserError(f"--resume={name}: {folder / 'run.json'} cannot be read as the record of a run")
    if _is_at_work(left):
        raise UserError(f"--resume={name}: its process {left.state['pid']} is still at work")
    if sweep is not None and _is_at_work(sweep):
        raise UserError(f"--resume={name}: the process {sweep.state['pid']} of its sweep is still at work")
    return left


def ran_other_code(folder: Path) -> bool:
    """Whether it is known that the run was begun by other code than today's."""
    return _code_of(folder) not in (None, code_sha256())


@contextlib.contextmanager
def held(look: Callable[[], Left | None]) -> Iterator[Left | None]:
    """What `look` finds, held for this process: another one that found it too looks again.

    Its record says RUNNING by this process. At the end it says again what it said, unless somebody has gone
    on with it in the meantime.

    Raises:
        UserError: its record cannot be written now; the line says why.
    """
    mine = None
    while (found := look()) is not None and (mine := _claim(found)) is None:
        pass
    try:
        yield mine
    finally:
        if mine is not None:
            _release(mine)


def reached(folder: Path) -> str:
    """From where a run goes on, in words."""
    for path in checkpoints_in(folder / CHECKPOINTS):
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


def _stand(left: Left, requested: Config, code: str, links: Mapping[str, Any]) -> _Stand:
    """Whether a run may be gone on with where this is asked for, or what is against it."""
    state, folder = left.state, left.folder
    is_same = state.get("config_sha256") == config_sha256(requested) and state.get("links") == links
    if not is_same or state["status"] not in ("RUNNING", "KILLED", "FAILED"):
        return "no"
    if not all((folder / name).is_file() for name in ("config.yaml", "requested.yaml")):
        return "no"  # killed before it said what it is
    if left.runs and is_alive(state):  # which for another machine nobody knows
        return "other host" if is_elsewhere(state) else "no"
    has_checkpoint = bool(checkpoints_in(folder / CHECKPOINTS))
    if state["status"] == "FAILED" and not has_checkpoint:
        return "no"
    known = _code_of(folder)
    # Killed before it wrote what it runs on, it reached nothing that other code could have had a part in.
    return "free" if known == code or (known is None and not has_checkpoint) else "other code"


def _why_left(left: Left, stand: _Stand) -> str:
    again = f"--resume={shlex.quote(str(left.folder))} goes on with it"
    if stand == "other code":
        return f"{left.folder}: is unfinished and was asked for the same, but other code began it; {again}"
    host = left.state["host"]
    return f"{left.folder}: runs on {host}, if that is still so; if it is not, {again}"


def _code_of(folder: Path) -> str | None:
    """The SHA-256 of the code that began the run; None where its record does not say."""
    try:
        code = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["code_sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return code if isinstance(code, str) else None


def _is_at_work(left: Left) -> bool:
    return left.runs and not is_elsewhere(left.state) and is_alive(left.state)


# -- one process at a time -----------------------------------------------------------------------------------


def _claim(seen: Left) -> Left | None:
    """The record, which says from now on that this process is at work, as it was until then; None if that is
    not any more what was seen."""
    (root() / "outputs").mkdir(parents=True, exist_ok=True)
    try:
        with alone(SECONDS_FOR_THE_LOCK) as granted:
            if not granted:
                raise UserError(
                    f"{seen.folder}: cannot be gone on with now, since another process has been closing runs "
                    f"for {SECONDS_FOR_THE_LOCK:.0f} s; start again when it is done"
                )
            now = read_left(seen.path)
            if now is None or _owner(now) != _owner(seen) or _has_finished_since(seen, now):
                return None
            write_json(now.path, now.state | _claimed())
            return now
    except OSError as error:
        raise UserError(f"{seen.folder}: cannot be gone on with: {error}") from None


def _has_finished_since(seen: Left, now: Left) -> bool:
    return bool(now.state["status"] == "FINISHED" != seen.state["status"])


def _release(mine: Left) -> None:
    now = read_left(mine.path)
    if now is not None and now.state == mine.state | _claimed():
        with contextlib.suppress(OSError):  # the next start closes it
            write_json(mine.path, mine.state)


def _claimed() -> dict[str, Any]:
    return {"status": "RUNNING", **identity()}


def _owner(left: Left) -> tuple[Any, ...]:
    return tuple(left.state.get(key) for key in identity())
