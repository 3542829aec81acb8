"""The exported file as a model in MLflow."""

import logging
import shlex
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import onnx

from captcha_exp import runs
from captcha_exp.config import MlflowConfig
from captcha_exp.errors import UserError
from captcha_exp.export.export import Export, export_run
from captcha_exp.export.manifest import INPUT, Manifest
from captcha_exp.export.predictor import OnnxPredictor
from captcha_exp.tracking.models import ModelNotLogged, ModelRef, OnnxModel, TensorType, log_model

logger = logging.getLogger(__name__)

FILE = "model.onnx"  # in the run directory


def log_export(exported: Export, run_dir: Path, name: str | None = None) -> ModelRef:
    """Log an exported file to the MLflow run of its run; register it as a version of `name`, if given.

    Raises:
        ModelNotLogged: MLflow does not have it; the message is the reason.
    """
    return log_model(run_dir, to_onnx_model(exported), name)


def register_after_training(run_dir: Path) -> None:
    """Export a finished run and register it, if its config has tracking.register; a failure is a warning.

    The training itself has succeeded, and is not repeated for the sake of its export.
    """
    run = runs.load(run_dir)
    tracking = run.config().tracking
    if not isinstance(tracking, MlflowConfig) or tracking.register is None or run.info.result is None:
        return
    if run.info.status != "FINISHED" or run.info.lineage.reproduces is not None:
        return
    try:
        ref = log_export(export_run(run_dir, run_dir / FILE), run_dir, tracking.register)
    except (ModelNotLogged, UserError, OSError) as error:
        again = f"captcha-exp export {shlex.quote(str(run_dir))} --register {shlex.quote(tracking.register)}"
        logger.warning(f"tracking.register={tracking.register}: not registered: {error}; {again} tries again")
    else:
        logger.info(
            f"Registered {run_dir / FILE} in MLflow as version {ref.version} of {ref.name} ({ref.uri})"
        )


def to_onnx_model(exported: Export) -> OnnxModel:
    """Return an exported file as a model for MLflow, with its description."""
    content, manifest = exported.path.read_bytes(), exported.manifest
    graph = onnx.load_model_from_string(content).graph
    images = OnnxPredictor(exported.path, content=content).proof_images()
    test = manifest.test
    return OnnxModel(
        content=content,
        inputs=[_tensor_type(each) for each in graph.input],
        outputs=[_tensor_type(each) for each in graph.output],
        example={INPUT: images[0].pixels[None]},
        requirements=[f"onnx=={onnx.__version__}", f"onnxruntime=={version('onnxruntime')}"],
        metadata={name: value for name, value in asdict(manifest).items() if name != "format"},
        tags={
            "run": manifest.run,
            "test_accuracy": f"{test['accuracy']:.4f}",
            "test_accuracy_low": f"{test['accuracy_low']:.4f}",
            "test_accuracy_high": f"{test['accuracy_high']:.4f}",
            "test_images": f"{test['images']:.0f}",
        },
        description=_describe(manifest),
    )


def _describe(manifest: Manifest) -> str:
    """Return the description of a version."""
    test, parity = manifest.test, manifest.parity
    interval = f"95% confidence interval {test['accuracy_low']:.2%} to {test['accuracy_high']:.2%}"
    labels = f"{test['correct']:,} of {test['images']:,} labels fully correct"
    return (
        f"Test accuracy {test['accuracy']:.2%} ({interval}; {labels}).\n\n"
        f"Run `{manifest.run}`. ONNX Runtime gives every text of PyTorch on the {parity['images']:,} images "
        "of the test split."
    )


def _tensor_type(value: onnx.ValueInfoProto) -> TensorType:
    """Return the type of an input or output; a dimension with a name has any size."""
    tensor = value.type.tensor_type
    shape = tuple(
        each.dim_value if each.WhichOneof("value") == "dim_value" else -1 for each in tensor.shape.dim
    )
    return TensorType(value.name, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape)
