"""Test an exported file elsewhere: in JavaScript, and in a fresh environment without torch.

Both install packages from the network. npm's are kept in build/node.
"""

import json
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from support.exported import bars

from captcha_exp import OnnxPredictor
from captcha_exp.model.predict import Predictor, find_images

PROJECT = Path(__file__).resolve().parents[2]
PAGE = PROJECT / "docs" / "javascript.md"
NODE = PROJECT / "build" / "node"
BARE = ("numpy", "pillow", "onnxruntime")
NUM_IMAGES = 500

pytestmark = pytest.mark.slow


def run(*words: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def script() -> Path:
    """Return the script of the page, beside the packages that the page installs."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    page = PAGE.read_text(encoding="utf-8")
    (install,) = re.findall(r"^npm (install .+)$", page, re.MULTILINE)
    (code,) = re.findall(r"```js\n(.+?)```", page, re.DOTALL)
    NODE.mkdir(parents=True, exist_ok=True)
    (NODE / "package.json").touch()
    if not all((NODE / "node_modules" / name).is_dir() for name in ("onnxruntime-node", "pngjs")):
        (NODE / "package.json").write_text("{}")
        run("npm", *install.split(), cwd=NODE)
    path = NODE / "predict.mjs"
    path.write_text(code, encoding="utf-8")
    return path


def test_javascript_gives_the_embedded_answers(exported: tuple[Path, Path], script: Path) -> None:
    *lines, last = run("node", script, exported[1]).splitlines()
    expected = OnnxPredictor(exported[1]).proof_images()
    assert last == f"{len(expected)} of {len(expected)} test images are read as at the export"
    for line, image in zip(lines, expected, strict=True):
        name, text, confidence = line.split()
        assert (name, text) == (image.name, image.text)
        assert float(confidence) == pytest.approx(image.confidence, abs=1e-3)


def test_javascript_reads_png_files(exported: tuple[Path, Path], script: Path, tmp_path: Path) -> None:
    opaque = bars("010110", 1000)
    shaded = opaque.copy()
    shaded.putalpha(Image.fromarray(np.random.default_rng(0).integers(0, 256, (22, 66), dtype=np.uint8)))
    names = [str(tmp_path / name) for name in ("opaque.png", "shaded.png", "gray.png")]
    for image, name in zip((opaque, shaded, opaque.convert("L")), names, strict=True):
        image.save(name)
    lines = run("node", script, exported[1], *names).splitlines()
    for line, name, answer in zip(lines, names, OnnxPredictor(exported[1])(names), strict=True):
        assert line.split()[:2] == [name, answer.text]
        assert float(line.split()[2]) == pytest.approx(answer.confidence, abs=1e-5)


def test_mistakes_in_javascript_are_one_line(
    exported: tuple[Path, Path], script: Path, tmp_path: Path
) -> None:
    bars("010110", 1000).save(tmp_path / "photo.png", "JPEG")
    for words, line in (
        ([], "usage: node predict.mjs MODEL.onnx [IMAGE.png ...]\n"),
        ([exported[1], tmp_path / "photo.png"], f"{tmp_path}/photo.png: is not a PNG file; convert it\n"),
    ):
        done = subprocess.run(["node", script, *words], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_javascript_notices_a_changed_weight(
    exported: tuple[Path, Path], script: Path, tmp_path: Path
) -> None:
    model = onnx.load(exported[1])
    for tensor in model.graph.initializer:
        if tensor.name.endswith("classifier.bias"):
            values = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values + np.array([9, -9], np.float32), tensor.name))
    onnx.save(model, tmp_path / "changed.onnx")
    done = subprocess.run(
        ["node", script, tmp_path / "changed.onnx"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "differs: " in done.stdout


def test_the_wheel_reads_as_the_run_does(exported: tuple[Path, Path], tmp_path: Path) -> None:
    source, images = tmp_path / "source", tmp_path / "images"
    names = run("git", "ls-files", "-z", cwd=PROJECT).split("\0")
    for name in filter(None, names):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, source / name)
    images.mkdir()
    for n in range(NUM_IMAGES):
        bars(f"{n % 64:06b}", 5000 + n).save(images / f"{n:04}.png")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("captcha_exp-*.whl")
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", wheel)
    run(python, "-m", "pip", "install", *BARE)
    command = python.with_name("captcha-exp")
    found = json.loads(run(command, "predict", exported[1], images, "--json", cwd=tmp_path))
    expected = list(
        Predictor(exported[0] / "model.safetensors", "cpu").predict_all(find_images([str(images)]))
    )
    assert len(expected) == NUM_IMAGES
    assert [(Path(row["image"]).name, row["text"]) for row in found] == [
        (each.image.name, each.text) for each in expected
    ]
    assert ": proven here: " in run(command, "predict", exported[1], "--self-test", cwd=tmp_path)
