"""Close stale runs and sweeps in their directories and in MLflow."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from conftest import TINY, edit_record, infos, mlflow_ref, sweep_info, warnings, write_record
from mlflow import MlflowClient

from captcha_exp import runs
from captcha_exp.cli import main
from captcha_exp.config import Config, MlflowConfig
from captcha_exp.model.saved import evaluate_run
from captcha_exp.runs import MetricsRow, Run
from captcha_exp.runtime.console import set_up_logging
from captcha_exp.runtime.files import write_json
from captcha_exp.runtime.process import ProcessIdentity
from captcha_exp.tracking.store import open_store
from captcha_exp.tracking.sync import close_stale_runs, sync_reachable
from captcha_exp.tracking.tracker import MlflowTracker

LONG_AGO = 1_700_000_000.25  # 2023
ROWS = [MetricsRow(step, 10 * step, {"val/accuracy": step / 4, "val/loss": 1 / step}) for step in (1, 2, 3)]


def make_stale(run: Run, **state: Any) -> Run:
    """Change the recorded process of a run to one that has exited (a pid that is now in use by another)."""
    run.update(process_started=1.0, **state)
    return run


def state_of(run_dir: Path, name: str = "run.json") -> dict[str, Any]:
    state: dict[str, Any] = json.loads((run_dir / name).read_text(encoding="utf-8"))
    del state["checksum"]
    return state


def contents(run_dir: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def make_old(run_dir: Path, seconds: float = LONG_AGO) -> None:
    for path in run_dir.rglob("*"):
        os.utime(path, (seconds, seconds))


def write_stale_sweep(sweep_dir: Path, **state: Any) -> Path:
    """Write the sweep.json of a stale sweep."""
    sweep_dir.mkdir(parents=True)
    write_record(sweep_dir, "sweep.json", sweep_info(**{"process_started": 1.0, **state}))
    return sweep_dir


# -- run directories -----------------------------------------------------------------------------------------


def test_a_stale_run_is_marked_killed_and_its_files_are_kept(
    tiny: Config, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_stale(runs.create_run(tiny, tiny))
    run.write("model.safetensors", b"weights")
    (run.report_dir / "curves.png").write_bytes(b"image")
    make_old(run.run_dir)
    os.utime(run.run_dir / "model.safetensors", (LONG_AGO + 7, LONG_AGO + 7))
    before = contents(run.run_dir)
    caplog.clear()

    assert close_stale_runs() == [run.run_dir]

    state = state_of(run.run_dir)
    assert state["status"] == "KILLED"
    assert (state["error"], state["stop_reason"]) == (None, "killed")
    assert datetime.fromisoformat(state["ended"]).timestamp() == LONG_AGO + 7
    after = contents(run.run_dir)
    del before[run.run_dir / "run.json"], after[run.run_dir / "run.json"]
    assert after == before
    assert state["files"].keys() == {"config.yaml", "requested.yaml"}, "the others are not vouched for"
    changed = {"status", "stop_reason", "ended"}
    assert {k: v for k, v in state.items() if k not in changed} == run.info.model_dump(exclude=changed)
    runs.load(run.run_dir).path("model.safetensors")
    name = f"outputs/{run.run_dir.parent.name}/{run.run_dir.name}"
    assert infos(caplog) == [f"{name}: process {os.getpid()} has exited; marked KILLED"]
    assert warnings(caplog) == []
    assert close_stale_runs() == []


def test_a_run_of_an_exited_process_is_closed(tiny: Config) -> None:
    run = runs.create_run(tiny, tiny)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    run.update(pid=child.pid)

    assert close_stale_runs() == [run.run_dir]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"process_started": 1.0, "host": "another"},
        {"process_started": 1.0, "status": "FINISHED"},
        {"process_started": 1.0, "status": "FINISHED", "mlflow": mlflow_ref(closed=True)},
        {"status": "FINISHED", "mlflow": mlflow_ref(closed=False)},
    ],
    ids=[
        "running",
        "other host",
        "ended, not tracked",
        "ended and synced",
        "running, not yet synced",
    ],
)
def test_other_runs_are_not_changed(
    tiny: Config, root: Path, state: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run = runs.create_run(tiny, tiny)
    run.update(**state)
    (run.run_dir / f".metrics.jsonl.{os.getpid()}.part").write_text("partial")
    before = contents(root)
    caplog.clear()

    assert close_stale_runs() == []
    assert contents(root) == before
    assert infos(caplog) == warnings(caplog) == []


def test_an_empty_root_stays_empty(root: Path) -> None:
    assert close_stale_runs() == []
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "5",
        "[" * 100_000,
        "\udcff",
        '{"status": "RUNNING"}',
    ],
    ids=["truncated", "list", "number", "deep", "bytes", "incomplete"],
)
@pytest.mark.parametrize("filename", ["run.json", "sweep.json"])
def test_a_damaged_record_is_skipped_and_not_changed(
    tiny: Config, root: Path, text: str, filename: str
) -> None:
    path = root / "outputs/2026-01-01/000000-renamed" / filename
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    other = make_stale(runs.create_run(tiny, tiny))

    assert close_stale_runs() == [other.run_dir]
    assert path.read_bytes() == text.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    "field",
    [{"pid": "1"}, {"pid": -1}, {"process_started": None}, {"mlflow": ["x"]}, {"format": None}],
    ids=["text pid", "negative pid", "no time", "mlflow", "version 0.1"],
)
def test_a_record_with_an_invalid_field_is_skipped_and_not_changed(
    tiny: Config, root: Path, field: dict[str, Any]
) -> None:
    sweep_dir = write_stale_sweep(root / "outputs/2026-01-01/000000-grid", **field)
    edit_record(make_stale(runs.create_run(tiny, tiny)).run_dir, **field)
    before = contents(root)

    assert close_stale_runs() == []
    assert contents(root) == before
    assert (sweep_dir / "sweep.json").is_file()


def test_a_run_that_cannot_be_closed_does_not_affect_the_others(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stale_runs = [make_stale(runs.create_run(tiny, tiny)) for _ in range(3)]

    def disk_full(path: Path, content: Any) -> None:
        if path.parent == stale_runs[1].run_dir:
            raise OSError(28, "No space left on device")
        write_json(path, content)

    monkeypatch.setattr("captcha_exp.runs.info.write_json", disk_full)
    caplog.clear()

    assert sorted(close_stale_runs()) == sorted([stale_runs[0].run_dir, stale_runs[2].run_dir])
    (warning,) = warnings(caplog)
    assert warning.endswith("it cannot be marked KILLED: [Errno 28] No space left on device")
    assert state_of(stale_runs[1].run_dir)["status"] == "RUNNING"


def test_a_lock_that_cannot_be_created_is_one_warning(
    tiny: Config, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_stale(runs.create_run(tiny, tiny))
    (root / "outputs/.closing.lock").mkdir()
    caplog.clear()

    assert close_stale_runs() == []
    (warning,) = warnings(caplog)
    assert warning.startswith(f"{root}/outputs: cannot close stale runs: ")


def test_control_characters_in_a_name_are_escaped(
    root: Path, tiny: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_stale(runs.create_run(tiny, tiny))
    renamed = run.run_dir.with_name("[red]a\x1b[31m\nb")
    run.run_dir.rename(renamed)

    set_up_logging()
    assert close_stale_runs() == [renamed]
    assert "/[red]a\\x1b[31m\\nb: process" in capsys.readouterr().err


# -- partial files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "partial", [ROWS[2].to_line()[:-1], ROWS[2].to_line()[:20], "{", "\0\0", "[" * 99_999]
)
def test_a_truncated_last_line_is_a_warning_and_the_other_rows_are_read(tiny: Config, partial: str) -> None:
    run = make_stale(runs.create_run(tiny, tiny))
    for row in ROWS[:2]:
        run.log_metrics(row)
    path = run.run_dir / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + partial.encode())
    before = path.read_bytes()

    close_stale_runs()

    assert path.read_bytes() == before
    rows, damaged_lines = runs.read_metrics_rows(run.run_dir)
    assert (rows, list(damaged_lines)) == (ROWS[:2], [3])
    assert run.metrics_rows() == ROWS[:2]
    runs.load(run.run_dir).path("metrics.jsonl")


def test_a_damaged_line_in_the_middle_does_not_hide_the_others(tiny: Config) -> None:
    run = make_stale(runs.create_run(tiny, tiny), warnings=["slow"])
    lines = [row.to_line().encode() for row in ROWS]
    (run.run_dir / "metrics.jsonl").write_bytes(lines[0] + b"\xff" + lines[1] + lines[2])

    close_stale_runs()

    rows, damaged_lines = runs.read_metrics_rows(run.run_dir)
    assert (rows, list(damaged_lines)) == ([ROWS[0], ROWS[2]], [2])
    assert state_of(run.run_dir)["warnings"] == ["slow"]


def test_temporary_files_of_exited_processes_are_removed(tiny: Config) -> None:
    exited = subprocess.Popen([sys.executable, "-c", ""])
    exited.wait()
    run = runs.create_run(tiny, tiny)
    run.update(pid=exited.pid)
    kept = {f".a.{os.getpid()}.part", "b.1.part", ".c.part", f".d.{exited.pid}.parts", ".e.x.part"}
    for name in (*kept, f".model.safetensors.{exited.pid}.part"):
        (run.run_dir / name).write_text("partial")
    (run.report_dir / f".curves.png.{exited.pid}.part").write_text("partial")
    (run.run_dir / f".model.safetensors.{exited.pid}.part").touch()
    make_old(run.run_dir)
    os.utime(run.report_dir / f".curves.png.{exited.pid}.part", (LONG_AGO + 9, LONG_AGO + 9))

    close_stale_runs()

    names = {path.name for path in run.run_dir.rglob("*") if path.is_file()}
    assert names == {"run.json", "config.yaml", "requested.yaml", *kept}
    assert datetime.fromisoformat(state_of(run.run_dir)["ended"]).timestamp() == LONG_AGO + 9


# -- a sweep -------------------------------------------------------------------------------------------------


def test_a_stale_sweep_and_its_stale_jobs_are_closed_but_not_a_running_job(root: Path, tiny: Config) -> None:
    sweep_dir = write_stale_sweep(root / "outputs/2026-01-01/000000-grid")
    stale, running = (runs.create_run(tiny, tiny, sweep_dir / name) for name in ("1-seed=1", "2-seed=2"))
    make_stale(stale)
    (sweep_dir / f".summary.json.{os.getpid()}.part").write_text("partial")
    (running.run_dir / f".model.safetensors.{os.getpid()}.part").write_text("partial")
    make_old(sweep_dir)
    os.utime(running.run_dir / "config.yaml", (LONG_AGO + 5, LONG_AGO + 5))
    before = contents(running.run_dir)

    assert close_stale_runs() == [sweep_dir, stale.run_dir]

    state = state_of(sweep_dir, "sweep.json")
    assert state["status"] == "KILLED"
    assert datetime.fromisoformat(state["ended"]).timestamp() == LONG_AGO + 5
    assert state["stop_reason"] == "killed"
    assert set(state) == set(sweep_info())
    assert datetime.fromisoformat(state_of(stale.run_dir)["ended"]).timestamp() == LONG_AGO
    assert contents(running.run_dir) == before
    assert not (sweep_dir / f".summary.json.{os.getpid()}.part").exists()


# -- concurrency ---------------------------------------------------------------------------------------------


def test_concurrent_calls_close_each_run_once(tiny: Config) -> None:
    stale_runs = [make_stale(runs.create_run(tiny, tiny)) for _ in range(12)]
    barrier = Barrier(8)

    def close(_: int) -> list[Path]:
        barrier.wait()
        return close_stale_runs()

    with ThreadPoolExecutor(8) as pool:
        closed = [run_dir for run_dirs in pool.map(close, range(8)) for run_dir in run_dirs]

    assert sorted(closed) == sorted(run.run_dir for run in stale_runs)
    for run in stale_runs:
        assert state_of(run.run_dir)["status"] == "KILLED"
        runs.load(run.run_dir).path("config.yaml")


def test_close_returns_if_another_process_holds_the_lock(
    tiny: Config, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_stale(runs.create_run(tiny, tiny))
    caplog.clear()
    with runs.stale_lock() as granted, ThreadPoolExecutor(1) as pool:
        assert granted
        assert pool.submit(close_stale_runs).result() == []
    assert infos(caplog) == warnings(caplog) == []
    assert state_of(run.run_dir)["status"] == "RUNNING"


def test_a_run_that_finishes_meanwhile_keeps_its_status(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.create_run(tiny, tiny)

    def finish_and_exit(_: object) -> bool:
        if run.info.is_running:
            run.close("FINISHED")
        return False

    monkeypatch.setattr(ProcessIdentity, "is_alive", finish_and_exit)

    assert close_stale_runs() == []
    assert state_of(run.run_dir)["status"] == "FINISHED"


# -- MLflow --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a store for all tests of this file; creating one takes two seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    open_store(uri)
    return uri


@pytest.fixture
def tracked(tiny: Config, store: str) -> Config:
    """Return a config with a copy of the store for one test."""
    path = Path(os.environ["CAPTCHA_EXP_ROOT"]) / "mlruns" / "mlflow.db"
    path.parent.mkdir()
    shutil.copy(store.removeprefix("sqlite:///"), path)
    return replace(
        tiny,
        tracking=MlflowConfig(backend="mlflow", uri=f"sqlite:///{path}", experiment="tests", required=False),
    )


@pytest.fixture(autouse=True)
def no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tracker send its own run only."""
    monkeypatch.setattr("captcha_exp.tracking.tracker.sync_reachable", lambda _: None)


def start_run(config: Config) -> tuple[Run, MlflowTracker]:
    """Start a run that is in MLflow when this returns."""
    assert isinstance(config.tracking, MlflowConfig)
    config = replace(config, tracking=replace(config.tracking, required=True))
    run, tracker = runs.create_run(config, config), MlflowTracker()
    tracker.start(run, config)
    return run, tracker


def close_and_sync() -> list[Path]:
    closed = close_stale_runs()
    synced = [result.run_dir for result in sync_reachable() if result.problem is None]
    return [*closed, *(run_dir for run_dir in synced if run_dir not in closed)]


def in_mlflow(run: Run | Path) -> tuple[MlflowClient, Any]:
    mlflow_ref = state_of(run if isinstance(run, Path) else run.run_dir)["mlflow"]
    client = MlflowClient(mlflow_ref["uri"])
    return client, client.get_run(mlflow_ref["run_id"])


def logged_steps(run: Run) -> list[int]:
    client, mlflow_run = in_mlflow(run)
    return [m.step for m in client.get_metric_history(mlflow_run.info.run_id, "val/loss")]


def must_not_be_called(*_: object) -> Any:
    raise AssertionError("the store was inspected")


def unreachable(*_: object) -> tuple[str, str]:
    return "unreachable", "no answer within 8 s"


def test_rows_artifacts_and_status_are_synced_to_mlflow(
    tracked: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, tracker = start_run(tracked)
    for row in ROWS:
        run.log_metrics(row)
    tracker.log_metrics(ROWS[0])
    (run.report_dir / "curves.png").write_bytes(b"image")
    before = state_of(make_stale(run).run_dir)["mlflow"]
    caplog.clear()

    assert close_and_sync() == [run.run_dir]

    client, mlflow_run = in_mlflow(run)
    state = state_of(run.run_dir)
    assert mlflow_run.info.status == state["status"] == "KILLED"
    assert mlflow_run.info.end_time == int(datetime.fromisoformat(state["ended"]).timestamp() * 1000)
    assert logged_steps(run) == [1, 2, 3]
    names = {item.path for item in client.list_artifacts(mlflow_run.info.run_id)}
    assert names == {"config.yaml", "metrics.jsonl", "report", "requested.yaml", "run.json"}
    assert [item.path for item in client.list_artifacts(mlflow_run.info.run_id, "report")] == [
        "report/curves.png"
    ]
    assert state["mlflow"] == {**before, "closed": True}
    assert len(infos(caplog)) == 2
    assert re.search(r": delivered metrics of steps \d-3, 5 files, status KILLED$", infos(caplog)[1])
    monkeypatch.setattr("captcha_exp.tracking.inspection.inspect_store", must_not_be_called)
    assert close_and_sync() == []


def test_a_run_closed_but_not_synced_keeps_its_status(
    tracked: Config, caplog: pytest.LogCaptureFixture
) -> None:
    run, _ = start_run(tracked)
    run.log_metrics(ROWS[0])
    run.close("FINISHED")
    ended = state_of(make_stale(run).run_dir)["ended"]
    caplog.clear()

    assert close_and_sync() == [run.run_dir]

    _, mlflow_run = in_mlflow(run)
    assert (mlflow_run.info.status, logged_steps(run)) == ("FINISHED", [1])
    assert mlflow_run.info.end_time == int(datetime.fromisoformat(ended).timestamp() * 1000)
    state = state_of(run.run_dir)
    assert (state["status"], state["ended"], state["error"]) == ("FINISHED", ended, None)
    (line,) = infos(caplog)
    # The thread of the tracker may have sent the metrics before.
    assert re.search(r": delivered (metrics of step 1, )?4 files, status FINISHED$", line)


def test_the_tracker_marks_the_run_as_closed(tracked: Config) -> None:
    run, tracker = start_run(tracked)
    assert state_of(run.run_dir)["mlflow"]["closed"] is False
    run.close("FINISHED")
    tracker.finish()
    assert state_of(run.run_dir)["mlflow"]["closed"] is True


@pytest.mark.parametrize("method", ["log_batch", "log_artifact", "set_terminated"])
def test_a_failed_end_is_synced_at_the_next_start(
    tracked: Config, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    run, tracker = start_run(tracked)

    def refuse(*_: object, **kwargs: object) -> None:
        raise ConnectionError("the store is unreachable")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, method, refuse)
        run.log_metrics(ROWS[0])
        tracker.log_metrics(ROWS[0])
        run.close("FINISHED")
        tracker.finish()
    assert state_of(run.run_dir)["mlflow"]["closed"] is False
    make_stale(run)

    assert close_and_sync() == [run.run_dir]
    client, mlflow_run = in_mlflow(run)
    assert (mlflow_run.info.status, logged_steps(run)) == ("FINISHED", [1])
    assert "config.yaml" in {item.path for item in client.list_artifacts(mlflow_run.info.run_id)}


def test_a_run_killed_while_mlflow_created_it_is_found_by_its_tags(
    tracked: Config, caplog: pytest.LogCaptureFixture
) -> None:
    created, other = start_run(tracked)[0], start_run(tracked)[0]
    run_id = created.info.run_id
    created.update_mlflow(run_id=None)
    make_stale(created)
    before = make_stale(runs.create_run(tracked, tracked), mlflow=created.info.mlflow)

    caplog.clear()
    assert sorted(close_and_sync()) == sorted([created.run_dir, before.run_dir])

    assert state_of(created.run_dir)["mlflow"]["run_id"] == run_id
    assert in_mlflow(created)[1].info.status == "KILLED"
    assert in_mlflow(other)[1].info.status == "RUNNING"
    assert state_of(before.run_dir)["mlflow"]["closed"] is True
    assert in_mlflow(before)[1].info.status == "KILLED"
    assert state_of(before.run_dir)["mlflow"]["run_id"] != run_id
    assert warnings(caplog) == []


def test_an_unreachable_store_is_one_warning_and_synced_later(
    tracked: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stale_runs = [make_stale(start_run(tracked)[0]) for _ in range(3)]
    caplog.clear()
    with monkeypatch.context() as patch:
        patch.setattr("captcha_exp.tracking.inspection.inspect_store", unreachable)
        assert len(close_and_sync()) == 3
    assert infos(caplog)[-1].endswith(
        "mlflow.db: lacks the end of 3 earlier runs: the store is unreachable (no answer within 8 s); "
        "captcha-exp sync delivers it"
    )
    assert {state_of(run.run_dir)["status"] for run in stale_runs} == {"KILLED"}
    assert {in_mlflow(run)[1].info.status for run in stale_runs} == {"RUNNING"}

    assert len(close_and_sync()) == 3
    assert {in_mlflow(run)[1].info.status for run in stale_runs} == {"KILLED"}
    assert warnings(caplog) == []


@pytest.mark.parametrize(("reachable", "num_synced"), [(True, 2), (False, 0)])
def test_an_error_of_one_run_does_not_affect_the_others_if_the_store_is_reachable(
    tracked: Config,
    monkeypatch: pytest.MonkeyPatch,
    reachable: bool,
    num_synced: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, *_ = [make_stale(start_run(tracked)[0]) for _ in range(3)]
    get_run = MlflowClient.get_run
    failures = 0

    def fail_first(self: MlflowClient, run_id: str) -> Any:
        nonlocal failures
        if run_id == first.info.run_id:
            failures += 1
            raise ConnectionError("[connection] refused")
        return get_run(self, run_id)

    def inspect(*_: object) -> tuple[str, str]:
        return unreachable() if failures and not reachable else ("current", "")

    monkeypatch.setattr(MlflowClient, "get_run", fail_first)
    monkeypatch.setattr("captcha_exp.tracking.inspection.inspect_store", inspect)
    caplog.clear()
    close_and_sync()

    closed = [run.info.mlflow is not None and run.info.mlflow.closed for run in runs.list_runs()]
    assert closed.count(True) == num_synced
    number = "1 earlier run" if reachable else "3 earlier runs"
    assert f"lacks the end of {number}: [connection] refused;" in infos(caplog)[-1]
    assert failures == 2, "of the first run only"


def test_a_missing_store_is_neither_created_nor_inspected(
    tracked: Config, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_stale(start_run(tracked)[0])
    (root / "mlruns").rename(root / "elsewhere")
    caplog.clear()
    with monkeypatch.context() as patch:
        patch.setattr("captcha_exp.tracking.inspection.inspect_store", must_not_be_called)
        assert close_and_sync() == [run.run_dir]
        assert close_and_sync() == []
    assert not (root / "mlruns").exists()
    assert warnings(caplog) == []

    (root / "elsewhere").rename(root / "mlruns")  # as if its disk was mounted again
    assert close_and_sync() == [run.run_dir]
    assert in_mlflow(run)[1].info.status == "KILLED"


@pytest.mark.parametrize("deleted", ["run", "experiment", "store", "tables"])
def test_a_run_deleted_in_mlflow_is_not_retried(
    tracked: Config,
    root: Path,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
    deleted: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = make_stale(start_run(tracked)[0])
    client, mlflow_run = in_mlflow(run)
    path = root / "mlruns/mlflow.db"
    match deleted:
        case "run":
            client.delete_run(mlflow_run.info.run_id)
        case "experiment":
            client.delete_experiment(mlflow_run.info.experiment_id)
        case "store":
            shutil.copy(store.removeprefix("sqlite:///"), path)
        case "tables":
            path.write_bytes(b"")
    caplog.clear()

    assert close_and_sync() == [run.run_dir]
    (warning,) = warnings(caplog)
    run_id = mlflow_run.info.run_id
    assert warning.endswith(f"mlflow.db: run {run_id} was deleted in MLflow, and is not sent again")
    assert state_of(run.run_dir)["mlflow"]["closed"] is True
    if deleted == "tables":
        assert path.read_bytes() == b""
    monkeypatch.setattr("captcha_exp.tracking.inspection.inspect_store", must_not_be_called)
    assert close_and_sync() == []


def test_a_sweep_is_synced_without_the_files_of_its_jobs(tracked: Config, root: Path) -> None:
    parent, _ = start_run(tracked)
    sweep_dir = write_stale_sweep(
        root / "outputs/2026-01-01/000000-grid", mlflow=state_of(parent.run_dir)["mlflow"]
    )
    shutil.rmtree(parent.run_dir)
    runs.create_run(tracked, tracked, sweep_dir / "1-seed=1")
    (sweep_dir / "images").mkdir()
    (sweep_dir / "images/grid.png").write_bytes(b"image")

    assert close_and_sync() == [sweep_dir]

    mlflow_ref = state_of(sweep_dir, "sweep.json")["mlflow"]
    client = MlflowClient(mlflow_ref["uri"])
    assert client.get_run(mlflow_ref["run_id"]).info.status == "KILLED"
    assert {item.path for item in client.list_artifacts(mlflow_ref["run_id"])} == {"images", "sweep.json"}


# -- command line --------------------------------------------------------------------------------------------


def test_the_runs_command_closes_stale_runs(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_stale(runs.create_run(tiny, tiny))
    monkeypatch.setattr(sys, "argv", ["captcha-exp", "runs", "--json"])
    with pytest.raises(SystemExit, match="0"):
        main.main()
    captured = capsys.readouterr()
    assert [run["status"] for run in json.loads(captured.out)] == ["KILLED"]
    assert "marked KILLED" in captured.err


def test_the_runs_command_lists_a_run_of_version_0_1_as_a_warning(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stale_runs = [runs.create_run(tiny, tiny) for _ in range(2)]
    state = stale_runs[0].info.model_dump(exclude={"format"})
    (stale_runs[0].run_dir / "run.json").write_text(json.dumps(state))
    monkeypatch.setattr(sys, "argv", ["captcha-exp", "runs", "--json"])
    with pytest.raises(SystemExit, match="0"):
        main.main()
    captured = capsys.readouterr()
    assert [Path(run["run_dir"]) for run in json.loads(captured.out)] == [stale_runs[1].run_dir]
    assert captured.err.splitlines() == [
        f"warning: {stale_runs[0].run_dir}: was written by captcha_exp 0.1, which this version cannot read; "
        "train again, or use captcha_exp 0.1"
    ]


def test_closing_a_run_imports_neither_torch_nor_mlflow(tiny: Config, root: Path) -> None:
    make_stale(runs.create_run(tiny, tiny))
    script = (
        "import sys; from captcha_exp.tracking.sync import close_stale_runs;"
        "print(len(close_stale_runs()), {'torch', 'mlflow', 'hydra'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == ["1", "set()\n"]


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_training_is_closed_by_the_next_start(tracked: Config, cache: Path) -> None:
    assert isinstance(tracked.tracking, MlflowConfig)
    args = (*TINY, f"data.cache={cache}", "train.epochs=100000", f"tracking.uri={tracked.tracking.uri}")
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "captcha_exp", "train", *args], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    epochs = (line for line in process.stderr if line.startswith("epoch"))
    next(epochs)
    next(epochs)
    assert close_stale_runs() == []  # still running
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)

    (run_dir,) = close_and_sync()

    state = state_of(run_dir)
    assert (state["status"], state["stop_reason"], state["error"]) == ("KILLED", "killed", None)
    assert state["pid"] == process.pid
    evaluation, _ = evaluate_run(run_dir, "test", "cpu")
    assert len(evaluation.indices) > 0
    rows, _ = runs.read_metrics_rows(run_dir)
    client, mlflow_run = in_mlflow(run_dir)
    assert mlflow_run.info.status == "KILLED"
    history = client.get_metric_history(mlflow_run.info.run_id, "val/accuracy")
    assert [(m.step, m.value) for m in history] == [(r.step, r.metrics["val/accuracy"]) for r in rows]
    assert len(rows) >= 2
    assert "model.safetensors" in {item.path for item in client.list_artifacts(mlflow_run.info.run_id)}
