"""Test int8 models: what is quantized, what the file says, and that it proves itself."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Call
from support.exported import a_manifest

from captcha_exp import OnnxPredictor
from captcha_exp.export import quantize
from captcha_exp.export.manifest import Manifest, ProofImage
from captcha_exp.model.answer import Answer


@pytest.fixture(scope="session")
def quantized(exported: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an int8 file of the exported run."""
    from captcha_exp.export.export import export_run

    path = tmp_path_factory.mktemp("quantized") / "model.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPTCHA_EXP_ROOT", str(exported[1].parent))
        export_run(exported[0], path, "int8")
    return path


@pytest.mark.long
def test_only_the_layers_of_the_network_are_int8(exported: tuple[Path, Path], quantized: Path) -> None:
    before, after = onnx.load(exported[1]), onnx.load(quantized)
    layers = quantize.find_layers(before)
    kinds = sorted(node.op_type for node in before.graph.node if node.name in layers)
    assert kinds == ["Conv"] * 4 + ["MatMul"] * 2  # three of the network and its residual block; the head
    made_by = {name: node for node in after.graph.node for name in node.output}
    constants = {each.name: each for each in after.graph.initializer}
    for node in after.graph.node:
        inputs = [made_by[name].op_type for name in node.input[:2] if name in made_by]
        assert (inputs == ["DequantizeLinear"] * 2) == (node.name in layers), node.name
        if node.name in layers:
            weight = constants[made_by[node.input[1]].input[0]]
            assert weight.data_type == onnx.TensorProto.INT8
            values = onnx.numpy_helper.to_array(weight)
            assert np.abs(values.astype(int)).max() <= 64  # 7 bits
            scales = constants[made_by[node.input[1]].input[1]]
            assert list(scales.dims) == [values.shape[-1 if node.op_type == "MatMul" else 0]]
    others = [node for node in after.graph.node if "QuantizeLinear" not in node.op_type]
    others = [node for node in others if node.op_type != "DequantizeLinear"]
    assert len(others) == len(before.graph.node)


@pytest.mark.long
def test_the_file_has_its_own_accuracy_and_answers(exported: tuple[Path, Path], quantized: Path) -> None:
    before, after = OnnxPredictor(exported[1]), OnnxPredictor(quantized)
    assert (before.manifest.quantization, after.manifest.quantization) == ("none", "int8")
    assert after.self_test() == []
    originals = before.proof_images()
    for one, other in zip(originals, after.proof_images(), strict=True):
        assert one.name == other.name
        assert np.array_equal(one.pixels, other.pixels)
    parity, test = after.manifest.parity, after.manifest.test
    assert parity["fp32_bytes"] == exported[1].stat().st_size
    assert {name: before.manifest.test[name] for name in ("correct", "accuracy")} == {
        name: parity[f"fp32_{name}"] for name in ("correct", "accuracy")
    }
    assert parity["fp32_max_confidence_difference"] == before.manifest.parity["max_confidence_difference"]
    assert 0 < parity["max_confidence_difference"] < 0.5
    assert parity["images"] - parity["equal_texts"] >= abs(test["correct"] - parity["fp32_correct"])
    assert test["images"] == before.manifest.test["images"]


@pytest.mark.long
def test_its_figures_are_those_of_the_whole_split(exported: tuple[Path, Path], quantized: Path) -> None:
    root = exported[1].parent / "images"
    listed = json.loads((exported[0] / "dataset.json").read_text())["files"]
    predictor = OnnxPredictor(quantized)
    names = [each["file"] for each in listed if each.get("split") == "test"]
    assert len(names) == predictor.manifest.test["images"]
    answers = predictor([root / name for name in names])
    correct = sum(a.text == name.split("-")[1][:6] for a, name in zip(answers, names, strict=True))
    assert correct == predictor.manifest.test["correct"]


def test_calibration_images_are_spread_over_the_split() -> None:
    assert quantize.choose_images(range(5)) == [0, 1, 2, 3, 4]
    chosen = quantize.choose_images(range(10, 10 + 3 * quantize.NUM_CALIBRATION_IMAGES + 1))
    assert chosen == list(range(10, 10 + 3 * quantize.NUM_CALIBRATION_IMAGES, 3))


class FakePredictor:
    """Answers an image with the text and the confidence that its name has."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def predict_arrays(self, arrays: Sequence[Any]) -> Iterator[Answer]:
        for pixels in arrays:
            confidence = int(pixels[0, 0, 0]) / 100
            yield Answer("ab" if confidence > 0.5 else "cd", confidence, (confidence, 1.0))


def test_accuracy_and_equal_texts_are_those_of_int8() -> None:
    fp32 = {"images": 4, "correct": 4, "accuracy": 1.0, "accuracy_low": 0.51, "accuracy_high": 1.0}
    manifest = a_manifest(test=fp32, parity={"images": 4, "max_confidence_difference": 1e-5})
    images = [
        ProofImage(str(n), np.full((1, 1, 3), value, np.uint8), "", text, 0.9, (0.9, 1.0))
        for n, (value, text) in enumerate([(80, "ab"), (70, "ab"), (60, "cd"), (40, "cd")])
    ]
    labels = ["ab", "ab", "cd", "ab"]  # int8 reads ab, ab, ab, cd
    predictor: Any = FakePredictor(manifest)
    found, own = quantize.measure(predictor, images, labels, 99)
    assert (found.test["correct"], found.test["accuracy"]) == (2, 0.5)
    assert found.test["accuracy_low"] < 0.5 < found.test["accuracy_high"]
    assert found.parity == {
        "images": 4,
        "equal_texts": 3,
        "max_confidence_difference": pytest.approx(0.5),
        "fp32_bytes": 99,
        **{f"fp32_{name}": value for name, value in fp32.items() if name != "images"},
        "fp32_max_confidence_difference": 1e-5,
    }
    assert [each.text for each in own] == ["ab", "ab", "ab", "cd"]
    assert [each.confidence for each in own] == [0.8, 0.7, 0.6, 0.4]


@pytest.mark.long
def test_the_command_states_what_int8_costs(
    exported: tuple[Path, Path], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(exported[1].parent))
    code, out, _ = call("export", "latest", "--quantize", "int8")
    path, lines = exported[0] / "model.int8.onnx", out.splitlines()
    assert code == 0
    found = OnnxPredictor(path).manifest
    size, fp32 = path.stat().st_size / 1e6, exported[1].stat().st_size / 1e6
    text = " ".join(lines)
    assert f"{size:.2f} MB, int8, instead of {fp32:.2f} MB, ONNX opset 18" in text
    assert f"int8 gives {found.parity['equal_texts']} of {found.parity['images']} texts of fp32" in text
    assert text.index("test accuracy of fp32 ") < text.index("test accuracy ", text.index("int8 gives"))
    code, out, _ = call("predict", str(path), "--self-test")
    assert code == 0
    assert "images of its test split as at its quantization; test accuracy " in out
    path.unlink()
