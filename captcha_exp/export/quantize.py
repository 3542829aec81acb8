"""Quantize the network of an exported graph to int8.

Only convolutions and linear layers are quantized: their weights per output channel, their activations by the
range that they have on images of the validation split. Preprocessing and decoding stay as they are, so the
network receives the same bytes as before.

Source: Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only
inference, CVPR 2018, section 3, applied after training.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from captcha_exp.export.manifest import INPUT, Manifest, ProofImage
from captcha_exp.export.predictor import OnnxPredictor, confidence_difference
from captcha_exp.model.proportions import wilson_interval

INT8 = "int8"  # the choice of --quantize, and its name in the manifest
NUM_CALIBRATION_IMAGES = 256
BATCH_SIZE = 32
LAYERS = ("Conv", "Gemm", "MatMul")


def to_int8(model: onnx.ModelProto, images: Sequence[npt.NDArray[np.uint8]]) -> onnx.ModelProto:
    """Return the model with an int8 network, calibrated on images (H, W, 3) of any size.

    Weights have 7 bits: with 8, sums of two products overflow on x86 CPUs without VNNI, which would then
    read otherwise than those with it.
    """
    from onnxruntime import quantization  # starts threads, which a forked process would not have

    with tempfile.TemporaryDirectory() as folder, _silent():
        path = Path(folder, "int8.onnx")
        quantization.quantize_static(
            model,
            path,
            _Batches(images),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(LAYERS),
            nodes_to_quantize=find_layers(model),
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        quantized = onnx.load(path)
    del quantized.metadata_props[:]
    _sort_nodes(quantized.graph)
    onnx.checker.check_model(quantized, full_check=True)
    return quantized


def _sort_nodes(graph: onnx.GraphProto) -> None:
    """Put each node behind those that it needs; the quantization overlooks those of graphs inside nodes."""
    known = {"", *(each.name for each in (*graph.initializer, *graph.input))}
    waiting, ordered = list(graph.node), []
    while waiting:
        ready = next(node for node in waiting if _needed_by(node) <= known)
        waiting.remove(ready)
        ordered.append(ready)
        known.update(ready.output)
    del graph.node[:]
    graph.node.extend(ordered)


def _needed_by(node: onnx.NodeProto) -> set[str]:
    """Return the names of the values that a node takes from the graph around it."""
    names = set(node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            inner = attribute.g
            own = {each.name for each in (*inner.initializer, *inner.input)}
            own.update(name for each in inner.node for name in each.output)
            names |= {name for each in inner.node for name in _needed_by(each)} - own
            names |= {each.name for each in inner.output} - own
    return names


def find_layers(model: onnx.ModelProto) -> list[str]:
    """Return the names of the convolutions and linear layers: the nodes whose second input is a constant."""
    constants = {each.name for each in model.graph.initializer}
    return [node.name for node in model.graph.node if node.op_type in LAYERS and node.input[1] in constants]


def choose_images(indices: Sequence[int]) -> list[int]:
    """Return the indices of the images to calibrate with, evenly spaced over these."""
    step = max(1, len(indices) // NUM_CALIBRATION_IMAGES)
    return list(indices[::step][:NUM_CALIBRATION_IMAGES])


def measure(
    predictor: OnnxPredictor, expected: Sequence[ProofImage], labels: Sequence[str], fp32_bytes: int
) -> tuple[Manifest, list[ProofImage]]:
    """Return the manifest of a quantized model, and the images with its own answers.

    Args:
        predictor: The quantized model, with the manifest of the fp32 model.
        expected: The images of the test split, with what PyTorch predicted.
        labels: Their labels, in the case of the texts.
        fp32_bytes: Size of the file of the fp32 model.
    """
    answers = list(predictor.predict_arrays([each.pixels for each in expected]))
    pairs = [(a, b) for a, b in zip(expected, answers, strict=True) if a.text == b.text]
    num_correct = sum(a.text == label for a, label in zip(answers, labels, strict=True))
    low, high = wilson_interval(num_correct, len(labels))
    fp32, test = predictor.manifest, predictor.manifest.test
    manifest = replace(
        fp32,
        quantization=INT8,
        test={
            "images": len(labels),
            "correct": num_correct,
            "accuracy": num_correct / len(labels),
            "accuracy_low": low,
            "accuracy_high": high,
        },
        parity={
            "images": len(expected),
            "equal_texts": len(pairs),
            "max_confidence_difference": max((confidence_difference(a, b) for a, b in pairs), default=0.0),
            "fp32_bytes": fp32_bytes,
            **{f"fp32_{name}": value for name, value in test.items() if name != "images"},
            "fp32_max_confidence_difference": fp32.parity["max_confidence_difference"],
        },
    )
    own = [
        replace(image, text=answer.text, confidence=answer.confidence, confidences=answer.confidences)
        for image, answer in zip(expected, answers, strict=True)
    ]
    return manifest, own


class _Batches:
    """The batches that calibrate a model, as ONNX Runtime reads them; a batch has images of one size."""

    def __init__(self, images: Sequence[npt.NDArray[np.uint8]]) -> None:
        self._batches = _batch(images)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}


def _batch(images: Sequence[npt.NDArray[np.uint8]]) -> Iterator[npt.NDArray[np.uint8]]:
    by_size: dict[tuple[int, ...], list[npt.NDArray[np.uint8]]] = {}
    for image in images:
        by_size.setdefault(image.shape, []).append(image)
    for group in by_size.values():
        for start in range(0, len(group), BATCH_SIZE):
            yield np.stack(group[start : start + BATCH_SIZE])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hide onnxruntime's advice to optimize the graph before it is quantized."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
