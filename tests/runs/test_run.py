"""A run's folder: its own, whole at every moment, checked by hash, found again."""

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone, tzinfo
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captcha_exp import runs
from captcha_exp.config import Config, load
from captcha_exp.errors import UserError
from captcha_exp.runs import MetricsRow, Run, resume
from captcha_exp.runtime.files import write_atomically
from captcha_exp.runtime.paths import root_dir as root_of_runs
from captcha_exp.runtime.process import is_alive, process_identity


class OneSecond(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "OneSecond":
        return cls(2026, 3, 1, 12, 30, 45)


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captcha_exp.runs.create.datetime", OneSecond)


@pytest.fixture
def run(tiny: Config) -> Run:
    return runs.create_run(tiny, tiny)


# -- folders -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_second")
def test_runs_of_the_same_second_have_folders_of_their_own(tiny: Config, root: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: runs.create_run(tiny, tiny).run_dir, range(8)))
    names = ["123045-tiny", *(f"123045-tiny-{number}" for number in range(2, 9))]
    assert sorted(made) == [root / "outputs/2026-03-01" / name for name in names]


def test_a_new_run_says_what_runs_where_and_since_when(run: Run, tiny: Config) -> None:
    state = json.loads((run.run_dir / "run.json").read_text())
    assert state["status"] == "RUNNING"
    assert (state["host"], state["pid"]) == (platform.node(), os.getpid())
    assert abs(datetime.now().astimezone() - datetime.fromisoformat(state["started"])) < timedelta(minutes=1)
    assert load(run.run_dir / "config.yaml") == load(run.run_dir / "requested.yaml") == tiny


def test_the_root_is_the_folder_that_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(tmp_path / "elsewhere"))
    assert root_of_runs() == tmp_path / "elsewhere"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", "~/mine")
    assert root_of_runs() == tmp_path / "mine"


def test_without_a_name_the_root_is_the_checkout_wherever_the_command_is_called(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CAPTCHA_EXP_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert root_of_runs() == Path(__file__).resolve().parents[2]


# -- atomic writes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, b"old")

    def disk_full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, name, disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"run.json": b"old"}


def test_content_is_on_the_disk_before_it_gets_the_name_and_the_name_is_on_the_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b"old")
    steps = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        what = "folder" if os.path.samestat(os.fstat(descriptor), tmp_path.stat()) else "content"
        steps.append((f"fsync {what}", path.read_bytes()))
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        steps.append(("replace", source.read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_atomically(path, b"new")
    assert steps == [("fsync content", b"old"), ("replace", b"new"), ("fsync folder", b"new")]


def test_a_whole_run_leaves_no_temporary_file(run: Run) -> None:
    run.write("model.safetensors", b"weights")
    run.write_json("dataset.json", {})
    run.log_metrics(MetricsRow(1, 2, {}))
    run.update(error="none")
    run.close("FINISHED")
    assert sorted(p.name for p in run.run_dir.rglob("*")) == [
        "config.yaml",
        "dataset.json",
        "metrics.jsonl",
        "model.safetensors",
        "requested.yaml",
        "run.json",
    ]


# -- metrics -------------------------------------------------------------------------------------------------

LINE = MetricsRow(3, 1_700_000_000_000, {"train/loss": 0.125, "val/accuracy": 0.5}).to_line()


@settings(deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(0, 2**53),
    st.dictionaries(st.text(), st.floats(allow_nan=False) | st.integers(0, 2**53)),
)
def test_a_row_survives_the_file(step: int, timestamp: int, metrics: dict[str, float]) -> None:
    row = MetricsRow(step, timestamp, metrics)
    assert MetricsRow.from_line(row.to_line()) == row
    assert row.to_line().count("\n") == 1


def test_a_metric_that_is_not_a_number_survives_the_file() -> None:
    line = MetricsRow(1, 2, {"train/loss": float("nan")}).to_line()
    assert MetricsRow.from_line(line).to_line() == line


def test_logged_rows_come_back_in_their_order(run: Run) -> None:
    rows = [MetricsRow(step, 10 * step, {"val/accuracy": step / 3}) for step in (1, 2, 3)]
    assert run.metrics_rows() == []
    for row in rows:
        run.log_metrics(row)
    assert run.metrics_rows() == rows


@settings(deadline=None)
@given(st.integers(0, len(LINE) - 1))
def test_a_line_that_was_cut_is_noticed(end: int) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's own words where the JSON is cut
        MetricsRow.from_line(LINE[:end])


@settings(deadline=None)
@given(st.integers(0, len(LINE) - 1), st.characters(codec="utf-8"))
def test_a_line_with_one_changed_character_is_noticed(place: int, character: str) -> None:
    changed = LINE[:place] + character + LINE[place + 1 :]
    if changed != LINE:
        with pytest.raises(ValueError):  # noqa: PT011
            MetricsRow.from_line(changed)


@pytest.mark.parametrize(
    "line", ["", "\n", "{}\n", "[]\n", "5\n", LINE.replace('"step"', '"stop"'), LINE + LINE]
)
def test_a_line_that_is_no_row_is_noticed(line: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        MetricsRow.from_line(line)


# -- the end -------------------------------------------------------------------------------------------------


def test_close_writes_down_the_hash_of_every_file(run: Run) -> None:
    run.write("model.safetensors", b"weights")
    (run.report_dir / "curves.png").write_bytes(b"picture")
    run.close("FINISHED")
    state = json.loads((run.run_dir / "run.json").read_text())
    assert state["status"] == "FINISHED"
    assert state["files"] == {
        path.relative_to(run.run_dir).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run.run_dir.rglob("*")
        if path.is_file() and path != run.run_dir / "run.json"
    }
    assert {"config.yaml", "model.safetensors", "report/curves.png"} <= state["files"].keys()


def test_a_failed_run_says_why(run: Run) -> None:
    run.close("FAILED", "step 3: the loss is not a finite number")
    state = json.loads((run.run_dir / "run.json").read_text())
    assert (state["status"], state["error"]) == ("FAILED", "step 3: the loss is not a finite number")
    assert datetime.fromisoformat(state["ended"]) >= datetime.fromisoformat(state["started"])


# -- found again ---------------------------------------------------------------------------------------------


def test_a_run_is_found_by_folder_by_date_and_time_and_by_the_start_of_its_id(
    tiny: Config, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = runs.create_run(tiny, tiny), runs.create_run(tiny, tiny)
    first.update(mlflow={"run_id": "abc123"})
    second.update(mlflow={"run_id": "abd456"})
    monkeypatch.chdir(root / "outputs")
    for name in (
        str(first.run_dir),
        str(first.run_dir.relative_to(root)),
        str(first.run_dir.relative_to(root / "outputs")),
        "abc123",
        "abc",
    ):
        assert runs.find_run(name) == first.run_dir
    assert runs.find_run("abd") == second.run_dir


def test_an_ambiguous_beginning_is_refused(tiny: Config) -> None:
    for run_id in ("abc123", "abd456"):
        runs.create_run(tiny, tiny).update(mlflow={"run_id": run_id})
    with pytest.raises(UserError, match=r"^'ab' begins the ids of 2 runs; give more of it$"):
        runs.find_run("ab")


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("name", ["nosuchrun", "", "None", "ab"])
def test_what_is_no_run_is_refused_with_the_ways_to_name_one(name: str) -> None:
    with pytest.raises(UserError, match=r"is no run: .*captcha-exp runs lists them"):
        runs.find_run(name)


def test_latest_is_refused_while_there_is_no_run(root: Path) -> None:
    with pytest.raises(UserError, match=r"^latest: no run in .*outputs yet; captcha-exp train makes one$"):
        runs.find_run("latest")


def test_latest_is_the_run_that_began_last_by_the_clock_of_the_world(tiny: Config) -> None:
    """When summer time ends, the wall clock shows the same hour twice."""
    summer, winter = (timezone(timedelta(hours=hours)) for hours in (2, 1))
    older, newer = runs.create_run(tiny, tiny), runs.create_run(tiny, tiny)
    older.update(started=datetime(2026, 10, 25, 2, 50, tzinfo=summer).isoformat())
    newer.update(started=datetime(2026, 10, 25, 2, 10, tzinfo=winter).isoformat())
    assert runs.find_run("latest") == newer.run_dir


def test_latest_is_the_run_that_began_last_also_within_a_second(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = count(100_000)

    class Ticking(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Ticking":
            return cls(2026, 3, 1, 12, 30, 45, next(clock))

    monkeypatch.setattr("captcha_exp.runs.run.datetime", Ticking)
    for number in range(1, 12):  # an alphabet puts -10 before -2
        newest = runs.create_run(tiny, tiny)
        assert runs.find_run("latest") == newest.run_dir, f"run {number} of this second"


def test_a_damaged_record_is_named_when_asked_for_and_hides_no_other(tiny: Config) -> None:
    damaged, good = runs.create_run(tiny, tiny), runs.create_run(tiny, tiny)
    (damaged.run_dir / "run.json").write_text("{")
    assert [folder for folder, _ in runs.list_runs()] == [good.run_dir]
    with pytest.raises(UserError, match=r"run\.json: cannot be read as the record of a run"):
        runs.find_run(str(damaged.run_dir))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("mlflow", "x", "mlflow='x'"),
        ("pid", "7", "pid='7'"),
        ("result", None, "result=None"),
        ("links", ["a"], r"links=\['a'\]"),
        ("started", 5, "started=5"),
        ("started", None, "started=None"),
    ],
)
def test_a_record_of_another_shape_is_one_line(tiny: Config, key: str, value: object, words: str) -> None:
    run = runs.create_run(tiny, tiny)
    run.update(**{key: value})
    with pytest.raises(UserError, match=rf"run\.json: is not the record of a run: {words} is nothing that"):
        runs.find_run(str(run.run_dir))
    told: list[str] = []
    assert runs.list_runs(told.append) == []
    assert len(told) == 1


def test_an_id_that_is_no_text_ends_no_search(tiny: Config) -> None:
    run = runs.create_run(tiny, tiny)
    run.update(mlflow={"run_id": 12})
    with pytest.raises(UserError, match="is no run"):
        runs.find_run("ab")


@pytest.mark.parametrize("name", ["x" * 300, "x\0y", "a/" * 3000])
def test_a_name_that_no_file_has_is_no_run(name: str, root: Path) -> None:
    with pytest.raises(UserError, match="is no run"):
        runs.find_run(name)
    with pytest.raises(UserError, match="is no run"):
        resume.find_named(name)


# -- gone on with --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", "requested.yaml"])
def test_an_edited_config_is_refused_and_the_key_named(run: Run, name: str) -> None:
    path = run.run_dir / name
    path.write_text(path.read_text().replace("batch_size: 64", "batch_size: 32"))
    with pytest.raises(UserError, match=rf"{name}: was changed since .*\(train.batch_size=\d+, asked for as"):
        runs.reopen_run(run.run_dir)
    assert run.state["status"] == "RUNNING"


def test_a_line_that_is_no_row_is_set_aside_with_the_file(run: Run) -> None:
    rows = [MetricsRow(step, 5, {"val/loss": 0.5}) for step in (1, 2, 3)]
    first, second, third = (row.to_line() for row in rows)
    damaged = f"{first}{second[:9]}#{second[10:]}{third}"
    (run.run_dir / "metrics.jsonl").write_text(damaged + first[:7])

    again = runs.reopen_run(run.run_dir)
    assert again.metrics_rows() == [rows[0], rows[2]]
    assert (run.run_dir / "metrics.jsonl").read_text() == first + third
    assert (run.run_dir / "metrics.jsonl.damaged").read_text() == damaged
    again.log_metrics(rows[1])
    assert runs.read_metrics_rows(run.run_dir) == (rows, [])


# -- alive or dead -------------------------------------------------------------------------------------------


def state_of(process: psutil.Process) -> dict[str, Any]:
    return process_identity(process.pid)


def test_a_run_of_this_process_is_alive(run: Run) -> None:
    assert is_alive(run.state)


def test_a_run_whose_process_has_ended_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    state = state_of(psutil.Process(child.pid))
    assert is_alive(state)
    child.communicate()
    assert not is_alive(state)


def test_a_run_whose_process_has_ended_is_dead_even_if_nobody_has_asked_how() -> None:
    """In a container whose first process is no init, such a process stays in the table for ever."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = psutil.Process(child.pid)
    state = state_of(process)
    child.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
    try:
        assert not is_alive(state)
    finally:
        child.communicate()


def test_a_process_that_only_has_the_same_number_is_not_the_run(run: Run) -> None:
    assert not is_alive({**run.state, "process_started": run.state["process_started"] - 3600})


def test_a_run_of_another_machine_is_not_called_dead(run: Run) -> None:
    assert is_alive({**run.state, "host": "another", "pid": -1})


def test_a_run_of_a_container_with_the_machines_name_is_not_called_dead(run: Run) -> None:
    """`docker run --net=host`: the same host and folder, and numbers of its own."""
    assert is_alive({**run.state, "pid_namespace": "pid:[1]", "pid": 2**22 + 1})


def test_a_run_before_the_machine_was_started_again_is_dead(run: Run) -> None:
    assert not is_alive({**run.state, "boot_id": "before", "pid_namespace": "pid:[1]"})


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux counts from the machine's start")
def test_a_clock_that_is_set_ends_no_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: time.time() + 3600)
    assert is_alive(run.state)
    assert process_identity() == {key: run.state[key] for key in process_identity()}


def test_a_process_may_have_any_name(tmp_path: Path) -> None:
    """In /proc its name stands amid the numbers, in brackets."""
    odd = tmp_path / "a) R 1 (b"
    odd.symlink_to(sys.executable)
    child = subprocess.Popen([odd, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        state = process_identity(child.pid)
        assert state["process_started"] >= process_identity()["process_started"]
        assert is_alive(state)
    finally:
        child.communicate()


def test_a_file_that_has_changed_since_the_run_ended_is_refused(tiny: Config) -> None:
    run = runs.create_run(tiny, tiny)
    run.write("model.safetensors", b"weights")
    runs.check_file_unchanged(run.run_dir, "model.safetensors")  # the run goes on: nothing is promised yet
    run.close("FINISHED")
    runs.check_file_unchanged(run.run_dir, "model.safetensors")
    (run.run_dir / "model.safetensors").write_bytes(b"weightz")

    with pytest.raises(UserError, match=r"model.safetensors: is not the file that the run ended with"):
        runs.check_file_unchanged(run.run_dir, "model.safetensors")
    (run.run_dir / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors: is not the file that the run ended with"):
        runs.check_file_unchanged(run.run_dir, "model.safetensors")


def test_a_run_that_cannot_be_read_is_told_and_the_others_are_listed(tiny: Config) -> None:
    whole, broken = runs.create_run(tiny, tiny), runs.create_run(tiny, tiny)
    (broken.run_dir / "run.json").write_text("{")
    told: list[str] = []

    assert [folder for folder, _ in runs.list_runs(told.append)] == [whole.run_dir]
    assert len(told) == 1
    assert told[0].startswith(str(broken.run_dir / "run.json"))


@pytest.mark.parametrize("started", ["yesterday", "2026-01-01T00:00:00"])
def test_a_record_with_an_odd_time_does_not_keep_the_others_from_being_found(
    tiny: Config, started: str
) -> None:
    odd, good = runs.create_run(tiny, tiny), runs.create_run(tiny, tiny)
    odd.update(started=started)

    told: list[str] = []
    assert [folder for folder, _ in runs.list_runs(told.append)] == [good.run_dir]
    assert told == [
        f"{odd.run_dir / 'run.json'}: started={started!r} is no time with a zone, as a run writes it"
    ]
    assert runs.find_run("latest") == good.run_dir
