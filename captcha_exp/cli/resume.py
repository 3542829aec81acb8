"""What `--resume` means: a new run, an unfinished one to go on with, or more epochs of a finished one."""

import argparse
import contextlib
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from captcha_exp.cli.hydra_config import Composed, overridden
from captcha_exp.config import Config, Machine, leaves, load
from captcha_exp.errors import UserError
from captcha_exp.runs import CHECKPOINTS, Left, checkpoints_in, linked, new_folder
from captcha_exp.runs import resume as unfinished
from captcha_exp.runtime.console import Display

LIMIT = "train.stop_after_minutes"  # of a process, not of its run
MORE = {"train.epochs", "train.patience", LIMIT}  # what may differ where a finished run gets more epochs
NAMED = 4  # keys in one line


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a training begins with."""

    requested: Config
    choices: Mapping[str, str] = field(default_factory=dict)
    """conf group -> the file chosen; of a run that was named, those beside its name"""
    folder: Path | None = None
    """of the unfinished run that it goes on with; None: a new one"""
    links: Mapping[str, Any] = field(default_factory=dict)
    """the run that it belongs to, as in run.json"""
    start_from: Path | None = None
    """the finished run whose state a new run starts from"""


@contextlib.contextmanager
def started(
    arguments: argparse.Namespace, composed: Composed, machine: Machine, display: Display
) -> Iterator[Start]:
    """The training that --resume and the overrides ask for; the run that it goes on with is held meanwhile.

    Raises:
        ConfigError: every mistake of the overrides.
        UserError: what is named cannot be gone on with, or not like this; the line says what can.
    """
    with contextlib.ExitStack() as stack:
        if arguments.resume not in ("auto", "never"):
            yield _of_named(arguments, composed, machine, display, stack)
            return
        start = Start(requested=composed.checked(machine), choices=composed.choices)
        yield start if arguments.resume == "never" else _or_unfinished(start, display, stack)


def places(start: Start, resume: str, display: Display) -> Callable[[Config], AbstractContextManager[Path]]:
    """Where each process of a training writes that starts again in smaller parts: the first as `start` says,
    each after it in an unfinished run of its own config, or in a new one."""

    @contextlib.contextmanager
    def place(requested: Config) -> Iterator[Path]:
        with contextlib.ExitStack() as stack:
            each = start if requested == start.requested else replace(start, requested=requested, folder=None)
            if each is not start and resume != "never":
                each = _or_unfinished(each, display, stack)
            yield each.folder or new_folder(requested.name)

    return place


def _or_unfinished(start: Start, display: Display, stack: contextlib.ExitStack) -> Start:
    """The unfinished run that is just this one, where there is one."""

    def look() -> Left | None:
        return unfinished.newest(start.requested, display.line, start.links)

    found = stack.enter_context(unfinished.held(look))
    if found is None:
        return start
    _tell(found, display)
    return replace(start, folder=found.folder)


def _tell(left: Left, display: Display) -> None:
    display.line(f"goes on with {left.folder}, {unfinished.reached(left.folder)}")


# -- --resume RUN --------------------------------------------------------------------------------------------


def _of_named(
    arguments: argparse.Namespace,
    composed: Composed,
    machine: Machine,
    display: Display,
    stack: contextlib.ExitStack,
) -> Start:
    name = arguments.resume
    seen = unfinished.named(name)
    saved = load(seen.folder / "requested.yaml")
    wanted, choices = _wanted(saved, arguments, composed, machine)
    other = _other_keys(saved, wanted)
    if seen.state["status"] == "FINISHED":
        start = replace(_of_finished(name, seen, saved, wanted, other), choices=choices)
        _warn_of_plans(wanted, set(other), display)
        return _or_unfinished(start, display, stack)
    if "reproduces" in (seen.state.get("links") or {}):
        raise UserError(
            f"--resume={name}: is a reproduction that was interrupted; captcha-exp reproduce "
            f"{_reproduced(seen.state['links'])} begins it anew"
        )
    if strange := {key: words for key, words in other.items() if key != LIMIT}:
        raise UserError(
            f"--resume={name}: is unfinished and goes on as it was begun; {_in_words(strange)}: leave that "
            "out, or begin a new run with --resume=never"
        )

    def look() -> Left:
        left = unfinished.named(name)
        if left.state["status"] == "FINISHED":
            raise UserError(f"--resume={name}: has finished just now; train.epochs=N beside it gives it more")
        return left

    found = stack.enter_context(unfinished.held(look))
    assert found is not None  # look() raises where it finds nothing
    if unfinished.ran_other_code(found.folder):
        display.warn(
            f"{found.folder}: other code than today's began it; it may not end as a run does that nobody "
            "interrupted"
        )
    _tell(found, display)
    links = found.state.get("links") or {}
    return Start(
        requested=wanted,
        choices=choices,
        folder=found.folder,
        links=links,
        start_from=_first_of(links, found.folder),
    )


def _wanted(
    saved: Config, arguments: argparse.Namespace, composed: Composed, machine: Machine
) -> tuple[Config, Mapping[str, str]]:
    """What the words beside a run ask for: values are put onto its config; with a choice between files all is
    composed as usual."""
    words = [text.lstrip("+") for text in arguments.overrides]
    if all(text.partition("=")[0] in composed.written for text in words) and not composed.mistakes:
        return overridden(saved, words, machine), {}
    return composed.checked(machine), composed.choices


def _of_finished(name: str, left: Left, saved: Config, wanted: Config, other: Mapping[str, str]) -> Start:
    """A new run that starts from the state of a finished one.

    Raises:
        UserError: it asks for something else than more epochs, or there is no state; the line says what.
    """
    result = left.state["result"]
    epochs = result.get("epochs", saved.train.epochs) if isinstance(result, dict) else saved.train.epochs
    if strange := {key: words for key, words in other.items() if key not in MORE}:
        raise UserError(
            f"--resume={name}: is finished and can get more epochs (train.epochs, train.patience) alone; "
            f"{_in_words(strange)}: leave that out, or begin a new run with --resume=never"
        )
    if not result or not checkpoints_in(left.folder / CHECKPOINTS):
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
    links = {"continues": {"folder": str(left.folder), "run_id": run_id}}
    return Start(requested=wanted, links=links, start_from=left.folder)


def _reproduced(links: Mapping[str, Any]) -> str:
    """The run that a reproduction was of, as a word of a command."""
    first = links["reproduces"]
    return shlex.quote(str(first.get("folder") or first.get("run_id")))


def _first_of(links: Mapping[str, Any], folder: Path) -> Path | None:
    """The finished run that the run in this folder, with these links, starts from."""
    continued = links.get("continues")
    return (linked(continued, folder) or Path(continued["folder"])) if continued else None


def _warn_of_plans(wanted: Config, other: set[str], display: Display) -> None:
    """What is laid out over all epochs is another one for more of them."""
    train = wanted.train
    of_all = [f"train.schedule={train.schedule}"] if train.schedule != "constant" else []
    of_all += [f"augment.ramp={wanted.augment.ramp:g}"] if wanted.augment.ramp > 0 else []
    if of_all and "train.epochs" in other:
        display.warn(
            f"{' and '.join(of_all)}: is laid out over all epochs, so that the result is not that of "
            f"{train.epochs} epochs from the start"
        )


def _other_keys(saved: Config, wanted: Config) -> dict[str, str]:
    """Key -> in words, for each key whose value is not the saved one."""
    old, new = leaves(saved), leaves(wanted)
    return {
        key: f"{key}={new.get(key, '(none)')} (it was {old.get(key, '(none)')})"
        for key in dict.fromkeys((*new, *old))
        if new.get(key) != old.get(key)
    }


def _in_words(other: Mapping[str, str]) -> str:
    words = list(other.values())
    more = f" and {len(words) - NAMED} keys more" if len(words) > NAMED else ""
    return f"{', '.join(words[:NAMED])}{more} {'differ' if len(words) > 1 else 'differs'}"
