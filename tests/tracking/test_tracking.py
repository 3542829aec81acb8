"""MLflow's view of a run, read back through its own client."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERY_EPOCH, TINY, Heard
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from PIL import Image

from captcha_exp import compose, load, runs
from captcha_exp.config import Config, MlflowConfig, flatten
from captcha_exp.errors import RunFailed
from captcha_exp.model.weights import load_weights
from captcha_exp.runtime.console import NullDisplay
from captcha_exp.tracking import MlflowTracker, serve_ui
from captcha_exp.tracking.store import open_store
from captcha_exp.training.train import train


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One root with one store for the tests of this file: a new store takes two seconds to set up."""
    root = tmp_path_factory.mktemp("store")
    before = os.environ.get("CAPTCHA_EXP_ROOT")
    os.environ["CAPTCHA_EXP_ROOT"] = str(root)
    yield root
    if before is None:
        del os.environ["CAPTCHA_EXP_ROOT"]
    else:
        os.environ["CAPTCHA_EXP_ROOT"] = before


@pytest.fixture
def tracked(store: Path, cache: Path) -> Config:
    return load(compose(*TINY, f"data.cache={cache}", "tracking=mlflow"))


@pytest.fixture(scope="module")
def finished(store: Path, cache: Path) -> tuple[MlflowClient, MlflowRun, Path]:
    """A run that finished, as MLflow has it, and its folder."""
    config = load(compose(*TINY, f"data.cache={cache}", "tracking=mlflow"))
    result = train(config, MlflowTracker(NullDisplay(), {"model": "compact"}))
    client, run = _last(result.run_dir)
    return client, run, result.run_dir


def _last(folder: Path) -> tuple[MlflowClient, MlflowRun]:
    noted = json.loads((folder / "run.json").read_text())["mlflow"]
    client = MlflowClient(noted["uri"])
    return client, client.get_run(noted["run_id"])


def _newest() -> Path:
    return runs.find_run("latest")


def test_every_metric_stands_at_every_epoch(finished: tuple[MlflowClient, MlflowRun, Path]) -> None:
    client, run, folder = finished

    assert set(run.data.metrics) >= EVERY_EPOCH
    for name in EVERY_EPOCH:
        assert [m.step for m in client.get_metric_history(run.info.run_id, name)] == [1, 2], name
    for name in (
        "test/accuracy",
        "test/loss",
        "test/char_accuracy",
        "test/accuracy_low",
        "test/accuracy_high",
        "memory/predicted_peak_mib",
    ):
        assert len(client.get_metric_history(run.info.run_id, name)) == 1, name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sent = client.get_metric_history(run.info.run_id, "val/loss")
    assert [(m.step, m.value, m.timestamp) for m in sent] == [
        (row["step"], row["metrics"]["val/loss"], row["timestamp_ms"]) for row in rows[:2]
    ]


def test_every_leaf_of_the_resolved_config_is_a_param(
    finished: tuple[MlflowClient, MlflowRun, Path],
) -> None:
    _, run, folder = finished
    resolved = flatten(load(folder / "config.yaml"))

    assert run.data.params == resolved
    assert "auto" not in resolved.values()
    assert resolved["model.channels"] == "[4, 8, 8]"


def test_a_finished_run_says_so_and_says_where_it_comes_from(
    finished: tuple[MlflowClient, MlflowRun, Path],
) -> None:
    _, run, folder = finished
    tags = run.data.tags

    assert run.info.status == "FINISHED"
    assert run.info.run_name == folder.name
    assert tags["choice.model"] == "compact"
    assert tags["run_dir"] == str(folder)
    assert len(tags["mlflow.source.git.commit"]) == 40
    assert tags["git.dirty"] in ("True", "False")
    assert "mlflow.source.git.branch" in tags


def test_the_dataset_is_an_input_of_the_run(finished: tuple[MlflowClient, MlflowRun, Path]) -> None:
    _, run, folder = finished
    manifest = json.loads((folder / "dataset.json").read_text())
    assert run.inputs is not None
    (used,) = run.inputs.dataset_inputs

    assert used.dataset.name == "captcha"
    assert used.dataset.digest == manifest["key"]
    assert json.loads(str(used.dataset.profile))["images"] == 300


def test_artifacts_open(finished: tuple[MlflowClient, MlflowRun, Path], tmp_path: Path) -> None:
    client, run, _ = finished
    there = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))

    for picture in ("curves", "confusion", "misreads", "images"):
        with Image.open(there / "report" / f"{picture}.png") as image:
            image.verify()
    for text in ("config.yaml", "requested.yaml"):
        load(there / text)
    for text in ("environment.json", "dataset.json", "test.json", "run.json"):
        json.loads((there / text).read_text())
    load_weights(there / "model.safetensors", torch.device("cpu"))


def test_artifacts_stand_beside_the_store_by_an_absolute_path(
    finished: tuple[MlflowClient, MlflowRun, Path], store: Path
) -> None:
    _, run, _ = finished

    assert run.info.artifact_uri.startswith((store / "mlruns" / "artifacts").as_uri())


@pytest.mark.parametrize(
    ("raised", "status"),
    [(ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(143), "KILLED")],
)
def test_a_run_that_is_cut_short_says_how(
    tracked: Config, monkeypatch: pytest.MonkeyPatch, raised: BaseException, status: str
) -> None:
    def broken(*_: object) -> None:
        raise raised

    monkeypatch.setattr("captcha_exp.training.train.fit", broken)
    with pytest.raises(type(raised)):
        train(tracked, MlflowTracker(NullDisplay()))

    _, run = _last(_newest())
    assert run.info.status == status
    assert json.loads((_newest() / "run.json").read_text())["status"] == status


def test_a_store_that_goes_away_costs_nothing_and_gets_the_rows_when_it_is_back(
    tracked: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    display = Heard()
    send = MlflowClient.log_batch
    calls = 0

    def away_for_the_first_epoch(self: MlflowClient, *arguments: Any, **named: Any) -> None:
        nonlocal calls
        if "metrics" in named:
            calls += 1
            if calls == 1:
                raise MlflowException("the store is away")
        send(self, *arguments, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", away_for_the_first_epoch)
    result = train(tracked, MlflowTracker(display))

    client, run = _last(result.run_dir)
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "val/accuracy")] == [1, 2]
    assert display.warnings == [
        "MLflow did not take metrics of step 1: the store is away; the run's folder has it"
    ]


def test_a_store_that_is_never_there_again_leaves_the_folder_complete(
    tracked: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    display = Heard()
    tracker = MlflowTracker(display)

    def away(*_: object, **named: object) -> None:
        raise ConnectionError("the store is away")

    def start_and_leave(run: runs.Run, config: Config) -> None:
        MlflowTracker.start(tracker, run, config)
        for name in ("log_batch", "log_inputs", "log_artifacts", "set_terminated"):
            monkeypatch.setattr(MlflowClient, name, away)

    monkeypatch.setattr(tracker, "start", start_and_leave)
    result = train(tracked, tracker)

    state = json.loads((result.run_dir / "run.json").read_text())
    assert state["status"] == "FINISHED"
    assert len((result.run_dir / "metrics.jsonl").read_text().splitlines()) == 3
    assert any("the end of the run" in warning for warning in display.warnings)


def test_a_store_that_cannot_be_opened_is_one_line(root: Path, cache: Path) -> None:
    (root / "mlruns").write_text("a file where the folder should be")
    config = load(compose(*TINY, f"data.cache={cache}", "tracking=mlflow"))

    with pytest.raises(
        RunFailed, match=r"^tracking.uri=sqlite:///.*; mend the store \(.*\), or train with tracking=none$"
    ):
        train(config, MlflowTracker(NullDisplay()))

    assert json.loads((_newest() / "run.json").read_text())["status"] == "FAILED"


def test_rows_sent_twice_stay_one(tracked: Config, finished: tuple[MlflowClient, MlflowRun, Path]) -> None:
    client, run, folder = finished
    assert isinstance(load(folder / "config.yaml").tracking, MlflowConfig)
    tracker = MlflowTracker(NullDisplay())
    tracker._client, tracker._run_id = client, run.info.run_id

    for line in (folder / "metrics.jsonl").read_text().splitlines(keepends=True):
        tracker.log_metrics(runs.MetricsRow.from_line(line))

    assert [m.step for m in client.get_metric_history(run.info.run_id, "val/loss")] == [1, 2]


def test_the_ui_names_what_is_missing(root: Path) -> None:
    tracking = MlflowConfig(backend="mlflow", uri=f"sqlite:///{root}/mlruns/mlflow.db", experiment="none")

    with pytest.raises(
        Exception, match=r"mlflow.db: there is no MLflow store yet; captcha-exp train makes it"
    ):
        serve_ui(tracking, None, NullDisplay())


def test_names_and_values_are_what_mlflow_takes(finished: tuple[MlflowClient, MlflowRun, Path]) -> None:
    _, run, _ = finished
    numbers: Mapping[str, float] = run.data.metrics

    assert all(value == value for value in numbers.values()), "NaN would be hidden in the UI"


CUT_STORE = """
import os
import signal
import sys

from sqlalchemy import event
from sqlalchemy.engine import Engine

from captcha_exp.tracking.store import open_store

made = []


@event.listens_for(Engine, "after_cursor_execute")
def count(connection, cursor, statement, *_):
    made.append(statement.strip().startswith("CREATE TABLE"))
    if sum(made) == 9:
        connection.connection.commit()
        os.kill(os.getpid(), signal.SIGKILL)


open_store(sys.argv[1])
"""


def test_a_store_that_was_cut_while_it_was_made_is_made_anew(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    cut = subprocess.run([sys.executable, "-c", CUT_STORE, uri], check=False)
    assert cut.returncode == -signal.SIGKILL
    assert open_store(uri).search_experiments() != []
    assert [path.name for path in tmp_path.glob(".mlflow.db.*")] == []
