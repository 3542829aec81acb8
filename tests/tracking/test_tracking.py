"""Runs in MLflow, read back through its client."""

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
from conftest import EVERY_EPOCH, TINY, warnings
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from PIL import Image

from captcha_exp import compose, load, runs
from captcha_exp.config import Config, MlflowConfig, flatten
from captcha_exp.errors import RunFailed
from captcha_exp.model.weights import load_weights
from captcha_exp.tracking.server import serve_ui
from captcha_exp.tracking.store import open_store
from captcha_exp.tracking.tracker import MlflowTracker
from captcha_exp.training.train import train


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a root with a store for all tests of this file; creating one takes two seconds."""
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
    """Return the client, the MLflow run and the run directory of a finished run."""
    config = load(compose(*TINY, f"data.cache={cache}", "tracking=mlflow"))
    result = train(config, MlflowTracker({"model": "compact"}))
    client, run = _mlflow_run(result.run_dir)
    return client, run, result.run_dir


def _mlflow_run(run_dir: Path) -> tuple[MlflowClient, MlflowRun]:
    mlflow_ref = json.loads((run_dir / "run.json").read_text())["mlflow"]
    client = MlflowClient(mlflow_ref["uri"])
    return client, client.get_run(mlflow_ref["run_id"])


def _latest() -> Path:
    return runs.find_run("latest")


def test_every_metric_is_logged_for_every_epoch(finished: tuple[MlflowClient, MlflowRun, Path]) -> None:
    client, run, run_dir = finished

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
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = client.get_metric_history(run.info.run_id, "val/loss")
    assert [(m.step, m.value, m.timestamp) for m in logged] == [
        (row["step"], row["metrics"]["val/loss"], row["timestamp_ms"]) for row in rows[:2]
    ]


def test_every_key_of_the_resolved_config_is_a_param(
    finished: tuple[MlflowClient, MlflowRun, Path],
) -> None:
    _, run, run_dir = finished
    resolved = flatten(load(run_dir / "config.yaml"))

    assert run.data.params == resolved
    assert "auto" not in resolved.values()
    assert resolved["model.channels"] == "[4, 8, 8]"


def test_a_finished_run_has_its_status_and_tags(
    finished: tuple[MlflowClient, MlflowRun, Path],
) -> None:
    _, run, run_dir = finished
    tags = run.data.tags

    assert run.info.status == "FINISHED"
    assert run.info.run_name == run_dir.name
    assert tags["choice.model"] == "compact"
    assert tags["run_dir"] == str(run_dir)
    assert len(tags["mlflow.source.git.commit"]) == 40
    assert tags["git.dirty"] in ("True", "False")
    assert "mlflow.source.git.branch" in tags


def test_the_dataset_is_logged_as_an_input(finished: tuple[MlflowClient, MlflowRun, Path]) -> None:
    _, run, run_dir = finished
    manifest = json.loads((run_dir / "dataset.json").read_text())
    assert run.inputs is not None
    (logged,) = run.inputs.dataset_inputs

    assert logged.dataset.name == "captcha"
    assert logged.dataset.digest == manifest["key"]
    assert json.loads(str(logged.dataset.profile))["images"] == 300


def test_artifacts_can_be_downloaded_and_read(
    finished: tuple[MlflowClient, MlflowRun, Path], tmp_path: Path
) -> None:
    client, run, _ = finished
    artifacts = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))

    figures = list((artifacts / "report").glob("*.png"))
    assert len(figures) == 4
    for figure in figures:
        with Image.open(figure) as image:
            image.verify()
    for name in ("config.yaml", "requested.yaml"):
        load(artifacts / name)
    for name in ("environment.json", "dataset.json", "test.json", "run.json"):
        json.loads((artifacts / name).read_text())
    load_weights(artifacts / "model.safetensors", torch.device("cpu"))


def test_the_artifact_location_is_absolute_and_next_to_the_store(
    finished: tuple[MlflowClient, MlflowRun, Path], store: Path
) -> None:
    _, run, _ = finished

    assert run.info.artifact_uri.startswith((store / "mlruns" / "artifacts").as_uri())


@pytest.mark.parametrize(
    ("raised", "status"),
    [(ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(143), "KILLED")],
)
def test_an_interrupted_run_has_its_status_in_mlflow(
    tracked: Config, monkeypatch: pytest.MonkeyPatch, raised: BaseException, status: str
) -> None:
    def fit(*_: object) -> None:
        raise raised

    monkeypatch.setattr("captcha_exp.training.train.fit", fit)
    with pytest.raises(type(raised)):
        train(tracked, MlflowTracker())

    _, run = _mlflow_run(_latest())
    assert run.info.status == status
    assert json.loads((_latest() / "run.json").read_text())["status"] == status


def test_rows_are_queued_while_the_store_is_unreachable(
    tracked: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log_batch = MlflowClient.log_batch
    calls = 0

    def fail_first(self: MlflowClient, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        if "metrics" in kwargs:
            calls += 1
            if calls == 1:
                raise MlflowException("the store is unreachable")
        log_batch(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", fail_first)
    result = train(tracked, MlflowTracker())

    client, run = _mlflow_run(result.run_dir)
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "val/accuracy")] == [1, 2]
    assert warnings(caplog) == [
        "metrics of step 1 not logged to MLflow: the store is unreachable; the run directory is complete"
    ]


def test_the_run_directory_is_complete_if_the_store_stays_unreachable(
    tracked: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = MlflowTracker()

    def refuse(*_: object, **kwargs: object) -> None:
        raise ConnectionError("the store is unreachable")

    def start_then_disconnect(run: runs.Run, config: Config) -> None:
        MlflowTracker.start(tracker, run, config)
        for name in ("log_batch", "log_inputs", "log_artifacts", "set_terminated"):
            monkeypatch.setattr(MlflowClient, name, refuse)

    monkeypatch.setattr(tracker, "start", start_then_disconnect)
    result = train(tracked, tracker)

    state = json.loads((result.run_dir / "run.json").read_text())
    assert state["status"] == "FINISHED"
    assert len((result.run_dir / "metrics.jsonl").read_text().splitlines()) == 3
    assert any("1 of 1 runs not synced to MLflow" in warning for warning in warnings(caplog))


def test_a_store_that_cannot_be_opened_is_one_line(root: Path, cache: Path) -> None:
    (root / "mlruns").write_text("a file in place of the directory")
    config = load(compose(*TINY, f"data.cache={cache}", "tracking=mlflow"))

    with pytest.raises(
        RunFailed,
        match=r"^tracking.uri=sqlite:///.*; run captcha-exp doctor for the fix, or use tracking=none$",
    ):
        train(config, MlflowTracker())

    assert json.loads((_latest() / "run.json").read_text())["status"] == "FAILED"


def test_rows_logged_twice_are_stored_once(
    tracked: Config, finished: tuple[MlflowClient, MlflowRun, Path]
) -> None:
    client, run, run_dir = finished
    assert isinstance(load(run_dir / "config.yaml").tracking, MlflowConfig)
    tracker = MlflowTracker()
    tracker._client, tracker._run_id = client, run.info.run_id

    for line in (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True):
        tracker.log_metrics(runs.MetricsRow.from_line(line))

    assert [m.step for m in client.get_metric_history(run.info.run_id, "val/loss")] == [1, 2]


def test_the_ui_reports_a_missing_store(root: Path) -> None:
    tracking = MlflowConfig(backend="mlflow", uri=f"sqlite:///{root}/mlruns/mlflow.db", experiment="none")

    with pytest.raises(
        Exception, match=r"mlflow.db: MLflow store does not exist yet; captcha-exp train creates it"
    ):
        serve_ui(tracking, None)


def test_no_metric_is_nan(finished: tuple[MlflowClient, MlflowRun, Path]) -> None:
    _, run, _ = finished
    metrics: Mapping[str, float] = run.data.metrics

    assert all(value == value for value in metrics.values()), "the UI hides NaN"


KILLED_CREATION = """
import os
import signal
import sys

from sqlalchemy import event
from sqlalchemy.engine import Engine

from captcha_exp.tracking.store import open_store

created = []


@event.listens_for(Engine, "after_cursor_execute")
def count(connection, cursor, statement, *_):
    created.append(statement.strip().startswith("CREATE TABLE"))
    if sum(created) == 9:
        connection.connection.commit()
        os.kill(os.getpid(), signal.SIGKILL)


open_store(sys.argv[1])
"""


def test_an_interrupted_creation_of_a_store_is_repeated(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    process = subprocess.run([sys.executable, "-c", KILLED_CREATION, uri], check=False)
    assert process.returncode == -signal.SIGKILL
    assert open_store(uri).search_experiments() != []
    assert [path.name for path in tmp_path.glob(".mlflow.db.*")] == []
