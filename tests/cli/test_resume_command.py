"""What --resume comes to: which run goes on, and that it ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY, Call
from mlflow import MlflowClient

from captcha_exp import compose, load, runs
from captcha_exp.cli import resume
from captcha_exp.cli.hydra_config import apply_overrides
from captcha_exp.config import Config, flatten
from captcha_exp.errors import ConfigError
from captcha_exp.model import state as checkpoint
from captcha_exp.runs import code_sha256
from captcha_exp.training import train as training

NOBODY = {"pid": 2**22 + 1, "process_started": 1.0}


class Trained:
    """In the place of train(): remembers how it was called, and leaves a finished run."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        requested: Config,
        tracker: Any,
        display: Any,
        folder: Path | None = None,
        links: Mapping[str, Any] | None = None,
        start_from: Path | None = None,
    ) -> Any:
        del tracker, display
        self.calls.append(
            {"requested": requested, "run_dir": folder, "links": dict(links or {}), "start_from": start_from}
        )
        if folder is None:
            folder = runs.create_run(requested, requested, None, links).run_dir
        state = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(state | {"status": "FINISHED"}))
        return SimpleNamespace(folder=folder)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    stub = Trained()
    monkeypatch.setattr(training, "train", stub)
    return stub


@pytest.fixture
def words(cache: Path) -> list[str]:
    """Overrides of the tiny config; it keeps no MLflow."""
    return [*TINY, f"data.cache={cache}", "tracking=none"]


def left(words: list[str], status: str = "KILLED", code: str | None = None, **state: Any) -> Path:
    """A run of these overrides that a process has left."""
    config = load(compose(*words))
    run = runs.create_run(config, config)
    run.write_json("environment.json", {"code_sha256": code or code_sha256()})
    (run.run_dir / "checkpoint").mkdir()
    run.update(**{"status": status, **NOBODY, **state})
    return run.run_dir


def finished(words: list[str], **state: Any) -> Path:
    """A run of two epochs that has ended with its checkpoint."""
    folder = left(words, "FINISHED", **{"result": {"epochs": 2}, **state})
    (folder / "checkpoint" / "step-6.safetensors").touch()
    return folder


# -- auto and never ------------------------------------------------------------------------------------------


def test_by_itself_a_call_goes_on_with_what_it_asks_for(
    call: Call, trained: Trained, words: list[str]
) -> None:
    folder = left(words)
    code, _, err = call("train", *words)
    assert code == 0
    (only,) = trained.calls
    assert only == {"requested": load(compose(*words)), "run_dir": folder, "links": {}, "start_from": None}
    assert f"goes on with {folder}, from the start (no checkpoint yet)" in err
    code, _, err = call("train", *words)
    assert trained.calls[1]["run_dir"] is None, "it is finished now"
    assert err == ""


@pytest.mark.parametrize("more", [["--resume=never"], ["seed=7"], ["--resume", "never"]])
def test_what_is_not_asked_for_is_left_without_a_word(
    call: Call, trained: Trained, words: list[str], more: list[str]
) -> None:
    left(words)
    code, _, err = call("train", *words, *more)
    assert (code, err) == (0, "")
    assert trained.calls[0]["run_dir"] is None


def test_what_died_just_now_is_closed_and_gone_on_with(
    call: Call, trained: Trained, words: list[str]
) -> None:
    folder = left(words, "RUNNING")
    _, _, err = call("train", *words)
    assert trained.calls[0]["run_dir"] == folder
    assert err.splitlines()[0].endswith("has exited; marked KILLED")


def test_other_code_is_named_and_a_new_run_begins(call: Call, trained: Trained, words: list[str]) -> None:
    folder = left(words, code="0" * 64)
    _, _, err = call("train", *words)
    assert trained.calls[0]["run_dir"] is None
    assert err == (
        f"{folder}: unfinished run with the same config, started by different code; --resume={folder} "
        "resumes it\n"
    )


def test_a_call_that_fails_before_it_goes_on_leaves_the_run_as_it_was(
    call: Call, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    folder = left(words)
    before = (folder / "run.json").read_text()

    def fail(*_: object, **__: object) -> None:
        assert json.loads((folder / "run.json").read_text())["pid"] == os.getpid()
        raise ConfigError("data.path=x: leads nowhere")

    monkeypatch.setattr(training, "train", fail)
    assert call("train", *words)[0] == 2
    assert json.loads((folder / "run.json").read_text()) == json.loads(before)


# -- a run by its name ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [[], ["seed=0"], ["+train.epochs=2"], TINY], ids=str)
def test_a_named_run_goes_on_as_it_was_asked_for(
    call: Call, trained: Trained, words: list[str], beside: list[str]
) -> None:
    folder = left(words)
    left([*words, "seed=3"])
    code, _, err = call("train", "--resume", str(folder), *beside)
    assert code == 0, err
    assert trained.calls == [
        {"requested": load(compose(*words)), "run_dir": folder, "links": {}, "start_from": None}
    ]


def test_choices_between_files_are_composed_and_compared(
    call: Call, trained: Trained, words: list[str]
) -> None:
    folder = left(words)
    assert call("train", "--resume", str(folder), *words)[0] == 0
    assert trained.calls[0]["run_dir"] == folder
    other = left([*words, "seed=3"])
    code, _, err = call("train", f"--resume={other}", "experiment=alnum")
    assert code == 2
    assert err.startswith(f"--resume={other}: is unfinished and goes on as it was begun; name=alnum (it was ")
    assert err.count("\n") == 1
    assert " keys more differ: leave that out, or begin a new run with --resume=never" in err


def test_a_named_run_of_other_code_goes_on_with_a_warning(
    call: Call, trained: Trained, words: list[str]
) -> None:
    folder = left(words, code="0" * 64)
    code, _, err = call("train", f"--resume={folder}")
    assert code == 0
    assert trained.calls[0]["run_dir"] == folder
    assert f"warning: {folder}: other code than today's began it" in err


@pytest.mark.parametrize(
    ("beside", "line"),
    [
        (
            ["train.epochs=3"],
            "is unfinished and goes on as it was begun; train.epochs=3 (it was 2) differs: leave",
        ),
        (["seed=1", "name=x"], "name=x (it was tiny), seed=1 (it was 0) differ: leave that out"),
    ],
)
def test_an_unfinished_run_takes_no_other_values(
    call: Call, trained: Trained, words: list[str], beside: list[str], line: str
) -> None:
    folder = left(words)
    before = (folder / "run.json").read_text()
    code, out, err = call("train", f"--resume={folder}", *beside)
    assert (code, out) == (2, "")
    assert line in err
    assert err.count("\n") == 1
    assert (folder / "run.json").read_text() == before
    assert trained.calls == []


@pytest.mark.parametrize("by_itself", [True, False])
def test_an_unfinished_run_can_be_given_another_limit_of_time(
    call: Call, trained: Trained, words: list[str], by_itself: bool
) -> None:
    folder = left([*words, "train.max_minutes=5"])
    more = "train.max_minutes=30"
    code, _, _ = call("train", *([*words, more] if by_itself else [f"--resume={folder}", more]))
    assert code == 0
    (made,) = trained.calls
    assert made["run_dir"] == folder
    assert made["requested"].train.max_minutes == 30


def test_a_named_run_that_finishes_just_then_is_not_gone_on_with(
    call: Call, trained: Trained, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = left(words)

    def other_keys(*_: object) -> dict[str, str]:
        state = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(state | {"status": "FINISHED"}))
        return {}

    monkeypatch.setattr(resume, "_other_keys", other_keys)
    code, _, err = call("train", f"--resume={folder}")
    assert (code, trained.calls) == (2, [])
    assert err == f"--resume={folder}: has finished just now; train.epochs=N beside it gives it more\n"


def test_a_reproduction_that_was_interrupted_is_begun_anew(
    call: Call, trained: Trained, words: list[str]
) -> None:
    folder = left(words, lineage={"reproduces": {"run_dir": "/a run", "run_id": None}})
    code, out, err = call("train", f"--resume={folder}")
    assert (code, out) == (2, "")
    assert err == (
        f"--resume={folder}: is a reproduction that was interrupted; captcha-exp reproduce '/a run' "
        "begins it anew\n"
    )
    assert trained.calls == []


def test_mistakes_beside_a_run_are_told_all_at_once(call: Call, words: list[str]) -> None:
    folder = left(words)
    code, _, err = call("train", f"--resume={folder}", "train.epohcs=3", "seed=-1", "device.name=cuda:9")
    assert code == 2
    assert sorted(line.split("=")[0] for line in err.splitlines()) == ["device.name", "seed", "train.epohcs"]


def test_a_damaged_config_is_one_line(call: Call, words: list[str]) -> None:
    folder = left(words)
    (folder / "requested.yaml").write_text("{")
    code, _, err = call("train", f"--resume={folder}")
    assert code == 2
    assert err.startswith(f"{folder}/requested.yaml: cannot be read as a config: ")


# -- more epochs ---------------------------------------------------------------------------------------------


def test_more_epochs_make_a_new_run_that_is_linked(call: Call, trained: Trained, words: list[str]) -> None:
    words = [*words, "train.schedule=constant", "train.warmup_fraction=0"]
    folder = finished(words, mlflow={"run_id": "abc", "uri": "", "closed": True})
    before = (folder / "run.json").read_text()
    code, _, err = call("train", f"--resume={folder}", "train.epochs=5", "train.patience=9")
    assert (code, err) == (0, "")
    assert trained.calls == [
        {
            "requested": load(compose(*words, "train.epochs=5", "train.patience=9")),
            "run_dir": None,
            "links": {"extends": {"run_dir": str(folder), "run_id": "abc"}},
            "start_from": folder,
        }
    ]
    assert (folder / "run.json").read_text() == before


def test_a_new_run_of_more_epochs_that_was_interrupted_goes_on_itself(
    call: Call, trained: Trained, words: list[str]
) -> None:
    folder = finished(words)
    links = {"extends": {"run_dir": str(folder), "run_id": None}}
    begun = left([*words, "train.epochs=5"], lineage=links)
    for _ in range(2):
        code, _, err = call("train", f"--resume={folder}", "train.epochs=5")
        assert code == 0, err
        assert (trained.calls[-1]["lineage"], trained.calls[-1]["start_from"]) == (links, folder)
    assert [each["run_dir"] for each in trained.calls] == [begun, None]

    by_name = left([*words, "train.epochs=5"], lineage=links)
    assert call("train", f"--resume={by_name}")[0] == 0
    assert (trained.calls[-1]["run_dir"], trained.calls[-1]["start_from"]) == (by_name, folder)
    begun = left([*words, "train.epochs=5"], lineage=links)
    assert call("train", *words, "train.epochs=5")[0] == 0
    assert trained.calls[-1]["run_dir"] is None, "from the beginning is another thing"


def test_what_is_laid_out_over_all_epochs_is_told(call: Call, trained: Trained, words: list[str]) -> None:
    folder = finished([*words, "augment.warmup_fraction=0.5"])
    _, _, err = call("train", f"--resume={folder}", "train.epochs=5")
    assert err == (
        "warning: train.schedule=onecycle and augment.warmup_fraction=0.5: is laid out "
        "over all epochs, so that the "
        "result is not that of 5 epochs from the start\n"
    )
    assert len(trained.calls) == 1


@pytest.mark.parametrize(
    ("beside", "line"),
    [
        ([], "is finished after epoch 2 of 2; more of them, with train.epochs=N beside it, make a new run"),
        (["train.epochs=2"], "is finished after epoch 2 of 2; more of them"),
        (["train.epochs=1"], "is finished after epoch 2 of 2; more of them"),
        (["train.patience=9"], "is finished after epoch 2 of 2; more of them"),
        (
            ["train.epochs=5", "seed=1"],
            "is finished and can get more epochs (train.epochs, train.patience) alone; seed=1 (it was 0)",
        ),
    ],
    ids=str,
)
def test_a_finished_run_gets_nothing_but_more_epochs(
    call: Call, trained: Trained, words: list[str], beside: list[str], line: str
) -> None:
    folder = finished(words)
    code, _, err = call("train", f"--resume={folder}", *beside)
    assert code == 2
    assert err.startswith(f"--resume={folder}: {line}")
    assert err.count("\n") == 1
    assert trained.calls == []


def test_what_stopped_early_may_be_given_more_patience_alone(
    call: Call, trained: Trained, words: list[str]
) -> None:
    folder = finished([*words, "train.epochs=9", "train.patience=1"])
    assert call("train", f"--resume={folder}", "train.patience=5")[0] == 0
    assert trained.calls[0]["start_from"] == folder
    assert call("train", f"--resume={folder}", "train.epochs=8")[0] == 2


@pytest.mark.parametrize("lacks", ["checkpoint", "result"])
def test_a_finished_run_without_its_state_is_refused(
    call: Call, trained: Trained, words: list[str], lacks: str
) -> None:
    folder = finished(words, **({"result": {}} if lacks == "result" else {}))
    if lacks == "checkpoint":
        (folder / "checkpoint" / "step-6.safetensors").unlink()
    code, _, err = call("train", f"--resume={folder}", "train.epochs=5")
    assert code == 2
    assert "is finished and has no checkpoint to start from; begin a new run with --resume=never" in err
    assert trained.calls == []


# -- values on a saved config --------------------------------------------------------------------------------


def test_values_are_put_onto_a_saved_config(tiny: Config) -> None:
    changed = apply_overrides(
        tiny, ["train.epochs=9", "+seed=1", "model.channels=[4,4]", "captcha.alphabet='0123'"]
    )
    others = {key: value for key, value in flatten(changed).items() if value != flatten(tiny)[key]}
    assert others == {
        "seed": "1",
        "captcha.alphabet": "0123",
        "model.channels": "[4, 4]",
        "train.epochs": "9",
    }
    assert apply_overrides(tiny, []) == tiny


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("train.epochs=0", "train.epochs=0: must be a whole number"),
        ("train.epohcs=3", "train.epohcs=3: unknown key; did you mean train.epochs?"),
        ("seed.x.y=3", "seed.x.y=3: there is no such key"),
        ("train.epochs.x=3", "train.epochs.x=3: there is no such key"),
        ("experiment=alnum", "experiment=alnum: gives no key of a saved config a value; "),
        ("data=wheezy", "data=wheezy: gives no key of a saved config a value; "),
        ("~train.epochs", "~train.epochs: gives no key of a saved config a value; "),
        ("seed=1,2", "seed=1,2: is a sweep; "),
        ("hydra.run.dir=x", "hydra.run.dir=x: "),
        ("seed", "'seed': is no override; "),
        ("data.cache=${oc.env:HOME}", ""),
    ],
)
def test_a_mistake_on_a_saved_config_is_one_line(tiny: Config, word: str, line: str) -> None:
    if not line:
        config = apply_overrides(tiny, [word])
        assert "${oc.env:HOME}" in flatten(config).values(), (
            "a saved config is data: nothing in it is followed"
        )
        return
    with pytest.raises(ConfigError) as caught:
        apply_overrides(tiny, [word])
    (told,) = caught.value.lines
    assert told.startswith(line)


# -- as a whole ----------------------------------------------------------------------------------------------


def command(root: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "captcha_exp", "train", *words],
        env=os.environ | {"CAPTCHA_EXP_ROOT": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def killed_after(root: Path, step: int, *words: str) -> Path:
    """The folder of a training that was killed once a checkpoint of this step, or a later one, was there."""
    process = command(root, *words)
    deadline = time.monotonic() + 120
    while not [p for p in root.glob("outputs/*/*/checkpoint/step-*.safetensors") if int(p.stem[5:]) >= step]:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (record_,) = root.glob("outputs/*/*/run.json")
    assert json.loads(record_.read_text())["status"] == "RUNNING"
    return record_.parent


def said(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out), err


def figures(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Metrics by step, without those of time and memory."""
    rows, broken = runs.read_metrics_rows(folder)
    assert broken == []
    return [
        (row.step, {key: v for key, v in row.metrics.items() if not key.startswith(("memory/", "speed/"))})
        for row in rows
    ]


def test_the_same_command_goes_on_after_kill_9(root: Path, words: list[str], tmp_path: Path) -> None:
    """In the same folder and the same run of MLflow, to the same bits."""
    words = [word for word in words if word != "tracking=none"]
    words += ["train.checkpoint_every='1 step'", "train.epochs=8", "train.batch_size=16", "--json"]
    folder = killed_after(root, 12, *words)
    run_id = json.loads((folder / "run.json").read_text())["mlflow"]["run_id"]
    result, err = said(command(root, *words))
    assert f"goes on with {folder}, from " in err
    assert result["run_dir"] == str(folder)
    assert (result["epochs"], result["status"]) == (8, "FINISHED")

    config = load(compose(*(word for word in words if word != "--json"), "tracking=none"))
    whole = training.train(config, run_dir=made(tmp_path / "whole"))
    assert result["weights_sha256"] == whole.weights_sha256
    assert_same_state(folder, whole.run_dir)
    assert figures(folder) == figures(whole.run_dir)
    assert [step for step, _ in figures(folder)] == [*range(1, 9), 8], "each epoch once, and the test"

    client = MlflowClient(f"sqlite:///{root}/mlruns/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "captcha_exp")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert [m.step for m in client.get_metric_history(run_id, "val/loss")] == [*range(1, 9)]


def assert_same_state(folder: Path, other: Path) -> None:
    """The last checkpoints of two runs have every tensor in common; the best weights may be of any epoch."""
    one, two = (checkpoint.load_latest(each / runs.CHECKPOINT_DIR, pytest.fail) for each in (folder, other))
    assert one is not None
    assert two is not None
    assert one.path.name == two.path.name
    assert one.tensors.keys() == two.tensors.keys()
    assert [name for name in one.tensors if not torch.equal(one.tensors[name], two.tensors[name])] == []


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_more_epochs_are_as_if_there_had_been_so_many_from_the_start(
    call: Call, words: list[str], tmp_path: Path
) -> None:
    words = [*words, "train.schedule=constant", "train.warmup_fraction=0"]
    code, out, _ = call("train", *words, "--json")
    assert code == 0
    first = json.loads(out)
    code, out, _ = call("train", f"--resume={first['folder']}", "train.epochs=4", "--json")
    assert code == 0
    more = json.loads(out)
    config = load(compose(*words, "train.epochs=4"))
    whole = training.train(config, run_dir=made(tmp_path / "whole"))
    assert more["run_dir"] != first["run_dir"]
    assert more["weights_sha256"] == whole.weights_sha256
    assert_same_state(Path(more["run_dir"]), whole.run_dir)
    assert figures(Path(more["run_dir"])) == figures(whole.run_dir)
    state = json.loads((Path(more["run_dir"]) / "run.json").read_text())
    assert state["lineage"] == {"extends": {"run_dir": first["run_dir"], "run_id": None}}


def test_more_epochs_that_were_killed_at_once_start_from_the_finished_run_again(
    call: Call, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*words, "train.schedule=constant", "train.warmup_fraction=0", "train.epochs=1"]
    first = json.loads(call("train", *words, "--json")[1])
    config = load(compose(*words[:-1], "train.epochs=3"))
    links = {"extends": {"run_dir": first["run_dir"], "run_id": None}}
    begun = runs.create_run(config, config, None, links)
    begun.update(status="KILLED", **NOBODY)

    trained: list[int] = []
    one_epoch = training.train_epoch

    def counted(state: checkpoint.TrainState, *more: Any, **named: Any) -> Any:
        trained.append(state.epoch)
        return one_epoch(state, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_epoch", counted)
        code, out, err = call("train", f"--resume={begun.run_dir}", "--json")
    assert code == 0, err
    assert trained == [2, 3], "the first one is taken over"
    whole = training.train(replace(config, name="whole"))
    assert json.loads(out)["weights_sha256"] == whole.weights_sha256
    assert figures(begun.run_dir) == figures(whole.run_dir)
    assert len(json.loads((begun.run_dir / "run.json").read_text())["resumed"]) == 1


def test_a_training_in_a_process_of_its_own_goes_on_too(root: Path, words: list[str], tmp_path: Path) -> None:
    """train.on_oom=split starts a process for each training."""
    words = [*words, "train.checkpoint_every='1 step'", "train.epochs=6", "train.batch_size=16"]
    words += ["train.on_oom=split"]
    folder = killed_after(root, 12, *words, "--json")
    result, err = said(command(root, *words, "--json"))
    assert f"goes on with {folder}, from " in err
    assert result["run_dir"] == str(folder)
    whole = training.train(load(compose(*words)), run_dir=made(tmp_path / "whole"))
    assert result["weights_sha256"] == whole.weights_sha256
