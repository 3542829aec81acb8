"""Predict with an exported model: imports numpy, Pillow and onnxruntime, and no torch."""

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from captcha_exp.data import images
from captcha_exp.data.images import InvalidImage
from captcha_exp.errors import UserError, one_line
from captcha_exp.export.manifest import (
    IMAGES_KEY,
    INPUT,
    INT8_TOLERANCE,
    MANIFEST_KEY,
    TOLERANCE,
    Manifest,
    ProofImage,
    is_unchanged,
    unpack_images,
)
from captcha_exp.model.answer import Alternative, Answer, Reader, ReadingOptions
from captcha_exp.model.confidence import Calibration

BATCH_SIZE = 64
MAX_MODEL_BYTES = 2**31  # of an ONNX file

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]
"""a path, the content of a file, an image of Pillow, or pixels (H, W, 3) or (H, W) uint8"""


class OnnxPredictor:
    """A recognizer that was exported to an ONNX file.

    >>> OnnxPredictor("model.onnx")(["captcha.png"])
    [Answer(text='r865', confidence=0.98, confidences=(0.99, 1.0, 0.99, 1.0))]
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        num_threads: int | None = None,
        content: bytes | None = None,
    ) -> None:
        """Load the model, onto the CPU.

        Args:
            path: The file.
            num_threads: Threads of ONNX Runtime; by default one per core.
            content: The content of the file, which is then neither read nor checked for changes.

        Raises:
            UserError: the file is missing, damaged, changed, or not written by `captcha-exp export`; or
                onnxruntime is not installed.
        """
        self.path = Path(path)
        self.content = read_model(self.path) if content is None else content
        self._session = _start_session(self.path, self.content, num_threads)
        try:
            metadata = self._session.get_modelmeta().custom_metadata_map  # damaged text is a ValueError
            self.manifest = Manifest.from_json(metadata[MANIFEST_KEY])
            self._calibration = Calibration.from_json(self.manifest.calibration)
        except (KeyError, ValueError) as error:
            reason = "has no metadata" if isinstance(error, KeyError) else f"its metadata {one_line(error)}"
            raise UserError(
                f"{path}: is not a model that this version reads: {reason}; captcha-exp export RUN writes one"
            ) from None
        if content is None and not is_unchanged(self.content):
            raise UserError(
                f"{path}: has changed since its export (its SHA-256 is another one); export the run again"
            )
        self._packed_images = metadata.get(IMAGES_KEY, "")

    def __call__(
        self,
        inputs: Iterable[ImageLike],
        *,
        min_confidence: float | None = None,
        length: int | None = None,
        mask: str | None = None,
        top: int = 1,
    ) -> list[Answer]:
        """Predict the texts of images, in order.

        Args:
            inputs: The images.
            min_confidence: Abstain where it is needed for this fraction of the answers to be right.
            length: Only texts of this many characters.
            mask: Only texts that this mask allows, as in `[0-9]{2}[A-Z]{3}`.
            top: Alternatives for each image.

        Raises:
            InvalidImage: an image cannot be read.
            TypeError: an argument has the wrong type, such as one image instead of a list.
            UserError: the model cannot read in this way.
        """
        options = ReadingOptions(min_confidence, length, mask, top)
        is_one_array = isinstance(inputs, np.ndarray) and inputs.ndim < 4
        if is_one_array or isinstance(inputs, str | bytes | os.PathLike | Image.Image):
            raise TypeError("inputs must be a list of images, as in predictor([image])")
        arrays = []
        for number, each in enumerate(inputs):
            try:
                arrays.append(to_pixels(each))
            except InvalidImage as reason:
                name = each if isinstance(each, str | os.PathLike) else f"image {number}"
                raise InvalidImage(f"{name}: {reason}") from None
        return list(self.predict_arrays(arrays, options))

    def predict_arrays(
        self, arrays: Sequence[npt.NDArray[np.uint8]], options: ReadingOptions | None = None
    ) -> Iterator[Answer]:
        """Yield the answer for each image (H, W, 3); those of one size that follow another form a batch."""
        reader = self.reader(options or ReadingOptions())
        start = 0
        while start < len(arrays):
            end = start + 1
            while end < min(len(arrays), start + BATCH_SIZE) and arrays[end].shape == arrays[start].shape:
                end += 1
            same = arrays[start:end]
            batch = np.stack(same) if len(same) > 1 else same[0][None]
            yield from self._predict_batch(batch, reader)
            start = end

    def reader(self, options: ReadingOptions) -> Reader:
        """Return the reader, which turns the outputs of the model into answers.

        Raises:
            UserError: the model cannot read in this way; the line has the limits.
        """
        manifest = self.manifest
        lengths = (manifest.min_length, manifest.length)
        return Reader(manifest.head, manifest.alphabet, *lengths, self._calibration, options)

    def _predict_batch(self, batch: npt.NDArray[np.uint8], reader: Reader) -> Iterator[Answer]:
        if reader.needs_search:
            (log_probs,) = self._session.run(["log_probs"], {INPUT: batch})
            yield from map(reader.search, log_probs)
            return
        names = ["ids", "confidences", "text_confidences"]
        for ids, confidences, confidence in zip(*self._session.run(names, {INPUT: batch}), strict=True):
            text = self.manifest.decode(ids)
            of_characters = tuple(map(float, confidences[: len(text)]))
            yield reader.answer((Alternative(text, float(confidence), of_characters),))

    def proof_images(self) -> list[ProofImage]:
        """Return the images of the test split in the file, with what PyTorch predicted.

        Raises:
            ValueError: they are damaged.
        """
        return unpack_images(self._packed_images)

    def self_test(self) -> list[str]:
        """Return how this runtime differs from what the file promises; empty if it is proven here."""
        problems = []
        if not is_unchanged(self.content):
            problems.append("the file has changed since its export: its SHA-256 differs")
        try:
            expected = self.proof_images()
        except (ValueError, KeyError, TypeError) as error:
            return [*problems, f"its test images are damaged: {one_line(error)}"]
        if not expected:
            return [*problems, "it has no test images"]
        answers = self.predict_arrays([each.pixels for each in expected])
        tolerance = INT8_TOLERANCE if self.manifest.quantization == "int8" else TOLERANCE
        for image, answer in zip(expected, answers, strict=True):
            problems += describe_difference(image, answer, tolerance)
        return problems


def describe_difference(expected: ProofImage, answer: Answer, tolerance: float = TOLERANCE) -> list[str]:
    """Return how an answer differs from what PyTorch predicted for an image; empty if it does not."""
    if answer.text != expected.text:
        return [f"{expected.name}: reads {answer.text!r} instead of {expected.text!r}"]
    difference = confidence_difference(expected, answer)
    if not difference <= tolerance:  # NaN is a difference, too
        return [f"{expected.name}: a confidence differs by {difference:.4f}; the limit is {tolerance}"]
    return []


def confidence_difference(expected: ProofImage, answer: Answer) -> float:
    """Return the largest difference of a confidence, for equal texts."""
    pairs = zip(
        (answer.confidence, *answer.confidences), (expected.confidence, *expected.confidences), strict=True
    )
    return max(abs(a - b) for a, b in pairs)


def to_pixels(image: ImageLike) -> npt.NDArray[np.uint8]:
    """Return the pixels (H, W, 3) uint8 of an image.

    Raises:
        InvalidImage: the image cannot be read, or is blank.
        TypeError: it is no image.
    """
    if isinstance(image, np.ndarray):
        pixels = _check_array(image)
    elif isinstance(image, Image.Image):
        pixels = images.to_array(images.from_pillow(image), 3)
    elif isinstance(image, bytes):
        pixels = images.to_array(images.decode(image).image, 3)
    elif isinstance(image, str | os.PathLike):
        pixels = images.to_array(images.decode(images.read_bytes(Path(image))).image, 3)
    else:
        raise TypeError(f"an image must be a path, bytes, an image of Pillow or an array, not {type(image)}")
    if images.is_blank(pixels):
        raise InvalidImage("is blank: all pixels are equal")
    return pixels


def _check_array(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the pixels (H, W, 3) of an array.

    Raises:
        InvalidImage: it has another shape or type.
    """
    pixels = image[..., None] if image.ndim == 2 else image
    if image.dtype != np.uint8 or pixels.shape[2:] not in ((1,), (3,)) or 0 in image.shape:
        raise InvalidImage(f"must have pixels (H, W, 3) or (H, W) uint8, not {image.shape} {image.dtype}")
    return np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), order="C")  # callers reuse their buffers


def read_model(path: Path) -> bytes:
    """Read an ONNX file.

    Raises:
        UserError: it cannot be read, or is too large.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise UserError(f"{path}: is not a file")
        if state.st_size > MAX_MODEL_BYTES:
            raise UserError(f"{path}: has more than 2 GiB; it is not an exported recognizer")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from None


def _start_session(path: Path, content: bytes, num_threads: int | None) -> Any:
    """Return an inference session of ONNX Runtime, on the CPU."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"onnxruntime cannot be imported: {one_line(error)}; pip install onnxruntime"
        ) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the classes of onnxruntime's errors are not public
        raise UserError(f"{path}: is not a complete ONNX model: {one_line(error)[:200]}") from None
