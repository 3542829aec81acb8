"""The command `watch`: are these images still those that a model was trained on? Needs no torch."""

import argparse
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from captcha_exp.cli.predict_onnx import BATCH_SIZE, expand_folders
from captcha_exp.data.images import InvalidImage, read_bytes
from captcha_exp.errors import UserError
from captcha_exp.export.image_statistics import STATISTICS, describe_all, read_reference
from captcha_exp.export.predictor import OnnxPredictor, to_pixels
from captcha_exp.export.watch import ALPHA, Movement, WatchResult, compare
from captcha_exp.runtime.text import escape_unprintable

CHANGED_EXIT_CODE = 3
COPY_SECONDS = 60  # images that were all written within this time are taken for a copy
NUM_TO_LABEL = 100  # images of a new source that are enough to measure the accuracy
NUM_FEW = 20  # images; fewer show only a large change


def watch(arguments: argparse.Namespace) -> int:
    """Compare the images of a folder with those of a model's test; return the exit code.

    Raises:
        UserError: the model has no statistics of its test images, or the folder has no image that can be
            used.
    """
    predictor = OnnxPredictor(arguments.model)
    try:
        reference = read_reference(predictor.manifest.reference)
    except ValueError as error:
        raise UserError(f"{arguments.model}: {error}") from None
    if not os.path.isdir(arguments.folder):  # noqa: PTH112 - Path.is_dir raises for names that are too long
        raise UserError(f"{arguments.folder}: is not a folder of images")
    names = list(expand_folders([arguments.folder]))
    order = choose_order(names) if arguments.order == "auto" else arguments.order
    names = in_order(names, order)
    rows, used, unusable = [], list[str](), dict[str, str]()
    for start in range(0, len(names), BATCH_SIZE):
        arrays = []
        for name in names[start : start + BATCH_SIZE]:
            try:
                arrays.append(to_pixels(name))
                used.append(name)
            except InvalidImage as reason:
                unusable[name] = str(reason)
        rows.append(describe_all(predictor, arrays))
    if not used:
        first, problem = next(iter(unusable.items()))
        count = f"none of {len(names):,} images can be used; the first is {first}, which"
        raise UserError(f"{arguments.folder}: {count} {problem}")
    result = compare(reference, np.concatenate(rows))
    _print(result, used, unusable, order, arguments)
    if result.is_changed:
        return CHANGED_EXIT_CODE
    return 1 if unusable else 0


def choose_order(names: Sequence[str]) -> str:
    """Return the order of time, or random if all images were written at once, as by a copy.

    A copy writes them in the order of their names, which may be labels: the first images then
    have the same first character, which is a change.
    """
    times = [_time_of(name) for name in names]
    return "random" if max(times) - min(times) < COPY_SECONDS * 10**9 else "time"


def in_order(names: Sequence[str], order: str) -> list[str]:
    """Return the images by the time of their last change, by name, or by a hash of their content."""
    match order:
        case "time":
            return sorted(names, key=lambda name: (_time_of(name), name))
        case "random":
            return sorted(names, key=_hash_of)
        case _:
            return sorted(names)


def _time_of(name: str) -> int:
    try:
        return Path(name).stat().st_mtime_ns
    except (OSError, ValueError):
        return 0


def _hash_of(name: str) -> str:
    try:
        return hashlib.sha256(read_bytes(Path(name))).hexdigest()
    except InvalidImage:
        return ""


def _print(
    result: WatchResult,
    used: Sequence[str],
    unusable: dict[str, str],
    order: str,
    arguments: argparse.Namespace,
) -> None:
    for name, reason in unusable.items():
        print(f"{escape_unprintable(name)}: {reason}", file=sys.stderr)
    if arguments.json:
        rows = [{"image": name, "error": reason} for name, reason in unusable.items()]
        values = {"model": arguments.model, "order": order, "unusable": rows}
        print(json.dumps(result.to_json() | values, indent=2))
        return
    shown = escape_unprintable(arguments.folder)
    odds = f"order: {order}; false alarms: at most {ALPHA:.0%}"
    count = f"{result.num_images:,} image{'s' * (result.num_images != 1)}"
    if not result.is_changed:
        few = "; so few images show only a large change" if result.num_images < NUM_FEW else ""
        print(
            f"{shown}: no change found in {count}, compared with the {result.num_reference:,} test images in "
            f"the model file ({odds}){few}"
        )
        return
    name, *others = result.moved
    since = result.movements[name].since
    where = f"from about image {since:,} on ({escape_unprintable(used[since - 1])})"
    print(
        f"{shown}: these are not the images that the model was trained on: {describe(result, name)}, {where}"
    )
    print(f"found after {result.found_at:,} of {count} ({odds})")
    if others:
        print(f"moved, too: {', '.join(others)}")
    if order == "name":
        print("the order may be the cause, if it is that of labels: --order random does not depend on names")
    model = escape_unprintable(shlex.quote(arguments.model))
    print(
        f"to see what it costs, label about {NUM_TO_LABEL} of them, and run captcha-exp evaluate {model} "
        "--data DIR"
    )


def describe(result: WatchResult, name: str) -> str:
    """Return the values of a statistic in the test, their median, and its median now."""
    each: Movement = result.movements[name]
    low, high = (format(value, ".4g") for value in each.usual)
    usual = low if low == high else f"mostly {low} to {high}, in the median {each.usual_median:.4g},"
    return f"{name} ({STATISTICS[name]}) was {usual} in the test, and is {each.median:.4g} in the median"
