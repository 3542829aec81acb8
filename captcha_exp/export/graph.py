"""The exported graph: images of any size -> texts and confidences, all in one ONNX model.

Axes: B batch, C channels, H height, W width, T positions in the longest label.

The graph is that of a torch module: conversion to grayscale as in Pillow, the resize of `data.resize`,
normalization, network, and the decoding of the head. Resizing and grayscale are integer arithmetic, so that
the network receives the same bytes in every runtime.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from captcha_exp.config import CaptchaConfig
from captcha_exp.data import resize as numpy_resize
from captcha_exp.data.resize import WEIGHT_SCALE
from captcha_exp.export.manifest import INPUT, OUTPUTS
from captcha_exp.model.networks import Recognizer

OPSET = 18
MAX_SIDE = 4096  # pixels; of the declared dimensions of an image
WEIGHTS = ("rows", "columns")  # that resize images
PLANES = "planes"  # of resized images
LUMA = (19595.0, 38470.0, 7471.0)  # red, green, blue, in 1/65536


class ResizeWeights(nn.Module):
    """The weights that resize images to the size of a recognizer."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height = height
        self.width = width

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights (height, H) and (width, W) for images (B, H, W, 3)."""
        return resize_weights(images.shape[1], self.height), resize_weights(images.shape[2], self.width)


class Resize(nn.Module):
    """The preprocessing of a recognizer: images (B, H, W, 3) uint8 -> planes (B, C, height, width)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the planes, given the weights of `ResizeWeights`."""
        return resize(to_gray(images) if self.channels == 1 else images, rows, columns)


class ExportedRecognizer(nn.Module):
    """A recognizer with decoding: planes (B, C, height, width) -> texts."""

    def __init__(self, recognizer: Recognizer) -> None:
        super().__init__()
        self.recognizer = recognizer

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return class ids (B, T), probabilities of the characters (B, T) and of the texts (B,).

        The last output has the log probabilities (B, T or S, classes) that these are from.
        """
        logits = self.recognizer(planes.movedim(1, -1))
        ids, confidences, text_confidences = self.recognizer.decode(logits)
        return ids, confidences, text_confidences, self.recognizer.log_probs(logits)


def to_gray(images: Tensor) -> Tensor:
    """Convert (B, H, W, 3) uint8 to (B, H, W, 1), as Pillow converts RGB to L.

    The result has integers in fp32, which represents all sums exactly: they are below 2**24.

    Source: ITU-R 601-2 luma transform, in fixed-point numbers.
    """
    return torch.floor((images.float() @ torch.tensor(LUMA)[:, None] + 0x8000) / 0x10000)


def resize(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resize images (B, H, W, C) by the weights (height, H) and (width, W) to planes (B, C, height, width).

    The pixels are integers in fp32, those of `data.resize.resize`.
    """
    planes = images.movedim(-1, 1).float()
    return torch.floor(rows @ planes @ columns.T + 0.5)  # (height, H) @ (B, C, H, W) @ (W, width)


def resize_weights(source_size: int, target_size: int) -> Tensor:
    """Return the weights (target, source) of `data.resize.resize_weights` as fractions, which are exact.

    Only the source pixels of which the filter reaches a target pixel are computed.
    """
    widest: int = torch.sym_max(source_size, target_size)  # type: ignore[no-untyped-call]  # torch has no types for it
    centers = (2 * torch.arange(target_size)[:, None] + 1) * source_size  # in 1 / (2 * target_size) pixels
    # No dividend is negative, as ONNX rounds the quotients of integers toward 0.
    shifted = centers - 2 * widest - target_size + 2 * target_size * widest
    first = torch.div(shifted, 2 * target_size, rounding_mode="floor") - widest + 1
    number = torch.arange((2 * widest + target_size - 1) // target_size)
    index = first + number
    is_inside = (index >= 0) & (index < source_size)
    distance = ((2 * index + 1) * target_size - centers).abs()
    triangle = torch.where(is_inside, (2 * widest - distance).clamp(min=0), 0)
    total = triangle.sum(dim=1, keepdim=True)
    scaled = triangle * WEIGHT_SCALE
    rounded = torch.div(scaled, total, rounding_mode="floor")
    remainder = scaled - rounded * total
    # Of equal remainders, the first one is rounded up first: no two of these keys are equal.
    order = (remainder * number.shape[0] - number).sort(dim=1, descending=True)[1]
    missing = WEIGHT_SCALE - rounded.sum(dim=1, keepdim=True)
    weights = rounded + torch.zeros_like(rounded).scatter(1, order, (number < missing).long())
    dense = torch.zeros(target_size, source_size, dtype=torch.int64)
    return dense.scatter_add(1, index.clamp(0, source_size - 1), weights).float() / WEIGHT_SCALE


def to_onnx(recognizer: Recognizer, captcha: CaptchaConfig, usual_size: tuple[int, int]) -> onnx.ModelProto:
    """Return the ONNX model of a recognizer in evaluation mode, whose weights are fp32 on the CPU.

    It takes images of any size. Only for those of another size than `usual_size`, their height and width, it
    computes the weights to resize them, which takes up to half of the time of a small image.
    """
    batch, height, width = (torch.export.Dim(name, min=1, max=MAX_SIDE) for name in "BHW")
    static = torch.export.Dim.STATIC
    targets = (captcha.height, captcha.width)
    images = torch.zeros(2, captcha.height + 1, captcha.width + 1, 3, dtype=torch.uint8)
    compute_weights, resize = ResizeWeights(*targets), Resize(captcha.channels)
    weights = compute_weights(images)
    planes = resize(images, *weights)
    planes[..., ::2] = 255.0  # not blank
    image_input = (images, (batch, height, width, static))
    weight_inputs = ((weights[0], (static, height)), (weights[1], (static, width)))
    weights_graph = _export(compute_weights, {INPUT: image_input}, WEIGHTS).graph
    inputs = {INPUT: image_input, **dict(zip(WEIGHTS, weight_inputs, strict=True))}
    resize_graph = _export(resize, inputs, (PLANES,)).graph
    model = _export(
        ExportedRecognizer(recognizer), {PLANES: (planes, (batch, static, static, static))}, OUTPUTS
    )
    usual_weights = [
        numpy_resize.resize_weights(*each) / WEIGHT_SCALE for each in zip(usual_size, targets, strict=True)
    ]
    _prepend_resize(model.graph, resize_graph, weights_graph, usual_size, usual_weights)
    onnx.checker.check_model(model, full_check=True)
    return model


def _export(
    module: nn.Module, inputs: dict[str, tuple[Tensor, Any]], outputs: Sequence[str]
) -> onnx.ModelProto:
    """Return the ONNX model of a module; each input has an example and the names of its axes."""
    with torch.no_grad(), _silent():
        program = torch.onnx.export(
            module.eval(),
            tuple(example for example, _ in inputs.values()),
            dynamo=True,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple(axes for _, axes in inputs.values()),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _strip(model)
    return model


def _prepend_resize(
    graph: onnx.GraphProto,
    resize: onnx.GraphProto,
    weights: onnx.GraphProto,
    usual_size: tuple[int, int],
    usual_weights: Sequence[npt.NDArray[np.floating]],
) -> None:
    """Make a graph take images instead of planes: constants resize those of the usual size."""
    usual = onnx.compose.add_prefix_graph(resize, "usual_", rename_inputs=False)
    constants = zip(WEIGHTS, usual_weights, strict=True)
    usual.initializer.extend(numpy_helper.from_array(each, name) for name, each in constants)
    other = onnx.compose.add_prefix_graph(resize, "other_", rename_inputs=False)
    computed = onnx.compose.add_prefix_graph(weights, "weights_", rename_inputs=False, rename_outputs=False)
    nodes = [*computed.node, *other.node]
    del other.node[:]
    other.node.extend(nodes)
    other.initializer.extend(computed.initializer)
    for branch in (usual, other):
        del branch.input[:]  # the images are those of the whole graph
    choice = [
        helper.make_node("Shape", [INPUT], ["size"], start=1, end=3),
        helper.make_node("Equal", ["size", "usual_size"], ["are_usual_sides"]),
        helper.make_node("Cast", ["are_usual_sides"], ["side_flags"], to=TensorProto.INT32),
        helper.make_node("ReduceMin", ["side_flags"], ["size_flag"], keepdims=0),
        helper.make_node("Cast", ["size_flag"], ["is_usual_size"], to=TensorProto.BOOL),
        helper.make_node(
            "If", ["is_usual_size"], [PLANES], name="resize", then_branch=usual, else_branch=other
        ),
    ]
    nodes = [*choice, *graph.node]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.append(resize.input[0])
    graph.initializer.append(numpy_helper.from_array(np.array(usual_size), "usual_size"))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hide the messages of the exporter, which are about its own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes about the source code, with the paths of this machine."""
    assert not model.functions
    model.doc_string = ""
    del model.metadata_props[:]
    _strip_graph(model.graph)


def _is_empty_list(attribute: onnx.AttributeProto) -> bool:
    """Return whether an optional list of numbers is empty, which ONNX Runtime's quantization cannot copy."""
    return attribute.type == onnx.AttributeProto.INTS and not attribute.ints


def _strip_graph(graph: onnx.GraphProto) -> None:
    graph.doc_string = ""
    del graph.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
        kept = [each for each in node.attribute if not _is_empty_list(each)]
        del node.attribute[:]
        node.attribute.extend(kept)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _strip_graph(attribute.g)
    for value in (*graph.input, *graph.output):
        del value.metadata_props[:]
    del graph.value_info[:]
