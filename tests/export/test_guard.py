"""`captcha-exp evaluate MODEL.onnx`: accuracy, baselines and verdicts, through the real command."""

import base64
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Call
from onnx import TensorProto, helper
from PIL import Image
from support.onnx_reader import draw, save_images, sha256_of_images, write_reader
from test_export import run_bare

from captcha_exp.cli.evaluate_onnx import PACKAGES
from captcha_exp.errors import UserError
from captcha_exp.export import guard, speed
from captcha_exp.export.guard import Measurement, Reading
from captcha_exp.export.predictor import OnnxPredictor
from captcha_exp.export.speed import Rate, Speed
from captcha_exp.model.proportions import wilson_interval

PROJECT = Path(__file__).resolve().parents[2]
LABELS = [f"{n * 7919 % 10_000:04}" for n in range(40)]
TEXTS = [*LABELS[:-3], "0000", "0000", "0000"]  # the last three are misread


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with model.onnx, and images/ of which the model misreads three."""
    constant = measurement("+").speed  # no test depends on a clock
    monkeypatch.setattr(guard, "measure_speed", lambda *_: constant)
    write_reader(tmp_path / "model.onnx")
    save_images(tmp_path / "images", LABELS, TEXTS)
    return tmp_path


def run(call: Call, folder: Path, *words: str, model: str = "model.onnx") -> tuple[int, str, str]:
    return call("evaluate", str(folder / model), "--data", str(folder / "images"), *words)


def test_a_model_is_evaluated_and_its_baseline_written(folder: Path, call: Call) -> None:
    baseline = folder / "baseline.json"
    code, out, err = run(call, folder, "--save-baseline", str(baseline))
    assert (code, err) == (0, "")
    low, high = wilson_interval(37, 40)
    first, second, third = out.splitlines()
    assert first == (
        f"{folder}/model.onnx: accuracy 92.50% (95% confidence interval {low:.2%} to {high:.2%}; 37 of 40 "
        "labels fully correct)"
    )
    assert " images/s one by one, " in second
    assert third == f"baseline written to {baseline}"
    values = json.loads(baseline.read_text())
    assert set(values["images"]) == set(sha256_of_images(folder / "images"))
    assert sum(each["correct"] for each in values["images"].values()) == 37
    code, out, err = run(call, folder, "--baseline", str(baseline), "--must-hold", "--json")
    found = json.loads(out)
    assert (code, err, found["worse"], found["correct"]) == (0, "", False, 37)
    assert (found["accuracy_low"], found["accuracy_high"]) == (low, high)
    assert found["findings"][0]["text"].startswith("of 40 images of the baseline, 0 are misread that were ")


def test_a_baseline_is_not_overwritten_without_force(folder: Path, call: Call) -> None:
    baseline = folder / "baseline.json"
    old = replace(measurement("+-"), num_bytes=7).to_json()
    baseline.write_bytes(old)
    words = ("--save-baseline", str(baseline))
    line = f"--save-baseline {baseline}: exists; add --force to overwrite it\n"
    assert run(call, folder, *words) == (2, "", line)
    assert baseline.read_bytes() == old
    assert run(call, folder, *words, "--force")[0] == 0
    assert json.loads(baseline.read_text())["num_bytes"] == (folder / "model.onnx").stat().st_size
    baseline.write_text("")
    assert run(call, folder, *words, "--force")[0] == 0
    assert json.loads(baseline.read_text())["format"] == 1


def test_force_overwrites_no_other_file(folder: Path, call: Call) -> None:
    (folder / "mine.json").write_text('{"format": 1}')
    (folder / "link.json").symlink_to(folder / "nowhere.json")
    for name in ("model.onnx", "mine.json", "link.json"):
        path = folder / name
        before = path.read_bytes() if path.is_file() else None
        line = f"--save-baseline {path}: exists and is not a baseline; choose another name\n"
        for words in ((), ("--force",)):
            assert run(call, folder, "--save-baseline", str(path), *words) == (2, "", line)
        assert (path.read_bytes() if path.is_file() else None) == before


def test_a_baseline_without_its_images_must_not_hold(folder: Path, call: Call) -> None:
    baseline = folder / "baseline.json"
    run(call, folder, "--save-baseline", str(baseline))
    names = sorted((folder / "images").iterdir())
    words = ("--baseline", str(baseline))
    for name in names[:20]:
        name.unlink()
    assert run(call, folder, *words, "--must-hold")[0] == 0  # half of them are enough
    names[20].unlink()
    code, out, err = run(call, folder, *words, "--must-hold")
    assert (code, out) == (2, "")
    assert err == (
        f"--must-hold: 19 of the 40 images of --baseline {baseline} are in --data {folder}/images, and at "
        "least half are needed; name the folder of the baseline, or write a baseline of these images with "
        "the model that it is for: --save-baseline FILE\n"
    )
    code, out, _ = run(call, folder, *words)
    assert code == 0
    assert "21 missing since the baseline" in out


def test_a_worse_model_has_exit_code_3(folder: Path, call: Call) -> None:
    """The model stays and its images are misread, as another model would misread them."""
    baseline, other = folder / "baseline.json", folder / "other.json"
    assert run(call, folder, "--save-baseline", str(baseline))[0] == 0
    values = json.loads(baseline.read_text())
    for image in list(values["images"].values())[:3] + [
        e for e in values["images"].values() if not e["correct"]
    ]:
        image["correct"] = True
    baseline.write_text(json.dumps(values))  # now three are lost: p = 1/8
    assert run(call, folder, "--baseline", str(baseline), "--must-hold")[0] == 0
    for n in (1, 2):
        name = next((folder / "images").glob(f"{n:05}-*"))
        Image.fromarray(draw("0000", n + 9000)).save(name)
    hashes = sha256_of_images(folder / "images")
    values["images"] |= {hashes[n]: {"label": LABELS[n], "text": LABELS[n], "correct": True} for n in (1, 2)}
    baseline.write_text(json.dumps(values))  # five: p = 1/32
    words = ("--baseline", str(baseline), "--must-hold", "--save-baseline", str(other))
    code, out, _ = run(call, folder, *words)
    assert code == 3
    assert "worse than the baseline: accuracy: of 40 images of the baseline, 5 are misread that were" in out
    assert "p = 0.031" in out
    assert not other.exists()
    assert run(call, folder, "--baseline", str(baseline))[0] == 0


def test_a_larger_file_is_worse(folder: Path, call: Call) -> None:
    baseline = folder / "baseline.json"
    run(call, folder, "--save-baseline", str(baseline))
    size = (folder / "model.onnx").stat().st_size
    for padding, expected in ((size // 20, 0), (size // 5, 3)):
        write_reader(folder / "large.onnx", padding=padding)
        words = ("--baseline", str(baseline), "--must-hold")
        code, out, _ = run(call, folder, *words, model="large.onnx")
        assert code == expected, out
    assert "worse than the baseline: size: the file has " in out


def rate(cost: float, deviation: float = 0.01) -> Rate:
    return Rate(100.0, cost, deviation)


def measurement(is_correct: str, cost: float = 1.0, start: int = 0, **values: Any) -> Measurement:
    """Return a measurement of an image for each + (correct) or - (misread)."""
    images = {f"{n:064x}": Reading("1", "1", mark == "+") for n, mark in enumerate(is_correct, start)}
    known: dict[str, Any] = {"cpu": "x", "cores": 2, "onnxruntime": "1.20"} | values
    return Measurement(1, "0" * 64, 1000, Speed(rate(cost), rate(1.0), **known), images)


@pytest.mark.parametrize(
    ("before", "now", "verdict"),
    [
        ("++++++++", "++++++++", "not worse"),
        ("++++++++", "+++-----", "worse"),
        ("++++++++", "++++----", "not worse"),
        ("-----+++", "+++++---", "not worse"),
        ("--++++++++", "++--------", "not worse"),
        ("-+++++++++", "---------+", "worse"),
    ],
)
def test_the_same_images_are_compared_in_pairs(before: str, now: str, verdict: str) -> None:
    found = guard.compare(measurement(before), measurement(now))[0]
    assert (found.name, found.verdict) == ("accuracy", verdict)
    assert "exact McNemar test" in found.text


def test_other_images_are_compared_as_two_proportions() -> None:
    before = measurement("+" * 40)
    found = guard.compare(before, measurement("+" * 30 + "-" * 10, start=100))[0]
    assert found.verdict == "worse"
    assert "(Fisher's exact test of two proportions" in found.text
    assert "40 missing, 40 new since the baseline" in found.text
    found = guard.compare(before, measurement("+" * 38 + "-" * 2, start=100))[0]
    assert found.verdict == "not worse"
    found = guard.compare(before, measurement("+" * 40, start=5))[0]
    assert "of 35 images of the baseline" in found.text
    assert "5 missing, 5 new since the baseline" in found.text


def test_speed_is_compared_beyond_what_repeats_vary_on_equal_machines_alone() -> None:
    before = measurement("+")

    def speed_of(now: Measurement) -> list[str]:
        return [each.verdict for each in guard.compare(before, now)[2:]]

    assert speed_of(measurement("+", cost=1.15)) == ["not worse", "not worse"]
    assert speed_of(measurement("+", cost=1.3)) == ["worse", "not worse"]
    noisy = replace(before.speed, batch_1=rate(1.3, deviation=0.1))
    assert speed_of(replace(before, speed=noisy)) == ["not worse", "not worse"]
    for other in ({"cpu": "y"}, {"cores": 4}, {"onnxruntime": "1.21"}):
        found = guard.compare(before, measurement("+", cost=9, **other))
        assert [each.verdict for each in found[2:]] == ["not compared"]


def test_speed_is_measured_with_the_most_frequent_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ROUNDS", 2)
    predictor = OnnxPredictor(folder / "model.onnx")
    arrays = [draw("1234", n) for n in range(3)]
    found = speed.measure_speed(predictor, [arrays[0][:5], *arrays])
    assert found.cpu
    assert found.onnxruntime.count(".") == 2
    for each in (found.batch_1, found.batch_64):
        assert each.images_per_second > 0
        assert each.cost > 0


def test_the_reference_workload_is_the_documented_one() -> None:
    shapes = {name: list(shape) for name, shape in speed._REFERENCE_SHAPES.items()} | {"y": [1, 16, 48, 64]}
    x, w, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in "xwy")
    nodes, source = [], "x"
    for n in range(4):
        result = "y" if n == 3 else f"h{n}"
        window = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
        nodes.append(helper.make_node("Conv", [source, "w"], [f"c{n}"], **window))  # type: ignore[arg-type]
        nodes.append(helper.make_node("Relu", [f"c{n}"], [result]))
        source = result
    graph = helper.make_graph(nodes, "reference", [x, w], [y])
    opset = [helper.make_opsetid("", 18)]
    built = helper.make_model(graph, opset_imports=opset, ir_version=8, producer_name="")
    assert base64.b64decode(speed._REFERENCE_MODEL) == built.SerializeToString()


@pytest.mark.long
def test_a_model_is_evaluated_without_torch(folder: Path) -> None:
    script = "import sys; sys.modules['torch'] = None; from captcha_exp.cli.main import main; main()"
    words = ("evaluate", str(folder / "model.onnx"), "--data", str(folder / "images"), "--json")
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["correct"] == 37
    code, out, err = run_bare(*words)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "needs packages that are not installed (pydantic is not installed): pip install 'numpy>=2' " in err
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    limits = {parse_requirement(each) for each in project["dependencies"]}
    named = {parse_requirement(each) for each in shlex.split(err.partition("pip install ")[2])}
    assert named <= limits
    assert {name for name, _ in named} == set(PACKAGES)


def parse_requirement(text: str) -> tuple[str, frozenset[str]]:
    """Return the name and the limits of a requirement."""
    name = re.match(r"[\w.-]+", text)
    assert name is not None
    return name[0], frozenset(text[name.end() :].split(","))


@pytest.mark.long
def test_the_packages_of_the_guard_are_all_that_it_imports(folder: Path) -> None:
    """Of the project's dependencies, the others are blocked."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    others = {parse_requirement(each)[0] for each in project["dependencies"]} - set(PACKAGES)
    blocked = {"nvidia-ml-py": "pynvml", "wheezy.captcha": "wheezy"}
    modules = {blocked.get(name, name): None for name in others - {"packaging"}}  # Hydra needs packaging
    script = f"import sys; sys.modules |= {modules!r}; from captcha_exp.cli.main import main; main()"
    words = ("evaluate", str(folder / "model.onnx"), "--data", str(folder / "images"), "--json")
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# -- hostile and mistaken input ------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    values = json.loads(measurement("++-").to_json())
    change(values)
    return json.dumps(values)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "Expecting value"),
        ("[1, 2]", "is not a baseline of format 1"),
        ("{}", "is not a baseline of format 1"),
        ("[" * 100_000, "levels of nesting"),
        (edited(lambda v: v.update(format=2)), "is not a baseline of format 1"),
        (edited(lambda v: v.update(images={})), "images: "),
        (edited(lambda v: v.update(num_bytes=0)), "num_bytes: "),
        (edited(lambda v: v.update(num_bytes="7")), "num_bytes: "),
        (edited(lambda v: v.update(num_bytes=10**30)), "64 bits"),
        (edited(lambda v: v.update(more=1)), "more: "),
        (edited(lambda v: v["images"].update({"../x": {}})), r"images\.\.\./x"),
        (edited(lambda v: v["speed"]["batch_1"].update(cost=0)), r"speed\.batch_1\.cost: "),
        (edited(lambda v: v["speed"]["batch_1"].update(cost=float("nan"))), "not valid JSON|NaN|nan|finite"),
        (edited(lambda v: v["images"][f"{0:064x}"].update(correct=1)), r"correct: "),
        (edited(lambda v: v["images"][f"{0:064x}"].update(label="x" * 999)), r"label: "),
    ],
)
def test_a_hostile_baseline_is_one_line(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(content)
    with pytest.raises(
        UserError, match=rf"cannot be used: .*{problem}.*; write one with --save-base"
    ) as error:
        guard.read_baseline(path)
    assert len(error.value.lines) == 1
    assert "\n" not in error.value.lines[0]


def test_a_baseline_is_read_as_it_was_written(tmp_path: Path) -> None:
    before = measurement("+-+")
    (tmp_path / "baseline.json").write_bytes(before.to_json())
    assert guard.read_baseline(tmp_path / "baseline.json") == before


def test_each_mistake_is_one_line(folder: Path, call: Call) -> None:
    model, images = str(folder / "model.onnx"), str(folder / "images")
    (folder / "empty").mkdir()
    save_images(folder / "named", ["IMG", "photo"], ["1234", "1235"])
    for words, message in (
        ((), "name a folder of labeled images, as in --data held_out"),
        (("--data", images, "--must-hold"), "--must-hold: needs --baseline FILE"),
        (("--data", images, "--device=cuda"), "an exported model runs on the CPU"),
        (("--data", images, "--baseline", "no.json"), "no.json: cannot be used: No such file or directory"),
        (("--data", images, "--save-baseline", "/no/b.json"), "the directory /no does not exist"),
        (("--data", images, "--save-baseline", str(folder)), "is a directory; name a file"),
        (("--data", images, "seed=1"), "seed=1: a model is evaluated with keys of data"),
        (("--data", images, "data.labels=no.csv"), "data.labels=no.csv: no such file"),
        (("--data", str(folder / "empty")), f"--data {folder}/empty: has no images"),
        (("--data", str(folder / "none")), "none"),
        (("--data", str(folder / "named")), "none of 2 images has a label that this model can write: 4 char"),
    ):
        code, out, err = call("evaluate", model, *words)
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert message in err
    code, _, err = call("evaluate", "latest", "--data", images)
    assert (code, err.split(":")[0]) == (2, "--data")


def test_labels_that_the_model_cannot_write_count_as_wrong(folder: Path, call: Call) -> None:
    Image.fromarray(draw("1234", 1)).save(folder / "images/99999-12x4.png")
    code, out, _ = run(call, folder)
    assert code == 0
    assert "37 of 41 labels fully correct" in out
    assert "1 of the labels cannot be written by this model, and count as wrong: 99999-12x4.png" in out


def test_images_that_cannot_be_used_are_named_or_skipped(folder: Path, call: Call) -> None:
    (folder / "images/00099-1234.png").write_text("<html>")
    copy = next((folder / "images").glob("00000-*")).read_bytes()
    (folder / "images/00098-9999.png").write_bytes(copy)
    code, out, err = run(call, folder)
    assert (code, out) == (2, "")
    assert "2 of 42 images cannot be used; fix or remove them, or add data.on_invalid=skip" in err
    assert "00098-9999.png: is the same file as 00000-0000.png, which is labeled '0000'" in err
    code, out, err = run(call, folder, "data.on_invalid=skip")
    assert code == 0
    assert "37 of 40" in out
