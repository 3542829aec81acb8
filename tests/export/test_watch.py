"""`captcha-exp watch`: the statistics, what it says and its exit codes, through the real command."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Call
from PIL import Image
from support.onnx_reader import draw, save_images, write_reader
from test_export import run_bare

from captcha_exp.cli.watch import choose_order, in_order
from captcha_exp.export.image_statistics import STATISTICS, describe, read_reference
from captcha_exp.export.watch import compare, threshold

TEXTS = [f"{n * 7919 % 10_000:04}" for n in range(200)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    write_reader(path, [draw(text, seed) for seed, text in enumerate(TEXTS)])
    return path


def test_the_statistics_are_what_their_descriptions_say() -> None:
    pixels = np.zeros((3, 4, 3), np.uint8)
    pixels[...] = (100, 60, 20)
    pixels[1, 2] = (200, 160, 120)
    found = dict(zip(STATISTICS, describe(pixels, 0.123456), strict=True))
    gray = 0.299 * 100 + 0.587 * 60 + 0.114 * 20
    assert found == {
        "confidence": 0.12346,
        "width": 4,
        "height": 3,
        "brightness": round(gray + 100 / 12, 2),
        "contrast": round(100 * np.sqrt(11) / 12, 2),
        "saturation": 80,
        "warmth": 80,
        "greenness": 0,
        "sharpness": round(2 * 100 / 9 + 2 * 100 / 8, 2),
        "grain": round((100 + 4 * 25) / 12, 2),
        "ink": round(100 / 12, 2),
    }
    assert describe(pixels, float("nan"))[0] == 0
    assert describe(pixels[:1, :1], 1.0)[1:3] == (1, 1)


def test_the_wealth_that_is_needed_is_shared_by_all_statistics() -> None:
    assert threshold(11, 0.02) == pytest.approx(550)
    rng = np.random.default_rng(0)
    rows, k = rng.normal(size=(260, len(STATISTICS))), list(STATISTICS).index("grain")
    rows[230:, k] += 5
    result = compare(rows[:200], rows[200:])
    assert result.moved == ["grain"]
    assert all(each.wealth < 550 for name, each in result.movements.items() if name != "grain")
    grain = result.movements["grain"]
    assert (grain.found_at or 0) > 30
    assert grain.wealth >= 550
    assert 25 <= grain.since <= 33
    assert grain.median > 4
    assert grain.usual_median == np.median(rows[:200, k])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "has no statistics of its test images; export its run again"),
        ({"width": None}, r"has damaged statistics of its test images \(width\)"),
        ({"width": [1, "2"]}, r"\(width\)"),
        ({"width": []}, r"\(width\)"),
        ({"width": [True] * 3}, r"\(width\)"),
        ({"confidence": [float("nan")] * 3}, r"\(confidence\)"),
        ({"ink": [10**400] * 3}, r"\(ink\)"),
        ({"ink": [1.0] * 100_000}, r"\(ink\)"),
        ({"ink": [1.0, 2.0]}, "of unequal numbers"),
    ],
)
def test_a_damaged_reference_says_so(change: dict[str, Any], message: str) -> None:
    whole = {name: [1, 2.5, 3] for name in STATISTICS}
    assert read_reference(whole).shape == (3, len(STATISTICS))
    with pytest.raises(ValueError, match=message):
        read_reference(whole | change if change else {})


def test_unchanged_images_are_not_called_changed(model: Path, tmp_path: Path) -> None:
    save_images(tmp_path / "same", TEXTS[:80])
    code, out, err = run_bare("watch", str(model), str(tmp_path / "same"))
    assert (code, err) == (0, "")
    assert out == (
        f"{tmp_path}/same: no change found in 80 images, compared with the 200 test images in the model file "
        "(order: random; false alarms: at most 2%)\n"
    )
    for path in sorted((tmp_path / "same").iterdir())[19:]:
        path.unlink()
    code, out, _ = run_bare("watch", str(model), str(tmp_path / "same"))
    assert code == 0
    assert ": no change found in 19 images, " in out
    assert out.endswith("; so few images show only a large change\n")


def test_changed_images_are_named_with_the_statistic_that_moved(
    model: Path, tmp_path: Path, call: Call
) -> None:
    save_images(tmp_path / "bright", TEXTS[:60], brightness=160)
    code, out, err = run_bare("watch", str(model), str(tmp_path / "bright"))
    assert (code, err) == (3, "")
    first, second, *_, last = out.splitlines()
    assert ": these are not the images that the model was trained on: brightness (mean gray value) " in first
    assert re.search(
        r" was mostly [\d.]+ to [\d.]+, in the median [\d.]+, in the test, and is [\d.]+ ", first
    )
    assert second.startswith("found after ")
    assert last == (
        f"to see what it costs, label about 100 of them, and run captcha-exp evaluate {model} --data DIR"
    )
    assert "the order may be the cause" not in out
    _, out, _ = call("watch", str(model), str(tmp_path / "bright"), "--order=name")
    assert "the order may be the cause" in out
    save_images(tmp_path / "doubtful", TEXTS[:60], confidence=120)
    code, out, _ = call("watch", str(model), str(tmp_path / "doubtful"), "--json")
    values = json.loads(out)
    assert (code, values["changed"], values["moved"][0], values["images"]) == (3, True, "confidence", 60)
    assert values["found_at"] < 20
    assert values["statistics"]["confidence"]["median"] < 0.5 < values["statistics"]["confidence"]["usual"][0]


def test_images_that_cannot_be_used_are_named(model: Path, tmp_path: Path) -> None:
    save_images(tmp_path / "some", TEXTS[:20])
    (tmp_path / "some/page.png").write_text("<html>")
    code, out, err = run_bare("watch", str(model), str(tmp_path / "some"))
    assert (code, len(out.splitlines())) == (1, 1)
    assert err.startswith(f"{tmp_path}/some/page.png: is not an image")
    for path in (tmp_path / "some").glob("0*.png"):
        path.unlink()
    code, out, err = run_bare("watch", str(model), str(tmp_path / "some"))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"{tmp_path}/some: none of 1 images can be used; the first is " in err


def test_each_mistake_is_one_line(model: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "empty").mkdir()
    write_reader(tmp_path / "old.onnx")
    for words, line in (
        ((model, tmp_path / "empty"), f"{tmp_path}/empty: has no images\n"),
        ((model, tmp_path / "none"), f"{tmp_path}/none: is not a folder of images\n"),
        ((model, model), f"{model}: is not a folder of images\n"),
        (
            (tmp_path / "old.onnx", tmp_path),
            f"{tmp_path}/old.onnx: has no statistics of its test images; export its run again\n",
        ),
    ):
        assert call("watch", *map(str, words)) == (2, "", line)


def test_the_order_is_that_of_time_of_names_or_of_hashes(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("b", "a", "c")]
    for n, name in enumerate(names):
        Image.fromarray(draw("1234", n)).save(name, "PNG")
        os.utime(name, ns=(10**18 + n, 10**18 + n))
    assert in_order(sorted(names), "time") == names
    assert in_order(names, "name") == sorted(names)
    assert choose_order(names) == "random"  # written at once
    os.utime(names[0], ns=(10**18 - 10**11, 10**18 - 10**11))
    assert choose_order(names) == "time"
    assert sorted(in_order(names, "random")) == sorted(names)
    assert in_order([*names, str(tmp_path / "gone")], "random")[0].endswith("gone")
