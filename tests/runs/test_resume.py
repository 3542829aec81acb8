"""Which run is gone on with: the newest of just this config and code that nobody is at work on."""

import json
import os
import platform
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
from safetensors.numpy import save_file

from captcha_exp import runs
from captcha_exp.config import Config
from captcha_exp.errors import UserError
from captcha_exp.runs import StaleRun, code_sha256, resume
from captcha_exp.runtime import process

NOBODY: dict[str, Any] = {"pid": 2**22 + 1, "process_started": 1.0}  # above every pid that Linux gives
PROCESSES = 8


@pytest.fixture(scope="module")
def nobody() -> dict[str, Any]:
    """A process that is gone."""
    assert not psutil.pid_exists(NOBODY["pid"])
    return dict(NOBODY)


class Made:
    """Runs of a config, as processes that are gone have left them."""

    def __init__(self, config: Config, nobody: Mapping[str, Any]) -> None:
        self.config, self.nobody = config, nobody
        self.told: list[str] = []

    def __call__(self, status: str = "KILLED", folder: Path | None = None, **state: Any) -> Path:
        run = runs.create_run(self.config, self.config, folder)
        run.write_json("environment.json", {"code_sha256": code_sha256()})
        run.update(**{"status": status, **self.nobody, **state})
        return run.run_dir

    def newest(self, **links: Any) -> Path | None:
        found = resume.find_resumable(self.config, self.told.append, links)
        return None if found is None else found.run_dir


@pytest.fixture
def made(tiny: Config, nobody: dict[str, Any]) -> Made:
    return Made(tiny, nobody)


def with_checkpoint(folder: Path, step: int = 7, state: Any = None) -> Path:
    """The folder, with a checkpoint of this step."""
    (folder / "checkpoint").mkdir(exist_ok=True)
    path = folder / "checkpoint" / f"step-{step}.safetensors"
    counters = {"step": step, "epoch": 3, "progress": {"batches": 2}} if state is None else state
    save_file({"x": np.zeros(1)}, path, {"state": json.dumps(counters)})
    return folder


# -- which one -----------------------------------------------------------------------------------------------


def test_the_newest_one_is_found(made: Made) -> None:
    assert made.newest() is None
    made()
    second = made()
    assert made.newest() == second
    assert made.told == []


@pytest.mark.parametrize("status", ["RUNNING", "KILLED", "FAILED", "FINISHED"])
@pytest.mark.parametrize("checkpoint", [True, False], ids=["with a checkpoint", "without"])
def test_what_failed_needs_a_checkpoint_and_what_finished_is_left(
    made: Made, status: str, checkpoint: bool
) -> None:
    folder = made(status)
    if checkpoint:
        with_checkpoint(folder)
    is_found = status in ("RUNNING", "KILLED") or (status == "FAILED" and checkpoint)
    assert made.newest() == (folder if is_found else None)
    assert made.told == []


def test_what_a_process_is_at_work_on_is_left_without_a_word(made: Made) -> None:
    before = made()
    made("RUNNING", **process.process_identity())
    assert made.newest() == before, "an older one that is free"
    assert made.told == []


def test_another_process_of_the_same_number_is_not_the_runs(made: Made) -> None:
    alive = process.process_identity()
    folder = made("RUNNING", **alive | {"process_started": alive["process_started"] - 5})
    assert made.newest() == folder


def test_a_run_of_another_machine_is_told_of_and_left_while_it_says_running(made: Made) -> None:
    folder = made("RUNNING", host="else[where]")
    assert made.newest() is None
    assert made.told == [
        f"{folder}: runs on else[where], if that is still so; if it is not, --resume={folder} goes on with it"
    ]
    made("KILLED", host="elsewhere")
    assert made.newest() is not None, "an end is an end, wherever it was written"


@pytest.mark.parametrize("reached", [True, False], ids=["with a checkpoint", "without"])
def test_what_other_code_began_is_told_of_once_and_left(made: Made, reached: bool) -> None:
    folders = [made(), made()]
    for folder in folders:
        (folder / "environment.json").write_text('{"code_sha256": "0"}')
        if reached:
            with_checkpoint(folder)
    assert made.newest() is None
    (line,) = made.told
    assert line.startswith(
        f"{folders[1]}: is unfinished and was asked for the same, but other code began it; "
    )


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"code_sha256": 1}', "[" * 100_000, None])
def test_without_its_code_a_run_is_gone_on_with_if_it_reached_nothing(
    made: Made, content: str | None
) -> None:
    folder = made()
    (folder / "environment.json").unlink()
    if content is not None:
        (folder / "environment.json").write_text(content)
    assert made.newest() == folder
    with_checkpoint(folder)
    assert made.newest() is None
    assert len(made.told) == 1


def test_another_config_is_another_run(made: Made) -> None:
    made()
    made.config = replace(made.config, seed=made.config.seed + 1)
    assert made.newest() is None
    assert made.told == []


@pytest.mark.parametrize("missing", ["config.yaml", "requested.yaml"])
def test_what_does_not_say_what_it_is_is_left(made: Made, missing: str) -> None:
    (made() / missing).unlink()
    assert made.newest() is None


@pytest.mark.parametrize("damage", ["", "[]", '{"status": "KILLED"}', '{"pid": "x"}'])
def test_a_damaged_record_is_left(made: Made, damage: str) -> None:
    (made() / "run.json").write_text(damage)
    assert made.newest() is None


@pytest.mark.parametrize(
    "change", [{"pid": "x"}, {"pid": -1}, {"links": None}, {"config_sha256": None}, {"host": 1}]
)
def test_a_record_of_odd_values_is_left(made: Made, change: dict[str, Any]) -> None:
    made(**change)
    assert made.newest() is None


def test_points_of_a_sweep_belong_to_the_sweep(made: Made, tiny: Config, root: Path) -> None:
    sweep = root / "outputs" / "2026-01-01" / "000000-sweep"
    sweep.mkdir(parents=True)
    (sweep / "sweep.json").write_text("{}")
    folder = made(folder=sweep / "1-x")
    assert made.newest() is None
    found = resume.find_resumable_job(folder, tiny)
    assert found is not None
    assert found.run_dir == folder
    assert resume.find_resumable_job(folder, replace(tiny, seed=9)) is None
    assert resume.find_resumable_job(sweep / "2-x", tiny) is None


def test_a_run_with_links_is_found_by_who_asks_for_just_these(made: Made) -> None:
    links = {"continues": {"run_dir": "/a", "run_id": None}}
    folder = made(links=links)
    made(links={"reproduces": {"run_dir": "/a", "run_id": None}})
    assert made.newest() is None
    assert made.newest(**links) == folder
    assert made.newest(continues={"run_dir": "/b", "run_id": None}) is None


# -- by its name ---------------------------------------------------------------------------------------------


def test_a_named_run_is_any_that_nobody_is_at_work_on(made: Made, root: Path) -> None:
    for status in ("KILLED", "FAILED", "FINISHED"):
        folder = made(status)
        assert resume.find_named(str(folder)).run_dir == folder
    elsewhere = made("RUNNING", host="elsewhere")
    assert resume.find_named(str(elsewhere.relative_to(root))).run_dir == elsewhere, "a person knows"
    assert resume.find_named("latest").run_dir == elsewhere


def refused(name: str) -> str:
    with pytest.raises(UserError) as caught:
        resume.find_named(name)
    (line,) = caught.value.lines
    return line


def test_a_name_that_cannot_be_gone_on_with_is_one_line(made: Made, root: Path) -> None:
    alive = process.process_identity()
    assert refused("nothing").startswith("'nothing' is no run: ")
    folder = made("RUNNING", **alive)
    assert refused(str(folder)) == f"--resume={folder}: its process {os.getpid()} is still at work"

    sweep = root / "outputs" / "2026-01-01" / "000000-sweep"
    sweep.mkdir(parents=True)
    state = {"status": "RUNNING", "host": platform.node(), **alive, "mlflow": None}
    (sweep / "sweep.json").write_text(json.dumps(state))
    point = made(folder=sweep / "1-x")
    assert refused(str(point)).endswith(f"the process {os.getpid()} of its sweep is still at work")
    assert refused(str(sweep)).endswith(": is a sweep; add -m to go on with it")
    (sweep / "sweep.json").write_text(json.dumps(state | {"status": "KILLED"}))
    assert resume.find_named(str(point)).run_dir == point


# -- from where ----------------------------------------------------------------------------------------------


def test_where_it_goes_on_is_read_from_the_newest_whole_checkpoint(made: Made) -> None:
    folder = made()
    assert resume.describe_progress(folder) == "from its beginning: it had no checkpoint yet"
    with_checkpoint(folder, 9)
    with_checkpoint(folder, 10, {"step": 10, "epoch": 4, "progress": None})
    found = runs.list_checkpoints(folder / runs.CHECKPOINT_DIR)
    assert [path.stem for path in found] == ["step-10", "step-9"], "by number"
    assert re.fullmatch(
        r"from the end of epoch 4, step 10 \(saved \d\d:\d\d\)", resume.describe_progress(folder)
    )
    (folder / "checkpoint" / "step-10.safetensors").write_bytes(b"cut")
    assert resume.describe_progress(folder).startswith("from epoch 3, step 9 (saved ")
    os.utime(folder / "checkpoint" / "step-9.safetensors", (0, 86400 * 365))
    assert re.search(
        r"\(saved 1971-01-01 \d\d:\d\d\)|\(saved 1970-12-31 \d\d:\d\d\)", resume.describe_progress(folder)
    )


@pytest.mark.parametrize(
    "state", [[], 1, {"step": "x", "epoch": 1}, {"epoch": 1}, {"step": None, "epoch": 1}]
)
def test_a_checkpoint_of_odd_words_is_passed_over(made: Made, state: Any) -> None:
    folder = with_checkpoint(made(), 5, state)
    (folder / "checkpoint" / "step-x.safetensors").touch()
    assert resume.describe_progress(folder) == "from its beginning: it had no checkpoint yet"


# -- one process at a time -----------------------------------------------------------------------------------


def state_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def test_what_is_held_says_so_and_says_afterwards_what_it_said_before(made: Made) -> None:
    folder = made(error="interrupted")
    before = state_of(folder)
    with resume.claim(lambda: resume.find_named(str(folder))) as found:
        assert found is not None
        assert found.state == before
        during = state_of(folder)
        assert (during["status"], during["pid"]) == ("RUNNING", os.getpid())
        assert made.newest() is None, "nobody else finds it"
        assert refused(str(folder)).endswith("is still at work")
    assert state_of(folder) == before


def test_what_went_on_in_the_meantime_is_not_put_back(made: Made) -> None:
    folder = made()
    with resume.claim(lambda: resume.find_named(str(folder))):
        state = state_of(folder) | {"status": "FINISHED"}
        (folder / "run.json").write_text(json.dumps(state))
    assert state_of(folder) == state


def test_nothing_is_held_where_nothing_is_found(made: Made) -> None:
    with resume.claim(lambda: resume.find_resumable(made.config, made.told.append)) as found:
        assert found is None


@pytest.mark.parametrize(
    "changed", [{"status": "FINISHED"}, {"pid": 1}, {"host": "elsewhere"}, {"process_started": 2.0}]
)
def test_who_comes_second_looks_again(made: Made, changed: dict[str, Any]) -> None:
    folder = made()
    looks: list[StaleRun | None] = [resume.find_named(str(folder)), None]
    changed = state_of(folder) | changed
    (folder / "run.json").write_text(json.dumps(changed))
    with resume.claim(lambda: looks.pop(0)) as found:
        assert found is None
    assert looks == []
    assert state_of(folder) == changed


def test_what_had_finished_when_it_was_looked_at_is_held_like_any(made: Made) -> None:
    folder = made("FINISHED")
    with resume.claim(lambda: resume.find_named(str(folder))) as found:
        assert found is not None
        assert state_of(folder)["status"] == "RUNNING"
    assert state_of(folder)["status"] == "FINISHED"


def test_a_run_that_was_closed_since_is_still_the_one_that_was_seen(made: Made) -> None:
    folder = made("RUNNING")
    seen = resume.find_named(str(folder))
    (folder / "run.json").write_text(json.dumps(state_of(folder) | {"status": "KILLED", "ended": "now"}))
    with resume.claim(lambda: seen) as found:
        assert found is not None
    assert (state_of(folder)["status"], state_of(folder)["ended"]) == ("KILLED", "now")


def test_a_lock_that_another_process_keeps_is_one_line(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made()
    monkeypatch.setattr(resume, "SECONDS_FOR_THE_LOCK", 0.05)
    words = "cannot be gone on with now, since another process has been closing runs for 0 s"
    with runs.stale_lock(), pytest.raises(UserError, match=words):
        resume.claim(lambda: resume.find_named(str(folder))).__enter__()


RACER = """
import sys
from captcha_exp.config import load
from captcha_exp.runs import resume as unfinished
from pathlib import Path

requested = load(Path(sys.argv[1]))
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.readline()
with unfinished.held(lambda: unfinished.newest(requested, print)) as found:
    sys.stdout.write(f"{found and found.folder}\\n")
    sys.stdout.flush()
    sys.stdin.readline()
"""


def test_of_processes_that_start_at_once_each_run_is_held_by_one(made: Made) -> None:
    """Eight processes, three runs: three get one each, the others none."""
    folders = {str(made()) for _ in range(3)}
    requested = str(Path(min(folders)) / "requested.yaml")
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, requested], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(PROCESSES)
    ]
    try:
        assert [each.stdout and each.stdout.readline() for each in racers] == ["ready\n"] * PROCESSES
        for each in racers:
            assert each.stdin
            each.stdin.write("\n")
            each.stdin.flush()
        found = [((each.stdout and each.stdout.readline()) or "").strip() for each in racers]
    finally:
        for each in racers:
            each.communicate("\n")
    assert sorted(found) == sorted([*folders, *["None"] * (PROCESSES - 3)])
    assert {state_of(Path(folder))["status"] for folder in folders} == {"KILLED"}
