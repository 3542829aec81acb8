"""No run stays RUNNING without its process: closed by whoever comes next, once, and nobody else's."""

import hashlib
import json
import os
import platform
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
from conftest import TINY, Heard
from mlflow import MlflowClient

from captcha_exp import runs as record
from captcha_exp.cli import main
from captcha_exp.config import Config, MlflowConfig
from captcha_exp.model.evaluate import evaluate_run
from captcha_exp.runs import MetricsRow, Run
from captcha_exp.runtime.console import NullDisplay, RichDisplay
from captcha_exp.runtime.files import write_json
from captcha_exp.tracking import MlflowTracker, close_stale_runs
from captcha_exp.tracking.store import open_store

LONG_AGO = 1_700_000_000.25  # 2023
ROWS = [MetricsRow(step, 10 * step, {"val/accuracy": step / 4, "val/loss": 1 / step}) for step in (1, 2, 3)]


def died(run: Run, **state: Any) -> Run:
    """The run as a process leaves it that was killed: its number is there, and is another process."""
    run.update(process_started=1.0, **state)
    return run


def state_of(folder: Path, name: str = "run.json") -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return state


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_old(folder: Path, seconds: float = LONG_AGO) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (seconds, seconds))


def sweep_in(folder: Path, **state: Any) -> Path:
    """A sweep's record beside the folders of its points."""
    folder.mkdir(parents=True)
    known: dict[str, Any] = {
        "name": "grid",
        "status": "RUNNING",
        "started": "2026-01-01T00:00:00.000000+00:00",
    }
    known |= {"ended": None, "error": None}
    place = {"host": platform.node(), "pid": os.getpid(), "process_started": 1.0, "mlflow": None}
    (folder / "sweep.json").write_text(json.dumps(known | place | state))
    return folder


# -- the folder ----------------------------------------------------------------------------------------------


def test_the_end_is_written_down_and_what_was_saved_can_be_used(tiny: Config) -> None:
    run = died(record.create_run(tiny, tiny))
    run.write("model.safetensors", b"weights")
    (run.report_dir / "curves.png").write_bytes(b"picture")
    make_old(run.run_dir)
    os.utime(run.run_dir / "model.safetensors", (LONG_AGO + 7, LONG_AGO + 7))
    before = contents(run.run_dir)
    display = Heard()

    assert close_stale_runs(display) == [run.run_dir]

    state = state_of(run.run_dir)
    assert state["status"] == "KILLED"
    assert state["error"].startswith("its process ended without a word")
    assert datetime.fromisoformat(state["ended"]).timestamp() == LONG_AGO + 7
    after = contents(run.run_dir)
    del before[run.run_dir / "run.json"], after[run.run_dir / "run.json"]
    assert after == before
    assert state["files"] == {
        path.relative_to(run.run_dir).as_posix(): hashlib.sha256(content).hexdigest()
        for path, content in before.items()
    }
    changed = {"status", "error", "ended", "files"}
    assert {k: v for k, v in state.items() if k not in changed} == {
        k: v for k, v in run.state.items() if k not in changed
    }
    record.check_file_unchanged(run.run_dir, "model.safetensors")
    name = f"outputs/{run.run_dir.parent.name}/{run.run_dir.name}"
    assert display.lines == [f"{name}: its process {os.getpid()} is gone; closed as KILLED"]
    assert display.warnings == []
    assert close_stale_runs(display) == []


def test_a_process_that_has_ended_and_is_not_known_any_more(tiny: Config) -> None:
    run = record.create_run(tiny, tiny)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    run.update(pid=child.pid)

    assert close_stale_runs(NullDisplay()) == [run.run_dir]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"process_started": 1.0, "host": "another"},
        {"process_started": 1.0, "status": "FINISHED"},
        {"process_started": 1.0, "status": "FAILED", "mlflow": {"uri": "x", "run_id": "y"}},
        {"process_started": 1.0, "status": "FINISHED", "mlflow": {"uri": "x", "run_id": "y", "closed": True}},
        {"status": "FINISHED", "mlflow": {"uri": "x", "run_id": "y", "closed": False}},
    ],
    ids=[
        "alive",
        "elsewhere",
        "ended",
        "ended, of an older version",
        "ended and sent",
        "alive, not yet sent",
    ],
)
def test_what_is_none_of_ours_is_left_alone(tiny: Config, root: Path, state: dict[str, Any]) -> None:
    run = record.create_run(tiny, tiny)
    run.update(**state)
    (run.run_dir / f".metrics.jsonl.{os.getpid()}.part").write_text("half")
    before = contents(root)
    display = Heard()

    assert close_stale_runs(display) == []
    assert contents(root) == before
    assert display.lines == display.warnings == []


def test_a_root_without_runs_stays_empty(root: Path) -> None:
    assert close_stale_runs(NullDisplay()) == []
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
        '{"status": "RUNNING", "host": HOST, "pid": "1", "process_started": 1, "mlflow": null}',
        '{"status": "RUNNING", "host": HOST, "pid": -1, "process_started": 1, "mlflow": null}',
        '{"status": "RUNNING", "host": HOST, "pid": 1, "process_started": null, "mlflow": null}',
        '{"status": "RUNNING", "host": HOST, "pid": 1, "process_started": 1, "mlflow": ["x"]}',
    ],
    ids=["cut", "list", "number", "deep", "bytes", "short", "text", "negative", "no time", "mlflow"],
)
def test_a_record_that_is_none_stops_nothing_and_is_not_touched(tiny: Config, root: Path, text: str) -> None:
    odd = root / "outputs/2026-01-01/000000-odd/run.json"
    odd.parent.mkdir(parents=True)
    content = text.replace("HOST", json.dumps(record.create_run(tiny, tiny).state["host"]))
    odd.write_bytes(content.encode("utf-8", "surrogateescape"))
    other = died(record.create_run(tiny, tiny))

    assert close_stale_runs(NullDisplay()) == [other.run_dir]
    assert odd.read_bytes() == content.encode("utf-8", "surrogateescape")


def test_a_folder_that_cannot_be_closed_hides_no_other(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [died(record.create_run(tiny, tiny)) for _ in range(3)]

    def disk_full(path: Path, content: Any) -> None:
        if path.parent == runs[1].run_dir:
            raise OSError(28, "No space left on device")
        write_json(path, content)

    monkeypatch.setattr("captcha_exp.runs.stale.write_json", disk_full)
    display = Heard()

    assert sorted(close_stale_runs(display)) == sorted([runs[0].run_dir, runs[2].run_dir])
    (warning,) = display.warnings
    assert warning.endswith("its end cannot be written: [Errno 28] No space left on device")
    assert state_of(runs[1].run_dir)["status"] == "RUNNING"


def test_a_lock_that_cannot_be_had_is_one_warning(tiny: Config, root: Path) -> None:
    died(record.create_run(tiny, tiny))
    (root / "outputs/.closing.lock").mkdir()
    display = Heard()

    assert close_stale_runs(display) == []
    (warning,) = display.warnings
    assert warning.startswith(f"{root}/outputs: runs whose process is gone cannot be closed: ")


def test_a_name_is_shown_as_it_is(root: Path, tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    run = died(record.create_run(tiny, tiny))
    odd = run.run_dir.with_name("[red]a\x1b[31m\nb")
    run.run_dir.rename(odd)

    assert close_stale_runs(RichDisplay()) == [odd]
    assert "/[red]a\\x1b[31m\\nb: its process" in capsys.readouterr().err


# -- what was being written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [ROWS[2].to_line()[:-1], ROWS[2].to_line()[:20], "{", "\0\0", "[" * 99_999])
def test_a_torn_last_line_stays_and_is_told_and_the_rows_before_it_are_read(tiny: Config, torn: str) -> None:
    run = died(record.create_run(tiny, tiny))
    for row in ROWS[:2]:
        run.log_metrics(row)
    path = run.run_dir / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + torn.encode())
    before = path.read_bytes()

    close_stale_runs(NullDisplay())

    assert path.read_bytes() == before
    assert record.read_metrics_rows(run.run_dir) == (ROWS[:2], [3])
    assert run.metrics_rows() == ROWS[:2]
    assert state_of(run.run_dir)["warnings"] == [
        "metrics.jsonl: no whole row in line 3; the other 2 are read"
    ]
    record.check_file_unchanged(run.run_dir, "metrics.jsonl")


def test_a_line_that_is_damaged_in_the_middle_hides_no_other(tiny: Config) -> None:
    run = died(record.create_run(tiny, tiny), warnings=["slow"])
    lines = [row.to_line().encode() for row in ROWS]
    (run.run_dir / "metrics.jsonl").write_bytes(lines[0] + b"\xff" + lines[1] + lines[2])

    close_stale_runs(NullDisplay())

    assert record.read_metrics_rows(run.run_dir) == ([ROWS[0], ROWS[2]], [2])
    assert state_of(run.run_dir)["warnings"] == [
        "slow",
        "metrics.jsonl: no whole row in line 2; the other 2 are read",
    ]


def test_parts_of_files_that_nobody_will_finish_are_removed(tiny: Config) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run = record.create_run(tiny, tiny)
    run.update(pid=gone.pid)
    kept = {f".a.{os.getpid()}.part", "b.1.part", ".c.part", f".d.{gone.pid}.parts", ".e.x.part"}
    for name in (*kept, f".model.safetensors.{gone.pid}.part"):
        (run.run_dir / name).write_text("half")
    (run.report_dir / f".curves.png.{gone.pid}.part").write_text("half")
    (run.run_dir / f".model.safetensors.{gone.pid}.part").touch()
    make_old(run.run_dir)
    os.utime(run.report_dir / f".curves.png.{gone.pid}.part", (LONG_AGO + 9, LONG_AGO + 9))

    close_stale_runs(NullDisplay())

    names = {path.name for path in run.run_dir.rglob("*") if path.is_file()}
    assert names == {"run.json", "config.yaml", "requested.yaml", *kept}
    assert datetime.fromisoformat(state_of(run.run_dir)["ended"]).timestamp() == LONG_AGO + 9


# -- a sweep -------------------------------------------------------------------------------------------------


def test_a_sweep_and_its_dead_points_are_closed_and_its_living_ones_left(root: Path, tiny: Config) -> None:
    folder = sweep_in(root / "outputs/2026-01-01/000000-grid")
    dead, alive = (record.create_run(tiny, tiny, folder / name) for name in ("1-seed=1", "2-seed=2"))
    died(dead)
    (folder / f".summary.json.{os.getpid()}.part").write_text("half")
    (alive.run_dir / f".model.safetensors.{os.getpid()}.part").write_text("half")
    make_old(folder)
    os.utime(alive.run_dir / "config.yaml", (LONG_AGO + 5, LONG_AGO + 5))
    before = contents(alive.run_dir)

    assert close_stale_runs(NullDisplay()) == [folder, dead.run_dir]

    state = state_of(folder, "sweep.json")
    assert state["status"] == "KILLED"
    assert datetime.fromisoformat(state["ended"]).timestamp() == LONG_AGO + 5
    assert set(state) == {
        *("name", "status", "started", "ended", "host", "pid", "process_started", "mlflow", "error")
    }
    assert datetime.fromisoformat(state_of(dead.run_dir)["ended"]).timestamp() == LONG_AGO
    assert contents(alive.run_dir) == before
    assert not (folder / f".summary.json.{os.getpid()}.part").exists()


# -- several at once -----------------------------------------------------------------------------------------


def test_of_eight_that_close_at_once_one_closes_each_run(tiny: Config) -> None:
    runs = [died(record.create_run(tiny, tiny)) for _ in range(12)]
    together = Barrier(8)

    def close(_: int) -> list[Path]:
        together.wait()
        return close_stale_runs(NullDisplay())

    with ThreadPoolExecutor(8) as pool:
        closed = [folder for folders in pool.map(close, range(8)) for folder in folders]

    assert sorted(closed) == sorted(run.run_dir for run in runs)
    for run in runs:
        assert state_of(run.run_dir)["status"] == "KILLED"
        record.check_file_unchanged(run.run_dir, "config.yaml")


def test_a_closer_that_works_long_is_not_waited_for(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = died(record.create_run(tiny, tiny))
    monkeypatch.setattr("captcha_exp.runs.stale.SECONDS_FOR_THE_LOCK", 0.05)
    display = Heard()
    with record.stale_lock() as granted, ThreadPoolExecutor(1) as pool:
        assert granted
        assert pool.submit(close_stale_runs, display).result() == []
    assert display.lines == display.warnings == []
    assert state_of(run.run_dir)["status"] == "RUNNING"


def test_a_run_that_ends_just_now_keeps_its_own_end(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record.create_run(tiny, tiny)

    def ends_when_asked(_: object) -> bool:
        if run.state["status"] == "RUNNING":
            run.close("FINISHED")
        return False

    monkeypatch.setattr("captcha_exp.runs.stale.is_alive", ends_when_asked)

    assert close_stale_runs(NullDisplay()) == []
    assert state_of(run.run_dir)["status"] == "FINISHED"


# -- MLflow --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for the tests of this file: a new one takes two seconds to set up."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    open_store(uri)
    return uri


@pytest.fixture
def tracked(tiny: Config, store: str) -> Config:
    """A config with a store of this test's own: copying one is quick."""
    own = Path(os.environ["CAPTCHA_EXP_ROOT"]) / "mlruns" / "mlflow.db"
    own.parent.mkdir()
    shutil.copy(store.removeprefix("sqlite:///"), own)
    return replace(tiny, tracking=MlflowConfig(backend="mlflow", uri=f"sqlite:///{own}", experiment="tests"))


def begin(config: Config) -> tuple[Run, MlflowTracker]:
    run, tracker = record.create_run(config, config), MlflowTracker(NullDisplay())
    tracker.start(run, config)
    return run, tracker


def in_mlflow(run: Run | Path) -> tuple[MlflowClient, Any]:
    known = state_of(run if isinstance(run, Path) else run.run_dir)["mlflow"]
    client = MlflowClient(known["uri"])
    return client, client.get_run(known["run_id"])


def steps(run: Run) -> list[int]:
    client, there = in_mlflow(run)
    return [m.step for m in client.get_metric_history(there.info.run_id, "val/loss")]


def never(*_: object) -> Any:
    raise AssertionError("looked at the store")


def away(*_: object) -> tuple[str, str]:
    return "silent", "no answer within 8 s"


def test_mlflow_gets_every_row_once_the_files_and_the_end(
    tracked: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tracker = begin(tracked)
    for row in ROWS:
        run.log_metrics(row)
    tracker.log_metrics(ROWS[0])
    (run.report_dir / "curves.png").write_bytes(b"picture")
    died(run)
    display = Heard()

    assert close_stale_runs(display) == [run.run_dir]

    client, there = in_mlflow(run)
    state = state_of(run.run_dir)
    assert there.info.status == state["status"] == "KILLED"
    assert there.info.end_time == int(datetime.fromisoformat(state["ended"]).timestamp() * 1000)
    assert steps(run) == [1, 2, 3]
    names = {item.path for item in client.list_artifacts(there.info.run_id)}
    assert names == {"config.yaml", "metrics.jsonl", "report", "requested.yaml", "run.json"}
    assert [item.path for item in client.list_artifacts(there.info.run_id, "report")] == ["report/curves.png"]
    assert state["mlflow"] == {**run.state["mlflow"], "closed": True}
    assert len(display.lines) == 1
    monkeypatch.setattr("captcha_exp.tracking.store.look_at_store", never)
    assert close_stale_runs(display) == []


def test_a_process_that_died_between_the_two_ends_is_sent_with_its_own(tracked: Config) -> None:
    run, _ = begin(tracked)
    run.log_metrics(ROWS[0])
    run.close("FINISHED")
    ended = run.state["ended"]
    died(run)
    display = Heard()

    assert close_stale_runs(display) == [run.run_dir]

    _, there = in_mlflow(run)
    assert (there.info.status, steps(run)) == ("FINISHED", [1])
    assert there.info.end_time == int(datetime.fromisoformat(ended).timestamp() * 1000)
    state = state_of(run.run_dir)
    assert (state["status"], state["ended"], state["error"]) == ("FINISHED", ended, None)
    (line,) = display.lines
    assert line.endswith(": MLflow has its end now, FINISHED")


def test_a_tracker_notes_that_mlflow_has_all_of_a_run(tracked: Config) -> None:
    run, tracker = begin(tracked)
    assert state_of(run.run_dir)["mlflow"]["closed"] is False
    run.close("FINISHED")
    tracker.finish(run, "FINISHED")
    assert state_of(run.run_dir)["mlflow"]["closed"] is True


@pytest.mark.parametrize("lacking", ["log_batch", "log_artifact", "set_terminated"])
def test_what_a_store_did_not_take_at_the_end_is_sent_at_the_next_start(
    tracked: Config, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    run, tracker = begin(tracked)

    def refuse(*_: object, **named: object) -> None:
        raise ConnectionError("the store is away")

    with monkeypatch.context() as then:
        then.setattr(MlflowClient, lacking, refuse)
        run.log_metrics(ROWS[0])
        tracker._display = Heard()
        tracker.log_metrics(ROWS[0])
        run.close("FINISHED")
        tracker.finish(run, "FINISHED")
    assert state_of(run.run_dir)["mlflow"]["closed"] is False
    died(run)

    assert close_stale_runs(NullDisplay()) == [run.run_dir]
    client, there = in_mlflow(run)
    assert (there.info.status, steps(run)) == ("FINISHED", [1])
    assert "config.yaml" in {item.path for item in client.list_artifacts(there.info.run_id)}


def test_a_run_of_an_older_version_is_closed_in_mlflow_if_it_says_running(tracked: Config) -> None:
    run, _ = begin(tracked)
    older = {key: run.state["mlflow"][key] for key in ("uri", "experiment_id", "run_id")}
    died(run, mlflow=older)

    assert close_stale_runs(NullDisplay()) == [run.run_dir]
    assert in_mlflow(run)[1].info.status == "KILLED"


def test_a_process_killed_while_mlflow_made_the_run(tracked: Config) -> None:
    made, other = begin(tracked)[0], begin(tracked)[0]
    run_id = made.state["mlflow"]["run_id"]
    died(made, mlflow={**made.state["mlflow"], "run_id": None})
    before = died(record.create_run(tracked, tracked), mlflow=made.state["mlflow"])

    display = Heard()
    assert sorted(close_stale_runs(display)) == sorted([made.run_dir, before.run_dir])

    assert state_of(made.run_dir)["mlflow"]["run_id"] == run_id
    assert in_mlflow(made)[1].info.status == "KILLED"
    assert in_mlflow(other)[1].info.status == "RUNNING"
    assert state_of(before.run_dir)["mlflow"]["closed"] is True
    assert display.warnings == []


def test_a_store_that_is_away_is_one_warning_and_gets_all_when_it_is_back(
    tracked: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [died(begin(tracked)[0]) for _ in range(3)]
    display = Heard()
    with monkeypatch.context() as then:
        then.setattr("captcha_exp.tracking.store.look_at_store", away)
        assert len(close_stale_runs(display)) == 3
    (warning,) = display.warnings
    assert warning.endswith(
        "mlflow.db: did not take the end of 3 of 3 runs whose process is gone: "
        "it does not answer; the next start tries again"
    )
    assert {state_of(run.run_dir)["status"] for run in runs} == {"KILLED"}
    assert {in_mlflow(run)[1].info.status for run in runs} == {"RUNNING"}

    assert len(close_stale_runs(display)) == 3
    assert {in_mlflow(run)[1].info.status for run in runs} == {"KILLED"}
    assert len(display.warnings) == 1


@pytest.mark.parametrize(("still_there", "sent"), [(True, 2), (False, 0)])
def test_a_run_that_is_refused_keeps_no_other_from_a_store_that_is_there(
    tracked: Config, monkeypatch: pytest.MonkeyPatch, still_there: bool, sent: int
) -> None:
    for _ in range(3):
        died(begin(tracked)[0])
    asked = 0
    get_run = MlflowClient.get_run

    def refuse_the_first(self: MlflowClient, run_id: str) -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise ConnectionError("[no] way")
        return get_run(self, run_id)

    looks = iter([("current", ""), ("current", "") if still_there else away()])
    monkeypatch.setattr(MlflowClient, "get_run", refuse_the_first)
    monkeypatch.setattr("captcha_exp.tracking.store.look_at_store", lambda *_: next(looks))
    display = Heard()
    close_stale_runs(display)

    known = [state["mlflow"]["closed"] for _, state in record.list_runs()]
    assert known.count(True) == sent
    assert len(display.warnings) == 1
    assert f"the end of {3 - sent} of 3 runs whose process is gone: [no] way;" in display.warnings[0]


def test_a_store_that_was_deleted_is_not_made_nor_asked_for(
    tracked: Config, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = died(begin(tracked)[0])
    (root / "mlruns").rename(root / "elsewhere")
    display = Heard()
    with monkeypatch.context() as then:
        then.setattr("captcha_exp.tracking.store.look_at_store", never)
        assert close_stale_runs(display) == [run.run_dir]
        assert close_stale_runs(display) == []
    assert not (root / "mlruns").exists()
    assert display.warnings == []

    (root / "elsewhere").rename(root / "mlruns")  # it was a disk that was away
    assert close_stale_runs(display) == [run.run_dir]
    assert in_mlflow(run)[1].info.status == "KILLED"


@pytest.mark.parametrize("what", ["the run", "the experiment", "another store", "an empty file"])
def test_a_run_that_mlflow_no_longer_has_is_asked_for_once(
    tracked: Config, root: Path, store: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    run = died(begin(tracked)[0])
    client, there = in_mlflow(run)
    path = root / "mlruns/mlflow.db"
    match what:
        case "the run":
            client.delete_run(there.info.run_id)
        case "the experiment":
            client.delete_experiment(there.info.experiment_id)
        case "another store":
            shutil.copy(store.removeprefix("sqlite:///"), path)
        case "an empty file":
            path.write_bytes(b"")
    display = Heard()

    assert close_stale_runs(display) == [run.run_dir]
    assert display.warnings == []
    assert len(display.lines) == 1
    assert state_of(run.run_dir)["mlflow"]["closed"] is True
    if what == "an empty file":
        assert path.read_bytes() == b""
    monkeypatch.setattr("captcha_exp.tracking.store.look_at_store", never)
    assert close_stale_runs(display) == []


def test_a_sweep_ends_in_mlflow_and_keeps_the_files_of_its_points_out(tracked: Config, root: Path) -> None:
    parent, _ = begin(tracked)
    folder = sweep_in(root / "outputs/2026-01-01/000000-grid", mlflow=parent.state["mlflow"])
    shutil.rmtree(parent.run_dir)
    record.create_run(tracked, tracked, folder / "1-seed=1")
    (folder / "images").mkdir()
    (folder / "pictures/grid.png").write_bytes(b"picture")

    assert close_stale_runs(NullDisplay()) == [folder]

    known = state_of(folder, "sweep.json")["mlflow"]
    client = MlflowClient(known["uri"])
    assert client.get_run(known["run_id"]).info.status == "KILLED"
    assert {item.path for item in client.list_artifacts(known["run_id"])} == {"images", "sweep.json"}


# -- from the command ----------------------------------------------------------------------------------------


def test_runs_closes_what_it_lists(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    died(record.create_run(tiny, tiny))
    monkeypatch.setattr(sys, "argv", ["captcha-exp", "runs", "--json"])
    with pytest.raises(SystemExit, match="0"):
        main.main()
    said = capsys.readouterr()
    assert [run["status"] for run in json.loads(said.out)] == ["KILLED"]
    assert "closed as KILLED" in said.err


def test_closing_a_folder_imports_neither_torch_nor_mlflow(tiny: Config, root: Path) -> None:
    died(record.create_run(tiny, tiny))
    script = (
        "import sys; from captcha_exp.runtime.console import Silent;"
        "from captcha_exp.tracking import close_dead;"
        "print(len(close_dead(Silent())), {'torch', 'mlflow', 'hydra'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == ["1", "set()\n"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_training_that_is_killed_is_closed_by_the_next_start(tracked: Config, cache: Path) -> None:
    assert isinstance(tracked.tracking, MlflowConfig)
    words = (*TINY, f"data.cache={cache}", "train.epochs=100000", f"tracking.uri={tracked.tracking.uri}")
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "captcha_exp", "train", *words], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    seen = (line for line in process.stderr if line.startswith("epoch"))
    next(seen)
    next(seen)
    assert close_stale_runs(NullDisplay()) == []  # it lives
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)

    (folder,) = close_stale_runs(NullDisplay())

    state = state_of(folder)
    assert (state["status"], state["pid"]) == ("KILLED", process.pid)
    evaluation, _ = evaluate_run(folder, "test", NullDisplay(), "cpu")
    assert len(evaluation.indices) > 0
    rows, _ = record.read_metrics_rows(folder)
    client, there = in_mlflow(folder)
    assert there.info.status == "KILLED"
    history = client.get_metric_history(there.info.run_id, "val/accuracy")
    assert [(m.step, m.value) for m in history] == [(r.step, r.metrics["val/accuracy"]) for r in rows]
    assert len(rows) >= 2
    assert "model.safetensors" in {item.path for item in client.list_artifacts(there.info.run_id)}
