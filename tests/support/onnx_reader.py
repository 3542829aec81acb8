"""A tiny exported model without torch: it reads the red values of the first pixels of an image.

The class ids are the red values of the first four pixels of the first row, and the confidence of the text is
that of the fifth one, divided by 255.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from captcha_exp.export.image_statistics import make_reference
from captcha_exp.export.manifest import INPUT, MANIFEST_KEY, OUTPUTS, Manifest, sign
from captcha_exp.export.predictor import OnnxPredictor
from captcha_exp.model.confidence import NOT_CALIBRATED

LENGTH = 4


def write_reader(
    path: Path, arrays: Sequence[npt.NDArray[np.uint8]] = (), padding: int = 0, **values: Any
) -> None:
    """Write the model, with a reference of these test images, and bytes that make the file larger."""
    numbers: Mapping[str, float] = {"images": 1, "accuracy": 1.0}
    known: dict[str, Any] = {
        "format": 1,
        **dict.fromkeys(("min_length", "length"), LENGTH),
        **dict.fromkeys(("width", "height", "channels", "opset"), 1),
        **dict.fromkeys(("run", "config_sha256", "weights_sha256", "torch"), "x"),
        "alphabet": "0123456789",
        "case": "keep",
        "head": "position",
        "calibration": NOT_CALIBRATED.to_json(),
        "test": numbers,
        "parity": numbers,
        "reference": {},
        "quantization": "none",
    }
    manifest = Manifest(**(known | values))
    if arrays:
        predictor = OnnxPredictor(path, content=_model(manifest, padding))
        manifest = Manifest(**(known | {"reference": make_reference(predictor, arrays)} | values))
    path.write_bytes(sign(_model(manifest, padding)))


def _model(manifest: Manifest, padding: int) -> bytes:
    ends: dict[str, list[int]] = {
        "start": [0, 0, 0],
        "end": [1, LENGTH, 1],
        "start_confidence": [0, LENGTH, 0],
        "end_confidence": [1, LENGTH + 1, 1],
        "axes": [1, 2, 3],
        "inner": [1, 3],
        "all": [1, 2, 3],
    }
    constants = [numpy_helper.from_array(np.array(value), name) for name, value in ends.items()]
    constants.append(numpy_helper.from_array(np.array(255, np.float32), "scale"))
    constants.append(numpy_helper.from_array(np.zeros(padding, np.uint8), "padding"))
    nodes = [
        helper.make_node("Slice", [INPUT, "start", "end", "axes"], ["text_pixels"]),
        helper.make_node("Squeeze", ["text_pixels", "inner"], ["text_bytes"]),
        helper.make_node("Cast", ["text_bytes"], [OUTPUTS[0]], to=TensorProto.INT64),
        helper.make_node("Slice", [INPUT, "start_confidence", "end_confidence", "axes"], ["pixel"]),
        helper.make_node("Squeeze", ["pixel", "all"], ["byte"]),
        helper.make_node("Cast", ["byte"], ["value"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["value", "scale"], [OUTPUTS[2]]),
        helper.make_node("Cast", ["text_bytes"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["values", "scale"], [OUTPUTS[1]]),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "reader",
            [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["B", "H", "W", 3])],
            [
                helper.make_tensor_value_info(OUTPUTS[0], TensorProto.INT64, ["B", LENGTH]),
                helper.make_tensor_value_info(OUTPUTS[1], TensorProto.FLOAT, ["B", LENGTH]),
                helper.make_tensor_value_info(OUTPUTS[2], TensorProto.FLOAT, ["B"]),
            ],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    onnx.helper.set_model_props(model, {MANIFEST_KEY: manifest.to_json()})
    return bytes(model.SerializeToString())


def draw(text: str, seed: int, confidence: int = 250, brightness: int = 128) -> npt.NDArray[np.uint8]:
    """Return an image (12, 30, 3) of noise that the model reads as this text of digits."""
    rng = np.random.default_rng(seed)
    pixels = (brightness + rng.normal(0, 20, (12, 30, 3))).clip(0, 255).astype(np.uint8)
    pixels[0, :LENGTH, 0] = [int(digit) for digit in text]
    pixels[0, LENGTH, 0] = confidence - seed % 7
    return pixels


def save_images(folder: Path, labels: Sequence[str], texts: Sequence[str] = (), **values: Any) -> None:
    """Write an image for each label, which the model reads as the text of the same number."""
    folder.mkdir()
    for number, (label, text) in enumerate(zip(labels, texts or labels, strict=True)):
        Image.fromarray(draw(text, number + 1000, **values)).save(folder / f"{number:05}-{label}.png")


def sha256_of_images(folder: Path) -> list[str]:
    """Return the hashes of the files of a folder, by name."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())]
