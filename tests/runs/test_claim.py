"""Find the run to resume: the newest with the same config and code whose process has exited."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import edit_record, environment_json, infos, rewrite, sweep_info, warnings, write_record
from safetensors.numpy import save_file

from captcha_exp import runs
from captcha_exp.config import Config
from captcha_exp.errors import UserError
from captcha_exp.runs import StaleRun, claim, code_sha256
from captcha_exp.runtime.process import identify_process

EXITED: dict[str, Any] = {"pid": 2**22 + 1, "process_started": 1.0}  # above the largest pid of Linux
NUM_PROCESSES = 8


@pytest.fixture(scope="module")
def exited() -> dict[str, Any]:
    """Return the identity of an exited process."""
    assert not psutil.pid_exists(EXITED["pid"])
    return dict(EXITED)


class StaleRuns:
    """Creates runs of a config whose process has exited."""

    def __init__(self, config: Config, process: Mapping[str, Any]) -> None:
        self.config, self.process = config, process

    def create(self, status: str = "KILLED", run_dir: Path | None = None, **state: Any) -> Path:
        run = runs.create_run(self.config, self.config, run_dir)
        run.write_json("environment.json", environment_json(code_sha256=code_sha256()))
        edit_record(run.run_dir, **{"status": status, **self.process, **state})
        return run.run_dir

    def find(self, **lineage: Any) -> Path | None:
        found = claim.find_resumable(self.config, runs.Lineage(**lineage))
        return None if found is None else found.run_dir


@pytest.fixture
def stale(tiny: Config, exited: dict[str, Any]) -> StaleRuns:
    return StaleRuns(tiny, exited)


def with_checkpoint(run_dir: Path, step: int = 7, state: Any = None) -> Path:
    """Write a checkpoint of this step and return the run directory."""
    (run_dir / "checkpoint").mkdir(exist_ok=True)
    path = run_dir / "checkpoint" / f"step-{step}.safetensors"
    counters = {"step": step, "epoch": 3, "progress": {"num_batches": 2}} if state is None else state
    save_file({"x": np.zeros(1)}, path, {"state": json.dumps(counters)})
    return run_dir


# -- find_resumable ------------------------------------------------------------------------------------------


def test_the_newest_run_is_found(stale: StaleRuns, caplog: pytest.LogCaptureFixture) -> None:
    assert stale.find() is None
    stale.create()
    second = stale.create()
    assert stale.find() == second
    assert infos(caplog) == []


@pytest.mark.parametrize("status", ["RUNNING", "KILLED", "FAILED", "FINISHED"])
@pytest.mark.parametrize("checkpoint", [True, False], ids=["with a checkpoint", "without"])
def test_a_failed_run_needs_a_checkpoint_and_a_finished_run_is_not_resumed(
    stale: StaleRuns, status: str, checkpoint: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = stale.create(status)
    if checkpoint:
        with_checkpoint(run_dir)
    is_found = status in ("RUNNING", "KILLED") or (status == "FAILED" and checkpoint)
    assert stale.find() == (run_dir if is_found else None)
    assert infos(caplog) == []


def test_a_running_run_is_skipped_without_a_warning(
    stale: StaleRuns, caplog: pytest.LogCaptureFixture
) -> None:
    before = stale.create()
    stale.create("RUNNING", **dict(identify_process()))
    assert stale.find() == before, "an older resumable run"
    assert infos(caplog) == []


def test_a_reused_pid_does_not_count_as_the_process_of_the_run(stale: StaleRuns) -> None:
    alive = dict(identify_process())
    run_dir = stale.create("RUNNING", **alive | {"process_started": alive["process_started"] - 5})
    assert stale.find() == run_dir


def test_a_running_run_of_another_host_is_skipped_with_a_warning(
    stale: StaleRuns, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = stale.create("RUNNING", host="else[where]")
    assert stale.find() is None
    assert infos(caplog) == [
        f"{run_dir}: has status RUNNING on host else[where]; --resume={run_dir} resumes it anyway"
    ]
    stale.create("KILLED", host="elsewhere")
    assert stale.find() is not None, "a run that ended on another host can be resumed here"


@pytest.mark.parametrize("checkpoint", [True, False], ids=["with a checkpoint", "without"])
def test_runs_of_different_code_are_skipped_with_one_warning(
    stale: StaleRuns, checkpoint: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run_dirs = [stale.create(), stale.create()]
    for run_dir in run_dirs:
        rewrite(run_dir, "environment.json", json.dumps(environment_json(code_sha256="0")))
        if checkpoint:
            with_checkpoint(run_dir)
    assert stale.find() is None
    (line,) = infos(caplog)
    assert line.startswith(f"{run_dirs[1]}: unfinished run with the same config, started by different code; ")


def test_without_a_code_hash_a_run_is_resumed_only_without_a_checkpoint(stale: StaleRuns) -> None:
    run_dir = stale.create()
    (run_dir / "environment.json").unlink()
    assert stale.find() == run_dir
    with_checkpoint(run_dir)
    assert stale.find() is None


def test_a_run_of_another_config_is_not_found(stale: StaleRuns, caplog: pytest.LogCaptureFixture) -> None:
    stale.create()
    stale.config = replace(stale.config, seed=stale.config.seed + 1)
    assert stale.find() is None
    assert infos(caplog) == []


@pytest.mark.parametrize("missing", ["config.yaml", "requested.yaml"])
def test_a_run_without_its_configs_is_skipped(stale: StaleRuns, missing: str) -> None:
    (stale.create() / missing).unlink()
    assert stale.find() is None


@pytest.mark.parametrize("damage", ["", "[]", '{"status": "KIL', '{"pid": "x"}'])
def test_a_damaged_run_json_is_named_and_skipped(
    stale: StaleRuns, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    other, damaged = stale.create(), stale.create()
    (damaged / "run.json").write_text(damage)
    assert stale.find() == other
    (line,) = warnings(caplog)
    assert line.startswith(f"skipped: {damaged}/run.json: cannot be read: ")


def test_a_damaged_environment_json_is_an_error(stale: StaleRuns) -> None:
    run_dir = stale.create()
    (run_dir / "environment.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"environment.json: was edited, or is damaged .*; captcha-exp train "
    ):
        stale.find()


@pytest.mark.parametrize(
    "change", [{"pid": "x"}, {"pid": -1}, {"lineage": None}, {"config_sha256": None}, {"host": 1}]
)
def test_a_run_json_with_invalid_values_is_skipped(stale: StaleRuns, change: dict[str, Any]) -> None:
    stale.create(**change)
    assert stale.find() is None


def test_jobs_of_a_sweep_are_found_only_by_job_directory(stale: StaleRuns, tiny: Config, root: Path) -> None:
    sweep = root / "outputs" / "2026-01-01" / "000000-sweep"
    sweep.mkdir(parents=True)
    (sweep / "sweep.json").write_text("{}")  # also of a damaged sweep
    run_dir = stale.create(run_dir=sweep / "1-x")
    assert stale.find() is None
    found = claim.find_resumable_job(run_dir, tiny)
    assert found is not None
    assert found.run_dir == run_dir
    assert claim.find_resumable_job(run_dir, replace(tiny, seed=9)) is None
    assert claim.find_resumable_job(sweep / "2-x", tiny) is None


def test_a_run_with_lineage_is_found_only_by_the_same_lineage(stale: StaleRuns) -> None:
    link = runs.RunLink(run_dir="/a", run_id=None)
    run_dir = stale.create(lineage={"extends": link.model_dump()})
    stale.create(lineage={"reproduces": link.model_dump()})
    assert stale.find() is None
    assert stale.find(extends=link) == run_dir
    assert stale.find(extends=runs.RunLink(run_dir="/b", run_id=None)) is None


# -- find_named ----------------------------------------------------------------------------------------------


def test_any_run_that_is_not_running_can_be_named(stale: StaleRuns, root: Path) -> None:
    for status in ("KILLED", "FAILED", "FINISHED"):
        run_dir = stale.create(status)
        assert claim.find_named(str(run_dir)).run_dir == run_dir
    elsewhere = stale.create("RUNNING", host="elsewhere")
    assert claim.find_named(str(elsewhere.relative_to(root))).run_dir == elsewhere, "the user decides"
    assert claim.find_named("latest").run_dir == elsewhere


def find_error(name: str) -> str:
    with pytest.raises(UserError) as caught:
        claim.find_named(name)
    (line,) = caught.value.lines
    return line


def test_a_name_that_cannot_be_resumed_is_one_line(stale: StaleRuns, root: Path) -> None:
    alive = dict(identify_process())
    assert find_error("nothing").startswith("'nothing' is not a run: ")
    run_dir = stale.create("RUNNING", **alive)
    assert (
        find_error(str(run_dir))
        == f"--resume={run_dir}: process {os.getpid()} is still running; stop it first"
    )

    sweep = root / "outputs" / "2026-01-01" / "000000-sweep"
    sweep.mkdir(parents=True)
    write_record(sweep, "sweep.json", sweep_info(**alive))
    job_dir = stale.create(run_dir=sweep / "1-x")
    assert find_error(str(job_dir)).endswith(f": process {os.getpid()} is still running; stop it first")
    assert find_error(str(sweep)).endswith(": is a sweep; add -m to resume it")
    edit_record(sweep, "sweep.json", status="KILLED")
    assert claim.find_named(str(job_dir)).run_dir == job_dir


# -- describe_progress ---------------------------------------------------------------------------------------


def test_progress_is_read_from_the_newest_valid_checkpoint(stale: StaleRuns) -> None:
    run_dir = stale.create()
    assert claim.describe_progress(run_dir) == "from the start (no checkpoint yet)"
    with_checkpoint(run_dir, 9)
    with_checkpoint(run_dir, 10, {"step": 10, "epoch": 4, "progress": None})
    found = runs.list_checkpoints(run_dir / runs.CHECKPOINT_DIR)
    assert [path.stem for path in found] == ["step-10", "step-9"], "sorted by number"
    assert re.fullmatch(
        r"from the end of epoch 4, step 10 \(saved \d\d:\d\d\)", claim.describe_progress(run_dir)
    )
    (run_dir / "checkpoint" / "step-10.safetensors").write_bytes(b"cut")
    assert claim.describe_progress(run_dir).startswith("from epoch 3, step 9 (saved ")
    os.utime(run_dir / "checkpoint" / "step-9.safetensors", (0, 86400 * 365))
    assert re.search(
        r"\(saved 1971-01-01 \d\d:\d\d\)|\(saved 1970-12-31 \d\d:\d\d\)", claim.describe_progress(run_dir)
    )


@pytest.mark.parametrize(
    "state", [[], 1, {"step": "x", "epoch": 1}, {"epoch": 1}, {"step": None, "epoch": 1}]
)
def test_a_checkpoint_with_invalid_metadata_is_skipped(stale: StaleRuns, state: Any) -> None:
    run_dir = with_checkpoint(stale.create(), 5, state)
    (run_dir / "checkpoint" / "step-x.safetensors").touch()
    assert claim.describe_progress(run_dir) == "from the start (no checkpoint yet)"


# -- claim ---------------------------------------------------------------------------------------------------


def state_of(run_dir: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    del state["checksum"]
    return state


def test_a_claimed_run_is_running_and_is_restored_afterwards(stale: StaleRuns) -> None:
    run_dir = stale.create(stop_reason="SIGINT")
    before = state_of(run_dir)
    with claim.claim(lambda: claim.find_named(str(run_dir))) as found:
        assert found is not None
        assert found.info.model_dump() == before
        during = state_of(run_dir)
        assert (during["status"], during["pid"]) == ("RUNNING", os.getpid())
        assert stale.find() is None, "a claimed run is not found"
        assert find_error(str(run_dir)).endswith("is still running; stop it first")
    assert state_of(run_dir) == before


def test_a_run_that_was_continued_is_not_restored(stale: StaleRuns) -> None:
    run_dir = stale.create()
    with claim.claim(lambda: claim.find_named(str(run_dir))):
        state = edit_record(run_dir, status="FINISHED")
    assert state_of(run_dir)["status"] == state["status"] == "FINISHED"


def test_nothing_is_claimed_if_no_run_is_found(stale: StaleRuns) -> None:
    with claim.claim(lambda: claim.find_resumable(stale.config, runs.Lineage())) as found:
        assert found is None


@pytest.mark.parametrize(
    "changed", [{"status": "FINISHED"}, {"pid": 1}, {"host": "elsewhere"}, {"process_started": 2.0}]
)
def test_a_run_that_has_changed_is_not_claimed_and_searched_again(
    stale: StaleRuns, changed: dict[str, Any]
) -> None:
    run_dir = stale.create()
    candidates: list[StaleRun[runs.RunInfo] | None] = [claim.find_named(str(run_dir)), None]
    edit_record(run_dir, **changed)
    changed = state_of(run_dir)
    with claim.claim(lambda: candidates.pop(0)) as found:
        assert found is None
    assert candidates == []
    assert state_of(run_dir) == changed


def test_a_finished_run_can_be_claimed(stale: StaleRuns) -> None:
    run_dir = stale.create("FINISHED")
    with claim.claim(lambda: claim.find_named(str(run_dir))) as found:
        assert found is not None
        assert state_of(run_dir)["status"] == "RUNNING"
    assert state_of(run_dir)["status"] == "FINISHED"


def test_a_run_that_was_closed_meanwhile_can_be_claimed(stale: StaleRuns) -> None:
    run_dir = stale.create("RUNNING")
    candidate = claim.find_named(str(run_dir))
    ended = "2026-01-01T00:00:00.000000+00:00"
    edit_record(run_dir, status="KILLED", ended=ended)
    with claim.claim(lambda: candidate) as found:
        assert found is not None
    assert (state_of(run_dir)["status"], state_of(run_dir)["ended"]) == ("KILLED", ended)


def test_a_lock_held_by_another_process_is_one_line(
    stale: StaleRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = stale.create()
    monkeypatch.setattr(claim, "LOCK_TIMEOUT_SECONDS", 0.05)
    message = "cannot resume: another process held the lock for 0 s"
    with runs.stale_lock(), pytest.raises(UserError, match=message):
        claim.claim(lambda: claim.find_named(str(run_dir))).__enter__()


CLAIM_SCRIPT = """
import sys
from captcha_exp.config import load
from captcha_exp.runs import Lineage, claim
from pathlib import Path

requested = load(Path(sys.argv[1]))
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.readline()
with claim.claim(lambda: claim.find_resumable(requested, Lineage())) as claimed:
    sys.stdout.write(f"{claimed and claimed.run_dir}\\n")
    sys.stdout.flush()
    sys.stdin.readline()
"""


@pytest.mark.long
def test_concurrent_processes_claim_each_run_once(stale: StaleRuns) -> None:
    """Start eight processes for three runs: three claim one each, the others none."""
    run_dirs = {str(stale.create()) for _ in range(3)}
    requested = str(Path(min(run_dirs)) / "requested.yaml")
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM_SCRIPT, requested],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(NUM_PROCESSES)
    ]
    try:
        assert [child.stdout and child.stdout.readline() for child in children] == ["ready\n"] * NUM_PROCESSES
        for child in children:
            assert child.stdin
            child.stdin.write("\n")
            child.stdin.flush()
        found = [((child.stdout and child.stdout.readline()) or "").strip() for child in children]
    finally:
        for child in children:
            child.communicate("\n")
    assert sorted(found) == sorted([*run_dirs, *["None"] * (NUM_PROCESSES - 3)])
    assert {state_of(Path(run_dir))["status"] for run_dir in run_dirs} == {"KILLED"}
