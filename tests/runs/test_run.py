"""Run directories: creation, atomic writes, metrics, hashes, lookup, and process identity."""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta, timezone, tzinfo
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import dataset_json, environment_json, mlflow_ref
from hypothesis import given, settings
from hypothesis import strategies as st

from captcha_exp import runs
from captcha_exp.config import Config, load
from captcha_exp.errors import UserError
from captcha_exp.runs import MetricsRow, Run, RunInfo, claim
from captcha_exp.runs.fields import RunFields
from captcha_exp.runtime.files import write_atomically
from captcha_exp.runtime.paths import root_dir
from captcha_exp.runtime.process import identify_process


class FrozenTime(datetime):
    """A clock that always shows the same time."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "FrozenTime":
        return cls(2026, 3, 1, 12, 30, 45)


@pytest.fixture
def frozen_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captcha_exp.runs.create.datetime", FrozenTime)


@pytest.fixture
def run(tiny: Config) -> Run:
    return runs.create_run(tiny, tiny)


# -- create --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("frozen_time")
def test_runs_started_in_the_same_second_get_different_directories(tiny: Config, root: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        run_dirs = list(pool.map(lambda _: runs.create_run(tiny, tiny).run_dir, range(8)))
    names = ["123045-tiny", *(f"123045-tiny-{number}" for number in range(2, 9))]
    assert sorted(run_dirs) == [root / "outputs/2026-03-01" / name for name in names]


def test_a_new_run_records_status_process_start_time_and_config(run: Run, tiny: Config) -> None:
    state = json.loads((run.run_dir / "run.json").read_text())
    assert state["status"] == "RUNNING"
    assert (state["host"], state["pid"]) == (platform.node(), os.getpid())
    assert abs(datetime.now().astimezone() - datetime.fromisoformat(state["started"])) < timedelta(minutes=1)
    assert load(run.run_dir / "config.yaml") == load(run.run_dir / "requested.yaml") == tiny


def test_the_root_is_read_from_the_environment_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(tmp_path / "elsewhere"))
    assert root_dir() == tmp_path / "elsewhere"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", "~/mine")
    assert root_dir() == tmp_path / "mine"


def test_the_default_root_is_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CAPTCHA_EXP_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert root_dir() == Path(__file__).resolve().parents[2]


# -- atomic writes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_failed_write_keeps_the_old_content(
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


def test_content_is_flushed_before_the_rename_and_the_directory_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b"old")
    steps = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        target = "directory" if os.path.samestat(os.fstat(descriptor), tmp_path.stat()) else "content"
        steps.append((f"fsync {target}", path.read_bytes()))
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        steps.append(("replace", source.read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_atomically(path, b"new")
    assert steps == [("fsync content", b"old"), ("replace", b"new"), ("fsync directory", b"new")]


def test_a_complete_run_leaves_no_temporary_files(run: Run) -> None:
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
def test_a_row_round_trips(step: int, timestamp: int, metrics: dict[str, float]) -> None:
    row = MetricsRow(step, timestamp, metrics)
    assert MetricsRow.from_line(row.to_line()) == row
    assert row.to_line().count("\n") == 1


def test_nan_round_trips() -> None:
    line = MetricsRow(1, 2, {"train/loss": float("nan")}).to_line()
    assert MetricsRow.from_line(line).to_line() == line


def test_logged_rows_are_returned_in_order(run: Run) -> None:
    rows = [MetricsRow(step, 10 * step, {"val/accuracy": step / 3}) for step in (1, 2, 3)]
    assert run.metrics_rows() == []
    for row in rows:
        run.log_metrics(row)
    assert run.metrics_rows() == rows


@settings(deadline=None)
@given(st.integers(0, len(LINE) - 1))
def test_a_truncated_line_is_rejected(end: int) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the message may come from json
        MetricsRow.from_line(LINE[:end])


@settings(deadline=None)
@given(st.integers(0, len(LINE) - 1), st.characters(codec="utf-8"))
def test_a_line_with_one_changed_character_is_rejected(position: int, character: str) -> None:
    changed = LINE[:position] + character + LINE[position + 1 :]
    if changed != LINE:
        with pytest.raises(ValueError):  # noqa: PT011
            MetricsRow.from_line(changed)


@pytest.mark.parametrize(
    "line", ["", "\n", "{}\n", "[]\n", "5\n", LINE.replace('"step"', '"stop"'), LINE + LINE]
)
def test_a_line_that_is_not_a_row_is_rejected(line: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        MetricsRow.from_line(line)


# -- close ---------------------------------------------------------------------------------------------------


def test_close_records_the_hash_of_every_file(run: Run) -> None:
    run.write("model.safetensors", b"weights")
    (run.report_dir / "curves.png").write_bytes(b"image")
    run.close("FINISHED")
    state = json.loads((run.run_dir / "run.json").read_text())
    assert state["status"] == "FINISHED"
    assert state["files"] == {
        path.relative_to(run.run_dir).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run.run_dir.rglob("*")
        if path.is_file() and path != run.run_dir / "run.json"
    }
    assert {"config.yaml", "model.safetensors", "report/curves.png"} <= state["files"].keys()


def test_close_ignores_a_file_that_is_being_written(run: Run) -> None:
    """The thread that sends to MLflow writes run.json at any time."""
    (run.run_dir / ".run.json.1.part").write_bytes(b"")
    run.close("FINISHED")
    assert not any(name.endswith(".part") for name in run.info.files)


def test_close_records_the_error(run: Run) -> None:
    run.close("FAILED", "step 3: the loss is not a finite number")
    state = json.loads((run.run_dir / "run.json").read_text())
    assert (state["status"], state["error"]) == ("FAILED", "step 3: the loss is not a finite number")
    assert datetime.fromisoformat(state["ended"]) >= datetime.fromisoformat(state["started"])


# -- find_run and list_runs ----------------------------------------------------------------------------------


def test_a_run_is_found_by_directory_and_by_a_prefix_of_its_mlflow_id(
    tiny: Config, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = runs.create_run(tiny, tiny), runs.create_run(tiny, tiny)
    first.update(mlflow=mlflow_ref("abc123"))
    second.update(mlflow=mlflow_ref("abd456"))
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


def test_an_ambiguous_prefix_is_rejected(tiny: Config) -> None:
    for run_id in ("abc123", "abd456"):
        runs.create_run(tiny, tiny).update(mlflow=mlflow_ref(run_id))
    with pytest.raises(UserError, match=r"^'ab' matches 2 MLflow run IDs; give a longer prefix$"):
        runs.find_run("ab")


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("name", ["nosuchrun", "", "None", "ab"])
def test_an_unknown_run_is_rejected_with_the_accepted_names(name: str) -> None:
    with pytest.raises(UserError, match=r"is not a run: .*captcha-exp runs lists all runs"):
        runs.find_run(name)


def test_latest_without_runs_is_rejected(root: Path) -> None:
    with pytest.raises(UserError, match=r"^latest: no runs in .*outputs yet; captcha-exp train creates one$"):
        runs.find_run("latest")


def test_the_latest_finished_run_is_no_reproduction_and_no_fold(
    tiny: Config, caplog: pytest.LogCaptureFixture
) -> None:
    fold = replace(tiny, data=replace(tiny.data, folds=2))
    killed, good, other, part = (runs.create_run(each, each) for each in (tiny, tiny, tiny, fold))
    for run in (good, other, part):
        run.update(status="FINISHED")
    assert runs.find_run("latest") == part.run_dir
    assert runs.find_run("latest", finished=True) == other.run_dir
    other.update(lineage=runs.Lineage(reproduces=runs.RunLink(run_dir=str(good.run_dir), run_id=None)))
    assert runs.find_run("latest", finished=True) == good.run_dir
    good.update(status="KILLED")
    killed.update(status="KILLED")
    newest = runs.create_run(tiny, tiny)
    newest.update(status="KILLED")
    assert runs.find_run("latest", finished=True) == part.run_dir  # better than none
    assert not caplog.messages
    for run in (part, other):
        run.update(status="KILLED")
    runs.find_run(str(part.run_dir))
    assert not caplog.messages
    for name in ("latest", str(newest.run_dir)):
        assert runs.find_run(name, finished=True) == newest.run_dir
        (line,) = caplog.messages
        assert line == f"{newest.run_dir}: unfinished (KILLED after epoch 0 of 2), not calibrated"
        caplog.clear()


def test_latest_compares_start_times_across_time_zones(tiny: Config) -> None:
    """Check that the hour that repeats at the end of daylight saving time is ordered correctly."""
    summer, winter = (timezone(timedelta(hours=hours)) for hours in (2, 1))
    older, newer = runs.create_run(tiny, tiny), runs.create_run(tiny, tiny)
    older.update(started=datetime(2026, 10, 25, 2, 50, tzinfo=summer))
    newer.update(started=datetime(2026, 10, 25, 2, 10, tzinfo=winter))
    assert runs.find_run("latest") == newer.run_dir


def test_latest_compares_start_times_within_a_second(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count(100_000)

    class Ticking(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Ticking":
            return cls(2026, 3, 1, 12, 30, 45, next(clock))

    monkeypatch.setattr("captcha_exp.runs.info.datetime", Ticking)
    for number in range(1, 12):  # sorted by name, -10 would precede -2
        run = runs.create_run(tiny, tiny)
        assert runs.find_run("latest") == run.run_dir, f"run {number}"


def test_a_damaged_run_json_is_reported_and_other_runs_are_listed(tiny: Config) -> None:
    damaged, good = runs.create_run(tiny, tiny), runs.create_run(tiny, tiny)
    (damaged.run_dir / "run.json").write_text("{")
    assert [run.run_dir for run in runs.list_runs()] == [good.run_dir]
    with pytest.raises(UserError, match=r"run\.json: cannot be read: "):
        claim.find_named(str(damaged.run_dir))


def write_as_0_1(run: Run) -> None:
    """Rewrite run.json as version 0.1 wrote it."""
    state = {k: v for k, v in run.info.model_dump().items() if k not in ("format", "lineage")}
    (run.run_dir / "run.json").write_text(json.dumps({**state, "links": {}}))


def test_a_run_of_version_0_1_is_rejected_in_one_line(tiny: Config, run: Run) -> None:
    write_as_0_1(run)
    message = (
        f"{run.run_dir}: was written by captcha_exp 0.1, which this version cannot read; "
        "train again, or use captcha_exp 0.1"
    )
    with pytest.raises(UserError) as caught:
        claim.find_named(str(run.run_dir))
    assert caught.value.lines == (message,)
    with pytest.raises(UserError, match=r"was written by captcha_exp 0\.1"):
        runs.reopen_run(run.run_dir)
    with pytest.raises(UserError, match=r"was written by captcha_exp 0\.1"):
        runs.load(run.run_dir).path("config.yaml")
    assert claim.find_resumable(tiny, runs.Lineage()) is None


def test_a_run_of_version_0_1_is_listed_as_a_warning(tiny: Config, run: Run) -> None:
    write_as_0_1(run)
    readable = runs.create_run(tiny, tiny)
    warnings: list[str] = []
    assert [run.run_dir for run in runs.list_runs(warnings.append)] == [readable.run_dir]
    (warning,) = warnings
    assert warning.startswith(f"{run.run_dir}: was written by captcha_exp 0.1")


@pytest.mark.parametrize("name", ["x" * 300, "x\0y", "a/" * 3000])
def test_an_impossible_file_name_is_not_a_run(name: str, root: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        runs.find_run(name)
    with pytest.raises(UserError, match="is not a run"):
        claim.find_named(name)


# -- reopen_run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", "requested.yaml"])
def test_an_edited_config_is_rejected(run: Run, name: str) -> None:
    path = run.run_dir / name
    path.write_text(path.read_text().replace("batch_size: 64", "batch_size: 32"))
    with pytest.raises(UserError, match=rf"{name}: was edited, or is damaged .*--resume=never starts a new"):
        runs.reopen_run(run.run_dir)
    assert run.info.status == "RUNNING"


def test_damaged_rows_of_metrics_are_set_aside(run: Run) -> None:
    rows = [MetricsRow(step, 5, {"val/loss": 0.5}) for step in (1, 2, 3)]
    first, second, third = (row.to_line() for row in rows)
    damaged = f"{first}{second[:9]}#{second[10:]}{third}"
    (run.run_dir / "metrics.jsonl").write_text(damaged + first[:7])

    reopened = runs.reopen_run(run.run_dir)
    assert reopened.metrics_rows() == [rows[0], rows[2]]
    assert (run.run_dir / "metrics.jsonl").read_text() == first + third
    assert (run.run_dir / "metrics.jsonl.damaged").read_text() == damaged + first[:7]
    reopened.log_metrics(rows[1])
    assert runs.read_metrics_rows(run.run_dir) == (rows, {})


def test_resuming_a_copy_by_hard_links_leaves_the_original_as_it_is(run: Run, tmp_path: Path) -> None:
    run.log_metrics(MetricsRow(1, 5, {"val/loss": 0.5}))
    before = (run.run_dir / "metrics.jsonl").read_bytes()
    copy = tmp_path / "copy"
    shutil.copytree(run.run_dir, copy, copy_function=os.link)
    runs.reopen_run(copy).log_metrics(MetricsRow(2, 5, {"val/loss": 0.4}))
    assert (run.run_dir / "metrics.jsonl").read_bytes() == before
    assert [row.step for row in runs.read_metrics_rows(copy)[0]] == [1, 2]


# -- is_alive ------------------------------------------------------------------------------------------------


def test_a_run_of_this_process_is_alive(run: Run) -> None:
    assert run.info.is_alive()


def test_a_run_whose_process_has_exited_is_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = identify_process(child.pid)
    assert identity.is_alive()
    child.communicate()
    assert not identity.is_alive()


def test_a_zombie_process_is_not_alive() -> None:
    """Check a process that was not waited for; in a container without an init process it stays a zombie."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = psutil.Process(child.pid)
    identity = identify_process(child.pid)
    child.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
    try:
        assert not identity.is_alive()
    finally:
        child.communicate()


def changed(run: Run, **fields: Any) -> RunInfo:
    """Return the record of a run with other values."""
    return run.info.model_copy(update=fields)


def test_a_reused_pid_is_not_alive(run: Run) -> None:
    assert not changed(run, process_started=run.info.process_started - 3600).is_alive()


def test_the_status_of_a_running_run_without_its_process_is_stale(run: Run) -> None:
    for process_started, status in ((run.info.process_started, "RUNNING"), (1.0, "stale")):
        run.update(process_started=process_started)
        assert RunFields(run)["status"] == status


def test_a_run_of_another_host_counts_as_alive(run: Run) -> None:
    assert changed(run, host="another", pid=2**22 + 1).is_alive()


def test_a_run_of_a_container_with_the_same_host_name_counts_as_alive(run: Run) -> None:
    """Check `docker run --net=host`: the same host name and directory, but another pid namespace."""
    assert changed(run, pid_namespace="pid:[1]", pid=2**22 + 1).is_alive()


def test_a_run_from_before_a_reboot_is_not_alive(run: Run) -> None:
    assert not changed(run, boot_id="before", pid_namespace="pid:[1]").is_alive()


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="only Linux has start times relative to boot"
)
def test_a_changed_system_clock_does_not_matter(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: time.time() + 3600)
    assert run.info.is_alive()
    assert identify_process().process_started == run.info.process_started


def test_a_process_name_may_contain_brackets(tmp_path: Path) -> None:
    """Check parsing of /proc/PID/stat, which contains the name in brackets."""
    odd = tmp_path / "a) R 1 (b"
    odd.symlink_to(sys.executable)
    child = subprocess.Popen([odd, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        identity = identify_process(child.pid)
        assert identity.process_started >= identify_process().process_started
        assert identity.is_alive()
    finally:
        child.communicate()


def test_a_file_that_was_modified_after_the_run_is_rejected(tiny: Config) -> None:
    run = runs.create_run(tiny, tiny)
    run.write("model.safetensors", b"weights")
    runs.load(run.run_dir).path("model.safetensors")  # not checked while the run is running
    run.close("FINISHED")
    runs.load(run.run_dir).path("model.safetensors")
    (run.run_dir / "model.safetensors").write_bytes(b"weightz")

    with pytest.raises(UserError, match=r"model.safetensors: was edited, or is damaged"):
        runs.load(run.run_dir).path("model.safetensors")
    (run.run_dir / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors: is missing; restore it"):
        runs.load(run.run_dir).path("model.safetensors")


def test_an_unreadable_run_is_a_warning_and_the_others_are_listed(tiny: Config) -> None:
    readable, damaged = runs.create_run(tiny, tiny), runs.create_run(tiny, tiny)
    (damaged.run_dir / "run.json").write_text("{")
    warnings: list[str] = []

    assert [run.run_dir for run in runs.list_runs(warnings.append)] == [readable.run_dir]
    assert len(warnings) == 1
    assert warnings[0].startswith(str(damaged.run_dir / "run.json"))


# -- every file is what was written, or is refused -----------------------------------------------------------


def kill_when_writing(monkeypatch: pytest.MonkeyPatch, filename: str) -> None:
    """Raise KeyboardInterrupt instead of writing this file of a run."""

    def write(path: Path, content: bytes) -> None:
        if path.name == filename:
            raise KeyboardInterrupt
        write_atomically(path, content)

    monkeypatch.setattr("captcha_exp.runs.run.write_atomically", write)


@pytest.mark.parametrize("before", [None, {"a": "1"}, {"a": "2"}], ids=["new", "changed", "equal"])
def test_a_kill_while_a_file_is_written_is_not_taken_for_damage(
    run: Run, monkeypatch: pytest.MonkeyPatch, before: dict[str, str] | None
) -> None:
    if before is not None:
        run.write_json("code.json", before)
    kill_when_writing(monkeypatch, "code.json")
    with pytest.raises(KeyboardInterrupt):
        run.write_json("code.json", {"a": "2"})
    monkeypatch.undo()
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(run.run_dir.parents[2]))
    assert (run.run_dir / "code.json").exists() == (before == {"a": "2"})
    reopened = runs.reopen_run(run.run_dir)
    reopened.write_json("code.json", {"a": "2"})
    assert runs.load(run.run_dir).read_json("code.json") == {"a": "2"}


def test_a_file_that_the_run_did_not_write_is_refused(run: Run) -> None:
    (run.run_dir / "code.json").write_text("{}")
    with pytest.raises(UserError, match=r"code.json: is not a file of this run .*; restore it"):
        runs.load(run.run_dir).read_json("code.json")


def test_damage_before_the_end_is_found_after_it(run: Run) -> None:
    run.write_json("code.json", {"a": "1"})
    (run.run_dir / "code.json").write_text('{"a": "2"}')
    run.close("FINISHED")
    with pytest.raises(UserError, match=r"code.json: was edited, or is damaged"):
        runs.load(run.run_dir).read_json("code.json")


def test_a_truncated_last_line_is_the_trace_of_a_kill_and_a_missing_one_is_not(run: Run) -> None:
    rows = [MetricsRow(step, 5, {"val/loss": 0.5}) for step in (1, 2)]
    for row in rows:
        run.log_metrics(row)
    path = run.run_dir / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[:20])
    assert runs.load(run.run_dir).metrics_rows() == rows
    for cut, problem in ((rows[0].to_line(), "1 of 2 lines are missing"), (whole[:-9], "line 2 is damaged")):
        path.write_text(cut)
        with pytest.raises(UserError, match=rf"metrics.jsonl: {problem}; restore it"):
            runs.load(run.run_dir).metrics_rows()
    path.unlink()
    with pytest.raises(UserError, match=r"metrics.jsonl: is missing; restore it"):
        runs.load(run.run_dir).metrics_rows()


def test_a_refused_file_is_named_with_what_still_works(run: Run) -> None:
    run.write("model.safetensors", b"weights")
    run.update(mlflow=mlflow_ref("a1b2", closed=True))
    run.write_json("code.json", {})
    (run.run_dir / "code.json").write_text("[]")
    run.close("FINISHED")
    with pytest.raises(UserError) as caught:
        runs.load(run.run_dir).read_json("code.json")
    assert caught.value.lines == (
        f"{run.run_dir / 'code.json'}: was edited, or is damaged (its SHA-256 is not that in run.json); "
        "restore it from the artifacts of MLflow run a1b2; "
        f"captcha-exp predict {run.run_dir / 'model.safetensors'} still works",
    )


ODD_CONTENT: dict[str, list[dict[str, Any]]] = {
    "code.json": [{"a": 1}, {"a": None}],
    "dataset.json": [
        {},
        dataset_json(splits=[1]),
        dataset_json(provenance=[]),
        dataset_json(files=[1]),
    ],
    "environment.json": [{}, environment_json(git=[]), environment_json(code_sha256=None)],
    "memory.json": [{"process_mib": [1], "budget_mib": None, "fits": None}],
    "test.json": [{"images": 0, "misreads": []}, {"images": 1, "misreads": [{"image": 1}]}],
}


@pytest.mark.parametrize(("name", "values"), [(n, v) for n, each in ODD_CONTENT.items() for v in each])
def test_values_of_another_type_are_damage_whatever_the_hash(
    run: Run, name: str, values: dict[str, Any]
) -> None:
    run.write_json(name, values)
    with pytest.raises(UserError, match=rf"{name}: cannot be read: .+; restore it"):
        runs.load(run.run_dir).read_json(name)


@pytest.mark.parametrize("name", ["report", "checkpoint", "metrics.jsonl", "jobs/deep"])
def test_nothing_is_written_through_a_link(run: Run, name: str, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    run.close("KILLED")
    path = run.run_dir / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "outside")
    before = (run.run_dir / "run.json").read_bytes()
    with pytest.raises(UserError, match=rf"{name}: is a symbolic link; replace it by the file or directory"):
        runs.reopen_run(run.run_dir)
    assert (run.run_dir / "run.json").read_bytes() == before
    assert not list((tmp_path / "outside").iterdir())


def test_a_temporary_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / f".a.{os.getpid()}.part").symlink_to(target)
    write_atomically(tmp_path / "a", b"new")
    assert target.read_text() == "mine"
    assert (tmp_path / "a").read_bytes() == b"new"
