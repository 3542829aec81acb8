"""Test suspected wrong labels: which images a model may judge, the ranking, the page and corrections."""

import csv
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, Call
from PIL import Image

from captcha_exp import compose, load
from captcha_exp.config import Config
from captcha_exp.curation import suspects
from captcha_exp.data import dataset
from captcha_exp.data.dataset import Dataset
from captcha_exp.data.sources.corrections import NAME as CORRECTIONS
from captcha_exp.errors import UserError
from captcha_exp.model.predict import Comparison
from captcha_exp.report import suspects_page
from captcha_exp.training.train import train

OVERRIDES = (
    *("data=folder", "tracking=none", "device.name=cpu", "device.threads=1", "device.precision=fp32"),
    *("captcha.width=48", "captcha.height=16", "captcha.channels=1", "augment=none"),
    *("model.channels=[16,16,16]", "train=constant_lr", "train.epochs=10", "train.batch_size=16"),
    *("train.learning_rate=0.01", "train.patience=null", "train.label_smoothing=0"),
)
WRONG = {"00003-000001.png": "010101", "00100-111010.png": "101110"}
"""file -> what it shows"""


def bars(text: str, seed: int) -> Image.Image:
    """Return an image of a dark or a bright bar for each character of 0 and 1, with noise."""
    columns = np.repeat([40 if c == "0" else 215 for c in text], 8)
    noise = np.random.default_rng(seed).integers(-30, 31, (16, 48))
    return Image.fromarray((columns[None] + noise).astype(np.uint8))


@pytest.fixture
def folder(root: Path) -> Path:
    """Return a folder of images that are easy to read, of which two are labeled wrongly."""
    made = root / "images"
    made.mkdir()
    wrong = {name.split("-")[0]: name for name in WRONG}
    for number in range(256):
        name = wrong.get(f"{number:05}", f"{number:05}-{number % 64:06b}.png")
        bars(WRONG.get(name, f"{number % 64:06b}"), number).save(made / name)
    return made


def config_of(folder: Path, *overrides: str) -> Config:
    return load(compose(*OVERRIDES, f"data.path={folder}", f"data.cache={folder.parent}/cache", *overrides))


def load_data(config: Config) -> tuple[Config, Dataset]:
    spec = dataset.inspect_dataset(config)
    return spec.config, dataset.load_or_build(spec)


def stub_readings(
    monkeypatch: pytest.MonkeyPatch, *readings: Mapping[int, tuple[str, float, float]]
) -> list[Path]:
    """Let run N read these texts, with probability and likelihood ratio; return the run directories."""
    by_dir = {
        Path(str(number)): {
            index: Comparison(text, probability, math.log(ratio))
            for index, (text, probability, ratio) in each.items()
        }
        for number, each in enumerate(readings)
    }
    monkeypatch.setattr(suspects, "_read_unseen", lambda _config, _data, run_dir: by_dir[run_dir])
    return list(by_dir)


def test_suspects_are_ranked_by_the_likelihood_ratio(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, data = load_data(config_of(folder))
    labels = data.labels
    one = {0: ("111111", 0.9, 100), 1: ("111111", 0.6, 900), 2: (labels[2], 0.9, 1), 4: ("100000", 0.4, 70)}
    other = {0: ("111111", 0.7, 400), 1: (labels[1], 0.5, 1), 2: ("000000", 0.5, 1000)}
    found = suspects.find_suspects(config, data, stub_readings(monkeypatch, one, other))
    assert [(each.index, each.read) for each in found.found] == [(0, "111111"), (4, "100000"), (1, "111111")]
    assert [each.confidence for each in found.found] == pytest.approx([0.8, 0.4, 0.3])
    assert [each.ratio for each in found.found] == pytest.approx([200, 70, 30])
    assert (found.num_probable, found.num_read, found.num_unread) == (2, 4, 252)


def test_images_with_a_correction_are_no_suspects(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ("00000-000000.png,keep,", "00001-000001.png,label,001001")
    (folder / CORRECTIONS).write_text("\n".join(("file,action,label", *rows)))
    config, data = load_data(config_of(folder))
    readings = dict.fromkeys(range(3), ("111111", 0.9, 10))
    found = suspects.find_suspects(config, data, stub_readings(monkeypatch, readings))
    assert [each.file for each in found.found] == ["00002-000010.png"]
    assert found.num_decided == 2


def test_runs_that_know_all_images_are_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, data = load_data(config_of(folder))
    with pytest.raises(UserError, match=r"^0: was trained on all of these images, .* with --folds 5$"):
        suspects.find_suspects(config, data, stub_readings(monkeypatch, {}))


def test_a_run_judges_only_images_that_it_was_not_trained_on(folder: Path) -> None:
    requested = config_of(folder)
    run = train(requested)
    config, data = load_data(requested)
    readings = suspects._read_unseen(config, data, run.run_dir)
    splits = data.split_indices
    assert set(readings) == {*splits["validation"].tolist(), *splits["test"].tolist()}
    shown = {n: WRONG.get(data.image_name(n), data.labels[n]) for n in readings}
    assert {n: each.text for n, each in readings.items()} == shown
    wrong = {n for n in readings if data.image_name(n) in WRONG}
    assert all((each.log_ratio > math.log(50)) == (n in wrong) for n, each in readings.items())
    assert all(each.log_ratio == 0 for n, each in readings.items() if n not in wrong)
    # Of other images, in another size, it judges all whose labels it can predict.
    other = folder.parent / "other"
    other.mkdir()
    for number in range(40):
        text = f"{number % 64:06b}"
        label = text if number % 2 else text.replace("0", "2")
        bars(text, 1000 + number).resize((96, 32)).save(other / f"{number:05}-{label}.png")
    config, data = load_data(config_of(other, "captcha.width=96", "captcha.height=32"))
    readings = suspects._read_unseen(config, data, run.run_dir)
    assert {n: each.text for n, each in readings.items()} == {
        n: label for n, label in enumerate(data.labels) if "2" not in label
    }
    found = suspects.find_suspects(config, data, [run.run_dir])
    assert (found.found, found.num_read, found.num_unread) == ([], 20, 20)


def test_a_reading_without_probability_makes_no_label_improbable() -> None:
    one, other = (suspects.Suspect(0, "0.png", "00", "11", confidence, 900.0) for confidence in (0.05, 0.15))
    assert (one.is_probable, other.is_probable) == (False, True)


@pytest.mark.slow
def test_the_command_finds_wrong_labels_and_its_corrections_are_applied(folder: Path, shell: Call) -> None:
    for path in (*folder.glob("*-000000.png"), *folder.glob("*-111111.png")):
        path.unlink()  # networks see no difference: the brightness of an image is normalized
    words = ["data", "--folds", "4", *OVERRIDES, "train.epochs=20", f"data.path={folder}"]
    values = json.loads(shell(*words, "--json")[1])
    found = [each["file"] for each in values["suspects"]["found"]]
    assert set(WRONG) <= set(found[:6]), values["suspects"]["found"]
    assert values["suspects"]["corrections"] == str(folder / CORRECTIONS)
    code, out, err = shell(*words)
    assert code == 0
    assert "a finished sweep over the same folds" in err
    assert re.search(r"00003-000001.png .* 000001 .* 010101", out)
    with (folder / CORRECTIONS).open("w", newline="") as file:
        csv.writer(file).writerows(
            [("file", "action", "label"), *((n, "label", t) for n, t in WRONG.items())]
        )
    corrected = json.loads(shell(*words, "--json")[1])
    assert not WRONG.keys() & {each["file"] for each in corrected["suspects"]["found"]}
    assert corrected["suspects"]["decided"] == 2


def test_generated_images_have_no_suspects(call: Call) -> None:
    code, _, err = call("data", "--folds", "2", *TINY, "data.count=40")
    assert (code, err.splitlines()[-1]) == (
        2,
        "data=captcha: has no labels that could be wrong; use data=folder",
    )


@pytest.mark.parametrize("number", ["0", "1", "-3"])
def test_too_few_folds_are_an_error(call: Call, number: str) -> None:
    assert call("data", f"--folds={number}", *TINY) == (2, "", f"--folds {number}: must be at least 2\n")


# -- the page ------------------------------------------------------------------------------------------------


def page_of(folder: Path, found: list[dict[str, Any]], page: Path) -> str:
    _, data = load_data(config_of(folder))
    suspects_page.write_page(data, found, folder / CORRECTIONS, page)
    return page.read_text()


def suspect(index: int, file: str, label: str = "000000") -> dict[str, Any]:
    return suspects.Suspect(index, file, label, "111111", 0.9, 10.0).to_json()


def test_the_page_escapes_names_and_labels(folder: Path) -> None:
    (folder / CORRECTIONS).write_text("file,action,label\n00000-000000.png,label,000011\n")
    hostile = "<script>alert(1)</script>.png"
    text = page_of(folder, [suspect(0, hostile, label='"><b>')], folder.parent / "page.html")
    assert "alert(1)</script>" not in text
    assert "<b>" not in text
    assert text.count("<fieldset") == 1


@pytest.mark.ui
def test_what_is_marked_on_the_page_becomes_corrections(folder: Path) -> None:
    from playwright.sync_api import sync_playwright

    (folder / CORRECTIONS).write_text("file,action,label\n00009-001001.png,keep,\n")
    path, odd = folder.parent / "page.html", 'a, "b".png'
    page_of(folder, [suspect(n, name) for n, name in enumerate(("0.png", odd, "2.png", "3.png"))], path)
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda each: problems.append(each.url) if each.url.startswith("http") else None)
        page.goto(path.as_uri())
        rows = page.locator("fieldset")
        rows.nth(0).locator("input[value=keep]").check()
        rows.nth(1).locator("input[type=text]").fill("10,1")
        rows.nth(2).locator("input[value=drop]").check()
        counts = [page.locator("#count").text_content()]
        with page.expect_download() as saved:
            page.locator("#save").click()
        suggested = saved.value.suggested_filename
        with Path(saved.value.path()).open(newline="") as file:
            table = [tuple(row.values()) for row in csv.DictReader(file)]
        page.reload()
        counts.append(page.locator("#count").text_content())
        are_shown = page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        browser.close()
    assert suggested == CORRECTIONS
    assert table == [
        ("00009-001001.png", "keep", ""),
        ("0.png", "keep", ""),
        (odd, "label", "10,1"),
        ("2.png", "drop", ""),
    ]
    assert counts == ["3 of 4 decided"] * 2
    assert are_shown
    assert problems == []
