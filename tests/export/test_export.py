"""Test exported models: the graph, the proof, the file, and the predictor without torch."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from conftest import TINY, Call
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.exported import a_manifest
from torch import Tensor

from captcha_exp import OnnxPredictor, compose, load, runs
from captcha_exp.config import Config, HeadName, resolve
from captcha_exp.data import images, resize
from captcha_exp.errors import RunFailed, UserError
from captcha_exp.export import export, graph, manifest, predictor, quantize
from captcha_exp.export.graph import ExportedRecognizer
from captcha_exp.export.manifest import Manifest, ProofImage
from captcha_exp.model import networks
from captcha_exp.model.answer import Answer
from captcha_exp.runtime.device import detect_machine

SIZES = st.integers(1, 200)

# -- the graph -----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(source=SIZES, target=st.integers(16, 120))
def test_the_resize_has_the_weights_of_training(source: int, target: int) -> None:
    expected = resize.resize_weights(source, target)
    assert np.array_equal(graph.resize_weights(source, target).numpy() * resize.WEIGHT_SCALE, expected)


def random_images(*shape: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@settings(deadline=None)
@given(height=SIZES, width=SIZES, seed=st.integers(0, 9))
def test_the_resize_gives_the_bytes_of_training(height: int, width: int, seed: int) -> None:
    pixels = random_images(2, height, width, 3, seed=seed)
    rows, columns = graph.resize_weights(height, 24), graph.resize_weights(width, 56)
    resized = graph.resize(torch.from_numpy(pixels), rows, columns).numpy()
    assert np.array_equal(np.moveaxis(resized, 1, -1), resize.resize(pixels, 24, 56))


def test_gray_is_that_of_pillow() -> None:
    pixels = random_images(200, 300, 3)
    expected = np.asarray(Image.fromarray(pixels).convert("L"))
    assert np.array_equal(graph.to_gray(torch.from_numpy(pixels)[None])[0, ..., 0].numpy(), expected)


def config_of(head: HeadName, *overrides: str) -> Config:
    lengths = ("captcha.length=4", f"captcha.min_length={2 if head in ('end_class', 'ctc') else 'null'}")
    words = ("captcha.width=56", "captcha.height=24", "model.channels=[8,16]", *lengths, *overrides)
    return resolve(load(compose(*TINY, *words, f"model.head={head}")), detect_machine())


def decisive(config: Config) -> networks.Recognizer:
    """Return a recognizer whose answers do not hang by a thread, as those of an untrained one do."""
    torch.manual_seed(0)
    recognizer = networks.build(config.model, config.captcha).eval()
    for module in recognizer.head.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d):
            with torch.no_grad():
                module.weight.mul_(30)
    return recognizer


@pytest.mark.long
@pytest.mark.parametrize("head", ["position", "grouped_softmax", "end_class", "ctc"])
@pytest.mark.parametrize("channels", [1, 3])
def test_onnx_runtime_answers_like_torch_for_images_of_any_size(head: HeadName, channels: int) -> None:
    import onnxruntime

    config = config_of(head, f"captcha.channels={channels}")
    recognizer = decisive(config)
    model = graph.to_onnx(recognizer, config.captcha, (30, 70))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    module = ExportedRecognizer(recognizer)
    for shape in [
        (1, 30, 70),
        (3, 30, 71),
        (3, 31, 70),
        (5, 24, 56),
        (2, 7, 300),
        (3, 100, 20),
        (64, 25, 57),
    ]:
        pixels = random_images(*shape, 3)
        weights = [graph.resize_weights(shape[1], 24), graph.resize_weights(shape[2], 56)]
        with torch.inference_mode():
            expected = module(graph.Resize(channels)(torch.from_numpy(pixels), *weights))
        ids, *confidences = session.run(manifest.OUTPUTS, {manifest.INPUT: pixels})
        assert np.array_equal(ids, expected[0].numpy()), shape
        for one, other in zip(confidences, expected[1:], strict=True):
            np.testing.assert_allclose(one, other.numpy(), atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("head", ["grouped_softmax", "end_class", "ctc"])
def test_models_with_other_heads_are_quantized(head: HeadName) -> None:
    import onnxruntime

    config = config_of(head)
    originals = list(random_images(8, 30, 70, 3))
    model = graph.to_onnx(decisive(config), config.captcha, (30, 70))
    quantized = quantize.to_int8(model, originals)
    session = onnxruntime.InferenceSession(quantized.SerializeToString())
    for pixels in (originals[0], originals[0][:-1]):
        ids, *_ = session.run(manifest.OUTPUTS, {manifest.INPUT: pixels[None]})
        assert ids.shape == (1, 4)


@pytest.mark.long
def test_many_pixels_of_one_brightness_are_read_like_in_torch() -> None:
    """Sums of pixels in fp32, one after another, would differ by 7e-4."""
    import onnxruntime

    config = config_of("position", "captcha.width=256", "captcha.height=28", "captcha.channels=3")
    recognizer = decisive(config)
    pixels = 200 + random_images(4, 28, 256, 3) // 8
    planes = torch.from_numpy(pixels).movedim(-1, 1)
    with torch.inference_mode():
        *_, expected = ExportedRecognizer(recognizer)(planes)
    session = onnxruntime.InferenceSession(
        graph.to_onnx(recognizer, config.captcha, (28, 256)).SerializeToString()
    )
    (log_probs,) = session.run(["log_probs"], {manifest.INPUT: pixels})
    np.testing.assert_allclose(log_probs, expected.numpy(), atol=1e-4)


@settings(deadline=None)
@given(
    height=st.integers(1, 64),
    width=st.sampled_from([2, 57, 1024, 2048]),
    seed=st.integers(0, 9),
    low=st.integers(0, 254),
)
def test_images_are_normalized_exactly(height: int, width: int, seed: int, low: int) -> None:
    values = low + random_images(2, 3, height, width, seed=seed).astype(np.int64) % (256 - low)
    pixels = torch.from_numpy(values.astype(np.uint8))
    deviation, mean = torch.std_mean(pixels.double() / 255, dim=(1, 2, 3), keepdim=True)
    expected = (pixels / 255 - mean) / (deviation + 1e-3)
    torch.testing.assert_close(networks.normalize(pixels).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [16, 2048])
def test_a_blank_image_is_normalized_to_zeros(width: int) -> None:
    for value in (0, 1, 77, 128, 255):
        found = networks.normalize(torch.full((1, 3, 16, width), value, dtype=torch.uint8))
        assert found.abs().max() <= 1e-2, value


@pytest.mark.long
def test_the_graph_names_nothing_of_the_machine_that_made_it() -> None:
    config = config_of("position")
    content = graph.to_onnx(decisive(config), config.captcha, (24, 56)).SerializeToString()
    assert str(Path(graph.__file__).parents[2]).encode() not in content
    assert b"forward(" not in content


# -- the file ------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_file_says_what_it_is(exported: tuple[Path, Path]) -> None:
    run_dir, path = exported
    found, test = OnnxPredictor(path).manifest, json.loads((run_dir / "test.json").read_text())
    config = runs.load(run_dir).config()
    assert (found.alphabet, found.length, found.head) == (config.captcha.alphabet, 6, "position")
    assert found.test["accuracy"] > 0.9
    assert found.run == run_dir.name
    assert found.test["images"] == test["images"]
    assert found.test["accuracy"] == pytest.approx(test["accuracy"], abs=0.05)  # of fp32
    assert found.parity["images"] == test["images"]
    assert found.parity["max_confidence_difference"] < 2e-5
    onnx.checker.check_model(onnx.load(path), full_check=True)


@pytest.mark.long
def test_the_embedded_images_are_originals_of_the_test_split(exported: tuple[Path, Path]) -> None:
    _, path = exported
    found = OnnxPredictor(path).proof_images()
    assert len(found) == min(32, int(OnnxPredictor(path).manifest.test["images"]))
    assert {each.pixels.shape for each in found} == {(22, 66, 3)}
    assert all(each.name.endswith(f"{each.label}.png") for each in found)
    assert OnnxPredictor(path).self_test() == []


@pytest.mark.long
@pytest.mark.parametrize("part", ["weights", "alphabet", "images", "digest"])
def test_a_changed_byte_fails_the_self_test(exported: tuple[Path, Path], tmp_path: Path, part: str) -> None:
    content = bytearray(exported[1].read_bytes())
    session = OnnxPredictor(exported[1])
    match part:
        case "weights":
            weights = next(
                each for each in onnx.load(exported[1]).graph.initializer if len(each.raw_data) > 999
            )
            position = content.index(weights.raw_data) + 500
        case "alphabet":
            position = content.index(b'"alphabet": "') + len(b'"alphabet": "')
        case "images":
            position = content.index(b'"pixels": "') + 100
        case _:
            position = content.index(session.manifest.sha256.encode())
    content[position] ^= 2
    changed = tmp_path / "changed.onnx"
    changed.write_bytes(content)
    problems = OnnxPredictor(changed, content=bytes(content)).self_test()
    assert problems[0] == "the file has changed since its export: its SHA-256 differs"
    with pytest.raises(UserError, match=r"changed\.onnx: has changed since its export \(its SHA-256 is "):
        OnnxPredictor(changed)


def nearest(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resize to the nearest pixel."""
    height, width = rows.shape[0], columns.shape[0]
    rows = torch.arange(height) * pixels.shape[1] // height
    columns = torch.arange(width) * pixels.shape[2] // width
    return pixels[:, rows][:, :, columns].movedim(-1, 1).float()


def first_channel(pixels: Tensor) -> Tensor:
    return pixels[..., :1]


def reversed_alphabet(self: Manifest, ids: npt.NDArray[np.int64]) -> str:
    return "".join(self.alphabet[::-1][k] for k in ids.tolist() if k >= 0)


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "name", "replacement"),
    [
        (graph, "resize", nearest),
        (graph, "to_gray", first_channel),
        (Manifest, "decode", reversed_alphabet),
    ],
)
def test_an_export_that_reads_otherwise_is_not_written(
    exported: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: Any,
    name: str,
    replacement: Callable[..., Any],
) -> None:
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(exported[1].parent))
    monkeypatch.setattr(target, name, replacement)
    with pytest.raises(RunFailed) as error:
        export.export_run(exported[0], tmp_path / "model.onnx")
    first, *lines = error.value.lines
    assert first.startswith(f"{tmp_path}/model.onnx: not written: ONNX Runtime reads ")
    assert all(line.split(":")[0].endswith(".png") for line in lines[:10])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is not a complete ONNX model"),
        (b"junk" * 1000, "is not a complete ONNX model"),
    ],
)
def test_a_file_that_is_no_model_is_an_error(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        OnnxPredictor(path)


def test_the_model_of_another_program_is_an_error(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [value], [other]),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=10,
    )
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(UserError, match=r"has no metadata; captcha-exp export RUN writes one"):
        OnnxPredictor(tmp_path / "other.onnx")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is not a JSON object"),
        ("{", "Expecting property name"),
        ('{"format": 2}', "has format 2, and this version reads 1"),
        ('{"format": 1}', "lacks alphabet, calibration, case"),
        (a_manifest(alphabet=5).to_json(), "has a wrong alphabet: 5"),
        (a_manifest(test=None).to_json(), "has a wrong test: None"),
        (a_manifest(alphabet="").to_json(), "has the alphabet ''"),
        (a_manifest(alphabet="010").to_json(), "has the alphabet '010'"),
        (a_manifest(length=10**9).to_json(), "has labels of 1 to 1000000000 characters"),
        (a_manifest(min_length=2).to_json(), "has labels of 2 to 1 characters"),
        (a_manifest(head="heart").to_json(), "has the head 'heart'"),
        (a_manifest(quantization="int2").to_json(), "has the quantization 'int2'"),
    ],
)
def test_metadata_that_cannot_be_read_say_why(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Manifest.from_json(text)
    assert Manifest.from_json(a_manifest(alphabet="aé").to_json()).alphabet == "aé"


def test_only_a_file_with_its_own_hash_is_unchanged() -> None:
    content = manifest.sign(b"weights" + a_manifest().to_json().encode())
    assert manifest.is_unchanged(content)
    for other in (b"weights", content + content, content + b"x", content.replace(b"weights", b"Weights")):
        assert not manifest.is_unchanged(other)


def test_packed_images_are_unpacked() -> None:
    packed = [
        ProofImage(f"{n}.png", random_images(n + 1, 2 * n + 3, 3, seed=n), "ab", "ac", 0.5, (0.7, 0.8))
        for n in range(3)
    ]
    for before, after in zip(packed, manifest.unpack_images(manifest.pack_images(packed)), strict=True):
        assert np.array_equal(before.pixels, after.pixels)
        assert replace(before, pixels=after.pixels) == after


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Answer("ab", 0.5, (0.7, 0.8)), []),
        (Answer("ab", 0.5005, (0.7, 0.8)), []),
        (
            Answer("ab", 0.5, (0.7, 0.79)),
            ["1.png: a confidence differs by 0.0100; the limit is 0.001"],
        ),
        (
            Answer("ab", float("nan"), (0.7, 0.8)),
            ["1.png: a confidence differs by nan; the limit is 0.001"],
        ),
        (Answer("ac", 0.5, (0.7, 0.8)), ["1.png: reads 'ac' instead of 'ab'"]),
    ],
)
def test_a_difference_names_its_image(answer: Answer, problem: list[str]) -> None:
    expected = ProofImage("1.png", random_images(2, 2, 3), "ab", "ab", 0.5, (0.7, 0.8))
    assert predictor.describe_difference(expected, answer) == problem


# -- the predictor -------------------------------------------------------------------------------------------


@pytest.mark.long
def test_onnx_runtime_reports_nothing(exported: tuple[Path, Path], tmp_path: Path) -> None:
    """Its telemetry would keep a database in the home directory."""
    code = "import sys; from captcha_exp import OnnxPredictor as P; print(P(sys.argv[1]).self_test())"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", code, exported[1]],
        capture_output=True,
        text=True,
        check=True,
        env=environment | {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
    )
    assert done.stdout == "[]\n"
    assert list(tmp_path.rglob("*onnxruntime*")) == []


@pytest.mark.long
def test_every_kind_of_image_gives_the_same_answer(exported: tuple[Path, Path], tmp_path: Path) -> None:
    reader = OnnxPredictor(exported[1], num_threads=1)
    one = reader.proof_images()[0]
    path = tmp_path / "one.png"
    Image.fromarray(one.pixels).save(path)
    inputs = (path, str(path), path.read_bytes(), Image.open(path), one.pixels)
    assert {answer.text for answer in reader(inputs)} == {one.text}
    gray = one.pixels[..., 0]
    assert len({answer.text for answer in reader([gray, gray[..., None], Image.fromarray(gray)])}) == 1
    assert reader([]) == []
    texts = [each.text for each in reader.proof_images()[:3]]
    buffer = np.empty_like(one.pixels)

    def refill() -> Iterator[npt.NDArray[np.uint8]]:
        for each in reader.proof_images()[:3]:
            buffer[:] = each.pixels
            yield buffer

    assert [answer.text for answer in reader(refill())] == texts


@pytest.mark.long
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((2, 3), np.float32), "image 0: must have pixels"),
        (np.zeros((0, 3), np.uint8), "image 0: must have pixels"),
        (np.zeros((4, 4, 4), np.uint8), "image 0: must have pixels"),
        (np.full((4, 4, 3), (1, 2, 3), np.uint8), "image 0: is blank"),
        (b"", "image 0: is empty"),
        (b"junk", "image 0: is not an image"),
        ("no.png", "no.png: cannot be read: No such file or directory"),
        (Image.new("F", (9, 9)), "image 0: has pixel mode F"),
    ],
)
def test_a_bad_image_is_an_error(exported: tuple[Path, Path], bad: Any, message: str) -> None:
    with pytest.raises(images.InvalidImage, match=message):
        OnnxPredictor(exported[1])([bad])


@pytest.mark.long
@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ("one.png", {}, r"inputs must be a list of images, as in predictor\(\[image\]\)"),
        (Path("one.png"), {}, "inputs must be a list of images"),
        (b"png", {}, "inputs must be a list of images"),
        (Image.new("L", (9, 9)), {}, "inputs must be a list of images"),
        (np.zeros((9, 9, 3), np.uint8), {}, "inputs must be a list of images"),
        (
            [None],
            {},
            "an image must be a path, bytes, an image of Pillow or an array, not <class 'NoneType'>",
        ),
        ([], {"top": "3"}, "top must be int, not '3'"),
        ([], {"top": None}, "top must be int, not None"),
        ([], {"length": 4.0}, r"length must be int, not 4\.0"),
        ([], {"length": True}, "length must be int, not True"),
        ([], {"mask": b"."}, "mask must be str, not b'.'"),
        ([], {"min_confidence": "0.9"}, "min_confidence must be a number, not '0.9'"),
    ],
)
def test_a_wrong_type_is_named(
    exported: tuple[Path, Path], inputs: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        OnnxPredictor(exported[1])(inputs, **options)


@pytest.mark.long
def test_an_image_of_pillow_is_read_as_its_file_is(exported: tuple[Path, Path], tmp_path: Path) -> None:
    """Turned by its EXIF orientation, and with 16 bits per pixel."""
    reader = OnnxPredictor(exported[1])
    pixels = reader.proof_images()[0].pixels
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for name in ("turned.png", "deep.png"):
        path = tmp_path / name
        assert reader([path]) == reader([Image.open(path)])
    assert reader([tmp_path / "turned.png"]) == reader([np.rot90(pixels, -1)])


WITHOUT = "torch", "pydantic", "rich", "omegaconf", "hydra", "mlflow", "scipy", "psutil", "onnx", "matplotlib"
BLOCKED = f"""
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {WITHOUT!r}:
            raise ImportError(f"{{name}} is not installed")
sys.meta_path.insert(0, Blocked())
from captcha_exp.cli.main import main
main()
"""


def run_bare(*words: str, stdin: bytes = b"") -> tuple[int, str, str]:
    """Run the command where only numpy, Pillow and onnxruntime are installed."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *words],
        input=stdin,
        capture_output=True,
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.long
def test_the_command_needs_no_torch(exported: tuple[Path, Path], tmp_path: Path) -> None:
    path = str(exported[1])
    one, two, *_ = OnnxPredictor(path).proof_images()
    (tmp_path / "sub").mkdir()
    Image.fromarray(one.pixels).save(tmp_path / "1.png")
    Image.fromarray(two.pixels).save(tmp_path / "sub/2.png")
    (tmp_path / "notes.txt").write_text("x")
    code, out, err = run_bare("predict", path, str(tmp_path))
    assert (code, err) == (0, "")
    assert [line.split()[1] for line in out.splitlines()] == [one.text, two.text]
    code, out, err = run_bare("predict", path, "-", "--json", stdin=(tmp_path / "1.png").read_bytes())
    (row,) = json.loads(out)
    assert (code, err, row["image"], row["text"]) == (0, "", "-", one.text)
    assert row["confidence"] == pytest.approx(one.confidence, abs=1e-3)
    code, out, _ = run_bare("predict", path, "--self-test")
    assert code == 0
    count = len(OnnxPredictor(path).proof_images())
    assert f": proven here: it reads {count} images of its test split as PyTorch did; test accuracy " in out
    code, out, err = run_bare("predict", path, str(tmp_path / "1.png"), str(tmp_path / "notes.txt"))
    assert code == 1
    assert len(out.splitlines()) == 1
    assert err.startswith(f"{tmp_path}/notes.txt: is not an image in a supported format")
    for words, message in (
        ((path,), "name images, folders, or - for an image on standard input; or add --self-test"),
        ((path, "x.png", "--device=cuda"), "--device=cuda: an exported model runs on the CPU"),
        ((path, str(tmp_path / "sub" / "..") + "/empty"), ""),
    ):
        if not message:
            (tmp_path / "empty").mkdir()
            message = "has no images"
        code, out, err = run_bare("predict", *words)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert message in err


@pytest.mark.long
@pytest.mark.parametrize(
    "words", [("--top", "3"), ("--mask", "[01]{3}0.."), ("--length=6",), ("--min-confidence=0.9999",), ()]
)
def test_the_file_answers_as_the_run_does(
    exported: tuple[Path, Path], call: Call, tmp_path: Path, words: tuple[str, ...]
) -> None:
    for n, image in enumerate(OnnxPredictor(exported[1]).proof_images()[:8]):
        Image.fromarray(image.pixels).save(tmp_path / f"{n}.png")
    results: list[tuple[str, list[tuple[str, list[str]]]]] = []
    for model in exported:
        code, out, err = call("predict", str(model), str(tmp_path), "--json", *words)
        rows = json.loads(out) if code == 0 else []
        read = [(row["text"], [each["text"] for each in row.get("alternatives", [])]) for row in rows]
        if "--top" in words:
            assert [len(each) for _, each in read] == [3] * 8
        if "--mask" in words:
            assert {text[3] for text, _ in read} == {"0"}
        results.append((err, read))
    assert results[0] == results[1]


@pytest.mark.long
def test_the_command_exports_into_the_run_directory(
    exported: tuple[Path, Path], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(exported[1].parent))
    code, out, _ = call("export", "latest", "--json")
    values = json.loads(out)
    assert code == 0
    assert values["path"] == str(exported[0] / "model.onnx")
    assert values["bytes"] == (exported[0] / "model.onnx").stat().st_size
    assert call("export", "latest", "--output", "/nowhere/model.onnx") == (
        2,
        "",
        "--output /nowhere/model.onnx: the directory /nowhere does not exist\n",
    )
    assert call("evaluate", "latest")[0] == 0  # the file does not disturb the record


@pytest.mark.long
def test_another_file_is_not_overwritten(
    exported: tuple[Path, Path], call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(exported[1].parent))
    exists = "exists and is not an exported model; choose another name"
    text = b"captcha_exp: a year of work"
    of_another_project = onnx.helper.make_model(onnx.helper.make_graph([], "resnet", [], []))
    for name, content, message in (
        ("thesis.doc", text, "predict knows an exported model by its name; let it end in .onnx"),
        ("thesis.onnx", text, exists),
        ("resnet.onnx", of_another_project.SerializeToString(), exists),
        ("n" * 300 + ".onnx", text, "cannot be written: File name too long"),
    ):
        path = tmp_path / name
        if len(name) < 255:
            path.write_bytes(content)
        code, out, err = call("export", "latest", "--output", str(path))
        assert (code, out, err) == (2, "", f"--output {path}: {message}\n")
        assert len(name) > 255 or path.read_bytes() == content
