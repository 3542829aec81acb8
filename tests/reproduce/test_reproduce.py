"""Test the reproduction of finished runs: identical results, and differences attributed to their cause."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, Call, edit_record, mlflow_ref, out_of_memory, rewrite, warnings
from omegaconf import DictConfig
from PIL import Image
from support.image_files import page, saved

from captcha_exp import compose, load
from captcha_exp.cli.hydra_config import apply_overrides
from captcha_exp.config import Config, HeadName
from captcha_exp.errors import UserError
from captcha_exp.report import figures
from captcha_exp.reproduce import compare
from captcha_exp.reproduce.causes import attribute, format_verdict
from captcha_exp.reproduce.changes import Change, effect_of
from captcha_exp.reproduce.reference import RunResult, load_reference
from captcha_exp.reproduce.rerun import Reproduction, reproduce
from captcha_exp.runs import Lineage, MetricsRow, RunLink, find_linked
from captcha_exp.runtime.files import sha256_of
from captcha_exp.training.recorder import NullTracker
from captcha_exp.training.train import train

PROJECT = Path(__file__).resolve().parents[2]
IMAGE_FOLDER = (
    *(text for text in TINY if text.split("=")[0] not in ("data.count", "data.workers", "captcha.alphabet")),
    *("captcha.alphabet='0123456789'", "captcha.length=4", "captcha.channels=1"),
    *("device.threads=1", "tracking=none", "data=folder", "train.epochs=1"),
)
"""overrides of a run on an image folder"""


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip plotting, which takes longer than the training."""
    for name in ("plot_curves", "plot_confusion_matrix", "plot_misreads", "plot_samples"):
        monkeypatch.setattr(figures, name, lambda *_: None)


@pytest.fixture(scope="module")
def trained(composed: DictConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run of the tiny config in its own root directory; tests only read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPTCHA_EXP_ROOT", str(tmp_path_factory.mktemp("first")))
        yield train(load(composed)).run_dir


@pytest.fixture
def run(trained: Path, tmp_path: Path, root: Path) -> Path:
    """A copy of the trained run outside the root directory of the test."""
    return shutil.copytree(trained, tmp_path / "copied [b]run")


def rerun(folder: Path, *overrides: str) -> Reproduction:
    from captcha_exp.runtime.device import detect_machine

    reference = load_reference(folder)
    requested = apply_overrides(reference.config, overrides)
    return reproduce(reference, requested, detect_machine(), lambda _: NullTracker())


def edit(folder: Path, **keys: Any) -> None:
    """Change values of config.yaml, as in `train__epochs=3`, and its SHA-256."""
    values = yaml.safe_load((folder / "config.yaml").read_text())
    for key, value in keys.items():
        *groups, last = key.split("__")
        inner = values
        for group in groups:
            inner = inner[group]
        inner[last] = value
    rewrite(folder, "config.yaml", yaml.safe_dump(values))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file of a run, and its SHA-256."""
    values = json.loads(path.read_text())
    change(values)
    rewrite(path.parent, path.name, json.dumps(values))


def roles(reproduction: Reproduction) -> dict[str, str]:
    return {each.name: each.role for each in reproduction.changes}


# -- identical runs ------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_copied_run_is_reproduced_identically_three_times(run: Path, root: Path) -> None:
    for _ in range(3):
        reproduction = rerun(run)
        assert reproduction.summary == "identical"
        assert (reproduction.changes, reproduction.differences) == ([], [])
    assert reproduction.run_dir.is_relative_to(root)
    assert (
        reproduction.result.weights_sha256
        == json.loads((run / "run.json").read_text())["result"]["weights_sha256"]
    )


@pytest.mark.parametrize("head", ["end_class", "ctc"])
def test_labels_of_different_lengths_are_reproduced_identically(tiny: Config, head: HeadName) -> None:
    captcha, model = replace(tiny.captcha, min_length=1), replace(tiny.model, head=head)
    reproduction = rerun(train(replace(tiny, captcha=captcha, model=model)).run_dir)
    assert reproduction.summary == "identical"


def test_the_new_run_links_to_the_reference_and_records_the_verdict(run: Path) -> None:
    reproduction = rerun(run)
    state = json.loads((reproduction.run_dir / "run.json").read_text())
    assert state["status"] == "FINISHED"
    link = {"run_dir": str(run), "run_id": None, "store": None}
    assert state["lineage"] == {"reproduces": link, "extends": None}
    assert state["tags"] == {"reproduces": str(run), "reproduction": "identical"}
    assert json.loads((reproduction.run_dir / "reproduction.json").read_text()) == reproduction.to_json()
    assert state["files"]["reproduction.json"] == sha256_of(reproduction.run_dir / "reproduction.json")


def test_a_reproduction_can_be_reproduced(run: Path) -> None:
    assert rerun(rerun(run).run_dir).summary == "identical"


def test_overrides_without_effect_give_identical_results(run: Path) -> None:
    reproduction = rerun(run, "data.workers=2", "train.checkpoint_every=5 steps")
    assert reproduction.verdict == "identical"
    assert reproduction.overrides == {
        "data.workers": (1, 2),
        "train.checkpoint_every": ("1 minute", "5 steps"),
    }
    assert reproduction.summary == "identical"
    assert roles(reproduction) == dict.fromkeys(reproduction.overrides, "ruled_out")


def test_environment_variables_for_threads_have_no_effect(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_json(run / "environment.json", lambda values: values["variables"].update(OMP_NUM_THREADS="7"))
    reproduction = rerun(run)
    assert reproduction.summary == "identical"
    assert roles(reproduction) == {"variables.OMP_NUM_THREADS": "ruled_out"}


def test_a_job_of_a_sweep_can_be_reproduced(run: Path, root: Path, call: Call) -> None:
    job = shutil.copytree(run, root / "outputs" / "2026-01-01" / "sweep" / "1-seed=0")
    code, out, _ = call("reproduce", str(job))
    assert (code, out.splitlines()[1]) == (0, "identical")
    code, out, _ = call("reproduce", "2026-01-01/sweep/1-seed=0", "--json")
    assert (code, json.loads(out)["reference"]) == (0, str(job))


# -- injected differences ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "cause"),
    [
        ("seed=1", "seed 0 -> 1"),
        ("captcha.alphabet='01243'", "captcha.alphabet 01234 -> 01243"),
        ("device.precision=bf16", "device.precision fp32 -> bf16"),
        ("data.split_seed=7", "data.split_seed 0 -> 7"),
        ("train.learning_rate=0.02", "train.learning_rate 0.008 -> 0.02"),
        ("augment.translate=0.1", "augment.translate 0.0 -> 0.1"),
        ("device.threads=2", "device.threads 1 -> 2"),
        ("data.seed=3", "data.seed 0 -> 3"),
    ],
)
def test_an_override_is_reported_as_the_cause(run: Path, override: str, cause: str) -> None:
    reproduction = rerun(run, override)
    assert reproduction.verdict != "identical"
    assert reproduction.summary.endswith(f"; cause: {cause}")


def test_the_time_limit_is_not_reproduced(tiny: Config) -> None:
    limited = replace(tiny, train=replace(tiny.train, max_minutes=30.0))
    folder = train(limited).run_dir
    reproduction = rerun(folder)
    assert (reproduction.summary, dict(reproduction.overrides)) == ("identical", {})
    assert load(reproduction.run_dir / "config.yaml").train.max_minutes is None
    assert rerun(folder, "train.max_minutes=20").overrides == {"train.max_minutes": (None, 20.0)}


def test_changes_across_an_interruption_are_suspects_if_results_differ(run: Path) -> None:
    changes = {"packages.torch": ["2.12.0", "2.13.0"], "packages.mlflow": ["3.0", "3.1"]}
    resumption = {"at": "2026-01-01T00:00:00+00:00", "host": "a"}
    edit_record(run, resumed=[{**resumption, "changed": changes}, resumption])
    reproduction = rerun(run)
    assert reproduction.summary == "identical, but on resume: packages.torch 2.12.0 -> 2.13.0"
    assert set(roles(reproduction).values()) == {"ruled_out"}
    role_of = roles(rerun(run, "train.learning_rate=0.004"))
    assert role_of["train.learning_rate"] == "cause"
    assert role_of["on resume: packages.torch"] == "suspect"
    assert role_of["on resume: packages.mlflow"] == "ruled_out"


def test_a_changed_package_version_is_reported_but_ruled_out(run: Path) -> None:
    edit_json(run / "environment.json", lambda values: values["packages"].update(pillow="1.2.3"))
    reproduction = rerun(run)
    assert reproduction.summary.startswith("identical, but pillow 1.2.3 -> ")
    assert roles(reproduction) == {"pillow": "ruled_out"}


def test_another_metric_is_not_identical(run: Path) -> None:
    path = run / "metrics.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    row = MetricsRow.from_line(first)
    loss = row.metrics["train/loss"]
    changed = replace(row, metrics={**row.metrics, "train/loss": loss * (1 + 2**-52)})
    rewrite(run, path.name, "".join([changed.to_line(), *rest]))
    reproduction = rerun(run)
    assert reproduction.verdict == "equivalent"
    (only,) = reproduction.differences
    assert (only.epoch, only.name, only.actual) == (1, "train/loss", loss)
    assert "; no recorded change: " in reproduction.summary


# -- image folders -------------------------------------------------------------------------------------------


@pytest.fixture
def folder_run(root: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run on an image folder, and the folder."""
    image_dir = tmp_path / "images"
    image_dir.mkdir()
    for number in range(60):
        (image_dir / f"{number:04}.png").write_bytes(saved(page(number), "PNG"))
    config = load(compose(*IMAGE_FOLDER, f"data.path={image_dir}", f"data.cache={tmp_path / 'cache'}"))
    return train(config).run_dir, image_dir


def test_a_moved_image_folder_is_given_by_data_path(folder_run: tuple[Path, Path]) -> None:
    run_dir, image_dir = folder_run
    moved = image_dir.rename(image_dir.with_name("elsewhere"))
    with pytest.raises(UserError, match=r"No such file or directory; set data\.path=DIR"):
        rerun(run_dir)
    reproduction = rerun(run_dir, f"data.path={moved}")
    assert reproduction.verdict == "identical"
    assert roles(reproduction) == {"data.path": "ruled_out"}


def test_one_changed_pixel_and_one_changed_label_are_reported(
    folder_run: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    run_dir, image_dir = folder_run
    with Image.open(image_dir / "0007.png") as image:
        image.putpixel((3, 4), (image.getpixel((3, 4)) or 0) ^ 128)  # type: ignore[operator]  # grayscale
        image.save(image_dir / "0007.png")
    (image_dir / "labels.csv").write_text(
        "file,label\n" + "".join(f"{n:04}.png,{9999 if n == 5 else n:04}\n" for n in range(60))
    )
    caplog.clear()
    reproduction = rerun(run_dir)
    prefix = "the image folder has changed:"
    assert f"{prefix} different content: 0007.png" in warnings(caplog)
    assert f"{prefix} different label: 0005.png" in warnings(caplog)
    assert reproduction.verdict == "different"
    assert reproduction.summary.endswith("; cause: different content: 0007.png, different label: 0005.png")


def test_a_missing_and_a_new_image_are_reported(
    folder_run: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    run_dir, image_dir = folder_run
    (image_dir / "0009.png").rename(image_dir / "7777.png")
    caplog.clear()
    reproduction = rerun(run_dir)
    assert [line.partition("changed: ")[2] for line in warnings(caplog) if "changed: " in line] == [
        "missing: 0009.png",
        "new: 7777.png",
    ]
    assert reproduction.verdict == "different"


# -- code ----------------------------------------------------------------------------------------------------


def test_changed_code_is_reported_with_the_command_to_restore_it(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_json(run / "code.json", lambda values: values.update({"captcha_exp/model/step.py": "0" * 64}))
    edit_json(
        run / "environment.json",
        lambda values: values.update(git={"commit": "a1" * 20, "branch": "main", "dirty": True}),
    )
    rewrite(run, "code.diff", "")
    caplog.clear()
    reproduction = rerun(run)
    line = next(line for line in warnings(caplog) if "code differs" in line)
    assert line.startswith(
        "the code differs from that of the run (a1a1a1a1 with uncommitted changes): "
        "captcha_exp/model/step.py; to restore it: git "
    )
    assert f"../captcha_exp-a1a1a1a1 {'a1' * 20}" in line
    assert line.endswith(f"then in it git apply '{run / 'code.diff'}'")
    assert reproduction.summary.startswith(
        "identical, but code (captcha_exp/model/step.py) a1a1a1a1 with uncommitted changes -> "
    )


def test_an_invalid_commit_is_never_part_of_a_command(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_json(run / "code.json", lambda values: values.update({"captcha_exp/model/step.py": "0" * 64}))
    edit_json(run / "environment.json", lambda values: values.update(git={"commit": "$(rm -rf ~)"}))
    caplog.clear()
    rerun(run)
    assert any("pip install captcha-exp==" in line for line in warnings(caplog))
    assert not any("worktree" in line for line in warnings(caplog))


def test_identical_code_at_another_commit_is_ruled_out(run: Path) -> None:
    edit_json(
        run / "environment.json", lambda values: values.update(git={"commit": "b" * 40, "dirty": False})
    )
    reproduction = rerun(run)
    assert reproduction.summary == "identical"
    assert roles(reproduction) == {"commit": "ruled_out"}


MAIN = "import sys; from captcha_exp.cli.main import main; sys.argv[0] = 'captcha-exp'; main()"


def run_command(home: Path, root: Path, *words: str, **variables: str) -> dict[str, Any]:
    """Run a command with the package in `home`; return its JSON output and exit code."""
    environment = os.environ | {"PYTHONPATH": str(home), "CAPTCHA_EXP_ROOT": str(root)} | variables
    result = subprocess.run(
        [sys.executable, "-P", "-c", MAIN, *words, "--json"], env=environment, capture_output=True, text=True
    )
    assert result.stdout, result.stderr
    values: dict[str, Any] = json.loads(result.stdout)
    return {**values, "exit_code": result.returncode}


@pytest.mark.long
def test_another_cpu_capability_is_the_cause(run: Path, root: Path) -> None:
    printed = run_command(PROJECT, root, "reproduce", str(run), ATEN_CPU_CAPABILITY="default")
    assert printed["exit_code"] in (3, 4)
    assert "cause: device.cpu_capability " in printed["summary"]
    assert {each["name"]: each["role"] for each in printed["changes"]} == {
        "device.cpu_capability": "cause",
        "variables.ATEN_CPU_CAPABILITY": "ruled_out",
    }


@pytest.mark.long
@pytest.mark.parametrize(
    ("replacement", "verdicts"),
    [
        ('config.seed, "weights"))  # comment', {"identical"}),
        ('config.seed, "weight"))', {"equivalent", "different"}),
    ],
    ids=["comment", "line"],
)
def test_a_changed_line_of_code_is_the_cause_but_a_comment_is_not(
    run: Path, root: Path, tmp_path: Path, replacement: str, verdicts: set[str]
) -> None:
    home = tmp_path / "other"
    for name in ("captcha_exp", "conf"):
        shutil.copytree(PROJECT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    path, original = home / "captcha_exp" / "model" / "step.py", 'config.seed, "weights"))'
    assert original in path.read_text()
    path.write_text(path.read_text().replace(original, replacement))
    printed = run_command(home, root, "reproduce", str(run))
    assert printed["verdict"] in verdicts
    expected = (
        "identical, but code (captcha_exp/model/step.py)"
        if "identical" in verdicts
        else "cause: code (captcha"
    )
    assert expected in printed["summary"]


# -- invalid runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"format": None}, "was written by captcha_exp 0.1, which this version cannot read"),
        ({"status": "KILLED"}, "status KILLED; only a FINISHED run can be reproduced"),
        ({"oom": out_of_memory().model_dump()}, "ran out of memory and has no weights to compare with"),
        ({"result": None}, "has no result to compare with"),
        ({"result": [1]}, "is not a valid run.json: result: Input should be a valid dictionary"),
    ],
)
def test_a_run_without_a_result_is_rejected(
    run: Path, root: Path, call: Call, change: dict[str, Any], line: str
) -> None:
    edit_record(run, **change)
    if change == {"format": None}:
        values = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({k: v for k, v in values.items() if k != "checksum"}))
    code, out, err = call("reproduce", str(run))
    assert (code, out) == (2, "")
    assert line in err
    assert len(err.splitlines()) == 1
    assert not list((root / "outputs").glob("2*"))


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "dataset.json",
        "environment.json",
        "test.json",
        "metrics.jsonl",
        "code.json",
        "run.json",
    ],
)
@pytest.mark.parametrize("is_missing", [True, False], ids=["missing", "edited"])
def test_a_missing_or_edited_file_is_refused_and_the_rest_still_works(
    run: Path, root: Path, call: Call, name: str, is_missing: bool
) -> None:
    path = run / name
    path.unlink() if is_missing else path.write_text(path.read_text() + " ")
    if (name, is_missing) == ("run.json", False):
        edit_record(run)
        path.write_text(path.read_text().replace("FINISHED", "FINISHED "))
    code, out, err = call("reproduce", str(run))
    assert (code, out, err.count("\n")) == (2, "", 1)
    if (name, is_missing) == ("run.json", True):
        return  # not a run
    assert err.startswith(f"{path}: ")
    assert "; restore it" in err
    assert err.endswith(f"; captcha-exp predict '{run / 'model.safetensors'}' still works\n")
    assert not list((root / "outputs").glob("2*"))


@pytest.mark.parametrize("name", ["dataset.json", "environment.json", "test.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff{", b"[" * 100_000])
def test_an_invalid_manifest_is_a_one_line_error(run: Path, name: str, content: bytes) -> None:
    rewrite(run, name, content)
    with pytest.raises(UserError) as caught:
        load_reference(run)
    assert len(caught.value.lines) == 1
    assert str(run) in caught.value.lines[0]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dataset.json", {"files": [{"file": "a"}]}),
        ("dataset.json", {"rejected": ["a"]}),
        ("test.json", {"misreads": [1]}),
        ("test.json", {"images": None}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_manifest_with_invalid_values_is_a_one_line_error(
    run: Path, name: str, change: dict[str, Any]
) -> None:
    edit_json(run / name, lambda values: values.update(change))
    with pytest.raises(UserError, match=rf"{name}: cannot be read: .+; restore it"):
        load_reference(run)


def test_damaged_metrics_are_a_one_line_error(run: Path) -> None:
    rewrite(run, "metrics.jsonl", MetricsRow(1, 2, {}).to_line().replace("1", "2", 1))
    with pytest.raises(UserError, match=r"metrics.jsonl: line 1 is damaged; restore it"):
        load_reference(run)


def test_an_invalid_saved_config_has_a_hint(run: Path) -> None:
    rewrite(run, "config.yaml", (run / "config.yaml").read_text() + "tomorrow: 1\n")
    with pytest.raises(UserError, match="it was saved by other code; use that version"):
        load_reference(run)


def test_interpolations_in_a_saved_config_are_not_resolved(run: Path) -> None:
    edit(run, data__cache="${oc.env:HOME}")
    assert load_reference(run).config.data.cache == "${oc.env:HOME}"


def test_a_missing_device_has_a_remedy(run: Path) -> None:
    edit(run, device__name="cuda:7")
    with pytest.raises(UserError, match=r"reproduce with device\.name=cpu"):
        rerun(run)


@pytest.mark.long
def test_a_run_that_exists_only_in_mlflow_is_downloaded(
    tiny: Config, root: Path, call: Call, composed: DictConfig
) -> None:
    from captcha_exp.config import MlflowConfig
    from captcha_exp.tracking import make_tracker

    store = MlflowConfig(
        backend="mlflow", uri=f"sqlite:///{root / 'mlruns' / 'mlflow.db'}", experiment="e", required=False
    )
    config = replace(tiny, tracking=store)
    folder = train(config, make_tracker(config, {})).run_dir
    run_id = json.loads((folder / "run.json").read_text())["mlflow"]["run_id"]
    shutil.rmtree(folder)
    code, out, _ = call("reproduce", run_id[:8])
    assert code == 2  # a prefix may be ambiguous
    code, out, _ = call("reproduce", run_id, "--json")
    assert (code, json.loads(out)["summary"]) == (0, "identical")
    from mlflow import MlflowClient

    state = json.loads((Path(json.loads(out)["run_dir"]) / "run.json").read_text())
    tags = MlflowClient(store.uri).get_run(state["mlflow"]["run_id"]).data.tags
    assert (tags["reproduces"], tags["reproduction"]) == (run_id, "identical")
    link = {"run_dir": None, "run_id": run_id, "store": store.uri}
    assert state["lineage"] == {"reproduces": link, "extends": None}
    assert json.loads(out)["reference"] == f"MLflow run {run_id} of {store.uri}"
    assert call("reproduce", "0" * 32)[0] == 2


def test_an_extended_run_is_reproduced_from_the_same_initial_state(run: Path, tmp_path: Path) -> None:
    config = load_reference(run).config
    more = replace(config, train=replace(config.train, epochs=4, schedule="constant"))
    first = train(replace(more, train=replace(more.train, epochs=2))).run_dir
    links = Lineage(extends=RunLink(run_dir=str(first), run_id=None))
    second = train(more, lineage=links, extend_from=first).run_dir
    assert rerun(second).summary == "identical"
    reproduced = rerun(second)
    new_links = json.loads((reproduced.run_dir / "run.json").read_text())["lineage"]
    assert new_links["extends"] == {"run_dir": str(first), "run_id": None, "store": None}
    assert rerun(reproduced.run_dir).summary == "identical", "it extends the same run"

    elsewhere = tmp_path / "elsewhere" / first.parent.name
    elsewhere.mkdir(parents=True)
    moved = [Path(shutil.move(folder, elsewhere)) for folder in (first, second)]
    assert rerun(moved[1]).summary == "identical", "found next to each other"
    shutil.rmtree(moved[0])
    with pytest.raises(UserError, match=r"extends .*, which was not found; copy it back"):
        rerun(moved[1])


def test_an_extended_run_is_found_by_its_id(run: Path, root: Path) -> None:
    edit_record(run, mlflow=mlflow_ref("a" * 32).model_dump())
    other = shutil.copytree(run, root / "outputs" / "2020-01-01" / "other")

    def find(run_dir: str | None, character: str) -> Path | None:
        return find_linked(RunLink(run_dir=run_dir, run_id=character * 32), run)

    assert find("/nowhere/x/y", "a") == find(None, "a") == other
    assert find("/nowhere/x/y", "b") is find(None, "b") is None
    assert find(f"/nowhere/2020-01-01/{other.name}", "a") == other
    assert find(str(other), "b") is None, "another run is there now"


def test_a_sweep_is_not_a_run(call: Call, root: Path) -> None:
    sweep = root / "outputs" / "2020-01-01" / "sweep"
    sweep.mkdir(parents=True)
    (sweep / "sweep.json").write_text("{}")
    code, _, err = call("reproduce", str(sweep))
    assert code == 2
    assert err.endswith(
        ": is a sweep, not a run; give the run directory of one of its jobs (none has started yet)\n"
    )
    (sweep / "1-seed=1").mkdir()
    (sweep / "1-seed=1" / "run.json").write_text("{}")
    assert f"one of its jobs, e.g. {sweep / '1-seed=1'}\n" in call("reproduce", str(sweep))[2]


# -- verdicts and causes -------------------------------------------------------------------------------------


def make_result(loss: float = 2.0, accuracy: float = 0.8, images: str = "a", weights: str = "w") -> RunResult:
    dataset = {"images_sha256": images, "labels_sha256": "l", "splits": {"train": 3}}
    metrics = {"train/loss": loss, "test/accuracy": accuracy, "test/accuracy_low": 0.7}
    epochs = {1: metrics | {"test/accuracy_high": 0.9, "speed/epoch_seconds": loss}}
    return RunResult(epochs, dataset, {}, {}, 10, {}, weights)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (make_result(), "identical"),
        (make_result(weights="v"), "equivalent"),
        (make_result(loss=2.0199999), "equivalent"),
        (make_result(loss=2.0200001), "different"),
        (make_result(accuracy=0.7), "equivalent"),
        (make_result(accuracy=0.9000001), "different"),
        (make_result(loss=float("nan")), "different"),
        (make_result(images="b"), "different"),
    ],
)
def test_compute_verdict(actual: RunResult, expected: str) -> None:
    assert compare.compute_verdict(make_result(), actual) == expected


def test_speed_is_not_compared_and_minus_zero_differs_from_zero() -> None:
    fast = make_result()
    fast.metrics_by_epoch[1]["speed/epoch_seconds"] = 9.0  # type: ignore[index]
    assert compare.find_differences(make_result(), fast) == []
    (only,) = compare.find_differences(make_result(loss=0.0), make_result(loss=-0.0))
    assert only.describe() == "epoch 1, train/loss 0.0 -> -0.0"


TORCH = Change("torch", "1", "2", "numbers")
PILLOW = Change("pillow", "1", "2", "images")
SEED = Change("seed", 0, 1, "numbers", is_input=True)
MLFLOW = Change("mlflow", "1", "2", "nothing")


@pytest.mark.parametrize(
    ("changes", "same_images", "deterministic", "expected"),
    [
        ([TORCH, MLFLOW], True, True, ["cause", "ruled_out"]),
        ([TORCH, PILLOW], True, True, ["cause", "ruled_out"]),
        ([TORCH, PILLOW], False, True, ["suspect", "suspect"]),
        ([PILLOW], False, True, ["cause"]),
        ([TORCH], True, False, ["suspect"]),
        ([TORCH, SEED], True, True, ["suspect", "cause"]),
        ([SEED, MLFLOW], True, False, ["cause", "ruled_out"]),
        ([MLFLOW], True, True, ["ruled_out"]),
    ],
)
def test_attribute(
    changes: list[Change], same_images: bool, deterministic: bool, expected: list[str]
) -> None:
    assert [each.role for each in attribute(changes, "different", same_images, deterministic)] == expected
    assert {each.role for each in attribute(changes, "identical", True, deterministic)} == {"ruled_out"}


def test_format_verdict_without_changes() -> None:
    differences = compare.find_differences(make_result(), make_result(loss=2.5))
    line = format_verdict("different", differences, [], deterministic=True)
    assert line.startswith("different: first in epoch 1, train/loss 2.0 -> 2.5; no recorded change")
    assert format_verdict("different", differences, [], deterministic=False).endswith(
        "two trainings are never identical"
    )


def test_keys_without_effect_on_results() -> None:
    assert effect_of("tracking.uri") == "nothing"
    assert effect_of("data.workers") == "nothing"
    assert effect_of("train.eval_batch_size") == "numbers"
    assert effect_of("data.workers_of_mine") == "numbers"
    assert effect_of("names") == "numbers"
    assert effect_of("packages.wheezy.captcha") == "images"
