"""Run the reference run again as a new run, and save the verdict in its run directory."""

import logging
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from captcha_exp.config import Config, Machine, MlflowConfig, flatten_mapping, to_dict
from captcha_exp.data.dataset import with_trusted_cache
from captcha_exp.errors import ConfigError, RunFailed
from captcha_exp.reproduce import changes, compare, images
from captcha_exp.reproduce.causes import attribute, format_verdict
from captcha_exp.reproduce.changes import Change
from captcha_exp.reproduce.compare import Difference, Verdict
from captcha_exp.reproduce.reference import ReferenceRun, RunResult, load_result
from captcha_exp.runs import Lineage, Run
from captcha_exp.runs.fields import changed_values
from captcha_exp.runs.source_code import hash_source_files
from captcha_exp.runtime.text import preview
from captcha_exp.training import train
from captcha_exp.training.oom import TrainingOutOfMemoryError
from captcha_exp.training.recorder import Tracker

logger = logging.getLogger(__name__)

Overrides: TypeAlias = Mapping[str, tuple[Any, Any]]
"""overridden key -> (saved, requested)"""


@dataclass(frozen=True)
class Reproduction:
    """Verdict and details of one reproduction."""

    verdict: Verdict
    summary: str
    reference: str
    """location of the reference run"""
    run_dir: Path
    """of the rerun"""
    overrides: Overrides
    changes: Sequence[Change]
    differences: Sequence[Difference]
    result: RunResult
    """of the rerun"""

    def to_json(self) -> dict[str, Any]:
        """Return the content of reproduction.json."""
        return {
            "verdict": self.verdict,
            "summary": self.summary,
            "reference": self.reference,
            "run_dir": str(self.run_dir),
            "overrides": self.overrides,
            "first_difference": self.differences[0].to_json() if self.differences else None,
            "num_differences": len(self.differences),
            "changes": [change.to_json() for change in self.changes],
            "num_epochs": len(self.result.metrics_by_epoch),
            "num_test_images": self.result.num_test_images,
            "weights_sha256": self.result.weights_sha256,
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
    known_changes = [*changes.from_config(overrides), *changes.from_interruptions(reference)]
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
    reference: ReferenceRun, config: Config, overrides: Overrides, known_changes: Sequence[Change], run: Run
) -> Reproduction:
    expected, actual = reference.result, load_result(run)
    differences = compare.find_differences(expected, actual)
    verdict, same_images = compare.compute_verdict(expected, actual), compare.has_same_images(differences)
    all_changes = [*known_changes, *changes.from_environment(expected, actual)]
    attributed_changes = attribute(all_changes, verdict, same_images, config.train.deterministic)
    return Reproduction(
        verdict=verdict,
        summary=format_verdict(verdict, differences, attributed_changes, config.train.deterministic),
        reference=reference.location,
        run_dir=run.run_dir,
        overrides=overrides,
        changes=attributed_changes,
        differences=differences,
        result=actual,
    )


def with_overrides(saved: Config, requested: Config, machine: Machine) -> tuple[Config, Overrides]:
    """Return the config to run, and key -> (saved, requested) for each changed key.

    An SQLite store of MLflow is replaced by that of this root directory unless another one is requested; a
    server is kept. So is data.cache, if `with_trusted_cache` does.

    Raises:
        ConfigError: the device does not exist on this machine; override device.name.
    """
    name = requested.device.name
    if name not in ("auto", *machine.devices):
        reason = machine.unavailable_reason.get(name.split(":")[0], "no such device")
        raise ConfigError(f"device.name={name}: {reason}; reproduce with device.name=cpu")
    overrides = changed_values(
        flatten_mapping(to_dict(saved)), flatten_mapping(to_dict(requested)), missing=None
    )
    tracking = requested.tracking
    if (
        tracking == saved.tracking
        and isinstance(tracking, MlflowConfig)
        and tracking.uri.startswith("sqlite:")
    ):
        requested = replace(requested, tracking=replace(tracking, uri="auto"))
    if requested.data.cache == saved.data.cache:
        requested = with_trusted_cache(requested)
    return requested, overrides


# -- warnings before the training ----------------------------------------------------------------------------


def _report_code(reference: ReferenceRun) -> None:
    """Warn if the current code differs from that of the run, with the command that checks it out."""
    files = changes.changed_files(reference.result, hash_source_files())
    if not files:
        return
    code = changes.describe_code(reference.result.environment)
    message = f"the code differs from that of the run ({code}): {preview(files)}"
    logger.warning(f"{message}; to restore it: {_checkout_command(reference)}")


def _checkout_command(reference: ReferenceRun) -> str:
    """Return the commands that check out the code of the run."""
    environment = reference.result.environment
    git = environment.get("git") or {}
    commit = str(git.get("commit") or "")
    if not re.fullmatch(r"[0-9a-f]{7,64}", commit):
        version = environment.get("captcha_exp", "VERSION")
        return f"pip install {shlex.quote(f'captcha-exp=={version}')}"
    directory = f"../captcha_exp-{commit[:8]}"
    command = f"git worktree add {directory} {commit}"
    patch = reference.run_dir / "code.diff"
    if not git.get("dirty"):
        return command
    if not patch.is_file():
        return f"{command} (uncommitted changes were not saved)"
    source = shlex.quote(str(patch)) if reference.store_uri is None else "the MLflow artifact code.diff"
    return f"{command}, then in it git apply {source}"


def _report_images(reference: ReferenceRun, config: Config) -> list[Change]:
    """Warn about changed files of an image folder, and return them as changes."""
    changed_files = images.describe_changed_files(config, reference.result.dataset)
    for description in changed_files:
        logger.warning(f"the image folder has changed: {description}")
    return [Change(description, None, None, "numbers", is_input=True) for description in changed_files]
