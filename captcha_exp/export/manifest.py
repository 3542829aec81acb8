"""What an exported model says about itself, in the metadata of the ONNX file; imports neither torch nor onnx.

The metadata has one JSON text under `captcha_exp` and test images under `captcha_exp.images`. A SHA-256 of
the whole file, in which the 64 digits of the hash itself are zeros, shows whether a byte has changed.
"""

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = 1  # raised when older predictors cannot read the file
INPUT = "images"
OUTPUTS = ("ids", "confidences", "text_confidences", "log_probs")
MANIFEST_KEY, IMAGES_KEY = "captcha_exp", "captcha_exp.images"
NUM_IMAGES = 32  # embedded images
TOLERANCE = 1e-3  # of a confidence, between runtimes
INT8_TOLERANCE = 1e-2  # of int8 models: rounding to 8 bits turns the last bit of a sum into a step of 1/255
HEADS = ("position", "grouped_softmax", "end_class", "ctc")
QUANTIZATIONS = ("none", "int8")
MAX_LENGTH = 32  # characters of a label
NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'"sha256": "([0-9a-f]{64})"')
MAX_IMAGE_BYTES = 2**26  # of all embedded images


@dataclass(frozen=True)
class Manifest:
    """What an exported model says about itself."""

    format: int
    alphabet: str
    min_length: int
    length: int
    case: str  # fold: the labels had letters of one case
    head: str
    width: int  # pixels, of the images that the network receives
    height: int
    channels: int
    opset: int
    run: str  # name of the run directory
    config_sha256: str
    weights_sha256: str
    torch: str  # version that wrote the file
    calibration: Mapping[str, Any]  # of `model.confidence.Calibration`; the graph contains it
    test: Mapping[str, float]  # images, correct, accuracy, accuracy_low, accuracy_high
    parity: Mapping[str, float]  # images, max_confidence_difference: in ONNX Runtime, against PyTorch
    reference: Mapping[str, Sequence[float]]  # statistics of images of the test split, for `watch`
    quantization: str  # none or int8; parity then has equal_texts as well, and the figures of fp32
    sha256: str = NO_DIGEST

    def to_json(self) -> str:
        """Return the JSON text in the metadata."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Return the manifest in a JSON text.

        Raises:
            ValueError: it is none, or one of a later version.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("is not a JSON object")
        if values.get("format") != FORMAT:
            raise ValueError(f"has format {values.get('format')!r}, and this version reads {FORMAT}")
        values.setdefault("reference", {})  # of a file that was exported before it had one
        types = {field.name: field.type if isinstance(field.type, type) else dict for field in fields(cls)}
        if missing := sorted(types.keys() - values.keys()):
            raise ValueError(f"lacks {', '.join(missing)}")
        if wrong := [name for name, kind in types.items() if not isinstance(values[name], kind)]:
            raise ValueError(f"has a wrong {wrong[0]}: {str(values[wrong[0]])[:40]}")
        found = cls(**{name: values[name] for name in types})
        if problem := next(found._problems(), None):
            raise ValueError(f"has {problem}")
        return found

    def _problems(self) -> Iterator[str]:
        """Yield what no exported model has."""
        if not 1 <= self.min_length <= self.length <= MAX_LENGTH:
            yield f"labels of {self.min_length} to {self.length} characters"
        if not self.alphabet or len(set(self.alphabet)) < len(self.alphabet):
            yield f"the alphabet {self.alphabet[:40]!r}"
        if self.head not in HEADS:
            yield f"the head {self.head[:40]!r}"
        if self.quantization not in QUANTIZATIONS:
            yield f"the quantization {self.quantization[:40]!r}"

    def decode(self, ids: npt.NDArray[np.int64]) -> str:
        """Return the text of class ids (T,), -1 after the last character."""
        return "".join(self.alphabet[k] for k in ids.tolist() if k >= 0)


@dataclass(frozen=True)
class ProofImage:
    """An embedded image of the test split, with what PyTorch predicted."""

    name: str
    pixels: npt.NDArray[np.uint8]  # (H, W, 3), before the resize
    label: str
    text: str
    confidence: float
    confidences: tuple[float, ...]


def pack_images(images: Sequence[ProofImage]) -> str:
    """Return test images as JSON; their pixels, one image after another, are deflated and in base64."""
    rows = [
        {
            "name": each.name,
            "height": each.pixels.shape[0],
            "width": each.pixels.shape[1],
            "label": each.label,
            "text": each.text,
            "confidence": each.confidence,
            "confidences": list(each.confidences),
        }
        for each in images
    ]
    pixels = zlib.compress(b"".join(each.pixels.tobytes() for each in images), 9)
    return json.dumps({"images": rows, "pixels": base64.b64encode(pixels).decode()}, ensure_ascii=False)


def unpack_images(text: str) -> list[ProofImage]:
    """Return the test images in a text.

    Raises:
        ValueError: the text is damaged.
    """
    values = json.loads(text)
    inflater = zlib.decompressobj()
    try:
        pixels = inflater.decompress(base64.b64decode(values["pixels"], validate=True), MAX_IMAGE_BYTES)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    images, start = [], 0
    for row in values["images"]:
        shape = (int(row["height"]), int(row["width"]), 3)
        end = start + shape[0] * shape[1] * 3
        array = np.frombuffer(pixels[start:end], np.uint8).reshape(shape)
        confidences = tuple(row["confidences"])
        images.append(
            ProofImage(row["name"], array, row["label"], row["text"], row["confidence"], confidences)
        )
        start = end
    return images


def sign(content: bytes) -> bytes:
    """Return the content of a file with its SHA-256 in place of NO_DIGEST."""
    digest = hashlib.sha256(content).hexdigest().encode()
    assert content.count(NO_DIGEST.encode()) == 1
    return content.replace(NO_DIGEST.encode(), digest)


def is_unchanged(content: bytes) -> bool:
    """Return whether the SHA-256 in a file is that of the file."""
    matches = list(_DIGEST.finditer(content))
    if len(matches) != 1:
        return False
    start, end = matches[0].span(1)
    unsigned = content[:start] + NO_DIGEST.encode() + content[end:]
    return hashlib.sha256(unsigned).hexdigest().encode() == matches[0][1]
