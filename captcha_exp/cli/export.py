"""The command `export`: write a run as one ONNX file, and prove it."""

import argparse
import shlex
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
    path = run_dir / "model.onnx" if arguments.output is None else Path(arguments.output)
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: the directory {path.parent} does not exist")
    return export_run(run_dir, path)


def print_export(exported: Export, program: str) -> None:
    """Print what was written, and its proof."""
    out, manifest = get_console(), exported.manifest
    test, parity = manifest.test, manifest.parity
    interval = (test["accuracy_low"], test["accuracy_high"])
    accuracy = format_accuracy(test["accuracy"], interval, int(test["correct"]), int(test["images"]))
    size = f"{exported.num_bytes / 1e6:.2f} MB"
    out.print(f"{exported.path}: {size}, ONNX opset {manifest.opset}", markup=False)
    out.print(
        f"proven on the {parity['images']:,} images of the test split: ONNX Runtime gives every text of "
        f"PyTorch, and confidences differ by at most {parity['max_confidence_difference']:.1e}"
    )
    out.print(f"test accuracy {accuracy}")
    file = shlex.quote(str(exported.path))
    out.print("\nnext:")
    for words, description in (("IMAGE ...", "without torch"), ("--self-test", "on another machine")):
        out.print(f"  {program} predict {file} {words}  # {description}", markup=False)
