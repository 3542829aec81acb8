"""The command `predict` with an exported model; needs numpy, Pillow and onnxruntime alone."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from captcha_exp.cli.parser import reading_options
from captcha_exp.data.images import InvalidImage, has_signature, is_image_name
from captcha_exp.errors import UserError
from captcha_exp.export.predictor import OnnxPredictor, read_model, to_pixels
from captcha_exp.model.answer import Answer, ReadingOptions
from captcha_exp.runtime.text import escape_unprintable

STANDARD_INPUT = "-"
BATCH_SIZE = 512  # images that are decoded before they are predicted


def predict(arguments: argparse.Namespace) -> int:
    """Predict images with an ONNX file, or prove it with --self-test; return the exit code.

    Raises:
        UserError: the file cannot be used, a folder has no images, or there is nothing to do.
    """
    if arguments.device not in ("auto", "cpu"):
        raise UserError(f"--device={arguments.device}: an exported model runs on the CPU; leave this out")
    if arguments.self_test:
        if arguments.images:
            raise UserError("--self-test: reads the images in the file; leave out those on the command line")
        path = Path(arguments.run)
        return _self_test(OnnxPredictor(path, content=read_model(path)), arguments.json)
    predictor = OnnxPredictor(arguments.run)
    options = reading_options(arguments)
    predictor.reader(options)  # a mistake is reported before images are read
    if not arguments.images:
        raise UserError(
            f"{arguments.run}: name images, folders, or - for an image on standard input; or add --self-test"
        )
    rows, has_errors = [], False
    names = list(expand_folders(arguments.images))
    for start in range(0, len(names), BATCH_SIZE):
        for name, answer in _predict(predictor, names[start : start + BATCH_SIZE], options):
            has_errors |= isinstance(answer, InvalidImage)
            rows.append(_to_json(name, answer))
            if not arguments.json:
                _print(name, answer)
    if arguments.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    return 1 if has_errors else 0


def _self_test(predictor: OnnxPredictor, as_json: bool) -> int:
    problems = predictor.self_test()
    if as_json:
        values = {"path": str(predictor.path), "proven": not problems, "problems": problems}
        print(json.dumps(values, indent=2, ensure_ascii=False))
    elif problems:
        print(f"{escape_unprintable(str(predictor.path))}: not proven here")
        for line in problems:
            print(f"  {escape_unprintable(line)}")
    else:
        test, count = predictor.manifest.test, len(predictor.proof_images())
        interval = f"{test['accuracy_low']:.2%} to {test['accuracy_high']:.2%}"
        earlier = "PyTorch did" if predictor.manifest.quantization == "none" else "at its quantization"
        print(
            f"{escape_unprintable(str(predictor.path))}: proven here: it reads {count} images of its test "
            f"split as {earlier}; test accuracy {test['accuracy']:.2%} (95% confidence interval {interval})"
        )
    return 1 if problems else 0


def expand_folders(names: Sequence[str]) -> Iterator[str]:
    """Yield the names of images; a folder stands for all images in it, recursively.

    Raises:
        UserError: a folder has no images.
    """
    for name in names:
        if not os.path.isdir(name):  # noqa: PTH112 - Path.is_dir raises for names that are too long
            yield name
            continue
        found = [
            os.path.join(parent, file)  # noqa: PTH118 - text stays text
            for parent, folders, files in os.walk(name)
            if not folders.sort()  # visits them in order
            for file in sorted(files)
            if not file.startswith(".") and _is_image(Path(parent, file))
        ]
        if not found:
            raise UserError(f"{name}: has no images")
        yield from found


def _is_image(path: Path) -> bool:
    if is_image_name(path.name):
        return True
    try:
        with path.open("rb") as file:
            return has_signature(file.read(16))
    except OSError:
        return False


def _predict(
    predictor: OnnxPredictor, names: Sequence[str], options: ReadingOptions
) -> Iterator[tuple[str, Answer | InvalidImage]]:
    """Yield for each image its answer, or why it has none."""
    pixels: dict[int, Any] = {}
    reasons: dict[int, InvalidImage] = {}
    for number, name in enumerate(names):
        try:
            pixels[number] = to_pixels(sys.stdin.buffer.read() if name == STANDARD_INPUT else name)
        except InvalidImage as reason:
            reasons[number] = reason
    answers = dict(zip(pixels, predictor.predict_arrays(list(pixels.values()), options), strict=True))
    for number, name in enumerate(names):
        yield name, answers.get(number) or reasons[number]


def _to_json(name: str, answer: Answer | InvalidImage) -> dict[str, Any]:
    if isinstance(answer, InvalidImage):
        return {"image": name, "error": str(answer)}
    return {"image": name, **answer.to_json()}


def _print(name: str, answer: Answer | InvalidImage) -> None:
    shown = escape_unprintable(name)
    if isinstance(answer, InvalidImage):
        print(f"{shown}: {answer}", file=sys.stderr)
    else:
        print(f"{shown}  {answer.to_line()}")
