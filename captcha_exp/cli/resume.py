"""`--resume`: start a new run, resume an unfinished one, or extend a finished one by more epochs."""

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
from captcha_exp.runs import resume as run_resume
from captcha_exp.runtime.console import Display, preview

TIME_LIMIT_KEY = "train.max_minutes"  # limits a process, not a run
EXTENDABLE_KEYS = {"train.epochs", "train.patience", TIME_LIMIT_KEY}  # may change to extend a finished run
MAX_NAMED = 4  # keys in one line


@dataclass(frozen=True, kw_only=True)
class ResumePlan:
    """How a training starts."""

    requested: Config
    choices: Mapping[str, str] = field(default_factory=dict)
    """config group -> selected file; with --resume RUN, only those on the command line"""
    run_dir: Path | None = None
    """of the unfinished run to resume; None: a new run"""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """links to other runs, as in run.json"""
    extend_from: Path | None = None
    """the finished run whose final state is the initial state"""


@contextlib.contextmanager
def plan_resume(
    arguments: argparse.Namespace, composed: ComposedConfig, machine: Machine, display: Display
) -> Iterator[ResumePlan]:
    """Yield the plan for --resume and the overrides. A run to resume is claimed until the context exits.

    Raises:
        ConfigError: every mistake of the overrides.
        UserError: the named run cannot be resumed with these overrides; the line says what is possible.
    """
    with contextlib.ExitStack() as stack:
        if arguments.resume not in ("auto", "never"):
            yield _plan_named(arguments, composed, machine, display, stack)
            return
        plan = ResumePlan(requested=composed.to_config(machine), choices=composed.choices)
        yield plan if arguments.resume == "never" else _or_resume(plan, display, stack)


def run_dir_factory(
    resume_plan: ResumePlan, resume: str, display: Display
) -> Callable[[Config], AbstractContextManager[Path]]:
    """Return a function that opens the run directory for each attempt of `train_with_oom_retry`.

    The first attempt follows the plan. Later ones have another config: they resume an unfinished run with it,
    or start a new one.
    """

    @contextlib.contextmanager
    def open_run_dir(requested: Config) -> Iterator[Path]:
        with contextlib.ExitStack() as stack:
            plan = resume_plan
            if requested != plan.requested:
                plan = replace(plan, requested=requested, run_dir=None)
                if resume != "never":
                    plan = _or_resume(plan, display, stack)
            yield plan.run_dir or make_run_dir(requested.name)

    return open_run_dir


def _or_resume(plan: ResumePlan, display: Display, stack: contextlib.ExitStack) -> ResumePlan:
    """Resume an unfinished run with the same config and code if there is one; else return the plan."""

    def find() -> StaleRun | None:
        return run_resume.find_resumable(plan.requested, display.info, plan.lineage)

    stale = stack.enter_context(run_resume.claim(find))
    if stale is None:
        return plan
    _report_resume(stale, display)
    return replace(plan, run_dir=stale.run_dir)


def _report_resume(stale: StaleRun, display: Display) -> None:
    display.info(f"Resuming {stale.run_dir} {run_resume.describe_progress(stale.run_dir)}")


# -- --resume RUN --------------------------------------------------------------------------------------------


def _plan_named(
    arguments: argparse.Namespace,
    composed: ComposedConfig,
    machine: Machine,
    display: Display,
    stack: contextlib.ExitStack,
) -> ResumePlan:
    name = arguments.resume
    named = run_resume.find_named(name)
    saved = load(named.run_dir / "requested.yaml")
    requested, choices = _requested_config(saved, arguments, composed, machine)
    changes = _changed_keys(saved, requested)
    if named.state["status"] == "FINISHED":
        plan = replace(_plan_extension(name, named, saved, requested, changes), choices=choices)
        _warn_epoch_schedules(requested, set(changes), display)
        return _or_resume(plan, display, stack)
    if "reproduces" in (named.state.get("lineage") or {}):
        raise UserError(
            f"--resume={name}: is an interrupted reproduction, which cannot be resumed; start it again with "
            f"captcha-exp reproduce {_reproduced_run(named.state['lineage'])}"
        )
    if rejected := {key: text for key, text in changes.items() if key != TIME_LIMIT_KEY}:
        raise UserError(
            f"--resume={name}: is unfinished and can only be resumed with its own config; "
            f"{_format_changes(rejected)}: remove the override, or start a new run with --resume=never"
        )

    def find() -> StaleRun:
        stale = run_resume.find_named(name)
        if stale.state["status"] == "FINISHED":
            raise UserError(f"--resume={name}: has just finished; add train.epochs=N to train more epochs")
        return stale

    stale = stack.enter_context(run_resume.claim(find))
    assert stale is not None  # find() raises if there is no such run
    if run_resume.has_code_changed(stale.run_dir):
        display.warn(
            f"{stale.run_dir}: started with different code; the result may differ from that of an "
            "uninterrupted run"
        )
    _report_resume(stale, display)
    links = stale.state.get("lineage") or {}
    return ResumePlan(
        requested=requested,
        choices=choices,
        run_dir=stale.run_dir,
        lineage=links,
        extend_from=_find_extended_run(links, stale.run_dir),
    )


def _requested_config(
    saved: Config, arguments: argparse.Namespace, composed: ComposedConfig, machine: Machine
) -> tuple[Config, Mapping[str, str]]:
    """Return the requested config and the selected files of the config groups.

    Overrides of values apply to the saved config. If one selects a file, the config is composed from conf/.
    """
    overrides = [text.lstrip("+") for text in arguments.overrides]
    if all(text.partition("=")[0] in composed.raw_overrides for text in overrides) and not composed.errors:
        return apply_overrides(saved, overrides, machine), {}
    return composed.to_config(machine), composed.choices


def _plan_extension(
    name: str, finished: StaleRun, saved: Config, requested: Config, changes: Mapping[str, str]
) -> ResumePlan:
    """Plan a new run that starts from the final state of a finished one.

    Raises:
        UserError: other values than the epochs change, or there is no state; the line says what to do.
    """
    result = finished.state["result"]
    epochs = result.get("epochs", saved.train.epochs) if isinstance(result, dict) else saved.train.epochs
    if rejected := {key: text for key, text in changes.items() if key not in EXTENDABLE_KEYS}:
        raise UserError(
            f"--resume={name}: is finished and can only be extended (train.epochs, train.patience); "
            f"{_format_changes(rejected)}: remove the override, or start a new run with --resume=never"
        )
    if not result or not list_checkpoints(finished.run_dir / CHECKPOINT_DIR):
        raise UserError(
            f"--resume={name}: is finished, but has no checkpoint to extend; start a new run with "
            "--resume=never"
        )
    if not changes or requested.train.epochs < saved.train.epochs or requested.train.epochs <= epochs:
        raise UserError(
            f"--resume={name}: finished after epoch {epochs} of {saved.train.epochs}; add a larger "
            "train.epochs=N to start a new run from its final state"
        )
    run_id = (finished.state["mlflow"] or {}).get("run_id")
    links = {"extends": {"run_dir": str(finished.run_dir), "run_id": run_id}}
    return ResumePlan(requested=requested, lineage=links, extend_from=finished.run_dir)


def _reproduced_run(links: Mapping[str, Any]) -> str:
    """Return the reference run of a reproduction, quoted for the shell."""
    reference = links["reproduces"]
    return shlex.quote(str(reference.get("run_dir") or reference.get("run_id")))


def _find_extended_run(links: Mapping[str, Any], run_dir: Path) -> Path | None:
    """Return the finished run that the run with these links extends; None if there is none."""
    continued = links.get("extends")
    return (find_linked(continued, run_dir) or Path(continued["run_dir"])) if continued else None


def _warn_epoch_schedules(requested: Config, changed_keys: set[str], display: Display) -> None:
    """Warn about settings that depend on the total number of epochs, if that changes."""
    train, warmup = requested.train, requested.augment.warmup_fraction
    settings = [f"train.schedule={train.schedule}"] if train.schedule != "constant" else []
    settings += [f"augment.warmup_fraction={warmup:g}"] if warmup > 0 else []
    if settings and "train.epochs" in changed_keys:
        display.warn(
            f"{' and '.join(settings)}: depends on the number of epochs, and the result will differ from a "
            f"run of {train.epochs} epochs from the start"
        )


def _changed_keys(saved: Config, requested: Config) -> dict[str, str]:
    """Return key -> description of the change, for each key whose value differs from the saved one."""
    old, new = flatten(saved), flatten(requested)
    return {
        key: f"{key}={new.get(key, '(none)')} (was {old.get(key, '(none)')})"
        for key in dict.fromkeys((*new, *old))
        if new.get(key) != old.get(key)
    }


def _format_changes(changes: Mapping[str, str]) -> str:
    texts = list(changes.values())
    keys = " keys" if len(texts) > MAX_NAMED else ""
    return f"{preview(texts, MAX_NAMED)}{keys} {'differ' if len(texts) > 1 else 'differs'}"
