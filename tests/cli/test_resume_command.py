"""`train --resume`: which run is resumed, and that the result equals an uninterrupted run."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY, Call, edit_record, environment_json, mlflow_ref, result_summary
from mlflow import MlflowClient

from captcha_exp import compose, load, runs
from captcha_exp.cli import resume
from captcha_exp.cli.hydra_config import apply_overrides
from captcha_exp.config import Config, flatten
from captcha_exp.errors import ConfigError
from captcha_exp.model import state as checkpoint
from captcha_exp.runs import Lineage, RunLink, code_sha256
from captcha_exp.runtime.shutdown import ShutdownHandler
from captcha_exp.training import train as training

EXITED_PROCESS = {"pid": 2**22 + 1, "process_started": 1.0}


class FakeTrain:
    """A replacement for `train` that stores its arguments and marks the run FINISHED."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        requested: Config,
        tracker: Any,
        run_dir: Path | None = None,
        lineage: Lineage | None = None,
        extend_from: Path | None = None,
        on_result: Any = None,
    ) -> Any:
        del tracker, on_result
        self.calls.append(
            {
                "requested": requested,
                "run_dir": run_dir,
                "lineage": lineage or Lineage(),
                "extend_from": extend_from,
            }
        )
        if run_dir is None:
            run_dir = runs.create_run(requested, requested, None, lineage).run_dir
        edit_record(run_dir, status="FINISHED")
        return SimpleNamespace(run_dir=run_dir, config=requested)

    def resume(
        self,
        run_dir: Path,
        tracker: Any,
        extend_from: Path | None = None,
        shutdown: ShutdownHandler | None = None,
        on_result: Any = None,
    ) -> Any:
        """A replacement for `resume`, whose time limit is stored as part of the requested config."""
        assert shutdown is not None
        deadline = shutdown._deadline
        minutes = None if deadline is None else round((deadline - time.monotonic()) / 60)
        requested = load(run_dir / "requested.yaml")
        requested = replace(requested, train=replace(requested.train, max_minutes=minutes))
        lineage = runs.RunInfo.load(run_dir).lineage
        return self(requested, tracker, run_dir, lineage, extend_from)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> FakeTrain:
    stub = FakeTrain()
    monkeypatch.setattr(training, "train", stub)
    monkeypatch.setattr(training, "resume", stub.resume)
    return stub


@pytest.fixture
def words(cache: Path) -> list[str]:
    """Overrides of the tiny config, without MLflow."""
    return [*TINY, f"data.cache={cache}", "tracking=none"]


def make_stale(words: list[str], status: str = "KILLED", code: str | None = None, **state: Any) -> Path:
    """Create a run whose process has exited."""
    config = load(compose(*words))
    run = runs.create_run(config, config)
    run.write_json("environment.json", environment_json(code_sha256=code or code_sha256()))
    (run.run_dir / "checkpoint").mkdir()
    run.update(**{"status": status, **EXITED_PROCESS, **state})
    return run.run_dir


def make_finished(words: list[str], **state: Any) -> Path:
    """Create a finished run of two epochs with a checkpoint."""
    run_dir = make_stale(words, "FINISHED", **{"result": result_summary(epochs=2), **state})
    (run_dir / "checkpoint" / "step-6.safetensors").touch()
    return run_dir


# -- auto and never ------------------------------------------------------------------------------------------


def test_auto_resumes_the_run_with_the_same_config(call: Call, trained: FakeTrain, words: list[str]) -> None:
    run_dir = make_stale(words)
    code, _, err = call("train", *words)
    assert code == 0
    (arguments,) = trained.calls
    assert arguments == {
        "requested": load(compose(*words)),
        "run_dir": run_dir,
        "lineage": Lineage(),
        "extend_from": None,
    }
    assert f"Resuming {run_dir} from the start (no checkpoint yet)" in err
    code, _, err = call("train", *words)
    assert trained.calls[1]["run_dir"] is None, "the run is finished"
    assert err == ""


@pytest.mark.parametrize("extra", [["--resume=never"], ["seed=7"], ["--resume", "never"]])
def test_other_runs_are_not_resumed(
    call: Call, trained: FakeTrain, words: list[str], extra: list[str]
) -> None:
    make_stale(words)
    code, _, err = call("train", *words, *extra)
    assert (code, err) == (0, "")
    assert trained.calls[0]["run_dir"] is None


def test_a_run_whose_process_has_just_exited_is_resumed(
    call: Call, trained: FakeTrain, words: list[str]
) -> None:
    run_dir = make_stale(words, "RUNNING")
    _, _, err = call("train", *words)
    assert trained.calls[0]["run_dir"] == run_dir
    assert err.splitlines()[0].endswith("has exited; marked KILLED")


def test_a_run_started_with_other_code_is_reported_and_skipped(
    call: Call, trained: FakeTrain, words: list[str]
) -> None:
    run_dir = make_stale(words, code="0" * 64)
    _, _, err = call("train", *words)
    assert trained.calls[0]["run_dir"] is None
    assert err == (
        f"{run_dir}: unfinished run with the same config, started by different code; --resume={run_dir} "
        "resumes it anyway\n"
    )


def test_a_call_that_fails_leaves_the_run_unchanged(
    call: Call, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    run_dir = make_stale(words)
    before = (run_dir / "run.json").read_text()

    def fail(*_: object, **__: object) -> None:
        assert json.loads((run_dir / "run.json").read_text())["pid"] == os.getpid()
        raise ConfigError("data.path=x: does not exist")

    monkeypatch.setattr(training, "resume", fail)
    assert call("train", *words)[0] == 2
    assert json.loads((run_dir / "run.json").read_text()) == json.loads(before)


# -- a named run ---------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("overrides", [[], ["seed=0"], ["+train.epochs=2"], TINY], ids=str)
def test_a_named_run_is_resumed_with_its_own_config(
    call: Call, trained: FakeTrain, words: list[str], overrides: list[str]
) -> None:
    run_dir = make_stale(words)
    make_stale([*words, "seed=3"])
    code, _, err = call("train", "--resume", str(run_dir), *overrides)
    assert code == 0, err
    assert trained.calls == [
        {"requested": load(compose(*words)), "run_dir": run_dir, "lineage": Lineage(), "extend_from": None}
    ]


def test_choices_of_config_files_are_compared(call: Call, trained: FakeTrain, words: list[str]) -> None:
    run_dir = make_stale(words)
    assert call("train", "--resume", str(run_dir), *words)[0] == 0
    assert trained.calls[0]["run_dir"] == run_dir
    other = make_stale([*words, "seed=3"])
    code, _, err = call("train", f"--resume={other}", "experiment=alnum")
    assert code == 2
    assert err.startswith(
        f"--resume={other}: is unfinished and can only be resumed with its own config; name=alnum (was "
    )
    assert err.count("\n") == 1
    assert " more keys differ: remove the override, or start a new run with --resume=never" in err


def test_a_named_run_of_other_code_is_resumed_with_a_warning(
    call: Call, trained: FakeTrain, words: list[str]
) -> None:
    run_dir = make_stale(words, code="0" * 64)
    code, _, err = call("train", f"--resume={run_dir}")
    assert code == 0
    assert trained.calls[0]["run_dir"] == run_dir
    assert f"warning: {run_dir}: started with different code" in err


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["train.epochs=3"],
            "can only be resumed with its own config; train.epochs=3 (was 2) differs: remove",
        ),
        (["seed=1", "name=x"], "name=x (was tiny), seed=1 (was 0) differ: remove the override"),
    ],
)
def test_an_unfinished_run_accepts_no_other_values(
    call: Call, trained: FakeTrain, words: list[str], overrides: list[str], line: str
) -> None:
    run_dir = make_stale(words)
    before = (run_dir / "run.json").read_text()
    code, out, err = call("train", f"--resume={run_dir}", *overrides)
    assert (code, out) == (2, "")
    assert line in err
    assert err.count("\n") == 1
    assert (run_dir / "run.json").read_text() == before
    assert trained.calls == []


@pytest.mark.parametrize("is_auto", [True, False])
def test_an_unfinished_run_accepts_another_time_limit(
    call: Call, trained: FakeTrain, words: list[str], is_auto: bool
) -> None:
    run_dir = make_stale([*words, "train.max_minutes=5"])
    more = "train.max_minutes=30"
    code, _, _ = call("train", *([*words, more] if is_auto else [f"--resume={run_dir}", more]))
    assert code == 0
    (arguments,) = trained.calls
    assert arguments["run_dir"] == run_dir
    assert arguments["requested"].train.max_minutes == 30


def test_a_named_run_that_has_just_finished_is_not_resumed(
    call: Call, trained: FakeTrain, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_stale(words)

    def changed_keys(*_: object) -> dict[str, str]:
        edit_record(run_dir, status="FINISHED")
        return {}

    monkeypatch.setattr(resume, "_changed_keys", changed_keys)
    code, _, err = call("train", f"--resume={run_dir}")
    assert (code, trained.calls) == (2, [])
    assert err == f"--resume={run_dir}: has just finished; add train.epochs=N to train more epochs\n"


def test_an_interrupted_reproduction_cannot_be_resumed(
    call: Call, trained: FakeTrain, words: list[str]
) -> None:
    run_dir = make_stale(words, lineage=Lineage(reproduces=RunLink(run_dir="/a run", run_id=None)))
    code, out, err = call("train", f"--resume={run_dir}")
    assert (code, out) == (2, "")
    assert err == (
        f"--resume={run_dir}: is an interrupted reproduction, which cannot be resumed; start it again with "
        "captcha-exp reproduce '/a run'\n"
    )
    assert trained.calls == []


def test_all_mistakes_of_a_named_run_are_reported(call: Call, words: list[str]) -> None:
    run_dir = make_stale(words)
    code, _, err = call("train", f"--resume={run_dir}", "train.epohcs=3", "seed=-1", "device.name=cuda:9")
    assert code == 2
    assert sorted(line.split("=")[0] for line in err.splitlines()) == ["device.name", "seed", "train.epohcs"]


def test_a_damaged_config_is_one_line(call: Call, words: list[str]) -> None:
    run_dir = make_stale(words)
    (run_dir / "requested.yaml").write_text("{")
    code, _, err = call("train", f"--resume={run_dir}")
    assert code == 2
    assert err.startswith(f"{run_dir}/requested.yaml: was edited, or is damaged (its SHA-256 is not that in ")


# -- more epochs ---------------------------------------------------------------------------------------------


def test_more_epochs_start_a_linked_run(call: Call, trained: FakeTrain, words: list[str]) -> None:
    words = [*words, "train.schedule=constant", "train.warmup_fraction=0"]
    run_dir = make_finished(words, mlflow=mlflow_ref("abc"))
    before = (run_dir / "run.json").read_text()
    code, _, err = call("train", f"--resume={run_dir}", "train.epochs=5", "train.patience=9")
    assert (code, err) == (0, f"Extending {run_dir} from the end of epoch 2\n")
    assert trained.calls == [
        {
            "requested": load(compose(*words, "train.epochs=5", "train.patience=9")),
            "run_dir": None,
            "lineage": Lineage(extends=RunLink(run_dir=str(run_dir), run_id="abc")),
            "extend_from": run_dir,
        }
    ]
    assert (run_dir / "run.json").read_text() == before


def test_an_interrupted_extension_is_resumed(call: Call, trained: FakeTrain, words: list[str]) -> None:
    run_dir = make_finished(words)
    links = Lineage(extends=RunLink(run_dir=str(run_dir), run_id=None))
    extension = make_stale([*words, "train.epochs=5"], lineage=links)
    for _ in range(2):
        code, _, err = call("train", f"--resume={run_dir}", "train.epochs=5")
        assert code == 0, err
        assert (trained.calls[-1]["lineage"], trained.calls[-1]["extend_from"]) == (links, run_dir)
    assert [each["run_dir"] for each in trained.calls] == [extension, None]

    named = make_stale([*words, "train.epochs=5"], lineage=links)
    assert call("train", f"--resume={named}")[0] == 0
    assert (trained.calls[-1]["run_dir"], trained.calls[-1]["extend_from"]) == (named, run_dir)
    extension = make_stale([*words, "train.epochs=5"], lineage=links)
    assert call("train", *words, "train.epochs=5")[0] == 0
    assert trained.calls[-1]["run_dir"] is None, "the same config without the extended run"


def test_settings_that_depend_on_the_number_of_epochs(
    call: Call, trained: FakeTrain, words: list[str]
) -> None:
    run_dir = make_finished([*words, "augment.warmup_fraction=0.5"])
    _, _, err = call("train", f"--resume={run_dir}", "train.epochs=5")
    assert err == (
        f"Extending {run_dir} from the end of epoch 2\n"
        "warning: train.schedule=onecycle and augment.warmup_fraction=0.5: depends on the number of epochs, "
        "and the result will differ from a run of 5 epochs from the start\n"
    )
    assert len(trained.calls) == 1


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([], "finished after epoch 2 of 2; add a larger train.epochs=N to start a new run"),
        (["train.epochs=2"], "finished after epoch 2 of 2; add a larger"),
        (["train.epochs=1"], "finished after epoch 2 of 2; add a larger"),
        (["train.patience=9"], "finished after epoch 2 of 2; add a larger"),
        (
            ["train.epochs=5", "seed=1"],
            "is finished and can only be extended (train.epochs, train.patience); seed=1 (was 0)",
        ),
    ],
    ids=str,
)
def test_a_finished_run_accepts_only_more_epochs(
    call: Call, trained: FakeTrain, words: list[str], overrides: list[str], line: str
) -> None:
    run_dir = make_finished(words)
    code, _, err = call("train", f"--resume={run_dir}", *overrides)
    assert code == 2
    assert err.startswith(f"--resume={run_dir}: {line}")
    assert err.count("\n") == 1
    assert trained.calls == []


def test_a_run_that_stopped_early_accepts_more_patience(
    call: Call, trained: FakeTrain, words: list[str]
) -> None:
    run_dir = make_finished([*words, "train.epochs=9", "train.patience=1"])
    assert call("train", f"--resume={run_dir}", "train.patience=5")[0] == 0
    assert trained.calls[0]["extend_from"] == run_dir
    assert call("train", f"--resume={run_dir}", "train.epochs=8")[0] == 2


@pytest.mark.parametrize("missing", ["checkpoint", "result"])
def test_a_finished_run_without_a_checkpoint_cannot_be_extended(
    call: Call, trained: FakeTrain, words: list[str], missing: str
) -> None:
    run_dir = make_finished(words, **({"result": None} if missing == "result" else {}))
    if missing == "checkpoint":
        (run_dir / "checkpoint" / "step-6.safetensors").unlink()
    code, _, err = call("train", f"--resume={run_dir}", "train.epochs=5")
    assert code == 2
    assert "is finished, but has no checkpoint to extend; start a new run with --resume=never" in err
    assert trained.calls == []


# -- overrides of a saved config -----------------------------------------------------------------------------


def test_overrides_of_a_saved_config(tiny: Config) -> None:
    changed = apply_overrides(
        tiny, ["train.epochs=9", "+seed=1", "model.channels=[4,4]", "captcha.alphabet='0123'"]
    )
    changes = {key: value for key, value in flatten(changed).items() if value != flatten(tiny)[key]}
    assert changes == {
        "seed": "1",
        "captcha.alphabet": "0123",
        "model.channels": "[4, 4]",
        "train.epochs": "9",
    }
    assert apply_overrides(tiny, []) == tiny


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.epochs=0", "train.epochs=0: must be a whole number"),
        ("train.epohcs=3", "train.epohcs=3: unknown key; did you mean train.epochs?"),
        ("seed.x.y=3", "seed.x.y=3: unknown key"),
        ("train.epochs.x=3", "train.epochs.x=3: unknown key"),
        ("experiment=alnum", "experiment=alnum: does not set a key of a saved config; "),
        ("data=wheezy", "data=wheezy: does not set a key of a saved config; "),
        ("~train.epochs", "~train.epochs: does not set a key of a saved config; "),
        ("seed=1,2", "seed=1,2: is a sweep; "),
        ("hydra.run.dir=x", "hydra.run.dir=x: "),
        ("seed", "'seed': invalid override; "),
        ("data.cache=${data.count}", "data.cache=${data.count}: must be a value, without ${...}"),
    ],
)
def test_each_mistake_of_an_override_is_one_line(tiny: Config, override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(tiny, [override])
    (message,) = caught.value.lines
    assert message.startswith(line)


# -- end to end ----------------------------------------------------------------------------------------------


def start(root: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "captcha_exp", "train", *words],
        env=os.environ | {"CAPTCHA_EXP_ROOT": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_after(root: Path, step: int, *words: str) -> Path:
    """Kill a training once it has a checkpoint of this step or later, and return the run directory."""
    process = start(root, *words)
    deadline = time.monotonic() + 120
    while not [p for p in root.glob("outputs/*/*/checkpoint/step-*.safetensors") if int(p.stem[5:]) >= step]:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (path,) = root.glob("outputs/*/*/run.json")
    assert json.loads(path.read_text())["status"] == "RUNNING"
    return path.parent


def result_of(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out), err


def metrics_by_epoch(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    """Return the metrics without those of time and memory."""
    rows, broken = runs.read_metrics_rows(run_dir)
    assert not broken
    return [
        (row.step, {key: v for key, v in row.metrics.items() if not key.startswith(("memory/", "speed/"))})
        for row in rows
    ]


@pytest.mark.long
def test_the_same_command_resumes_after_sigkill(root: Path, words: list[str], tmp_path: Path) -> None:
    """In the same run directory and the same MLflow run, with bit-identical results."""
    words = [word for word in words if word != "tracking=none"]
    words += ["train.checkpoint_every='1 step'", "train.epochs=8", "train.batch_size=16", "--json"]
    run_dir = kill_after(root, 12, *words)
    run_id = json.loads((run_dir / "run.json").read_text())["mlflow"]["run_id"]
    result, err = result_of(start(root, *words))
    assert f"Resuming {run_dir} from " in err
    assert result["run_dir"] == str(run_dir)
    assert (result["epochs"], result["status"]) == (8, "FINISHED")

    config = load(compose(*(word for word in words if word != "--json"), "tracking=none"))
    uninterrupted = training.train(config, run_dir=make_dir(tmp_path / "whole"))
    assert result["weights_sha256"] == uninterrupted.weights_sha256
    assert_same_state(run_dir, uninterrupted.run_dir)
    assert metrics_by_epoch(run_dir) == metrics_by_epoch(uninterrupted.run_dir)
    assert [step for step, _ in metrics_by_epoch(run_dir)] == [*range(1, 9), 8], (
        "each epoch once, then the test"
    )

    client = MlflowClient(f"sqlite:///{root}/mlruns/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "captcha_exp")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run_id in (run.info.run_id, None), "None: killed before it was sent"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "val/loss")] == [*range(1, 9)]


def assert_same_state(first: Path, second: Path) -> None:
    """Check that the last checkpoints of two runs are bit-identical, including the best weights."""
    one, two = (
        checkpoint.load_latest(each / runs.CHECKPOINT_DIR, runs.load(each).config(), pytest.fail)
        for each in (first, second)
    )
    assert one is not None
    assert two is not None
    assert one.path.name == two.path.name
    assert one.tensors.keys() == two.tensors.keys()
    assert [name for name in one.tensors if not torch.equal(one.tensors[name], two.tensors[name])] == []


def make_dir(path: Path) -> Path:
    path.mkdir()
    return path


def test_an_extended_run_equals_one_of_as_many_epochs_from_the_start(
    call: Call, words: list[str], tmp_path: Path
) -> None:
    words = [*words, "train.schedule=constant", "train.warmup_fraction=0"]
    code, out, _ = call("train", *words, "--json")
    assert code == 0
    first = json.loads(out)
    code, out, err = call("train", f"--resume={first['run_dir']}", "train.epochs=4", "--json")
    assert code == 0
    assert f"Extending {first['run_dir']} from the end of epoch" in err
    more = json.loads(out)
    config = load(compose(*words, "train.epochs=4"))
    uninterrupted = training.train(config, run_dir=make_dir(tmp_path / "whole"))
    assert more["run_dir"] != first["run_dir"]
    assert more["weights_sha256"] == uninterrupted.weights_sha256
    assert_same_state(Path(more["run_dir"]), uninterrupted.run_dir)
    assert metrics_by_epoch(Path(more["run_dir"])) == metrics_by_epoch(uninterrupted.run_dir)
    state = json.loads((Path(more["run_dir"]) / "run.json").read_text())
    link = {"run_dir": first["run_dir"], "run_id": None, "store": None}
    assert state["lineage"] == {"extends": link, "reproduces": None}


def test_an_extension_killed_at_once_starts_again_from_the_finished_run(
    call: Call, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*words, "train.schedule=constant", "train.warmup_fraction=0", "train.epochs=1"]
    first = json.loads(call("train", *words, "--json")[1])
    config = load(compose(*words[:-1], "train.epochs=3"))
    links = Lineage(extends=RunLink(run_dir=first["run_dir"], run_id=None))
    extension = runs.create_run(config, config, None, links)
    extension.update(status="KILLED", **EXITED_PROCESS)

    epochs: list[int] = []
    train_epoch = training.train_epoch

    def recording_train_epoch(state: checkpoint.TrainState, *args: Any, **kwargs: Any) -> Any:
        epochs.append(state.epoch)
        return train_epoch(state, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_epoch", recording_train_epoch)
        code, out, err = call("train", f"--resume={extension.run_dir}", "--json")
    assert code == 0, err
    assert epochs == [2, 3], "the first epoch is that of the extended run"
    uninterrupted = training.train(replace(config, name="whole"))
    assert json.loads(out)["weights_sha256"] == uninterrupted.weights_sha256
    assert metrics_by_epoch(extension.run_dir) == metrics_by_epoch(uninterrupted.run_dir)
    assert len(json.loads((extension.run_dir / "run.json").read_text())["resumed"]) == 1


@pytest.mark.long
def test_a_training_in_a_child_process_is_resumed(root: Path, words: list[str], tmp_path: Path) -> None:
    """train.on_oom=split starts a process for each training."""
    words = [*words, "train.checkpoint_every='1 step'", "train.epochs=6", "train.batch_size=16"]
    words += ["train.on_oom=split"]
    run_dir = kill_after(root, 12, *words, "--json")
    result, err = result_of(start(root, *words, "--json"))
    assert f"Resuming {run_dir} from " in err
    assert result["run_dir"] == str(run_dir)
    uninterrupted = training.train(load(compose(*words)), run_dir=make_dir(tmp_path / "whole"))
    assert result["weights_sha256"] == uninterrupted.weights_sha256
