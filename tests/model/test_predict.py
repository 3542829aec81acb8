"""Inference on image files: preprocessed as in training; invalid images are reported and skipped."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from captcha_exp import compose, load
from captcha_exp.cli import interactive, main
from captcha_exp.errors import UserError
from captcha_exp.model.predict import Predictor, find_images, resolve_weights
from captcha_exp.model.saved import evaluate_run
from captcha_exp.training.train import train

FOLDER_OVERRIDES = [text for text in TINY if not text.startswith(("data.count", "data.workers"))]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 images of two bars whose heights are the label, in several formats and sizes."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(100):
        first, second = rng.integers(0, 5, 2)
        array = rng.integers(150, 255, (20 + number % 3, 40, 3), dtype=np.uint8)
        array[18 - 4 * first :, 5:12] = 20
        array[18 - 4 * second :, 25:32] = 20
        kind = ("PNG", "GIF", "BMP", "JPEG")[number % 4]
        image = Image.fromarray(array)
        (image.convert("P") if kind == "GIF" else image).save(
            folder / f"{number:05}-{first}{second}.png", kind
        )
    return folder


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was trained on them for two epochs."""
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPTCHA_EXP_ROOT", str(root))
        overrides = [
            *FOLDER_OVERRIDES,
            "data=folder",
            f"data.path={images}",
            "tracking=none",
            "train.batch_size=8",
        ]
        return train(load(compose(*overrides)), None).run_dir


@pytest.fixture
def run_root(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(run.parents[2]))


@pytest.fixture
def predictor(run: Path, run_root: None) -> Predictor:
    return Predictor(resolve_weights(str(run)), "cpu")


class Command:
    """Runs `captcha-exp predict` in this process, or as a process of its own."""

    def __init__(
        self, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self._root, self._monkeypatch, self._capsys = run.parents[2], monkeypatch, capsys

    def __call__(self, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        words = ["captcha-exp", "predict", *arguments]
        with self._monkeypatch.context() as patch:
            patch.setenv("CAPTCHA_EXP_ROOT", str(self._root))
            patch.setattr(sys, "argv", words)
            patch.setattr(sys, "stdin", io.StringIO(typed))
            with pytest.raises(SystemExit) as ended:
                main.main()
        return subprocess.CompletedProcess(words, int(ended.value.code or 0), *self._capsys.readouterr())

    def in_new_process(self, *arguments: str, typed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "captcha_exp", "predict", *arguments],
            env=os.environ | {"CAPTCHA_EXP_ROOT": str(self._root)},
            input=typed,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def command(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(run, monkeypatch, capsys)


def test_predictions_of_the_test_split_equal_those_of_evaluate(
    run: Path, predictor: Predictor, images: Path
) -> None:
    """Including wrong ones, of which a model this small has many."""
    evaluation, data = evaluate_run(run, "test", "cpu")
    files = [images / data.image_name(int(index)) for index in evaluation.indices]
    expected = [data.alphabet.decode(ids) for ids in evaluation.predicted]

    predictions = list(predictor.predict_all(files))

    assert [prediction.text for prediction in predictions] == expected
    assert [prediction.image for prediction in predictions] == files
    rows = zip(predictions, evaluation.confidences, evaluation.text_confidences, strict=True)
    for prediction, confidences, confidence in rows:
        assert prediction.confidences == pytest.approx(confidences, abs=1e-4)
        assert prediction.confidence == pytest.approx(float(confidence), abs=1e-4)
    wrong = {each.image.name for each in predictions if each.image.stem[-2:] != each.text}
    assert wrong == {misread.image for misread in evaluation.misreads(data)}
    assert 0 < len(wrong) < len(files) or evaluation.accuracy in (0, 1)


def test_a_prediction_does_not_depend_on_the_batch(predictor: Predictor, images: Path) -> None:
    files = sorted(images.iterdir())[:20]

    batched = [prediction.text for prediction in predictor.predict(files)]

    assert batched == [predictor.predict([file])[0].text for file in files]


def test_invalid_images_have_an_error_and_the_others_a_text(
    predictor: Predictor, images: Path, tmp_path: Path
) -> None:
    good = sorted(images.iterdir())[0]
    text = tmp_path / "text.png"
    text.write_text("not an image")

    missing, valid, broken, folder = predictor.predict([tmp_path / "none.png", good, text, tmp_path])

    assert missing.error == "cannot be read: No such file or directory"
    assert len(valid.text) == 2
    assert "is not an image in a supported format" in broken.error
    assert folder.error == "is a folder"
    assert missing.confidence == 0


@pytest.mark.parametrize("which", ["run_dir", "latest", "weights"])
def test_a_run_or_a_weights_file(command: Command, run: Path, images: Path, which: str) -> None:
    name = {"run_dir": str(run), "latest": "latest", "weights": str(run / "model.safetensors")}[which]
    file = str(sorted(images.iterdir())[3])

    done = command(name, file)

    assert (done.returncode, done.stderr) == (0, f"Using {run}\n" if which == "latest" else "")
    name, text, confidence = done.stdout.split()
    assert name == file
    assert len(text) == 2
    assert confidence.endswith("%")


def test_a_folder_is_predicted_recursively_and_json_has_all_fields(
    command: Command, run: Path, images: Path, tmp_path: Path
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    for number, file in enumerate(sorted(images.iterdir())[:3]):
        (inner if number else tmp_path).joinpath(file.name).write_bytes(file.read_bytes())
    (inner / "broken.gif").write_bytes(b"GIF89a")

    done = command(str(run), str(tmp_path), "--json")

    assert done.returncode == 1, "one image is invalid"
    results = json.loads(done.stdout)
    assert len(results) == 4
    assert [set(result) for result in results if "error" in result] == [{"image", "error"}]
    for result in results:
        if "text" in result:
            assert len(result["text"]) == len(result["confidences"]) == 2
            assert 0 < result["confidence"] < 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "x.png"], "'nowhere' is not a run"),
        (["nowhere.safetensors", "x.png"], "nowhere.safetensors: no such file"),
        (["latest", "x.png", "--device", "cuda:7"], "--device=cuda:7: "),
        (["latest", "x.png", "--device", "gpu"], "--device=gpu: "),
        (["latest", "EMPTY"], "has no images"),
    ],
)
def test_an_invalid_argument_is_one_line(
    command: Command, tmp_path: Path, arguments: list[str], words: str
) -> None:
    done = command(*[str(tmp_path) if word == "EMPTY" else word for word in arguments])

    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


# -- the interactive loop ------------------------------------------------------------------------------------


def test_the_loop_continues_after_any_invalid_input(
    command: Command, run: Path, images: Path, tmp_path: Path
) -> None:
    """A missing file, a text file named .png, empty lines, quotes, a file: URI, the end of the input."""
    good = sorted(images.iterdir())[0]
    spaced = tmp_path / "with space.png"
    spaced.write_bytes(good.read_bytes())
    text = tmp_path / "text.png"
    text.write_text("not an image")
    lines = [
        str(good),
        "",
        "   ",
        "none.png",
        str(text),
        str(tmp_path),
        f"'{spaced}'",
        spaced.as_uri(),
        "\0x",
    ]
    escaped = str(spaced).replace(" ", "\\ ")

    done = command(str(run), typed="\n".join([*lines, escaped, str(good)]))

    assert done.returncode == 0
    lines_out = done.stdout.splitlines()
    assert len(lines_out) == 5
    assert len(set(lines_out)) == 1
    assert [line.rpartition(": ")[2] for line in done.stderr.splitlines()[:1]] == [
        "No such file or directory"
    ]
    assert len(done.stderr.splitlines()) == 4
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_the_loop_prints_json_lines(command: Command, run: Path, images: Path) -> None:
    good = sorted(images.iterdir())[0]

    done = command.in_new_process(str(run), "--json", typed=f"{good}\nnone.png\n")

    valid, missing = (json.loads(line) for line in done.stdout.splitlines())
    assert len(valid["text"]) == 2
    assert "error" in missing
    assert done.stderr == ""


def test_at_a_terminal_the_loop_prompts_until_ctrl_d(
    predictor: Predictor, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter([str(sorted(images.iterdir())[0])])
    prompts = []

    def fake_input(prompt: str) -> str:
        prompts.append(prompt)
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", fake_input)
    monkeypatch.setattr("sys.stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())

    interactive.prompt_loop(predictor, as_json=False)

    printed = capsys.readouterr()
    assert prompts == ["image: ", "image: "]
    assert "Ctrl-D to exit" in printed.err
    assert printed.out.count("%") == 1


def test_a_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert interactive.parse_path("~/x.png") == tmp_path / "x.png"
    (tmp_path / "x.png").write_bytes(b"")
    assert find_images(["~/x.png"]) == [tmp_path / "x.png"]


@pytest.mark.parametrize("name", ["x" * 300, "~nobody_of_this_name/x.png", "file://["])
def test_an_impossible_file_name_is_an_invalid_image(predictor: Predictor, name: str) -> None:
    """For the loop and for the command."""
    path = interactive.parse_path(name)
    assert path is not None
    for prediction in predictor.predict([path, *find_images([name])]):
        assert prediction.error.startswith("cannot be read: ")


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no images"):
        find_images([str(tmp_path)])
