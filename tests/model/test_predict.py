"""A picture file is read as the training saw it; what cannot be read is said, and the rest goes on."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, Heard
from PIL import Image

from captcha_exp import compose, load
from captcha_exp.cli import interactive
from captcha_exp.errors import UserError
from captcha_exp.model.evaluate import evaluate_run
from captcha_exp.model.predict import Predictor, find_images, resolve_weights
from captcha_exp.training.train import train

FOLDER = [text for text in TINY if not text.startswith(("data.count", "data.workers"))]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 picture files of two bars, whose heights are the label; of several formats and sizes."""
    folder = tmp_path_factory.mktemp("images")
    chance = np.random.default_rng(0)
    for number in range(100):
        first, second = chance.integers(0, 5, 2)
        array = chance.integers(150, 255, (20 + number % 3, 40, 3), dtype=np.uint8)
        array[18 - 4 * first :, 5:12] = 20
        array[18 - 4 * second :, 25:32] = 20
        kind = ("PNG", "GIF", "BMP", "JPEG")[number % 4]
        image = Image.fromarray(array)
        (image.convert("P") if kind == "GIF" else image).save(
            folder / f"{number:05}-{first}{second}.png", kind
        )
    return folder


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was trained on them, badly."""
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPTCHA_EXP_ROOT", str(root))
        overrides = [*FOLDER, "data=folder", f"data.path={pictures}", "tracking=none", "train.batch_size=8"]
        return train(load(compose(*overrides)), None, Heard()).run_dir


@pytest.fixture
def at_home(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(run.parents[2]))


@pytest.fixture
def reader(run: Path, at_home: None) -> Predictor:
    return Predictor(resolve_weights(str(run)), "cpu", Heard())


def command(run: Path, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "captcha_exp", "predict", *arguments],
        env=os.environ | {"CAPTCHA_EXP_ROOT": str(run.parents[2])},
        input=typed,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_picture_of_the_test_split_is_answered_as_evaluate_did(
    run: Path, reader: Predictor, pictures: Path
) -> None:
    """The wrong ones too, of which a model this small has many."""
    evaluation, data = evaluate_run(run, "test", Heard(), "cpu")
    files = [pictures / data.image_name(int(row)) for row in evaluation.indices]
    expected = [data.alphabet.decode(ids) for ids in evaluation.predicted]

    readings = list(reader.predict_all(files, Heard()))

    assert [reading.text for reading in readings] == expected
    assert [reading.image for reading in readings] == files
    for reading, confidences in zip(readings, evaluation.confidences, strict=True):
        assert reading.confidences == pytest.approx(confidences, abs=1e-4)
        assert reading.confidence == pytest.approx(float(np.prod(confidences)), abs=1e-4)
    wrong = {reading.image.name for reading in readings if reading.image.stem[-2:] != reading.text}
    assert wrong == {error.image for error in evaluation.misreads(data)}
    assert 0 < len(wrong) < len(files) or evaluation.accuracy in (0, 1)


def test_the_batch_a_picture_is_read_in_does_not_matter(reader: Predictor, pictures: Path) -> None:
    files = sorted(pictures.iterdir())[:20]

    together = [reading.text for reading in reader.predict(files)]

    assert together == [reader.predict([file])[0].text for file in files]


def test_what_cannot_be_read_has_an_error_and_the_rest_a_text(
    reader: Predictor, pictures: Path, tmp_path: Path
) -> None:
    good = sorted(pictures.iterdir())[0]
    text = tmp_path / "text.png"
    text.write_text("no picture")

    missing, read, broken, folder = reader.predict([tmp_path / "none.png", good, text, tmp_path])

    assert missing.error == "cannot be read: No such file or directory"
    assert len(read.text) == 2
    assert "is no picture of a known kind" in broken.error
    assert folder.error == "is a folder"
    assert missing.confidence == 0


@pytest.mark.parametrize("which", ["folder", "latest", "weights"])
def test_a_run_or_a_weights_file(run: Path, at_home: None, pictures: Path, which: str) -> None:
    name = {"run_dir": str(run), "latest": "latest", "weights": str(run / "model.safetensors")}[which]
    file = str(sorted(pictures.iterdir())[3])

    done = command(run, name, file)

    assert (done.returncode, done.stderr) == (0, "")
    name, text, confidence = done.stdout.split()
    assert name == file
    assert len(text) == 2
    assert confidence.endswith("%")


def test_a_folder_is_read_whole_and_json_says_it_all(run: Path, pictures: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    for number, file in enumerate(sorted(pictures.iterdir())[:3]):
        (inner if number else tmp_path).joinpath(file.name).write_bytes(file.read_bytes())
    (inner / "broken.gif").write_bytes(b"GIF89a")

    done = command(run, str(run), str(tmp_path), "--json")

    assert done.returncode == 1, "one could not be read"
    answers = json.loads(done.stdout)
    assert len(answers) == 4
    assert [set(answer) for answer in answers if "error" in answer] == [{"picture", "error"}]
    for answer in answers:
        if "text" in answer:
            assert len(answer["text"]) == len(answer["confidences"]) == 2
            assert answer["confidence"] == pytest.approx(np.prod(answer["confidences"]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "x.png"], "'nowhere' is no run"),
        (["nowhere.safetensors", "x.png"], "nowhere.safetensors: there is no such file"),
        (["latest", "x.png", "--device", "cuda:7"], "--device=cuda:7: "),
        (["latest", "x.png", "--device", "gpu"], "--device=gpu: "),
        (["latest", "EMPTY"], "there is no picture in this folder"),
    ],
)
def test_a_mistake_is_one_line(run: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    done = command(run, *[str(tmp_path) if word == "EMPTY" else word for word in arguments])

    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


# -- the interactive loop ------------------------------------------------------------------------------------


def test_the_loop_answers_and_survives_everything(run: Path, pictures: Path, tmp_path: Path) -> None:
    """A missing file, a text named .png, empty lines, quotes, a file: address; the end of the input."""
    good = sorted(pictures.iterdir())[0]
    spaced = tmp_path / "with space.png"
    spaced.write_bytes(good.read_bytes())
    text = tmp_path / "text.png"
    text.write_text("no picture")
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

    done = command(run, str(run), typed="\n".join([*lines, escaped, str(good)]))

    assert done.returncode == 0
    answers = done.stdout.splitlines()
    assert len(answers) == 5
    assert len(set(answers)) == 1
    assert [line.rpartition(": ")[2] for line in done.stderr.splitlines()[:1]] == [
        "No such file or directory"
    ]
    assert len(done.stderr.splitlines()) == 4
    assert "Traceback" not in done.stderr


def test_the_loop_speaks_json_too(run: Path, pictures: Path) -> None:
    good = sorted(pictures.iterdir())[0]

    done = command(run, str(run), "--json", typed=f"{good}\nnone.png\n")

    read, missing = (json.loads(line) for line in done.stdout.splitlines())
    assert len(read["text"]) == 2
    assert "error" in missing
    assert done.stderr == ""


def test_at_a_terminal_it_prompts_and_ctrl_d_ends_it(
    reader: Predictor, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter([str(sorted(pictures.iterdir())[0])])
    prompts = []

    def answer(prompt: str) -> str:
        prompts.append(prompt)
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())

    interactive.prompt_loop(reader, as_json=False)

    printed = capsys.readouterr()
    assert prompts == ["image: ", "image: "]
    assert "Ctrl-D to exit" in printed.err
    assert printed.out.count("%") == 1


def test_a_home_directory_is_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert interactive.parse_path("~/x.png") == tmp_path / "x.png"
    (tmp_path / "x.png").write_bytes(b"")
    assert find_images(["~/x.png"]) == [tmp_path / "x.png"]


@pytest.mark.parametrize("name", ["x" * 300, "~nobody_of_this_name/x.png", "file://["])
def test_a_name_that_no_file_can_have_is_a_picture_that_cannot_be_read(reader: Predictor, name: str) -> None:
    """To the loop as to the command; neither may end at it."""
    path = interactive.parse_path(name)
    assert path is not None
    for reading in reader.predict([path, *find_images([name])]):
        assert reading.error.startswith("cannot be read: ")


def test_an_empty_folder_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no picture in this folder"):
        find_images([str(tmp_path)])
