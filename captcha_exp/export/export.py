"""Export a run to one ONNX file, and prove that the file reads as the run does.

The proof compares the file in ONNX Runtime, given the original images of the whole test split, with the run
in PyTorch, given the resized images that it was trained on: every text has to be equal, every confidence
within `TOLERANCE`. The same has to hold for some of the images after cropping, as the file resizes images of
the usual size by other nodes than those of any other size.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from PIL import Image

from captcha_exp import runs
from captcha_exp.config import Config, to_dict
from captcha_exp.data import images
from captcha_exp.data.alphabet import Alphabet
from captcha_exp.data.dataset import Dataset
from captcha_exp.data.resize import resize
from captcha_exp.errors import RunFailed
from captcha_exp.export import quantize
from captcha_exp.export.graph import OPSET, to_onnx
from captcha_exp.export.image_statistics import make_reference
from captcha_exp.export.manifest import (
    FORMAT,
    IMAGES_KEY,
    MANIFEST_KEY,
    NUM_IMAGES,
    Manifest,
    ProofImage,
    pack_images,
    sign,
)
from captcha_exp.export.predictor import OnnxPredictor, confidence_difference, describe_difference
from captcha_exp.model.evaluate import Evaluation, evaluate
from captcha_exp.model.networks import Recognizer
from captcha_exp.model.saved import load_images_of
from captcha_exp.model.weights import load_weights, max_file_bytes, weights_sha256
from captcha_exp.runs import SavedRun
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.console import progress_bar
from captcha_exp.runtime.files import sha256_of_json, write_atomically
from captcha_exp.runtime.text import escape_unprintable

logger = logging.getLogger(__name__)

MAX_SHOWN = 10  # images of a failed proof


@dataclass(frozen=True)
class Export:
    """An exported file, and its proof."""

    path: Path
    manifest: Manifest
    num_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the values of `export --json`."""
        left_out = ("format", "reference")
        values = {name: value for name, value in vars(self.manifest).items() if name not in left_out}
        return {"path": str(self.path), "bytes": self.num_bytes, **values}


def export_run(run_dir: Path, path: Path, quantization: str = "none") -> Export:
    """Write the ONNX file of a finished run, and prove it.

    With quantization "int8", the fp32 file is proven but not written; the int8 file says how many texts it
    gives of PyTorch's, and contains its own answers.

    Raises:
        RunFailed: the file does not read as the run does; the lines name the images, and nothing is written.
        UserError: the run has no weights, or its images are not there any more; restore them.
    """
    run = runs.load(run_dir)
    config = devices.for_inference(run.config(), "cpu")
    device = devices.setup_device(config)
    model, _ = load_weights(run.path(runs.WEIGHTS, max_file_bytes(config)), device)
    spec, data = load_images_of(run, config)
    test = evaluate(model, data.split("test", device, 0), config)
    originals = spec.source.load_originals(spec.scan, test.indices.tolist())
    expected = _expected(test, data, originals)
    logger.info(f"Exporting {run_dir}")
    graph = to_onnx(model, config.captcha, _usual_size(originals))
    manifest = _describe(run, model, config, test)
    unproven = OnnxPredictor(path, content=_to_bytes(graph, manifest, []))
    largest = max(
        prove(unproven, each) for each in (expected, _cropped(model, config, expected[:NUM_IMAGES]))
    )
    parity = {"images": len(expected), "max_confidence_difference": largest}
    manifest = replace(manifest, parity=parity, reference=make_reference(unproven, originals))
    step = max(1, len(expected) // NUM_IMAGES)
    content = sign(_to_bytes(graph, manifest, expected[::step][:NUM_IMAGES]))
    if quantization == quantize.INT8:
        logger.info("Quantizing to int8")
        chosen = quantize.choose_images(data.split("validation", device, 0).indices.tolist())
        graph = quantize.to_int8(graph, spec.source.load_originals(spec.scan, chosen))
        labels = [data.alphabet.decode(ids) for ids in test.targets]
        unproven = OnnxPredictor(path, content=_to_bytes(graph, manifest, []))
        manifest, expected = quantize.measure(unproven, expected, labels, len(content))
        manifest = replace(manifest, reference=make_reference(unproven, originals))
        content = sign(_to_bytes(graph, manifest, expected[::step][:NUM_IMAGES]))
    predictor = OnnxPredictor(path, content=content)
    if problems := predictor.self_test():
        raise RunFailed(f"{path}: not written, as the self-test fails", *problems)
    write_atomically(path.resolve(), content)  # the target of a symbolic link
    return Export(path, predictor.manifest, len(content))


def is_exported(path: Path) -> bool:
    """Return whether a file is an exported model, perhaps of another version."""
    content = path.read_bytes()
    try:
        model = onnx.load_from_string(content)
    except Exception:  # the class of protobuf's error has no types
        return False
    return any(each.key == MANIFEST_KEY for each in model.metadata_props)


def _describe(run: SavedRun, model: Recognizer, config: Config, test: Evaluation) -> Manifest:
    """Return the manifest of a file that is not proven yet."""
    low, high = test.accuracy_interval
    return Manifest(
        format=FORMAT,
        alphabet=config.captcha.alphabet,
        min_length=config.captcha.shortest_length,
        length=config.captcha.length,
        case=config.captcha.case,
        head=str(config.model.head),
        width=config.captcha.width,
        height=config.captcha.height,
        channels=config.captcha.channels,
        opset=OPSET,
        run=run.run_dir.name,
        config_sha256=sha256_of_json(to_dict(run.config())),
        weights_sha256=weights_sha256(model),
        torch=torch.__version__,
        calibration=model.calibration.to_json(),
        test={
            "images": len(test.indices),
            "correct": test.num_correct,
            "accuracy": test.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
        },
        parity={},
        reference={},
        quantization="none",
    )


def _usual_size(images: Sequence[npt.NDArray[np.uint8]]) -> tuple[int, int]:
    """Return the most frequent height and width."""
    ((size, _),) = Counter(image.shape[:2] for image in images).most_common(1)
    height, width = size
    return height, width


def _expected(
    test: Evaluation, data: Dataset, originals: Sequence[npt.NDArray[np.uint8]]
) -> list[ProofImage]:
    """Return the original images of a split, with what PyTorch predicted."""
    alphabet, rows = data.alphabet, []
    for n, (index, pixels) in enumerate(zip(test.indices.tolist(), originals, strict=True)):
        text = alphabet.decode(test.predicted[n])
        confidences = tuple(map(float, test.confidences[n][: len(text)]))
        confidence = float(test.text_confidences[n])
        name, label = data.image_name(index), data.labels[index]
        rows.append(ProofImage(name, pixels, label, text, confidence, confidences))
    return rows


@torch.inference_mode()
def _cropped(model: Recognizer, config: Config, originals: Sequence[ProofImage]) -> list[ProofImage]:
    """Return cropped images, whose size is not the usual one, with what PyTorch predicts.

    An image whose side is one pixel stays as it is.
    """
    captcha, rows = config.captcha, []
    for each in originals:
        pixels = each.pixels[:-1, :-1] if min(each.pixels.shape[:2]) > 1 else each.pixels
        array = images.to_array(Image.fromarray(pixels), captcha.channels)
        resized = resize(array[None], captcha.height, captcha.width)
        ids, confidences, (confidence,) = model.decode(model(torch.from_numpy(resized)))
        text = Alphabet(captcha.alphabet).decode(ids[0].tolist())
        of_characters = tuple(map(float, confidences[0, : len(text)]))
        name = f"{each.name}, cropped by a pixel"
        rows.append(
            replace(
                each,
                name=name,
                pixels=pixels,
                text=text,
                confidence=float(confidence),
                confidences=of_characters,
            )
        )
    return rows


def prove(predictor: OnnxPredictor, expected: Sequence[ProofImage]) -> float:
    """Check that a model reads images as expected; return the largest difference of a confidence.

    Raises:
        RunFailed: it does not; the lines name the images.
    """
    problems, largest = [], 0.0
    with progress_bar(f"Comparing {len(expected):,} images", len(expected)) as bar:
        answers = predictor.predict_arrays([each.pixels for each in expected])
        for image, answer in zip(expected, answers, strict=True):
            bar.advance(1)
            if found := describe_difference(image, answer):
                problems += found
            else:
                largest = max(largest, confidence_difference(image, answer))
    if problems:
        more = [f"and {len(problems) - MAX_SHOWN:,} more"] if len(problems) > MAX_SHOWN else []
        raise RunFailed(
            f"{predictor.path}: not written: ONNX Runtime reads {len(problems):,} of {len(expected):,} test "
            "images otherwise than PyTorch",
            *(f"  {escape_unprintable(line)}" for line in problems[:MAX_SHOWN] + more),
        )
    return largest


def _to_bytes(graph: onnx.ModelProto, manifest: Manifest, images: Sequence[ProofImage]) -> bytes:
    """Return the content of an ONNX file with this metadata."""
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    onnx.helper.set_model_props(model, {MANIFEST_KEY: manifest.to_json(), IMAGES_KEY: pack_images(images)})
    return bytes(model.SerializeToString())
