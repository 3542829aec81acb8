"""A finished run again: what is the same is called so, and what is not is named with its cause."""

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
from conftest import Call, Heard
from omegaconf import DictConfig
from PIL import Image
from support.image_files import page, saved

from captcha_exp import load
from captcha_exp.cli.hydra_config import apply_overrides
from captcha_exp.config import Config
from captcha_exp.errors import UserError
from captcha_exp.report import figures
from captcha_exp.reproduce import changes as drift
from captcha_exp.reproduce import compare
from captcha_exp.reproduce.causes import attribute, format_verdict
from captcha_exp.reproduce.changes import Change
from captcha_exp.reproduce.reference import RunResult, load_reference
from captcha_exp.reproduce.rerun import Reproduction, reproduce
from captcha_exp.runs import find_linked
from captcha_exp.runtime.console import NullDisplay
from captcha_exp.runtime.files import sha256_of, write_json
from captcha_exp.training.recorder import NullTracker
from captcha_exp.training.train import train

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures: they take longer than the training."""
    for name in ("plot_curves", "plot_confusion_matrix", "plot_misreads", "plot_samples"):
        monkeypatch.setattr(figures, name, lambda *_: None)


@pytest.fixture(scope="module")
def trained(composed: DictConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run of the tiny config, in a root of its own; nobody writes into it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPTCHA_EXP_ROOT", str(tmp_path_factory.mktemp("first")))
        yield train(load(composed)).run_dir


@pytest.fixture
def run(trained: Path, tmp_path: Path, root: Path) -> Path:
    """The same run, copied to another place; the root of this test has no run yet."""
    return shutil.copytree(trained, tmp_path / "copied [b]run")


def again(folder: Path, *overrides: str, display: NullDisplay | None = None) -> Reproduction:
    from captcha_exp.runtime.device import detect_machine

    first = load_reference(folder)
    wanted = apply_overrides(first.config, overrides)
    return reproduce(first, wanted, detect_machine(), lambda _: NullTracker(), display or NullDisplay())


def edit(folder: Path, **keys: Any) -> None:
    """Somebody changes values in config.yaml: `train__epochs=3`."""
    path = folder / "config.yaml"
    values = yaml.safe_load(path.read_text())
    for key, value in keys.items():
        *groups, last = key.split("__")
        inner = values
        for group in groups:
            inner = inner[group]
        inner[last] = value
    path.write_text(yaml.safe_dump(values))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    write_json(path, values)


def roles(made: Reproduction) -> dict[str, str]:
    return {each.change.name: each.role for each in made.attributed_changes}


# -- the same ------------------------------------------------------------------------------------------------


def test_a_copied_run_is_identical_three_times(run: Path, root: Path) -> None:
    for _ in range(3):
        made = again(run)
        assert made.summary == "identical"
        assert (made.attributed_changes, made.differences) == ([], [])
    assert made.run_dir.is_relative_to(root)
    assert made.weights_sha256 == json.loads((run / "run.json").read_text())["result"]["weights_sha256"]


def test_the_new_run_is_linked_and_has_the_verdict_in_its_record(run: Path) -> None:
    made = again(run)
    state = json.loads((made.run_dir / "run.json").read_text())
    assert state["status"] == "FINISHED"
    assert state["lineage"] == {"reproduces": {"run_dir": str(run), "run_id": None}}
    assert state["tags"] == {"reproduces": str(run), "reproduction": "identical"}
    assert json.loads((made.run_dir / "reproduction.json").read_text()) == made.to_json()
    assert state["files"]["reproduction.json"] == sha256_of(made.run_dir / "reproduction.json")


def test_a_reproduction_can_be_reproduced(run: Path) -> None:
    assert again(again(run).run_dir).summary == "identical"


def test_other_workers_are_a_variation_that_changes_nothing(run: Path) -> None:
    made = again(run, "data.workers=2", "train.checkpoint_every=5 steps")
    assert made.verdict == "identical"
    assert made.overrides == {"data.workers": (1, 2), "train.checkpoint_every": ("1 minute", "5 steps")}
    assert made.summary.startswith("identical, but data.workers 1 -> 2")


def test_environment_variables_for_threads_do_not_matter(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_json(run / "environment.json", lambda found: found["variables"].update(OMP_NUM_THREADS="7"))
    made = again(run)
    assert made.summary == "identical"
    assert roles(made) == {"variable OMP_NUM_THREADS": "cleared"}


def test_a_point_of_a_sweep_is_a_run_like_any_other(run: Path, root: Path, call: Call) -> None:
    point = shutil.copytree(run, root / "outputs" / "2026-01-01" / "sweep" / "1-seed=0")
    code, out, _ = call("reproduce", str(point))
    assert (code, out.splitlines()[1]) == (0, "identical")
    code, out, _ = call("reproduce", "2026-01-01/sweep/1-seed=0", "--json")
    assert (code, json.loads(out)["of"]) == (0, str(point))


# -- planted differences -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "cause"),
    [
        ({"seed": 1}, "seed 0 -> 1"),
        ({"captcha__alphabet": "01243"}, "captcha.alphabet 01234 -> 01243"),
        ({"device__precision": "bf16"}, "device.precision fp32 -> bf16"),
        ({"data__split_seed": 7}, "data.split_seed 0 -> 7"),
        ({"train__learning_rate": 0.02}, "train.learning_rate 0.008 -> 0.02"),
        ({"augment__shift": 0.1}, "augment.translate 0.0 -> 0.1"),
        ({"device__threads": 1}, "device.threads 2 -> 1"),
        ({"data__seed": 3}, "data.seed 0 -> 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_edited_config_is_told_by_key_and_is_the_cause(
    run: Path, keys: dict[str, Any], cause: str
) -> None:
    edit(run, **keys)
    heard = Heard()
    made = again(run, display=heard)
    assert f"config.yaml was changed after the run ended: {cause}" in heard.warnings
    assert made.verdict != "identical"
    assert made.summary.endswith(f"; cause: {cause}")


def test_an_edit_that_changes_no_result_is_told_too(run: Path) -> None:
    edit(run, train__stop_after_minutes=500.0)
    assert again(run).summary == "identical, but train.max_minutes null -> 500.0"


def test_the_limit_of_time_was_of_the_process_and_not_of_the_run(tiny: Config) -> None:
    limited = replace(tiny, train=replace(tiny.train, max_minutes=30.0))
    folder = train(limited).run_dir
    made = again(folder)
    assert (made.summary, dict(made.overrides)) == ("identical", {})
    assert load(made.run_dir / "config.yaml").train.max_minutes is None
    assert again(folder, "train.max_minutes=20").summary == ("identical, but train.max_minutes null -> 20.0")


def test_a_config_of_which_no_edit_can_be_named_is_told(run: Path) -> None:
    """The weights, whose config says what ran, are gone, or were trained with the edited file."""
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "# a comment\n")
    heard = Heard()
    assert again(run, display=heard).summary == "identical", "the weights say that the values are the same"
    assert "config.yaml is not the file that the run ended with (its SHA-256 is another)" in heard.warnings
    changed = "identical, but the run's config.yaml as it began -> changed since"
    edit_json(run / "run.json", lambda s: s["files"].update({"config.yaml": sha256_of(run / "config.yaml")}))
    assert again(run).summary == changed

    edit(run, train__learning_rate=0.004)
    (run / "model.safetensors").unlink()
    made = again(run)
    assert made.verdict != "identical"
    assert roles(made)["the run's config.yaml"] == "cause", "nothing else can be"


def test_what_changed_while_a_run_was_interrupted_is_suspect_where_results_differ(run: Path) -> None:
    changes = {"packages.torch": ["2.12.0", "2.13.0"], "packages.mlflow": ["3.0", "3.1"], "device.threads": 3}
    edit_json(run / "run.json", lambda state: state.update(resumed=[{"changed": changes}, {"at": "then"}]))
    made = again(run)
    assert made.summary == "identical"
    assert set(roles(made).values()) == {"cleared"}
    edit(run, train__learning_rate=0.004)
    found = roles(again(run))
    assert found["train.learning_rate"] == "cause"
    assert found["when the run went on: packages.torch"] == "suspect"
    assert found["when the run went on: packages.mlflow"] == "cleared"


def test_a_version_in_the_record_is_drift_and_no_cause(run: Path) -> None:
    edit_json(run / "environment.json", lambda found: found["packages"].update(pillow="1.2.3"))
    heard = Heard()
    made = again(run, display=heard)
    assert made.summary.startswith("identical, but pillow 1.2.3 -> ")
    assert roles(made) == {"pillow": "cleared"}
    assert heard.warnings == [
        "environment.json is not the file that the run ended with (its SHA-256 is another)"
    ]


def test_a_metric_that_somebody_changed_is_not_called_the_same(run: Path) -> None:
    path = run / "metrics.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    row = results_row(first)
    loss = row.metrics["train/loss"]
    changed = replace(row, metrics={**row.metrics, "train/loss": loss * (1 + 2**-52)})
    path.write_text("".join([changed.to_line(), *rest]))
    made = again(run)
    assert made.verdict == "equivalent"
    (only,) = made.differences
    assert (only.epoch, only.name, only.actual) == (1, "train/loss", loss)
    assert made.summary.endswith("cause: the run's metrics.jsonl as it ended -> changed since")


def results_row(line: str) -> Any:
    from captcha_exp.runs import MetricsRow

    return MetricsRow.from_line(line)


# -- a folder of pictures ------------------------------------------------------------------------------------


@pytest.fixture
def pictured(tiny: Config, tmp_path: Path) -> tuple[Path, Path]:
    """A run on a folder of pictures, and the folder."""
    from test_folder import of

    there = tmp_path / "images"
    there.mkdir()
    for number in range(60):
        (there / f"{number:04}.png").write_bytes(saved(page(number), "PNG"))
    config = of(there)
    config = replace(config, train=replace(config.train, epochs=1))
    return train(config).run_dir, there


def test_pictures_that_were_moved_are_found_by_data_path(pictured: tuple[Path, Path]) -> None:
    folder, there = pictured
    there.rename(there.with_name("elsewhere"))
    with pytest.raises(
        UserError, match=r"there is no such folder; data\.path=DIR names the folder where it is"
    ):
        again(folder)
    made = again(folder, f"data.path={there.with_name('elsewhere')}")
    assert made.verdict == "identical"
    assert roles(made) == {"data.path": "cleared"}


def test_one_pixel_and_one_label_are_named_before_the_training(pictured: tuple[Path, Path]) -> None:
    folder, there = pictured
    with Image.open(there / "0007.png") as image:
        image.putpixel((3, 4), (image.getpixel((3, 4)) or 0) ^ 128)  # type: ignore[operator]  # one grey
        image.save(there / "0007.png")
    (there / "labels.csv").write_text(
        "file,label\n" + "".join(f"{n:04}.png,{9999 if n == 5 else n:04}\n" for n in range(60))
    )
    heard = Heard()
    made = again(folder, display=heard)
    before = "the folder of pictures is not as it was:"
    assert f"{before} another content: 0007.png" in heard.warnings
    assert f"{before} another label: 0005.png" in heard.warnings
    assert made.verdict == "different"
    assert made.summary.endswith("; cause: another content: 0007.png, another label: 0005.png")


def test_a_missing_and_a_new_picture_are_named(pictured: tuple[Path, Path]) -> None:
    folder, there = pictured
    (there / "0009.png").rename(there / "7777.png")
    heard = Heard()
    made = again(folder, display=heard)
    assert [line.partition("was: ")[2] for line in heard.warnings] == ["missing: 0009.png", "new: 7777.png"]
    assert made.verdict == "different"


# -- code ----------------------------------------------------------------------------------------------------


def test_code_that_was_changed_is_told_before_with_how_to_get_the_old(run: Path) -> None:
    edit_json(run / "code.json", lambda found: found.update({"captcha_exp/model/step.py": "0" * 64}))
    edit_json(
        run / "environment.json",
        lambda found: found.update(git={"commit": "a1" * 20, "branch": "main", "dirty": True}),
    )
    (run / "code.diff").write_text("")
    heard = Heard()
    made = again(run, display=heard)
    told = next(line for line in heard.warnings if "code is not" in line)
    assert told.startswith(
        "today's code is not that of the run (a1a1a1a1 with changes): captcha_exp/model/step.py; "
        "to have the old "
    )
    assert f"../captcha_exp-a1a1a1a1 {'a1' * 20}" in told or "git clone" in told
    assert told.endswith(f"and in there git apply '{run / 'code.diff'}'")
    assert made.summary.startswith(
        "identical, but code (captcha_exp/model/step.py) a1a1a1a1 with changes -> "
    )


def test_a_commit_that_is_no_commit_is_never_part_of_a_command(run: Path) -> None:
    edit_json(run / "code.json", lambda found: found.update({"captcha_exp/model/step.py": "0" * 64}))
    edit_json(run / "environment.json", lambda found: found.update(git={"commit": "$(rm -rf ~)"}))
    heard = Heard()
    again(run, display=heard)
    assert any("pip install captcha-exp==" in line for line in heard.warnings)
    assert not any("worktree" in line for line in heard.warnings)


def test_equal_code_at_another_commit_is_no_news(run: Path) -> None:
    edit_json(run / "environment.json", lambda found: found.update(git={"commit": "b" * 40, "dirty": False}))
    made = again(run)
    assert made.summary == "identical"
    assert roles(made) == {"commit": "cleared"}


SMALL = "import sys; from captcha_exp.cli.main import main; sys.argv[0] = 'captcha-exp'; main()"


def in_a_process(home: Path, root: Path, *words: str, **variables: str) -> dict[str, Any]:
    """What the command prints, from a fresh process of the package in `home`."""
    environment = os.environ | {"PYTHONPATH": str(home), "CAPTCHA_EXP_ROOT": str(root)} | variables
    done = subprocess.run(
        [sys.executable, "-P", "-c", SMALL, *words, "--json"], env=environment, capture_output=True, text=True
    )
    assert done.stdout, done.stderr
    values: dict[str, Any] = json.loads(done.stdout)
    return {**values, "exit_code": done.returncode}


def test_another_cpu_capability_is_the_cause(run: Path, root: Path) -> None:
    made = in_a_process(PROJECT, root, "reproduce", str(run), ATEN_CPU_CAPABILITY="default")
    assert made["exit_code"] in (3, 4)
    assert "cause: CPU capability " in made["sentence"]
    assert {each["what"]: each["role"] for each in made["drift"]} == {
        "CPU capability": "cause",
        "variable ATEN_CPU_CAPABILITY": "cause",
    }


@pytest.mark.parametrize(
    ("other", "verdicts"),
    [
        ('config.seed, "weights"))  # why', {"identical"}),
        ('config.seed, "weight"))', {"equivalent", "different"}),
    ],
    ids=["comment", "line"],
)
def test_a_changed_line_of_code_is_the_cause_and_a_comment_is_not(
    run: Path, root: Path, tmp_path: Path, other: str, verdicts: set[str]
) -> None:
    home = tmp_path / "other"
    for name in ("captcha_exp", "conf"):
        shutil.copytree(PROJECT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    path, healthy = home / "captcha_exp" / "step.py", 'config.seed, "weights"))'
    assert healthy in path.read_text()
    path.write_text(path.read_text().replace(healthy, other))
    made = in_a_process(home, root, "reproduce", str(run))
    assert made["verdict"] in verdicts
    told = (
        "identical, but code (captcha_exp/model/step.py)"
        if "identical" in verdicts
        else "cause: code (captcha"
    )
    assert told in made["sentence"]


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"status": "KILLED"}, "is KILLED; only a FINISHED run has a result to compare with"),
        ({"oom": {"during": "training"}}, "ran out of memory: it has no weights to compare with"),
        ({"result": {}}, "its record is damaged"),
    ],
)
def test_a_run_without_a_result_is_refused(
    run: Path, root: Path, call: Call, change: dict[str, Any], line: str
) -> None:
    edit_json(run / "run.json", lambda state: state.update(change))
    code, out, err = call("reproduce", str(run))
    assert (code, out) == (2, "")
    assert line in err
    assert len(err.splitlines()) == 1
    assert not list((root / "outputs").glob("2*"))


@pytest.mark.parametrize("name", ["dataset.json", "environment.json", "test.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b"\xff{", b"[" * 100_000])
def test_a_missing_or_damaged_manifest_is_one_line(run: Path, name: str, content: bytes | None) -> None:
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content)
    if (name, content) == ("environment.json", b"{}"):
        return  # nothing is known of what it ran on, and all of its results are there
    with pytest.raises(UserError) as refused:
        load_reference(run)
    assert len(refused.value.lines) == 1
    assert str(run) in refused.value.lines[0]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dataset.json", {"files": [{"file": "a"}]}),
        ("dataset.json", {"rejected": ["a"]}),
        ("test.json", {"misreads": [1]}),
        ("test.json", {"images": None}),
        ("run.json", {"result": [1]}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_manifest_of_other_things_is_one_line(run: Path, name: str, change: dict[str, Any]) -> None:
    edit_json(run / name, lambda values: values.update(change))
    with pytest.raises(UserError, match="its record is damaged"):
        load_reference(run)


def test_metrics_that_are_no_numbers_are_one_line(run: Path) -> None:
    from captcha_exp.runs import MetricsRow

    for metrics in ([0.5], {"train/loss": "a"}):
        row = MetricsRow(1, 2, metrics)  # type: ignore[arg-type]  # somebody else wrote it
        (run / "metrics.jsonl").write_text(row.to_line())
        with pytest.raises(UserError, match="its record is damaged"):
            load_reference(run)


def test_a_saved_config_of_other_code_says_so(run: Path) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text() + "tomorrow: 1\n")
    with pytest.raises(UserError, match="it was changed after the run ended: put it right"):
        load_reference(run)
    edit_json(run / "run.json", lambda state: state["files"].update({"config.yaml": sha256_of(path)}))
    with pytest.raises(UserError, match="it was saved by other code: take that"):
        load_reference(run)


def test_nothing_of_a_saved_config_is_followed(run: Path) -> None:
    edit(run, data__cache="${oc.env:HOME}")
    assert load_reference(run).config.data.cache == "${oc.env:HOME}"


def test_a_device_that_is_not_here_has_its_remedy(run: Path) -> None:
    edit(run, device__name="cuda:7")
    with pytest.raises(UserError, match=r"device\.name=cpu runs it here, as a variation"):
        again(run)


def test_a_run_that_only_mlflow_has_is_fetched(
    tiny: Config, root: Path, call: Call, composed: DictConfig
) -> None:
    from captcha_exp.config import MlflowConfig
    from captcha_exp.runtime.console import NullDisplay
    from captcha_exp.tracking import make_tracker

    store = MlflowConfig(backend="mlflow", uri=f"sqlite:///{root / 'mlruns' / 'mlflow.db'}", experiment="e")
    config = replace(tiny, tracking=store)
    folder = train(config, make_tracker(config, NullDisplay(), {})).run_dir
    run_id = json.loads((folder / "run.json").read_text())["mlflow"]["run_id"]
    shutil.rmtree(folder)
    code, out, _ = call("reproduce", run_id[:8])
    assert code == 2  # a beginning may be that of several
    code, out, _ = call("reproduce", run_id, "--json")
    assert (code, json.loads(out)["sentence"]) == (0, "identical")
    from mlflow import MlflowClient

    state = json.loads((Path(json.loads(out)["run_dir"]) / "run.json").read_text())
    tags = MlflowClient(store.uri).get_run(state["mlflow"]["run_id"]).data.tags
    assert (tags["reproduces"], tags["reproduction"]) == (run_id, "identical")
    assert state["lineage"] == {"reproduces": {"run_dir": None, "run_id": run_id, "store": store.uri}}
    assert json.loads(out)["of"] == f"MLflow run {run_id} of {store.uri}"
    assert call("reproduce", "0" * 32)[0] == 2


def test_a_run_with_more_epochs_begins_from_the_state_that_it_began_from(run: Path, tmp_path: Path) -> None:
    config = load_reference(run).config
    more = replace(config, train=replace(config.train, epochs=4, schedule="constant"))
    first = train(replace(more, train=replace(more.train, epochs=2))).run_dir
    links = {"extends": {"run_dir": str(first), "run_id": None}}
    second = train(more, lineage=links, extend_from=first).run_dir
    assert again(second).summary == "identical"
    reproduced = again(second)
    links = json.loads((reproduced.run_dir / "run.json").read_text())["lineage"]
    assert links["extends"] == {"run_dir": str(first), "run_id": None}
    assert again(reproduced.run_dir).summary == "identical", "it begins from that state, too"

    elsewhere = tmp_path / "elsewhere" / first.parent.name
    elsewhere.mkdir(parents=True)
    moved = [Path(shutil.move(folder, elsewhere)) for folder in (first, second)]
    assert again(moved[1]).summary == "identical", "copied together, they find each other"
    shutil.rmtree(moved[0])
    with pytest.raises(UserError, match=r"began from the state of .* which is not there; bring it back"):
        again(moved[1])


def test_a_run_that_was_continued_from_is_found_by_its_id(run: Path, root: Path) -> None:
    edit_json(run / "run.json", lambda state: state.update(mlflow={"run_id": "a" * 32, "closed": True}))
    other = shutil.copytree(run, root / "outputs" / "2020-01-01" / "other")
    link = {"run_dir": "/nowhere/x/y", "run_id": "a" * 32}
    assert find_linked(link, run) == other
    assert find_linked({**link, "run_id": "b" * 32}, run) is None
    assert find_linked({"run_dir": f"/nowhere/2020-01-01/{other.name}", "run_id": "a" * 32}, other) == other
    assert find_linked({"run_dir": str(other), "run_id": "b" * 32}, run) is None, (
        "another run stands there now"
    )


def test_a_sweep_is_not_a_run(call: Call, root: Path) -> None:
    sweep = root / "outputs" / "2020-01-01" / "sweep"
    sweep.mkdir(parents=True)
    (sweep / "sweep.json").write_text("{}")
    code, _, err = call("reproduce", str(sweep))
    assert code == 2
    assert err.endswith(": is a sweep; give the folder of one of its points, which has none yet\n")
    (sweep / "1-seed=1").mkdir()
    (sweep / "1-seed=1" / "run.json").write_text("{}")
    assert f"one of its points: {sweep / '1-seed=1'}, say\n" in call("reproduce", str(sweep))[2]


# -- verdicts and causes, by hand ----------------------------------------------------------------------------


def outcome(loss: float = 2.0, accuracy: float = 0.8, images: str = "a", weights: str = "w") -> RunResult:
    dataset = {"images_sha256": images, "labels_sha256": "l", "splits": {"train": 3}}
    metrics = {"train/loss": loss, "test/accuracy": accuracy, "test/accuracy_low": 0.7}
    epochs = {1: metrics | {"test/accuracy_high": 0.9, "speed/epoch_seconds": loss}}
    return RunResult(epochs, dataset, {}, {}, 10, {}, weights)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (outcome(), "identical"),
        (outcome(weights="v"), "equivalent"),
        (outcome(loss=2.0199999), "equivalent"),
        (outcome(loss=2.0200001), "different"),
        (outcome(accuracy=0.7), "equivalent"),
        (outcome(accuracy=0.9000001), "different"),
        (outcome(loss=float("nan")), "different"),
        (outcome(images="b"), "different"),
    ],
)
def test_equivalent_is_what_the_tolerances_say(now: RunResult, expected: str) -> None:
    assert compare.compute_verdict(outcome(), now) == expected


def test_speed_and_memory_are_never_compared_and_minus_zero_is_another_number() -> None:
    fast = outcome()
    fast.metrics_by_epoch[1]["speed/epoch_seconds"] = 9.0  # type: ignore[index]
    assert compare.find_differences(outcome(), fast) == []
    (only,) = compare.find_differences(outcome(loss=0.0), outcome(loss=-0.0))
    assert only.describe() == "epoch 1, train/loss 0.0 -> -0.0"


TORCH = Change("torch", "1", "2", "numbers")
PILLOW = Change("pillow", "1", "2", "images")
SEED = Change("seed", 0, 1, "numbers", is_input=True)
MLFLOW = Change("mlflow", "1", "2", "nothing")


@pytest.mark.parametrize(
    ("found", "same_pictures", "certain", "expected"),
    [
        ([TORCH, MLFLOW], True, True, ["cause", "cleared"]),
        ([TORCH, PILLOW], True, True, ["cause", "cleared"]),
        ([TORCH, PILLOW], False, True, ["suspect", "suspect"]),
        ([PILLOW], False, True, ["cause"]),
        ([TORCH], True, False, ["suspect"]),
        ([TORCH, SEED], True, True, ["suspect", "cause"]),
        ([SEED, MLFLOW], True, False, ["cause", "cleared"]),
        ([MLFLOW], True, True, ["cleared"]),
    ],
)
def test_a_cause_is_what_ran_otherwise_or_the_only_one_that_can_be(
    found: list[Change], same_pictures: bool, certain: bool, expected: list[str]
) -> None:
    assert [each.role for each in attribute(found, "different", same_pictures, certain)] == expected
    assert {each.role for each in attribute(found, "identical", True, certain)} == {"cleared"}


def test_a_difference_without_any_drift_is_told_plainly() -> None:
    (first,) = compare.find_differences(outcome(), outcome(loss=2.5))
    line = format_verdict("different", first, [], deterministic=True)
    assert line.startswith("different: first in epoch 1, train/loss 2.0 -> 2.5; nothing that is recorded")
    assert format_verdict("different", first, [], deterministic=False).endswith(
        "no two trainings are the same"
    )


def test_keys_that_no_result_depends_on() -> None:
    assert drift.has_no_effect("tracking.uri")
    assert drift.has_no_effect("data.workers")
    assert not drift.has_no_effect("train.eval_batch_size")
    assert not drift.has_no_effect("data.workers_of_mine")
    assert not drift.has_no_effect("names")
