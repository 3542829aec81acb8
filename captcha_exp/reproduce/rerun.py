"""Run the reference run again as a new run, and save the verdict in its run directory."""

import logging
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captcha_exp.config import Config, Machine
from captcha_exp.errors import RunFailed
from captcha_exp.reproduce import changes, compare, images
from captcha_exp.reproduce.causes import AttributedChange, attribute, format_verdict
from captcha_exp.reproduce.changes import Change
from captcha_exp.reproduce.compare import Difference, Verdict
from captcha_exp.reproduce.overrides import with_overrides
from captcha_exp.reproduce.reference import ReferenceRun, load_result
from captcha_exp.runs import Lineage, Run
from captcha_exp.runs.source_code import git_info, hash_source_files
from captcha_exp.runtime.console import preview
from captcha_exp.training import train
from captcha_exp.training.oom import TrainingOutOfMemoryError
from captcha_exp.training.recorder import Tracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reproduction:
    """Verdict and details of one reproduction."""

    verdict: Verdict
    summary: str
    reference: str
    """location of the reference run"""
    run_dir: Path
    """of the rerun"""
    overrides: Mapping[str, tuple[Any, Any]]
    """overridden key -> (saved, requested)"""
    attributed_changes: Sequence[AttributedChange]
    differences: Sequence[Difference]
    num_epochs: int
    num_test_images: int
    weights_sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return the content of reproduction.json."""
        return {
            "verdict": self.verdict,
            "summary": self.summary,
            "reference": self.reference,
            "run_dir": str(self.run_dir),
            "overrides": {key: list(pair) for key, pair in self.overrides.items()},
            "first_difference": self.differences[0].to_json() if self.differences else None,
            "num_differences": len(self.differences),
            "changes": [each.to_json() for each in self.attributed_changes],
            "num_epochs": self.num_epochs,
            "num_test_images": self.num_test_images,
            "weights_sha256": self.weights_sha256,
            "tolerances": compare.TOLERANCES,
        }


def reproduce(
    reference: ReferenceRun, requested: Config, machine: Machine, make_tracker: Callable[[Config], Tracker]
) -> Reproduction:
    """Train with the requested config, compare with the reference run, and save reproduction.json.

    Raises:
        UserError: the device or the image folder does not exist.
        RunFailed: the new run failed.
    """
    config, overrides = with_overrides(reference.config, requested, machine)
    known_changes = [
        *changes.from_config(reference.config_edits),
        *changes.from_config(overrides),
        *changes.from_record(reference),
    ]
    _report_record(reference)
    _report_code(reference)
    known_changes += _report_images(reference, config)
    reproductions: list[Reproduction] = []

    def on_complete(run: Run) -> None:
        reproduction = _compare_runs(reference, config, overrides, known_changes, run)
        run.write_json("reproduction.json", reproduction.to_json())
        tags = {
            "reproduces": reference.info.run_id or reference.location,
            "reproduction": reproduction.verdict,
        }
        run.update(tags={**run.info.tags, **tags})
        reproductions.append(reproduction)

    lineage = Lineage(reproduces=reference.link, extends=reference.info.lineage.extends)
    extend_from = reference.find_extended_run()
    try:
        train.train(
            config, make_tracker(config), lineage=lineage, on_complete=on_complete, extend_from=extend_from
        )
    except TrainingOutOfMemoryError as error:  # a result of a run, but not of a comparison
        raise RunFailed(*error.lines) from error
    return reproductions[0]


def _compare_runs(
    reference: ReferenceRun,
    config: Config,
    overrides: Mapping[str, tuple[Any, Any]],
    known_changes: Sequence[Change],
    run: Run,
) -> Reproduction:
    expected, actual = reference.result, load_result(run.run_dir, run.info)
    verdict = compare.compute_verdict(expected, actual)
    differences = compare.find_differences(expected, actual)
    deterministic = config.train.deterministic
    all_changes = [*known_changes, *changes.from_environment(expected, actual)]
    same_images = compare.has_same_images(expected, actual)
    attributed_changes = attribute(all_changes, verdict, same_images, deterministic)
    first = differences[0] if differences else None
    return Reproduction(
        verdict=verdict,
        summary=format_verdict(verdict, first, attributed_changes, deterministic),
        reference=reference.location,
        run_dir=run.run_dir,
        overrides=overrides,
        attributed_changes=attributed_changes,
        differences=differences,
        num_epochs=len(actual.metrics_by_epoch),
        num_test_images=actual.num_test_images,
        weights_sha256=actual.weights_sha256,
    )


# -- warnings before the training ----------------------------------------------------------------------------


def _report_record(reference: ReferenceRun) -> None:
    """Warn about files modified after the run finished."""
    edits = [each.describe() for each in changes.from_config(reference.config_edits)]
    if edits:
        logger.warning(f"config.yaml was edited after the run finished: {', '.join(edits)}")
    for name in reference.changed_files:
        if name != "config.yaml" or not edits:
            logger.warning(f"{name} was modified after the run finished (SHA-256 differs)")


def _report_code(reference: ReferenceRun) -> None:
    """Warn if the current code differs from that of the run, with the command that checks it out."""
    environment = reference.result.environment
    files = changes.changed_files(reference.result, hash_source_files())
    if files == []:
        return
    current_git = git_info() or {}
    run_git = environment.get("git") if isinstance(environment.get("git"), dict) else {}
    if files is None:  # the run has no code.json
        keys = ("commit", "dirty", "diff_sha256")
        if run_git and all(current_git.get(key) == run_git.get(key) for key in keys):
            return
        message = f"the run has no code.json; its code was {changes.describe_code(environment)}"
    else:
        code = changes.describe_code(environment)
        message = f"the code differs from that of the run ({code}): {preview(files)}"
    command = _checkout_command(reference, run_git or {}, in_checkout=bool(current_git))
    logger.warning(f"{message}; to restore it: {command}")


def _checkout_command(reference: ReferenceRun, git: Mapping[str, Any], in_checkout: bool) -> str:
    """Return the commands that check out the code of the run."""
    commit = str(git.get("commit") or "")
    if not re.fullmatch(r"[0-9a-f]{7,64}", commit):
        version = reference.result.environment.get("captcha_exp")
        if not version:
            return "unknown version"
        return f"pip install {shlex.quote(f'captcha-exp=={version}')}"
    directory = f"../captcha_exp-{commit[:8]}"
    command = f"git clone ... {directory} and git checkout {commit}"
    if in_checkout:
        command = f"git worktree add {directory} {commit}"
    if not git.get("dirty"):
        return command
    patch = reference.run_dir / "code.diff"
    if not patch.is_file():
        return f"{command} (uncommitted changes were not saved)"
    source = shlex.quote(str(patch)) if reference.store_uri is None else "the MLflow artifact code.diff"
    return f"{command}, then in it git apply {source}"


def _report_images(reference: ReferenceRun, config: Config) -> list[Change]:
    """Warn about changed files of an image folder, and return them as changes."""
    manifest = reference.result.dataset
    if images.rendered_differently(config, manifest):
        logger.info("images are rendered with other settings or versions than those of the run")
    changed_files = images.changed_files(config, manifest)
    descriptions = [images.describe_files(kind, names) for kind, names in changed_files.items()]
    for description in descriptions:
        logger.warning(f"the image folder has changed: {description}")
    return [changes.from_images(description) for description in descriptions]
