"""Test that no changed byte of an exported file, and no other difference, passes for the original."""

import random
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch

from captcha_exp.config import CaptchaConfig
from captcha_exp.errors import RunFailed
from captcha_exp.export import export, graph
from captcha_exp.model.heads import PositionHead
from captcha_exp.model.networks import Recognizer

NUM_POSITIONS = 200
SELF_TESTS = """
import sys
from pathlib import Path
from captcha_exp.cli.main import _dispatch
from captcha_exp.errors import UserError
original, copy = Path(sys.argv[1]).read_bytes(), sys.argv[2]
for line in sys.stdin:
    position, bit = map(int, line.split())
    changed = bytearray(original)
    changed[position] ^= 1 << bit
    Path(copy).write_bytes(changed)
    try:
        code = _dispatch(["predict", copy, "--self-test"])
    except UserError as error:
        code = error.exit_code
        print(error.lines[0])
    print("code", position, code, flush=True)
"""


@pytest.mark.long
def test_no_changed_bit_is_proven(exported: tuple[Path, Path], tmp_path: Path) -> None:
    """In a process of its own, which a damaged graph may crash; the reason must be the file, in one line."""
    size, rng = exported[1].stat().st_size, random.Random(0)
    cases = [(rng.randrange(size), rng.randrange(8)) for _ in range(NUM_POSITIONS)]
    done = subprocess.run(
        [sys.executable, "-c", SELF_TESTS, str(exported[1]), str(tmp_path / "changed.onnx")],
        input="".join(f"{position} {bit}\n" for position, bit in cases),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    codes = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("code ")]
    assert [int(position) for position, _ in codes] == [position for position, _ in cases]
    assert {int(code) for _, code in codes} <= {1, 2}
    assert ": proven here" not in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("difference", ["channels", "classes", "weight", "size"])
def test_a_difference_in_the_graph_is_not_written(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, difference: str
) -> None:
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(exported[1].parent))

    def weaker(recognizer: Recognizer, captcha: CaptchaConfig, size: tuple[int, int]) -> onnx.ModelProto:
        assert isinstance(recognizer.head, PositionHead)
        bias = recognizer.head.classifier.bias
        with torch.no_grad():
            bias.add_(torch.linspace(-9, 9, len(bias)))
        return graph.to_onnx(recognizer, captcha, size)

    def reordered(recognizer: Recognizer, captcha: CaptchaConfig, size: tuple[int, int]) -> onnx.ModelProto:
        decode = recognizer.head.decode
        with monkeypatch.context() as patch:
            patch.setattr(recognizer.head, "decode", lambda logits: decode(logits.flip(-1)))
            return graph.to_onnx(recognizer, captcha, size)

    match difference:
        case "channels":
            to_gray = graph.to_gray
            monkeypatch.setattr(graph, "to_gray", lambda images: to_gray(images.flip(-1)))
        case "size":
            weights = graph.resize_weights
            monkeypatch.setattr(
                graph, "resize_weights", lambda source, target: weights(source, target).roll(1, 0)
            )
        case "classes":
            monkeypatch.setattr(export, "to_onnx", reordered)
        case _:
            monkeypatch.setattr(export, "to_onnx", weaker)
    with pytest.raises(RunFailed) as error:
        export.export_run(exported[0], tmp_path / "model.onnx")
    first, *lines = error.value.lines
    assert first.startswith(f"{tmp_path}/model.onnx: not written: ONNX Runtime reads ")
    end = ".png, cropped by a pixel" if difference == "size" else ".png"
    assert all(line.split(":")[0].endswith(end) for line in lines[:10])
    assert list(tmp_path.iterdir()) == []
