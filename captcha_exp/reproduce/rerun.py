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
from captcha_exp.reproduce.causes import AttributedChange, attribute, format_verdict, tolerances
from captcha_exp.reproduce.changes import Change
from captcha_exp.reproduce.compare import Difference, Verdict
from captcha_exp.reproduce.overrides import with_overrides
from captcha_exp.reproduce.reference import ReferenceRun, load_result
from captcha_exp.runs import Run
from captcha_exp.runs.source_code import git_info, hash_source_files
from captcha_exp.runtime.console import Display, escape_unprintable
from captcha_exp.training import train
from captcha_exp.training.oom import TrainingOutOfMemoryError
from captcha_exp.training.recorder import Tracker


@dataclass(frozen=True)
class Reproduction:
    """What became of it."""

    verdict: Verdict
    summary: str
    reference: str
    """where the run is"""
    run_dir: Path
    """of the new one"""
    overrides: Mapping[str, tuple[Any, Any]]
    """key that was asked to be another -> its value then and now"""
    attributed_changes: Sequence[AttributedChange]
    differences: Sequence[Difference]
    num_epochs: int
    num_test_images: int
    weights_sha256: str

    def to_json(self) -> dict[str, Any]:
        """The content of reproduction.json."""
        first = self.differences[0].to_json() if self.differences else None
        return {
            "verdict": self.verdict,
            "sentence": self.summary,
            "of": self.reference,
            "run_dir": str(self.run_dir),
            "variation": {key: list(pair) for key, pair in self.overrides.items()},
            "first_difference": first,
            "differences": len(self.differences),
            "drift": [each.to_json() for each in self.attributed_changes],
            "epochs": self.num_epochs,
            "tested": self.num_test_images,
            "weights_sha256": self.weights_sha256,
            "tolerances": tolerances(),
        }


def reproduce(
    reference: ReferenceRun,
    requested: Config,
    machine: Machine,
    make_tracker: Callable[[Config], Tracker],
    display: Display,
) -> Reproduction:
    """The run once more, with its own config or with another that is wanted; and how it compares.

    Raises:
        UserError: the device or the folder of pictures is not there.
        RunFailed: the new run failed.
    """
    config, variation = with_overrides(reference.config, requested, machine)
    found = [
        *changes.from_config(reference.config_edits),
        *changes.from_config(variation),
        *changes.from_record(reference),
    ]
    _report_record(reference, display)
    _report_code(reference, display)
    found += _report_images(reference, config, display)
    done: list[Reproduction] = []

    def at_end(run: Run) -> None:
        made = _compare_runs(reference, config, variation, found, run)
        run.write_json("reproduction.json", made.to_json())
        tags = {"reproduces": reference.run_id or reference.location, "reproduction": made.verdict}
        run.update(tags={**run.state["tags"], **tags})
        done.append(made)

    links: dict[str, Any] = {"reproduces": reference.link}
    if reference.extends is not None:
        links["extends"] = dict(reference.extends)
    begin = reference.find_extended_run()
    try:
        train.train(
            config, make_tracker(config), display, lineage=links, on_complete=at_end, extend_from=begin
        )
    except TrainingOutOfMemoryError as error:  # that may be a result of a run, and is none of a comparison
        raise RunFailed(*error.lines) from error
    return done[0]


def _compare_runs(
    original: ReferenceRun,
    config: Config,
    variation: Mapping[str, tuple[Any, Any]],
    found: Sequence[Change],
    run: Run,
) -> Reproduction:
    then, now = original.result, load_result(run.run_dir, run.state)
    verdict, differences = compare.compute_verdict(then, now), compare.find_differences(then, now)
    repeatable = config.train.deterministic
    everything = [*found, *changes.from_environment(then, now)]
    judged = attribute(everything, verdict, compare.has_same_images(then, now), deterministic=repeatable)
    first = differences[0] if differences else None
    return Reproduction(
        verdict=verdict,
        summary=format_verdict(verdict, first, judged, repeatable),
        reference=original.location,
        run_dir=run.run_dir,
        overrides=variation,
        attributed_changes=judged,
        differences=differences,
        num_epochs=len(now.metrics_by_epoch),
        num_test_images=now.num_test_images,
        weights_sha256=now.weights_sha256,
    )


# -- told before the training --------------------------------------------------------------------------------


def _report_record(original: ReferenceRun, display: Display) -> None:
    """What of the record is not as the run ended with it."""
    edits = [each.describe() for each in changes.from_config(original.config_edits)]
    if edits:
        display.warn(escape_unprintable(f"config.yaml was changed after the run ended: {', '.join(edits)}"))
    for name in original.changed_files:
        if name != "config.yaml" or not edits:
            display.warn(
                escape_unprintable(f"{name} is not the file that the run ended with (its SHA-256 is another)")
            )


def _report_code(original: ReferenceRun, display: Display) -> None:
    """Whether today's code is that of the run, and how to get that one."""
    then = original.result.environment
    files = changes.changed_files(original.result, hash_source_files())
    if files == []:
        return
    here = git_info() or {}
    old = then.get("git") if isinstance(then.get("git"), dict) else {}
    if files is None:  # an older run, or one whose code.json is gone
        known = ("commit", "dirty", "diff_sha256")
        if old and all(here.get(key) == old.get(key) for key in known):
            return
        what = f"the run's code was {changes.describe_code(then)}, and it has not kept the files' SHA-256"
    else:
        named = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        what = f"today's code is not that of the run ({changes.describe_code(then)}): {named}"
    display.warn(
        escape_unprintable(
            f"{what}; to have the old one: {_checkout_command(original, old or {}, bool(here))}"
        )
    )


def _checkout_command(original: ReferenceRun, old: Mapping[str, Any], checkout: bool) -> str:
    """Commands that give the code of the run."""
    commit = str(old.get("commit") or "")
    if not re.fullmatch(r"[0-9a-f]{7,64}", commit):
        version = original.result.environment.get("captcha_exp")
        if not version:
            return "nobody has noted which"
        return f"pip install {shlex.quote(f'captcha-exp=={version}')}"
    place = f"../captcha_exp-{commit[:8]}"
    get = f"git clone ... {place} and git checkout {commit}"
    if checkout:
        get = f"git worktree add {place} {commit}"
    patch = original.run_dir / "code.diff"
    which = (
        shlex.quote(str(patch)) if original.store_uri is None else "the code.diff of its artifacts in MLflow"
    )
    if not old.get("dirty"):
        return get
    if not patch.is_file():
        return f"{get} (its changes since that commit were not kept)"
    return f"{get}, and in there git apply {which}"


def _report_images(original: ReferenceRun, config: Config, display: Display) -> list[Change]:
    """Files of a folder that are not as they were, named; each is a part of what ran."""
    manifest = original.result.dataset
    if images.rendered_differently(config, manifest):
        display.info("the pictures are drawn by other settings or versions than the run's were")
    found = images.changed_files(config, manifest)
    for kind, names in found.items():
        display.warn(f"the folder of pictures is not as it was: {images.describe_files(kind, names)}")
    return [changes.from_images(images.describe_files(kind, names)) for kind, names in found.items()]
