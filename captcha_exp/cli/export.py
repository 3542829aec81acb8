"""The command `export`: write a run as one ONNX file, and prove it."""

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path

from captcha_exp.cli.output import format_accuracy, get_console
from captcha_exp.errors import UserError
from captcha_exp.export.export import Export, export_run
from captcha_exp.runs import find_run


def export(arguments: argparse.Namespace) -> Export:
    """Export a run, by default into its directory.

    Raises:
        UserError: there is no directory for the file, or the run cannot be exported.
    """
    run_dir = find_run(arguments.run, finished=True)
    name = "model.onnx" if arguments.quantize == "none" else f"model.{arguments.quantize}.onnx"
    path = run_dir / name if arguments.output is None else Path(arguments.output)
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: the directory {path.parent} does not exist")
    return export_run(run_dir, path, arguments.quantize)


def print_export(exported: Export, program: str) -> None:
    """Print what was written, and its proof."""
    out, manifest = get_console(), exported.manifest
    parity, fp32 = manifest.parity, ""
    size = f"{exported.num_bytes / 1e6:.2f} MB"
    if manifest.quantization != "none":
        size += f", {manifest.quantization}, instead of {parity['fp32_bytes'] / 1e6:.2f} MB"
        fp32 = "fp32_"
    out.print(f"{exported.path}: {size}, ONNX opset {manifest.opset}", markup=False)
    out.print(
        f"{'the fp32 model is ' if fp32 else ''}proven on the {parity['images']:,} images of the test split: "
        "ONNX Runtime gives every text of PyTorch, and confidences differ by at most "
        f"{parity[f'{fp32}max_confidence_difference']:.1e}"
    )
    if fp32:
        equal = f"{parity['equal_texts']:,} of {parity['images']:,}"
        out.print(f"test accuracy of fp32 {_format_accuracy(parity, fp32, parity['images'])}")
        out.print(f"{manifest.quantization} gives {equal} texts of fp32")
    out.print(f"test accuracy {_format_accuracy(manifest.test, '', manifest.test['images'])}")
    out.print("\nnext:")
    file = shlex.quote(str(exported.path))
    for words, description in (("IMAGE ...", "without torch"), ("--self-test", "on another machine")):
        out.print(f"  {program} predict {file} {words}  # {description}", markup=False)


def _format_accuracy(figures: Mapping[str, float], prefix: str, images: float) -> str:
    low, high = figures[f"{prefix}accuracy_low"], figures[f"{prefix}accuracy_high"]
    correct = int(figures[f"{prefix}correct"])
    return format_accuracy(figures[f"{prefix}accuracy"], (low, high), correct, int(images))
