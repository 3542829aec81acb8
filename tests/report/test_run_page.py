"""The page of a run: its figures, hostile content, runs with missing files, and the page in a browser."""

import base64
import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from conftest import Call, dataset_json, environment_json, out_of_memory, result_summary, rewrite
from PIL import Image
from support.pages import Page, open_in_browser

from captcha_exp import runs
from captcha_exp.config import Config
from captcha_exp.data.alphabet import END, Alphabet
from captcha_exp.data.dataset import Dataset
from captcha_exp.model.evaluate import Evaluation
from captcha_exp.report import predictions, run_page
from captcha_exp.report.run_content import RunContent
from captcha_exp.runs import MetricsRow, Run
from captcha_exp.training.train import train

SCRIPT = "<script>alert(1)</script>"
CHARACTERS = "".join(dict.fromkeys(SCRIPT))
ANSWERS = [  # label, prediction, confidence
    (SCRIPT, SCRIPT, 0.9),
    (SCRIPT[:8], SCRIPT[:8], 0.99),
    ("lert", "lest", 0.995),
    ("cat", "cat", 0.25),
    ("cat", "ca", 0.4),
    ("1", "1", 0.95),
]
FILES = [
    f"{SCRIPT}.png",
    "a\x1b[31m.png",
    '"><img src=x onerror=alert(1)>.png',
    "b\ud800.png",
    "e.png",
    "f.png",
]


def make_predictions(height: int = 16, width: int = 32) -> tuple[Evaluation, Dataset]:
    """Return predictions for six images of noise, with hostile labels and file names."""
    alphabet, length = Alphabet(CHARACTERS), len(SCRIPT)
    targets, predicted = (
        np.array([alphabet.encode_padded(text, length) for text in texts])
        for texts in ([label for label, _, _ in ANSWERS], [text for _, text, _ in ANSWERS])
    )
    confidences = np.array([answer[2] for answer in ANSWERS], np.float32)
    evaluation = Evaluation(0.25, predicted, targets, confidences[:, None], confidences, np.arange(6))
    pixels = np.random.default_rng(0).integers(0, 256, (6, height, width, 3), dtype=np.uint8)
    labels = [label for label, _, _ in ANSWERS]
    manifest = dataset_json(
        provenance={"captcha": {"alphabet": CHARACTERS}, "source": {}, "dependencies": {}},
        files=[{"file": f, "sha256": "", "label": t} for f, t in zip(FILES, labels, strict=True)],
        folders=[],
        splits={"train": 700, "validation": 100, "test": 6},
    )
    return evaluation, Dataset(torch.from_numpy(pixels), torch.from_numpy(targets), labels, {}, manifest)


def epoch(step: int, train_accuracy: float, val_accuracy: float) -> MetricsRow:
    values = {
        "train/loss": 1 / step,
        "train/accuracy": train_accuracy,
        "val/loss": 2 / step,
        "val/accuracy": val_accuracy,
        "speed/images_per_second": 1000.0 + step,
        "speed/epoch_seconds": 2.5,
        "memory/process_peak_mib": 900.0 + step,
    }
    return MetricsRow(step, 0, values)


def make_run(config: Config, run_dir: Path, evaluation: Evaluation, data: Dataset) -> Run:
    """Return the record of a finished run with these predictions."""
    run = runs.create_run(config, replace(config, device=replace(config.device, threads="auto")), run_dir)
    for row in (epoch(1, 0.5, 0.6), epoch(2, 0.8, 0.7), epoch(3, 0.9, 0.85)):
        run.log_metrics(row)
    run.write_json("memory.json", {"process_mib": [200, 1300], "budget_mib": [1500, 1500], "fits": "fits"})
    device = {"name": "cpu", "cpu": SCRIPT}
    command = ["/bin/captcha-exp", "train", "tracking.uri=https://me:secret@x.org", "name=it's"]
    run.write_json("environment.json", environment_json(python="3.11", device=device, command=command))
    run.write_json("dataset.json", data.manifest)
    run.write_json("test.json", evaluation.to_json(data))
    run.add_warning(f"a warning of {SCRIPT}")
    run.update(result=result_summary(test_accuracy=evaluation.accuracy, best_epoch=3))
    run.close("FINISHED")
    return run


@pytest.fixture
def run(tiny: Config, root: Path) -> Run:
    (root / "outputs" / "2026-01-01").mkdir(parents=True)
    return make_run(tiny, root / "outputs" / "2026-01-01" / "000000-tiny", *make_predictions())


def written(run: Run, evaluation: Evaluation | None = None, data: Dataset | None = None) -> tuple[Page, str]:
    """Return the page of a run, parsed and as text."""
    path = run.report_dir / "run.html"
    run_page.write_page(run, evaluation, data, path)
    text = path.read_text(encoding="utf-8")
    return Page(text), text


def test_the_figures_are_those_of_the_files(run: Run) -> None:
    page, _ = written(run, *make_predictions())
    test = json.loads((run.run_dir / "test.json").read_text())
    assert f"Test accuracy {test['accuracy']:.2%}" in page.text
    assert f"interval {test['accuracy_low']:.2%} to {test['accuracy_high']:.2%}; 4 of 6 images" in page.text
    assert f"Character accuracy {test['char_accuracy']:.2%}" in page.text
    header, *rows = page.tables["epochs"]
    assert [row[:8] for row in rows] == [
        ["1", "1.0000", "50.00%", "2.0000", "60.00%", "2.5", "1,001", "901"],
        ["2", "0.5000", "80.00%", "1.0000", "70.00%", "2.5", "1,002", "902"],
        ["3", "0.3333", "90.00%", "0.6667", "85.00%", "2.5", "1,003", "903"],
    ]
    assert rows[2][8] == "best"
    assert len(header) == 9
    assert "predict --min-confidence 0.99 applies a threshold" in page.text
    charts = run_page._curves(RunContent(run, None, None, []))
    for chart in charts:  # three epochs
        assert [(tick.text, tick.position) for tick in chart.x_ticks] == [
            ("1", chart.left),
            ("2", (chart.left + chart.right) / 2),
            ("3", chart.right),
        ]
    assert page.tables["memory"] == [
        ["predicted GPU memory of the process", "200 to 1,300 MiB on any CUDA GPU"],
        ["memory budget", "1,500 MiB: fits"],
        [
            "measured peak of the process",
            "903 MiB (RAM; the prediction is of GPU memory, and not comparable)",
        ],
    ]
    assert "captcha-exp reproduce 2026-01-01/000000-tiny" in page.text
    assert "device.threads" in page.text
    assert "Missing" not in page.text


def test_the_confidences_are_those_of_the_predictions(run: Run) -> None:
    page, _ = written(run, *make_predictions())
    coverage = page.tables["coverage"][1:]
    assert coverage[0][:3] == ["0.2500", "100.0% (6)", "66.67%"]
    assert coverage[-1][:3] == ["0.9500", "50.0% (3)", "66.67%"]
    bins = {row[0]: row[1:4] for row in page.tables["bins"][1:]}
    assert bins["0.9 to 1.0"] == ["3", "97.83%", "66.67%"]
    assert bins["0.2 to 0.3"] == ["1", "25.00%", "100.00%"]
    assert "2 of 44 characters are wrong, missing or added" in page.text


def test_the_images_are_the_worst_and_the_least_certain_ones(run: Run) -> None:
    evaluation, data = make_predictions()
    page, _ = written(run, evaluation, data)
    order = [2, 4, *[3, 4, 0, 5, 1, 2]]
    found = [np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))) for uri in page.images]
    assert len(found) == len(order)
    for pixels, n in zip(found, order, strict=True):
        assert np.array_equal(pixels, data.images[n].numpy()), n
    assert "lert read as lest, 99.5%" in page.text
    assert "cat read correctly, 25.0%" in page.text


def test_hostile_names_and_labels_are_text(run: Run) -> None:
    page, text = written(run, *make_predictions())
    assert "script" not in page.tags
    assert not {name for name in page.attributes if name.startswith("on")}
    for part in (
        f"{SCRIPT}.png",
        SCRIPT,
        r"a\x1b[31m.png",
        FILES[2],
        r"b\ud800.png",
        f"a warning of {SCRIPT}",
    ):
        assert part in page.text, part
    assert "\x1b" not in text
    assert "secret" not in text
    assert "train 'tracking.uri=https://***@x.org' 'name=it'\"'\"'s'" in page.text
    outside = re.sub(r"data:image/png;base64,[^\"]*", "", text)
    assert not re.search(r"(src|href)=\"(https?:)?//", outside)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in text


def test_a_page_of_large_images_stays_small(run: Run) -> None:
    evaluation, data = make_predictions(height=700, width=900)
    many = np.tile(np.arange(6), 20)
    large = Evaluation(
        0.25,
        evaluation.predicted[many],
        evaluation.targets[many],
        evaluation.confidences[many],
        evaluation.text_confidences[many],
        many,
    )
    page, text = written(run, large, data)
    assert len(text) < 3_000_000
    assert len(page.images) >= 2
    assert "evaluated again, 80 of 120 images are correct, and not 4 of 6 as recorded" in page.text


def test_a_run_without_its_images_has_a_page(run: Run) -> None:
    page, _ = written(run)
    assert "Test accuracy 66.67%" in page.text
    assert page.images == []
    assert ["lert", "lest", "99.5%", FILES[2]] in page.tables[""]
    assert "Reliability" not in page.text


def test_a_run_of_an_earlier_version_has_a_page(run: Run) -> None:
    """Without keys of test.json that were added later, and without other files."""
    test = json.loads((run.run_dir / "test.json").read_text())
    kept = {key: value for key, value in test.items() if not key.startswith("by_") and "chance" not in key}
    rewrite(run.run_dir, "test.json", json.dumps(kept))
    (run.run_dir / "memory.json").unlink()
    (run.run_dir / "environment.json").unlink()
    (run.run_dir / "metrics.jsonl").write_text("{}\n")
    saved = runs.load(run.run_dir)
    missing = run_page.write_page(saved, None, None, run.report_dir / "run.html")
    page = Page((run.report_dir / "run.html").read_text())
    assert "Test accuracy 66.67%" in page.text
    assert sorted(line.partition(":")[0] for line in missing) == [
        "environment.json",
        "memory.json",
        "metrics.jsonl",
    ]
    assert "memory.json: is missing; restore it" in page.text


@pytest.mark.parametrize("value", ["x", {"0": 1}, [2.0], None])
def test_a_value_of_another_type_is_named(run: Run, value: Any) -> None:
    test = json.loads((run.run_dir / "test.json").read_text()) | {"by_position": value}
    rewrite(run.run_dir, "test.json", json.dumps(test))
    saved = runs.load(run.run_dir)
    (line,) = run_page.write_page(saved, None, None, run.report_dir / "run.html")
    assert line.startswith("test.json: by_position")
    assert "Test accuracy 66.67%" in Page((run.report_dir / "run.html").read_text()).text


def test_a_run_without_a_result_says_why(run: Run) -> None:
    run.update(result=None, oom=out_of_memory().model_copy(update={"remedies": ["train.batch_size=8"]}))
    page, _ = written(run)
    assert "No result out of memory during training, in epoch 1" in page.text
    assert "to need less memory, set train.batch_size=8" in page.text
    run.update(oom=None, status="KILLED", stop_reason="SIGTERM")
    assert "No result KILLED: SIGTERM" in written(run)[0].text


def test_a_model_that_has_diverged_has_a_page(run: Run) -> None:
    evaluation, data = make_predictions()
    nothing = np.full_like(evaluation.predicted, END)
    lost = np.full(6, np.nan, np.float32)
    diverged = replace(evaluation, predicted=nothing, loss=np.nan, text_confidences=lost)
    run.log_metrics(MetricsRow(4, 0, dict.fromkeys(epoch(1, 0, 0).metrics, np.nan)))
    page, _ = written(run, diverged, data)
    assert "nan" in page.text


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_of_the_training_again(tiny: Config, call: Call) -> None:
    """Byte by byte, with the hash in run.json."""
    run_dir = train(tiny).run_dir
    page = run_dir / "report" / "run.html"
    first = page.read_bytes()
    record = (run_dir / "run.json").read_bytes()
    page.write_text("edited")
    code, out, _ = call("report", "latest", "--json")
    values = json.loads(out)
    assert (code, values["path"], values["missing"]) == (0, str(page), [])
    assert page.read_bytes() == first
    assert values["bytes"] == len(first)
    assert (run_dir / "run.json").read_bytes() == record
    test = json.loads((run_dir / "test.json").read_text())
    assert f"Test accuracy {test['accuracy']:.2%}" in Page(first.decode()).text


def test_the_command_keeps_a_page_with_images(run: Run, call: Call) -> None:
    """The run has no weights, so a new page would lack them."""
    page = run.report_dir / "run.html"
    run.write("report/run.html", b"the page of the training")
    code, out, err = call("report", str(run.run_dir))
    assert (code, out, page.read_bytes()) == (0, f"{page}\n", b"the page of the training")
    assert "is kept as the training made it" in err
    page.write_bytes(b"edited")
    code, out, err = call("report", str(run.run_dir))
    assert (code, out) == (0, f"{page}\n")
    assert "images, confusion matrix and confidences: the test split could not be evaluated again" in err
    text = Page(page.read_text()).text
    assert "Test accuracy 66.67%" in text
    assert "model.safetensors: is missing" in text
    assert runs.load(run.run_dir).path("report/run.html") == page


def test_the_command_writes_only_over_pages(run: Run, call: Call, tmp_path: Path) -> None:
    target = tmp_path / "mine.html"
    target.write_text("my notes")
    code, out, err = call("report", "latest", "--output", str(target))
    assert (code, out) == (2, "")
    assert err.endswith("mine.html: exists, and is not a page of captcha-exp; choose another name\n")
    for bad in (str(tmp_path / "no" / "x.html"), str(tmp_path), str(tmp_path / ("x" * 300)), "/dev/null"):
        assert call("report", "latest", "-o", bad)[0] == 2
    assert target.read_text() == "my notes"
    target.unlink()
    for _ in range(2):
        assert call("report", "latest", "-o", str(target))[:2] == (0, f"{target}\n")
    assert not (run.run_dir / "report").exists()


def test_the_command_writes_through_no_link(run: Run, call: Call, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (run.run_dir / "report").symlink_to(tmp_path / "elsewhere")
    code, _, err = call("report", str(run.run_dir))
    assert code == 2
    assert "is a symbolic link" in err
    assert list((tmp_path / "elsewhere").iterdir()) == []


# -- the page in a browser -----------------------------------------------------------------------------------


@pytest.mark.ui
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(
    run: Run, width: int, scheme: Literal["light", "dark"], tmp_path: Path
) -> None:
    """Nothing is requested or reported, and the figures are those of the run."""
    page, _ = written(run, *make_predictions())
    screenshots = Path(os.environ.get("CAPTCHA_EXP_SCREENSHOTS", tmp_path))
    seen = open_in_browser(
        run.report_dir / "run.html", width, screenshots / f"run-{width}-{scheme}.png", scheme
    )
    assert (seen.requests, seen.messages) == ([], [])
    assert seen.image_widths == [32] * 8
    assert seen.overflow <= 0
    assert seen.smallest_text >= 10
    test = json.loads((run.run_dir / "test.json").read_text())
    assert f"Test accuracy {test['accuracy']:.2%}" in seen.text
    assert f"{test['accuracy_low']:.2%} to {test['accuracy_high']:.2%}" in seen.text
    assert f"{SCRIPT}.png" in seen.text
    for cells in page.tables["coverage"][1:]:
        assert all(cell in seen.text for cell in cells)


def test_a_tile_of_a_large_image_is_thinned() -> None:
    evaluation, data = make_predictions(height=700, width=900)
    (tile, *_) = predictions.make_tiles([0], evaluation, data)
    assert Image.open(io.BytesIO(base64.b64decode(tile.image.split(",")[1]))).size == (300, 234)
