"""`--resume`: start a new run, resume an unfinished one, or extend a finished one by more epochs."""

import argparse
import contextlib
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from captcha_exp import runs
from captcha_exp.cli.hydra_config import ComposedConfig, apply_overrides
from captcha_exp.config import Config, Machine, flatten
from captcha_exp.errors import UserError
from captcha_exp.runs import (
    CHECKPOINT_DIR,
    Lineage,
    RunInfo,
    RunLink,
    StaleRun,
    claim,
    find_linked,
    list_checkpoints,
    make_run_dir,
)
from captcha_exp.runtime.text import preview

logger = logging.getLogger(__name__)

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
    lineage: Lineage = field(default_factory=Lineage)
    extend_from: Path | None = None
    """the finished run whose final state is the initial state"""


@contextlib.contextmanager
def plan_resume(
    arguments: argparse.Namespace, composed: ComposedConfig, machine: Machine
) -> Iterator[ResumePlan]:
    """Yield the plan for --resume and the overrides. A run to resume is claimed until the context exits.

    Raises:
        ConfigError: every mistake of the overrides.
        UserError: the named run cannot be resumed with these overrides; the line says what is possible.
    """
    with contextlib.ExitStack() as stack:
        if arguments.resume not in ("auto", "never"):
            yield _plan_named(arguments, composed, machine, stack)
            return
        plan = ResumePlan(requested=composed.to_config(machine), choices=composed.choices)
        yield plan if arguments.resume == "never" else _or_resume(plan, stack)


def run_dir_factory(resume_plan: ResumePlan, resume: str) -> Callable[[Config], AbstractContextManager[Path]]:
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
                    plan = _or_resume(plan, stack)
            yield plan.run_dir or make_run_dir(requested.name)

    return open_run_dir


def _or_resume(plan: ResumePlan, stack: contextlib.ExitStack) -> ResumePlan:
    """Resume an unfinished run with the same config and code if there is one; else return the plan."""

    def find() -> StaleRun[RunInfo] | None:
        return claim.find_resumable(plan.requested, plan.lineage)

    stale = stack.enter_context(claim.claim(find))
    if stale is None:
        return plan
    _report_resume(stale)
    return replace(plan, run_dir=stale.run_dir)


def _report_resume(stale: StaleRun[RunInfo]) -> None:
    logger.info(f"Resuming {stale.run_dir} {claim.describe_progress(stale.run_dir)}")


# -- --resume RUN --------------------------------------------------------------------------------------------


def _plan_named(
    arguments: argparse.Namespace, composed: ComposedConfig, machine: Machine, stack: contextlib.ExitStack
) -> ResumePlan:
    name = arguments.resume
    named = claim.find_named(name)
    saved = runs.load(named.run_dir).config("requested.yaml")
    requested, choices = _requested_config(saved, arguments, composed, machine)
    changes = _changed_keys(saved, requested)
    if named.info.status == "FINISHED":
        plan = replace(_plan_extension(name, named, saved, requested, changes), choices=choices)
        _warn_epoch_schedules(requested, set(changes))
        return _or_resume(plan, stack)
    if reproduced := named.info.lineage.reproduces:
        raise UserError(
            f"--resume={name}: is an interrupted reproduction, which cannot be resumed; start it again with "
            f"captcha-exp reproduce {shlex.quote(str(reproduced.run_dir or reproduced.run_id))}"
        )
    if rejected := {key: text for key, text in changes.items() if key != TIME_LIMIT_KEY}:
        raise UserError(
            f"--resume={name}: is unfinished and can only be resumed with its own config; "
            f"{_format_changes(rejected)}: remove the override, or start a new run with --resume=never"
        )

    def find() -> StaleRun[RunInfo]:
        stale = claim.find_named(name)
        if stale.info.status == "FINISHED":
            raise UserError(f"--resume={name}: has just finished; add train.epochs=N to train more epochs")
        return stale

    stale = stack.enter_context(claim.claim(find))
    assert stale is not None  # find() raises if there is no such run
    if claim.has_code_changed(stale):
        logger.warning(
            f"{stale.run_dir}: started with different code; the result may differ from that of an "
            "uninterrupted run"
        )
    _report_resume(stale)
    extends = stale.info.lineage.extends
    return ResumePlan(
        requested=requested,
        choices=choices,
        run_dir=stale.run_dir,
        lineage=stale.info.lineage,
        extend_from=None if extends is None else _find_extended_run(extends, stale.run_dir),
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
    name: str, finished: StaleRun[RunInfo], saved: Config, requested: Config, changes: Mapping[str, str]
) -> ResumePlan:
    """Plan a new run that starts from the final state of a finished one.

    Raises:
        UserError: other values than the epochs change, or there is no state; the line says what to do.
    """
    result = finished.info.result
    epochs = saved.train.epochs if result is None else result.epochs
    if rejected := {key: text for key, text in changes.items() if key not in EXTENDABLE_KEYS}:
        raise UserError(
            f"--resume={name}: is finished and can only be extended (train.epochs, train.patience); "
            f"{_format_changes(rejected)}: remove the override, or start a new run with --resume=never"
        )
    if result is None or not list_checkpoints(finished.run_dir / CHECKPOINT_DIR):
        raise UserError(
            f"--resume={name}: is finished, but has no checkpoint to extend; start a new run with "
            "--resume=never"
        )
    if not changes or requested.train.epochs < saved.train.epochs or requested.train.epochs <= epochs:
        raise UserError(
            f"--resume={name}: finished after epoch {epochs} of {saved.train.epochs}; add a larger "
            "train.epochs=N to start a new run from its final state"
        )
    logger.info(f"Extending {finished.run_dir} from the end of epoch {epochs}")
    link = RunLink(run_dir=str(finished.run_dir), run_id=finished.info.run_id)
    return ResumePlan(requested=requested, lineage=Lineage(extends=link), extend_from=finished.run_dir)


def _find_extended_run(link: RunLink, run_dir: Path) -> Path:
    return find_linked(link, run_dir) or Path(str(link.run_dir))


def _warn_epoch_schedules(requested: Config, changed_keys: set[str]) -> None:
    """Warn about settings that depend on the total number of epochs, if that changes."""
    train, warmup = requested.train, requested.augment.warmup_fraction
    settings = [f"train.schedule={train.schedule}"] if train.schedule != "constant" else []
    settings += [f"augment.warmup_fraction={warmup:g}"] if warmup > 0 else []
    if settings and "train.epochs" in changed_keys:
        logger.warning(
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
