"""The command `export`: write a run as one ONNX file, prove it, and log it to MLflow as a model."""

import argparse
import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captcha_exp.cli.output import format_accuracy, get_console
from captcha_exp.config import check_model_name
from captcha_exp.errors import RunFailed, UserError
from captcha_exp.export.export import Export, export_run, is_exported
from captcha_exp.export.register import FILE, log_export
from captcha_exp.runs import find_run
from captcha_exp.tracking.models import ModelNotLogged, ModelRef, UntrackedRun

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoggedExport:
    """An exported file, and where MLflow has it."""

    exported: Export
    model: ModelRef | None
    problem: str | None
    """why MLflow does not have it"""

    def to_json(self) -> dict[str, Any]:
        """Return the values of `export --json`."""
        model = None if self.model is None else self.model.to_json()
        return {**self.exported.to_json(), "mlflow": model, "mlflow_problem": self.problem}


def export(arguments: argparse.Namespace) -> LoggedExport:
    """Export a run, by default into its directory, and log the file to MLflow.

    Raises:
        UserError: there is no directory for the file, the name is not valid, or the run cannot be exported.
    """
    name = arguments.register
    if name is not None:
        try:
            check_model_name(name)
        except ValueError as error:
            raise UserError(f"--register {name}: {error}") from None
    run_dir = find_run(arguments.run, finished=True)
    file = FILE if arguments.quantize == "none" else f"model.{arguments.quantize}.onnx"
    path = run_dir / file if arguments.output is None else Path(arguments.output)
    if arguments.output is not None:
        _check_output(path)
    exported = export_run(run_dir, path, arguments.quantize)
    try:
        return LoggedExport(exported, log_export(exported, run_dir, name), None)
    except ModelNotLogged as error:
        if name is None and isinstance(error, UntrackedRun):
            logger.info(f"{path}: is not in MLflow, as {error}")
        elif name is None:
            logger.warning(f"{path}: is written, but not in MLflow: {error}; the same command tries again")
        return LoggedExport(exported, None, str(error))


def _check_output(path: Path) -> None:
    """Check that a file can be written, and that none is lost but an exported model.

    Raises:
        UserError: it cannot; the line says why.
    """
    if path.suffix != ".onnx":
        raise UserError(f"--output {path}: predict knows an exported model by its name; let it end in .onnx")
    try:
        if not path.parent.is_dir():
            raise UserError(f"--output {path}: the directory {path.parent} does not exist")
        is_other = path.exists() and not (path.is_file() and is_exported(path))
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written: {error.strerror}") from None
    if is_other:
        raise UserError(f"--output {path}: exists and is not an exported model; choose another name")


def check_registered(arguments: argparse.Namespace, result: LoggedExport) -> None:
    """Check that MLflow has the version that --register asks for.

    Raises:
        RunFailed: it does not; the file is written.
    """
    if arguments.register is not None and result.problem is not None:
        raise RunFailed(
            f"--register {arguments.register}: not registered: {result.problem}; "
            f"{result.exported.path} is written and proven"
        )


def print_export(result: LoggedExport, program: str) -> None:
    """Print the file, its proof, and where MLflow has it."""
    out, manifest = get_console(), result.exported.manifest
    path, model = result.exported.path, result.model
    parity, fp32 = manifest.parity, ""
    size = f"{result.exported.num_bytes / 1e6:.2f} MB"
    if manifest.quantization != "none":
        size += f", {manifest.quantization}, instead of {parity['fp32_bytes'] / 1e6:.2f} MB"
        fp32 = "fp32_"
    out.print(f"{path}: {size}, ONNX opset {manifest.opset}", markup=False)
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
    if model is not None:
        version = "" if model.name is None else f", version {model.version} of {model.name}"
        out.print(f"in MLflow at {model.store} as {model.uri}{version}", markup=False)
    out.print("\nnext:")
    file = shlex.quote(str(path))
    for words, description in (("IMAGE ...", "without torch"), ("--self-test", "on another machine")):
        out.print(f"  {program} predict {file} {words}  # {description}", markup=False)
    if model is not None:
        store, uri = shlex.quote(model.store), shlex.quote(model.uri)
        serve = (
            f"MLFLOW_TRACKING_URI={store} mlflow models serve --env-manager local --host 127.0.0.1 -m {uri}"
        )
        out.print(f"  {serve}  # as a service, see docs/serving.md", markup=False)


def _format_accuracy(figures: Mapping[str, float], prefix: str, images: float) -> str:
    low, high = figures[f"{prefix}accuracy_low"], figures[f"{prefix}accuracy_high"]
    correct = int(figures[f"{prefix}correct"])
    return format_accuracy(figures[f"{prefix}accuracy"], (low, high), correct, int(images))
