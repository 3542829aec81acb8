"""The command `evaluate` with an exported model: accuracy, speed, size, and a baseline; needs no torch."""

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captcha_exp.cli.overrides import quote
from captcha_exp.errors import UserError, one_line
from captcha_exp.runtime.text import escape_unprintable, preview

if TYPE_CHECKING:
    from captcha_exp.export.guard import Finding, LabeledImage, Measurement
    from captcha_exp.export.manifest import Manifest

WORSE_EXIT_CODE = 3
MAX_SHOWN = 10  # images that cannot be used
PACKAGES = (
    *("numpy", "pillow", "onnxruntime", "pydantic", "hydra-core", "omegaconf", "pyyaml", "rich"),
    *("psutil", "scipy"),
)
"""that this command imports"""


def check_flags(arguments: argparse.Namespace) -> None:
    """Check that a run has no flags of an exported model.

    Raises:
        UserError: it is.
    """
    flags = {
        "--data": arguments.data,
        "--baseline": arguments.baseline,
        "--save-baseline": arguments.save_baseline,
        "--must-hold": arguments.must_hold,
        "--force": arguments.force,
    }
    given = [*(flag for flag, value in flags.items() if value), *arguments.overrides]
    if given:
        raise UserError(
            f"{given[0]}: is for a file of captcha-exp export; {arguments.run} is a run, which has images of "
            "its own"
        )


def evaluate(arguments: argparse.Namespace) -> int:
    """Evaluate an ONNX file on a folder of labeled images; return the exit code.

    Raises:
        UserError: the file, the folder or the baseline cannot be used.
    """
    if arguments.device not in ("auto", "cpu"):
        raise UserError(f"--device={arguments.device}: an exported model runs on the CPU; leave this out")
    if arguments.data is None:
        raise UserError(f"{arguments.run}: name a folder of labeled images, as in --data held_out")
    if arguments.must_hold and arguments.baseline is None:
        raise UserError("--must-hold: needs --baseline FILE; --save-baseline FILE writes one")
    target = None if arguments.save_baseline is None else Path(arguments.save_baseline)
    try:
        if target is not None:
            _check_target(target, arguments.force)
        return _evaluate(arguments, target)
    except ImportError as error:
        raise UserError(
            f"evaluate: needs packages that are not installed ({one_line(error)}): "
            f"pip install {shlex.join(required_packages())}"
        ) from None


def required_packages() -> list[str]:
    """Return the packages that this command needs, with the versions that pyproject.toml allows."""
    try:
        lines = importlib.metadata.requires("captcha-exp") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    limits = {name[0]: line for line in lines if ";" not in line and (name := re.match(r"[\w.-]+", line))}
    return [limits.get(name, name) for name in PACKAGES]


def _check_target(path: Path, force: bool) -> None:
    from captcha_exp.export.guard import is_baseline

    if not os.path.isdir(path.parent):  # noqa: PTH112 - Path.is_dir raises for names that are too long
        raise UserError(f"--save-baseline {path}: the directory {path.parent} does not exist")
    if os.path.isdir(path):  # noqa: PTH112 - as for its parent
        raise UserError(f"--save-baseline {path}: is a directory; name a file")
    if not os.path.lexists(path):
        return
    if not is_baseline(path):
        raise UserError(f"--save-baseline {path}: exists and is not a baseline; choose another name")
    if not force:
        raise UserError(f"--save-baseline {path}: exists; add --force to overwrite it")


def _evaluate(arguments: argparse.Namespace, target: Path | None) -> int:
    from captcha_exp.export import guard
    from captcha_exp.export.predictor import OnnxPredictor
    from captcha_exp.runtime.console import set_up_logging
    from captcha_exp.runtime.files import write_atomically

    set_up_logging(arguments.log_level)
    before = None if arguments.baseline is None else guard.read_baseline(Path(arguments.baseline))
    predictor = OnnxPredictor(arguments.run)
    guard.check_alphabet(predictor)
    images = load_labeled_images(arguments.data, arguments.overrides)
    if before is not None and arguments.must_hold:
        guard.check_shared(before, images, arguments.baseline, arguments.data)
    impossible = check_labels(images, predictor.manifest, arguments.data)
    measured = guard.measure(predictor, hashlib.sha256(predictor.content).hexdigest(), images)
    findings = [] if before is None else guard.compare(before, measured)
    is_worse = any(each.verdict == "worse" for each in findings)
    fails = is_worse and arguments.must_hold
    if target is not None and not fails:
        write_atomically(target, measured.to_json())
    if arguments.json:
        values = {
            "model": arguments.run,
            "data": arguments.data,
            **guard.to_json(measured, findings),
            "impossible_labels": impossible,
            "worse": is_worse if findings else None,
            "saved": None if target is None or fails else str(target),
        }
        print(json.dumps(values, indent=2))
    else:
        _print(arguments, measured, findings, impossible)
        if target is not None:
            shown = escape_unprintable(str(target))
            print(f"{shown}: not written, as the model is worse" if fails else f"baseline written to {shown}")
    return WORSE_EXIT_CODE if fails else 0


def load_labeled_images(folder: str, overrides: Sequence[str]) -> "list[LabeledImage]":
    """Return the images of a folder or archive with labels, found as in a training with data=folder.

    Of files with equal content, the first one counts.

    Raises:
        UserError: it has none, or some cannot be used and data.on_invalid is error; the lines say why.
    """
    from captcha_exp.cli.hydra_config import try_compose
    from captcha_exp.config import FolderConfig
    from captcha_exp.data.images import InvalidImage
    from captcha_exp.data.sources.files import unwrap
    from captcha_exp.data.sources.folder import read_labels
    from captcha_exp.export.guard import LabeledImage
    from captcha_exp.export.predictor import to_pixels

    for each in overrides:
        if not each.startswith("data.") or each.startswith("data.path="):
            raise UserError(f"{each}: a model is evaluated with keys of data, such as data.labels=folders")
    given = [f"data.path={quote(folder)}", *overrides]
    data = try_compose(["data=folder", *given], None).to_config(None).data
    assert isinstance(data, FolderConfig)
    try:
        found = read_labels(data, Path(folder))
    except UserError as error:
        start = f"data.path={folder}"
        raise UserError(*(line.replace(start, f"--data {folder}", 1) for line in error.lines)) from None
    labels = {each.name: each.label for each in found.candidates if not each.reason}
    unusable = {each.name: each.reason for each in found.candidates if each.reason}
    images: dict[str, LabeledImage] = {}
    for name, content in found.files.read(sorted(labels)):
        try:
            pixels = to_pixels(unwrap(content))
        except InvalidImage as reason:
            unusable[name] = str(reason)
            continue
        sha256 = hashlib.sha256(unwrap(content)).hexdigest()
        image = LabeledImage(name, sha256, unicodedata.normalize("NFC", labels[name]), pixels)
        first = images.setdefault(sha256, image)
        if first.label != image.label:
            unusable[name] = f"is the same file as {first.name}, which is labeled {first.label!r}"
    _report_unusable(folder, unusable, len(images), data.on_invalid == "skip")
    return sorted(images.values(), key=lambda each: each.name)


def _report_unusable(folder: str, unusable: dict[str, str], num_good: int, may_skip: bool) -> None:
    """Name the images that cannot be used.

    Raises:
        UserError: there are some, and they may not be skipped, or there are no others.
    """
    if not unusable:
        return
    total = len(unusable) + num_good
    problem = f"--data {folder}: {len(unusable):,} of {total:,} images cannot be used"
    rows = [
        f"  {escape_unprintable(name)}: {reason}" for name, reason in sorted(unusable.items())[:MAX_SHOWN]
    ]
    if len(unusable) > MAX_SHOWN:
        rows.append(f"  and {len(unusable) - MAX_SHOWN:,} more")
    if not num_good or not may_skip:
        skip = ", or add data.on_invalid=skip" if num_good else ""
        raise UserError(f"{problem}; fix or remove them{skip}", *rows)
    print(f"warning: {escape_unprintable(problem)}; evaluated on the others", file=sys.stderr)
    for row in rows:
        print(row, file=sys.stderr)


def check_labels(images: "Sequence[LabeledImage]", manifest: "Manifest", folder: str) -> list[str]:
    """Return the names of images whose label the model cannot write.

    Raises:
        UserError: it can write none of them, as where file names are not labels.
    """
    from captcha_exp.export.guard import can_write

    impossible = [each for each in images if not can_write(each.label, manifest)]
    if len(impossible) == len(images):
        first = impossible[0]
        lengths = str(manifest.length)
        if manifest.min_length < manifest.length:
            lengths = f"{manifest.min_length} to {lengths}"
        raise UserError(
            f"--data {folder}: none of {len(images):,} images has a label that this model can write: "
            f"{lengths} characters of {manifest.alphabet!r}; {escape_unprintable(first.name)} has "
            f"{first.label!r}; labels are in the file names or in labels.csv"
        )
    return [each.name for each in impossible]


def _print(
    arguments: argparse.Namespace,
    measured: "Measurement",
    findings: "Sequence[Finding]",
    impossible: Sequence[str],
) -> None:
    low, high = measured.accuracy_interval
    single, batch = measured.speed.batch_1, measured.speed.batch_64
    model = escape_unprintable(arguments.run)
    print(
        f"{model}: accuracy {measured.accuracy:.2%} (95% confidence interval {low:.2%} to {high:.2%}; "
        f"{measured.num_correct:,} of {len(measured.images):,} labels fully correct)"
    )
    print(
        f"{single.images_per_second:,.0f} images/s one by one, {batch.images_per_second:,.0f} in batches of "
        f"64 (one thread, images in memory); {measured.num_bytes / 1e6:.2f} MB"
    )
    if impossible:
        count = f"{len(impossible):,} of the labels"
        print(f"{count} cannot be written by this model, and count as wrong: {preview(impossible)}")
    if not findings:
        return
    worse = [each for each in findings if each.verdict == "worse"]
    names = " and ".join(each.name for each in worse)
    verdict = f"worse than the baseline: {names}" if worse else "not worse than the baseline"
    print(f"{verdict}: {(worse or findings)[0].text}")
    for each in findings:
        if each is not (worse or findings)[0]:
            print(f"  {each.name} ({each.verdict}): {each.text}")
