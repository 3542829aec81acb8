"""The run again, as a new run in a new folder, with the verdict in its record."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captcha_exp.config import Config, Machine
from captcha_exp.errors import RunFailed
from captcha_exp.reproduce import changes, compare, images
from captcha_exp.reproduce.causes import Judged, judge, sentence, tolerances
from captcha_exp.reproduce.changes import Drift
from captcha_exp.reproduce.compare import Difference, Verdict
from captcha_exp.reproduce.overrides import varied
from captcha_exp.reproduce.reference import Original, outcome
from captcha_exp.runs import Run
from captcha_exp.runs.source_code import git, source_files
from captcha_exp.runtime.console import Display, shown
from captcha_exp.training import train
from captcha_exp.training.oom import OutOfMemory
from captcha_exp.training.recorder import Tracker


@dataclass(frozen=True)
class Reproduction:
    """What became of it."""

    verdict: Verdict
    sentence: str
    of: str
    """where the run is"""
    folder: Path
    """of the new one"""
    variation: Mapping[str, tuple[Any, Any]]
    """key that was asked to be another -> its value then and now"""
    judged: Sequence[Judged]
    differences: Sequence[Difference]
    epochs: int
    tested: int
    weights_sha256: str

    def to_json(self) -> dict[str, Any]:
        """The content of reproduction.json."""
        first = self.differences[0].to_json() if self.differences else None
        return {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "of": self.of,
            "folder": str(self.folder),
            "variation": {key: list(pair) for key, pair in self.variation.items()},
            "first_difference": first,
            "differences": len(self.differences),
            "drift": [each.to_json() for each in self.judged],
            "epochs": self.epochs,
            "tested": self.tested,
            "weights_sha256": self.weights_sha256,
            "tolerances": tolerances(),
        }


def reproduce(
    original: Original,
    wanted: Config,
    machine: Machine,
    tracker_of: Callable[[Config], Tracker],
    display: Display,
) -> Reproduction:
    """The run once more, with its own config or with another that is wanted; and how it compares.

    Raises:
        UserError: the device or the folder of pictures is not there.
        RunFailed: the new run failed.
    """
    config, variation = varied(original.config, wanted, machine)
    found = [*changes.of_config(original.edits), *changes.of_config(variation), *changes.of_record(original)]
    _tell_record(original, display)
    _tell_code(original, display)
    found += _tell_pictures(original, config, display)
    done: list[Reproduction] = []

    def at_end(run: Run) -> None:
        made = _compared(original, config, variation, found, run)
        run.write_json("reproduction.json", made.to_json())
        tags = {"reproduces": original.run_id or original.place, "reproduction": made.verdict}
        run.note(tags={**run.state["tags"], **tags})
        done.append(made)

    links: dict[str, Any] = {"reproduces": original.link}
    if original.continues is not None:
        links["continues"] = dict(original.continues)
    begin = original.began_from()
    try:
        train.train(config, tracker_of(config), display, links=links, at_end=at_end, start_from=begin)
    except OutOfMemory as error:  # that may be a result of a run, and is none of a comparison
        raise RunFailed(*error.lines) from error
    return done[0]


def _compared(
    original: Original,
    config: Config,
    variation: Mapping[str, tuple[Any, Any]],
    found: Sequence[Drift],
    run: Run,
) -> Reproduction:
    then, now = original.outcome, outcome(run.folder, run.state)
    verdict, differences = compare.verdict(then, now), compare.differences(then, now)
    repeatable = config.train.deterministic
    everything = [*found, *changes.of_environment(then, now)]
    judged = judge(everything, verdict, compare.same_pictures(then, now), certain=repeatable)
    first = differences[0] if differences else None
    return Reproduction(
        verdict=verdict,
        sentence=sentence(verdict, first, judged, repeatable),
        of=original.place,
        folder=run.folder,
        variation=variation,
        judged=judged,
        differences=differences,
        epochs=len(now.epochs),
        tested=now.tested,
        weights_sha256=now.weights_sha256,
    )


# -- told before the training --------------------------------------------------------------------------------


def _tell_record(original: Original, display: Display) -> None:
    """What of the record is not as the run ended with it."""
    edits = [each.words() for each in changes.of_config(original.edits)]
    if edits:
        display.warn(shown(f"config.yaml was changed after the run ended: {', '.join(edits)}"))
    for name in original.changed:
        if name != "config.yaml" or not edits:
            display.warn(shown(f"{name} is not the file that the run ended with (its SHA-256 is another)"))


def _tell_code(original: Original, display: Display) -> None:
    """Whether today's code is that of the run, and how to get that one."""
    then = original.outcome.environment
    files = changes.changed_files(original.outcome, source_files())
    if files == []:
        return
    here = git() or {}
    old = then.get("git") if isinstance(then.get("git"), dict) else {}
    if files is None:  # an older run, or one whose code.json is gone
        known = ("commit", "dirty", "diff_sha256")
        if old and all(here.get(key) == old.get(key) for key in known):
            return
        what = f"the run's code was {changes.code_words(then)}, and it has not kept the files' SHA-256"
    else:
        named = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        what = f"today's code is not that of the run ({changes.code_words(then)}): {named}"
    display.warn(shown(f"{what}; to have the old one: {_how_to_get(original, old or {}, bool(here))}"))


def _how_to_get(original: Original, old: Mapping[str, Any], checkout: bool) -> str:
    """Commands that give the code of the run."""
    commit = str(old.get("commit") or "")
    if not re.fullmatch(r"[0-9a-f]{7,64}", commit):
        version = original.outcome.environment.get("captcha_exp")
        if not version:
            return "nobody has noted which"
        return f"pip install {shlex.quote(f'captcha-exp=={version}')}"
    place = f"../captcha_exp-{commit[:8]}"
    get = f"git clone ... {place} and git checkout {commit}"
    if checkout:
        get = f"git worktree add {place} {commit}"
    patch = original.folder / "code.diff"
    which = shlex.quote(str(patch)) if original.store is None else "the code.diff of its artifacts in MLflow"
    if not old.get("dirty"):
        return get
    if not patch.is_file():
        return f"{get} (its changes since that commit were not kept)"
    return f"{get}, and in there git apply {which}"


def _tell_pictures(original: Original, config: Config, display: Display) -> list[Drift]:
    """Files of a folder that are not as they were, named; each is a part of what ran."""
    manifest = original.outcome.dataset
    if images.made_otherwise(config, manifest):
        display.line("the pictures are drawn by other settings or versions than the run's were")
    found = images.other_files(config, manifest)
    for kind, names in found.items():
        display.warn(f"the folder of pictures is not as it was: {images.words(kind, names)}")
    return [changes.of_pictures(images.words(kind, names)) for kind, names in found.items()]
