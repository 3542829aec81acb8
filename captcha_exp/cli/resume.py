"""What `--resume` means: a new run, an unfinished one to go on with, or more epochs of a finished one."""

import argparse
import contextlib
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from captcha_exp.cli.hydra_config import ComposedConfig, apply_overrides
from captcha_exp.config import Config, Machine, flatten, load
from captcha_exp.errors import UserError
from captcha_exp.runs import CHECKPOINT_DIR, StaleRun, find_linked, list_checkpoints, make_run_dir
from captcha_exp.runs import resume as unfinished
from captcha_exp.runtime.console import Display

TIME_LIMIT_KEY = "train.max_minutes"  # of a process, not of its run
EXTENDABLE_KEYS = {
    "train.epochs",
    "train.patience",
    TIME_LIMIT_KEY,
}  # what may differ where a finished run gets more epochs
MAX_NAMED = 4  # keys in one line


@dataclass(frozen=True, kw_only=True)
class ResumePlan:
    """What a training begins with."""

    requested: Config
    choices: Mapping[str, str] = field(default_factory=dict)
    """conf group -> the file chosen; of a run that was named, those beside its name"""
    run_dir: Path | None = None
    """of the unfinished run that it goes on with; None: a new one"""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """the run that it belongs to, as in run.json"""
    extend_from: Path | None = None
    """the finished run whose state a new run starts from"""


@contextlib.contextmanager
def plan_resume(
    arguments: argparse.Namespace, composed: ComposedConfig, machine: Machine, display: Display
) -> Iterator[ResumePlan]:
    """The training that --resume and the overrides ask for; the run that it goes on with is held meanwhile.

    Raises:
        ConfigError: every mistake of the overrides.
        UserError: what is named cannot be gone on with, or not like this; the line says what can.
    """
    with contextlib.ExitStack() as stack:
        if arguments.resume not in ("auto", "never"):
            yield _plan_named(arguments, composed, machine, display, stack)
            return
        start = ResumePlan(requested=composed.to_config(machine), choices=composed.choices)
        yield start if arguments.resume == "never" else _or_resume(start, display, stack)


def run_dir_factory(
    resume_plan: ResumePlan, resume: str, display: Display
) -> Callable[[Config], AbstractContextManager[Path]]:
    """Where each process of a training writes that starts again in smaller parts: the first as `start` says,
    each after it in an unfinished run of its own config, or in a new one."""

    @contextlib.contextmanager
    def place(requested: Config) -> Iterator[Path]:
        with contextlib.ExitStack() as stack:
            each = (
                resume_plan
                if requested == resume_plan.requested
                else replace(resume_plan, requested=requested, run_dir=None)
            )
            if each is not resume_plan and resume != "never":
                each = _or_resume(each, display, stack)
            yield each.run_dir or make_run_dir(requested.name)

    return place


def _or_resume(start: ResumePlan, display: Display, stack: contextlib.ExitStack) -> ResumePlan:
    """The unfinished run that is just this one, where there is one."""

    def look() -> StaleRun | None:
        return unfinished.find_resumable(start.requested, display.info, start.lineage)

    found = stack.enter_context(unfinished.claim(look))
    if found is None:
        return start
    _report_resume(found, display)
    return replace(start, run_dir=found.run_dir)


def _report_resume(left: StaleRun, display: Display) -> None:
    display.info(f"goes on with {left.run_dir}, {unfinished.describe_progress(left.run_dir)}")


# -- --resume RUN --------------------------------------------------------------------------------------------


def _plan_named(
    arguments: argparse.Namespace,
    composed: ComposedConfig,
    machine: Machine,
    display: Display,
    stack: contextlib.ExitStack,
) -> ResumePlan:
    name = arguments.resume
    seen = unfinished.find_named(name)
    saved = load(seen.run_dir / "requested.yaml")
    wanted, choices = _requested_config(saved, arguments, composed, machine)
    other = _changed_keys(saved, wanted)
    if seen.state["status"] == "FINISHED":
        start = replace(_plan_extension(name, seen, saved, wanted, other), choices=choices)
        _warn_epoch_schedules(wanted, set(other), display)
        return _or_resume(start, display, stack)
    if "reproduces" in (seen.state.get("lineage") or {}):
        raise UserError(
            f"--resume={name}: is a reproduction that was interrupted; captcha-exp reproduce "
            f"{_reproduced_run(seen.state['lineage'])} begins it anew"
        )
    if strange := {key: words for key, words in other.items() if key != TIME_LIMIT_KEY}:
        raise UserError(
            f"--resume={name}: is unfinished and goes on as it was begun; "
            f"{_format_changes(strange)}: leave that "
            "out, or begin a new run with --resume=never"
        )

    def look() -> StaleRun:
        left = unfinished.find_named(name)
        if left.state["status"] == "FINISHED":
            raise UserError(f"--resume={name}: has finished just now; train.epochs=N beside it gives it more")
        return left

    found = stack.enter_context(unfinished.claim(look))
    assert found is not None  # look() raises where it finds nothing
    if unfinished.has_code_changed(found.run_dir):
        display.warn(
            f"{found.run_dir}: other code than today's began it; it may not end as a run does that nobody "
            "interrupted"
        )
    _report_resume(found, display)
    links = found.state.get("lineage") or {}
    return ResumePlan(
        requested=wanted,
        choices=choices,
        run_dir=found.run_dir,
        lineage=links,
        extend_from=_find_extended_run(links, found.run_dir),
    )


def _requested_config(
    saved: Config, arguments: argparse.Namespace, composed: ComposedConfig, machine: Machine
) -> tuple[Config, Mapping[str, str]]:
    """What the words beside a run ask for: values are put onto its config; with a choice between files all is
    composed as usual."""
    words = [text.lstrip("+") for text in arguments.overrides]
    if all(text.partition("=")[0] in composed.raw_overrides for text in words) and not composed.errors:
        return apply_overrides(saved, words, machine), {}
    return composed.to_config(machine), composed.choices


def _plan_extension(
    name: str, left: StaleRun, saved: Config, wanted: Config, other: Mapping[str, str]
) -> ResumePlan:
    """A new run that starts from the state of a finished one.

    Raises:
        UserError: it asks for something else than more epochs, or there is no state; the line says what.
    """
    result = left.state["result"]
    epochs = result.get("epochs", saved.train.epochs) if isinstance(result, dict) else saved.train.epochs
    if strange := {key: words for key, words in other.items() if key not in EXTENDABLE_KEYS}:
        raise UserError(
            f"--resume={name}: is finished and can get more epochs (train.epochs, train.patience) alone; "
            f"{_format_changes(strange)}: leave that out, or begin a new run with --resume=never"
        )
    if not result or not list_checkpoints(left.run_dir / CHECKPOINT_DIR):
        raise UserError(
            f"--resume={name}: is finished and has no checkpoint to start from; begin a new run with "
            "--resume=never"
        )
    if not other or wanted.train.epochs < saved.train.epochs or wanted.train.epochs <= epochs:
        raise UserError(
            f"--resume={name}: is finished after epoch {epochs} of {saved.train.epochs}; more of them, with "
            "train.epochs=N beside it, make a new run that starts from its state"
        )
    run_id = (left.state["mlflow"] or {}).get("run_id")
    links = {"extends": {"run_dir": str(left.run_dir), "run_id": run_id}}
    return ResumePlan(requested=wanted, lineage=links, extend_from=left.run_dir)


def _reproduced_run(links: Mapping[str, Any]) -> str:
    """The run that a reproduction was of, as a word of a command."""
    first = links["reproduces"]
    return shlex.quote(str(first.get("run_dir") or first.get("run_id")))


def _find_extended_run(links: Mapping[str, Any], folder: Path) -> Path | None:
    """The finished run that the run in this folder, with these links, starts from."""
    continued = links.get("extends")
    return (find_linked(continued, folder) or Path(continued["run_dir"])) if continued else None


def _warn_epoch_schedules(wanted: Config, other: set[str], display: Display) -> None:
    """What is laid out over all epochs is another one for more of them."""
    train = wanted.train
    of_all = [f"train.schedule={train.schedule}"] if train.schedule != "constant" else []
    of_all += (
        [f"augment.warmup_fraction={wanted.augment.warmup_fraction:g}"]
        if wanted.augment.warmup_fraction > 0
        else []
    )
    if of_all and "train.epochs" in other:
        display.warn(
            f"{' and '.join(of_all)}: is laid out over all epochs, so that the result is not that of "
            f"{train.epochs} epochs from the start"
        )


def _changed_keys(saved: Config, wanted: Config) -> dict[str, str]:
    """Key -> in words, for each key whose value is not the saved one."""
    old, new = flatten(saved), flatten(wanted)
    return {
        key: f"{key}={new.get(key, '(none)')} (it was {old.get(key, '(none)')})"
        for key in dict.fromkeys((*new, *old))
        if new.get(key) != old.get(key)
    }


def _format_changes(other: Mapping[str, str]) -> str:
    words = list(other.values())
    more = f" and {len(words) - MAX_NAMED} keys more" if len(words) > MAX_NAMED else ""
    return f"{', '.join(words[:MAX_NAMED])}{more} {'differ' if len(words) > 1 else 'differs'}"
