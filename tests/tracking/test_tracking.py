"""Runs in MLflow, read back through its client."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERY_EPOCH, TINY, Call, edit_record, warnings
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from PIL import Image

from captcha_exp import compose, load, runs
from captcha_exp.config import Config, MlflowConfig, flatten, resolve
from captcha_exp.errors import RunFailed
from captcha_exp.model.weights import load_weights
from captcha_exp.runs import CHECKPOINT_DIR
from captcha_exp.runs.info import list_run_files
from captcha_exp.runtime.device import detect_machine
from captcha_exp.runtime.paths import root_dir
from captcha_exp.tracking import tracker
from captcha_exp.tracking.delivery import Delivery, shorten
from captcha_exp.tracking.server import serve_ui
from captcha_exp.tracking.store import open_store
from captcha_exp.tracking.tracker import MlflowTracker
from captcha_exp.training.train import train


def sent_files(run_dir: Path) -> list[Path]:
    """Return the files that MLflow gets; code.diff only exists if the code has uncommitted changes."""
    return [path for path in list_run_files(run_dir) if path.parent.name != CHECKPOINT_DIR]


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


def required(config: Config) -> Config:
    assert isinstance(config.tracking, MlflowConfig)
    return replace(config, tracking=replace(config.tracking, required=True))


def refuse(*_: object, **__: object) -> None:
    raise ConnectionError("[Errno 111] Connection refused")


def fail(monkeypatch: pytest.MonkeyPatch, times: float, *names: str) -> None:
    """Let the first calls of these methods of the client fail."""
    calls = 0

    def patch(name: str) -> None:
        original = getattr(MlflowClient, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return refuse() if calls <= times else original(*args, **kwargs)

        monkeypatch.setattr(MlflowClient, name, method)

    for name in names:
        patch(name)


def steps_in_mlflow(run_dir: Path, metric: str = "val/accuracy") -> list[int]:
    client, run = _mlflow_run(run_dir)
    return [m.step for m in client.get_metric_history(run.info.run_id, metric)]


def test_a_request_that_fails_is_repeated(
    tracked: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail(monkeypatch, 1, "log_batch")
    monkeypatch.setattr(tracker, "RETRY_INTERVAL_SECONDS", 0.01)
    result = train(tracked, MlflowTracker())

    _, run = _mlflow_run(result.run_dir)
    assert run.info.status == "FINISHED"
    assert run.data.params == flatten(load(result.run_dir / "config.yaml"))
    assert steps_in_mlflow(result.run_dir) == [1, 2]
    assert len(warnings(caplog)) <= 2
    assert "Connection refused; the run continues, and MLflow gets the rest" in warnings(caplog)[0]


def test_a_request_without_an_answer_is_not_repeated(
    tracked: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store has created the run, and stored metrics, before the connection breaks."""
    broken = {"create_run", "log_batch"}

    def break_after(name: str) -> None:
        original = getattr(MlflowClient, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if name in broken and (name == "create_run" or "metrics" in kwargs):
                broken.remove(name)
                refuse()
            return result

        monkeypatch.setattr(MlflowClient, name, method)

    break_after("create_run")
    break_after("log_batch")
    monkeypatch.setattr(tracker, "RETRY_INTERVAL_SECONDS", 0.01)
    tracked = replace(tracked, name="unanswered")
    result = train(tracked, MlflowTracker())

    assert broken == set()
    client, run = _mlflow_run(result.run_dir)
    assert steps_in_mlflow(result.run_dir) == [1, 2]
    started = f"tags.started = '{run.data.tags['started']}'"
    assert len(client.search_runs([run.info.experiment_id], started)) == 1


def test_an_absent_store_costs_a_warning_and_gets_everything_later(
    tracked: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: Call
) -> None:
    names = ("create_run", "log_batch", "log_inputs", "log_artifact", "set_terminated")
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(MlflowClient, name, refuse)
        result = train(tracked, MlflowTracker({"model": "compact"}, "named"))

    assert len(warnings(caplog)) == 1
    state = json.loads((result.run_dir / "run.json").read_text())
    assert state["status"] == "FINISHED"
    num_files = len(sent_files(result.run_dir))
    owed = ["the run", "metrics of steps 1-2", f"{num_files} files", "status FINISHED"]
    assert state["mlflow"]["owed"] == owed
    assert len((result.run_dir / "metrics.jsonl").read_text().splitlines()) == 3
    end_process(result.run_dir)

    code, out, _ = call("sync")
    assert code == 0
    line = f"{result.run_dir.relative_to(root_dir())}: {state['mlflow']['uri']}: delivered "
    assert out.splitlines()[-1] == line + ", ".join(state["mlflow"]["owed"])
    client, run = _mlflow_run(result.run_dir)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "named")
    assert run.data.params == flatten(load(result.run_dir / "config.yaml"))
    assert run.data.tags["choice.model"] == "compact"
    assert run.inputs is not None
    assert len(run.inputs.dataset_inputs) == 1
    assert steps_in_mlflow(result.run_dir) == [1, 2]
    assert steps_in_mlflow(result.run_dir, "test/accuracy") == [2]
    assert "model.safetensors" in {item.path for item in client.list_artifacts(run.info.run_id)}
    state = json.loads((result.run_dir / "run.json").read_text())
    assert (state["mlflow"]["closed"], state["mlflow"]["owed"]) == (True, [])
    assert call("sync")[:2] == (0, "nothing to deliver: MLflow has every run that has ended\n")


def end_process(run_dir: Path) -> None:
    """Let the process that wrote this record be one that has exited."""
    edit_record(run_dir, process_started=1.0)


def test_a_training_does_not_wait_for_a_slow_store(
    tracked: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No request ends before the training does."""
    is_over = threading.Event()
    original = MlflowClient.create_run

    def create_run(*args: Any, **kwargs: Any) -> Any:
        is_over.wait(60)
        return original(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_run", create_run)
    monkeypatch.setattr(tracker, "LOCAL_END_SECONDS", 0.1)
    mlflow_tracker = MlflowTracker()
    result = train(tracked, mlflow_tracker)

    assert not is_over.is_set()
    (warning,) = warnings(caplog)
    assert ": did not take the end of the run within 0.1 s; the run continues, " in warning
    state = json.loads((result.run_dir / "run.json").read_text())
    assert state["mlflow"]["owed"][0] == "the run"
    is_over.set()
    assert mlflow_tracker._sender is not None
    mlflow_tracker._sender._thread.join(60)
    state = json.loads((result.run_dir / "run.json").read_text())
    assert (state["mlflow"]["closed"], state["mlflow"]["owed"]) == (True, [])


def test_a_store_that_goes_and_returns_is_two_warnings(
    tracked: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("RETRY_INTERVAL_SECONDS", "SEND_INTERVAL_SECONDS"):
        monkeypatch.setattr(tracker, name, 0.01)
    tracked = resolve(tracked, detect_machine())
    run = runs.create_run(tracked, tracked)
    mlflow_tracker = MlflowTracker()
    mlflow_tracker.start(run, tracked)
    for step in range(1, 7):
        with monkeypatch.context() as patch:
            if step % 2:
                patch.setattr(MlflowClient, "log_batch", refuse)
            row = runs.MetricsRow(step, 10 * step, {"val/accuracy": step / 8})
            run.log_metrics(row)
            mlflow_tracker.log_metrics(row)
            if step % 2:
                wait_for(lambda: bool(warnings(caplog)))
            else:
                wait_for(lambda: len(steps_of(run)) == len(run.metrics_rows()))
    run.close("FINISHED")
    mlflow_tracker.finish()

    lost, back = warnings(caplog)
    assert "Connection refused; the run continues" in lost
    assert back.endswith("mlflow.db: answers again; MLflow is up to date")
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]


def steps_of(run: runs.Run) -> list[int]:
    if run.info.run_id is None:
        return []
    return steps_in_mlflow(run.run_dir)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until the sending thread has done something."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_required_store_that_cannot_be_opened_is_one_line(root: Path, cache: Path) -> None:
    (root / "mlruns").write_text("a file in place of the directory")
    config = required(load(compose(*TINY, f"data.cache={cache}", "tracking=mlflow")))

    with pytest.raises(
        RunFailed,
        match=r"^tracking.uri=sqlite:///.*; run captcha-exp doctor for the fix, or use tracking=none$",
    ):
        train(config, MlflowTracker())

    assert json.loads((_latest() / "run.json").read_text())["status"] == "FAILED"


def test_a_deleted_store_is_not_taken_for_delivered(
    tracked: Config, store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite would continue to write to the deleted file."""
    uri = f"sqlite:///{store}/other/mlflow.db"
    open_store(uri)
    assert isinstance(tracked.tracking, MlflowConfig)
    tracked = required(replace(tracked, tracking=replace(tracked.tracking, uri=uri)))
    mlflow_tracker = MlflowTracker()
    run = runs.create_run(tracked, tracked)
    mlflow_tracker.start(run, tracked)
    shutil.rmtree(store / "other")
    run.close("FINISHED")
    mlflow_tracker.finish()

    (warning,) = warnings(caplog)
    assert "mlflow.db: the store was deleted or replaced; the run continues, " in warning
    state = json.loads((run.run_dir / "run.json").read_text())
    assert not state["mlflow"]["closed"]
    assert state["mlflow"]["owed"][-1] == "status FINISHED"


def test_rows_are_asked_for_after_a_failure(finished: tuple[MlflowClient, MlflowRun, Path]) -> None:
    _, run, run_dir = finished
    delivery = Delivery(runs.StaleRun(run_dir, runs.RunInfo.load(run_dir)))
    delivery.update()

    assert delivery.describe_sent() == [f"{len(sent_files(run_dir))} files", "status FINISHED"]
    assert steps_in_mlflow(run_dir, "val/loss") == [1, 2]
    assert run.info.run_id == delivery.recorded.info.run_id


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "API request to http://a:1/api/2.0/mlflow/runs/create failed with exception HTTPConnectionPool("
            "host='a', port=1): Max retries exceeded with url: /api/2.0/mlflow/runs/create (Caused by "
            "NewConnectionError(\"HTTPConnection(host='a', port=1): Failed to establish a new connection: "
            '[Errno 111] Connection refused"))',
            "Connection refused",
        ),
        (
            "... ('Connection aborted.', ConnectionResetError(104, 'Connection reset by peer'))",
            "Connection reset by peer",
        ),
        (
            "... RemoteDisconnected('Remote end closed connection without response'))",
            "Remote end closed connection without response",
        ),
        (
            "API request to http://a:1/ failed with timeout exception: Read timed out. (read timeout=20)",
            "timed out",
        ),
        ("x" * 400, "x" * 157 + "..."),
    ],
)
def test_the_reason_of_a_failed_request_is_short(message: str, reason: str) -> None:
    assert shorten(MlflowException(message)) == reason


def test_the_ui_reports_a_missing_store(root: Path) -> None:
    tracking = MlflowConfig(
        backend="mlflow", uri=f"sqlite:///{root}/mlruns/mlflow.db", experiment="none", required=False
    )

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
import shutil
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


@pytest.mark.long
def test_an_interrupted_creation_of_a_store_is_repeated(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    process = subprocess.run([sys.executable, "-c", KILLED_CREATION, uri], check=False)
    assert process.returncode == -signal.SIGKILL
    assert open_store(uri).search_experiments() != []
    assert [path.name for path in tmp_path.glob(".mlflow.db.*")] == []
