"""Sweeps that are interrupted, gone on with, cut off from disk and terminal, asked for in odd words."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import TINY, Heard
from support.faults import planted

from captcha_exp import runs
from captcha_exp.cli import main
from captcha_exp.cli import sweep as sweeping
from captcha_exp.config import Config, MlflowConfig
from captcha_exp.errors import ConfigError, RunFailed, UserError
from captcha_exp.memory.interval import MiBRange
from captcha_exp.runtime.device import detect_machine
from captcha_exp.runtime.shutdown import TimeLimitReached, defer_signals
from captcha_exp.sweep import record as recorded
from captcha_exp.sweep import supervisor
from captcha_exp.sweep.forecast import plan_jobs
from captcha_exp.sweep.record import Job, Sweep
from captcha_exp.sweep.results import Outcome, collect_results
from captcha_exp.sweep.runner import run_sweep
from captcha_exp.sweep.summary import SweepSummary
from captcha_exp.tracking import SweepParentRun
from captcha_exp.training import oom

Launch = Callable[[Path, Sequence[int]], None]


def points_of(tiny: Config, count: int = 3) -> list[Job]:
    return [
        Job(number=n, swept={"seed": str(n)}, choices={}, requested=replace(tiny, seed=n))
        for n in range(1, count + 1)
    ]


def recording(became: Outcome = "finished", launched: list[int] | None = None) -> Launch:
    """A launcher whose points leave a record and nothing else."""

    def launch(folder: Path, numbers: Sequence[int]) -> None:
        sweep = Sweep(folder)
        for number in numbers:
            record_of(sweep, number, became)
            if launched is not None:
                launched.append(number)

    return launch


def record_of(sweep: Sweep, number: int, became: Outcome) -> runs.Run:
    point = sweep.jobs[number - 1]
    run = runs.create_run(point.requested, point.requested, sweep.new_attempt(point))
    match became:
        case "killed":
            run.update(pid=2**22 + 1)  # no process has it
        case "failed":
            run.close("FAILED", "a mistake")
        case "oom" | "skipped":
            run.update(**{became: {"remedies": []}})
            run.close("FINISHED")
        case _:
            run.close("FINISHED")
    return run


class Told:
    """What a sweep tells at its end."""

    def __init__(self) -> None:
        self.verdicts: list[SweepSummary] = []
        self.sweep: Sweep | None = None

    def __call__(self, sweep: Sweep, verdict: SweepSummary) -> None:
        self.sweep = sweep
        self.verdicts.append(verdict)


def became(verdict: SweepSummary) -> list[str]:
    return [row.outcome for row in verdict.results]


# -- interrupted, and gone on with ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_last_words(number: signal.Signals) -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    said = []

    def speak() -> None:
        with defer_signals():
            signal.raise_signal(number)  # a second Ctrl-C would end this process at once
            said.append("the last word")

    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            speak()
        assert said
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_a_thread_that_hears_no_signal_there_is_nothing_to_wait_with() -> None:
    said = []

    def speak() -> None:
        with defer_signals():
            said.append(True)

    thread = threading.Thread(target=speak)
    thread.start()
    thread.join()
    assert said


def test_interrupted_in_the_second_point_and_gone_on_with(tiny: Config) -> None:
    found, told, heard = plan_jobs(points_of(tiny), Heard()), Told(), Heard()

    def interrupted(folder: Path, numbers: Sequence[int]) -> None:
        recording()(folder, numbers[:1])
        recording("killed")(folder, numbers[1:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(found, interrupted, 1, heard, told)
    (verdict,) = told.verdicts
    assert told.sweep is not None
    folder = told.sweep.sweep_dir
    assert became(verdict) == ["finished", "killed", "not run"]
    assert json.loads((folder / "summary.json").read_text())["jobs"][1]["outcome"] == "killed"
    states = [json.loads(path.read_text())["status"] for path in sorted(folder.glob("*/run.json"))]
    assert states == ["FINISHED", "KILLED"]

    sweep = recorded.find_sweep(folder.name if (Path.cwd() / folder.name).exists() else str(folder))
    assert (sweep.state["status"], sweep.state["error"]) == ("KILLED", "KeyboardInterrupt")
    sweep.update(pid=2**22 + 1)  # another process, that is gone
    launched: list[int] = []
    seen = {}

    def launch(folder: Path, numbers: Sequence[int]) -> None:
        seen.update(Sweep(folder).state)
        recording(launched=launched)(folder, numbers)

    verdict = run_sweep(plan_jobs(sweep.jobs, heard), launch, 1, heard, told, Sweep(folder))
    assert (seen["status"], seen["pid"]) == ("RUNNING", os.getpid()), "it is this process's own now"
    assert launched == [2, 3]
    assert became(verdict) == ["finished"] * 3
    assert [row.attempts for row in verdict.results] == [1, 2, 1]
    assert Sweep(folder).state["status"] == "FINISHED"
    assert "1 of 3 jobs are already done" in heard.lines


def test_what_has_a_result_is_not_run_again(tiny: Config) -> None:
    found, told = plan_jobs(points_of(tiny, 5), Heard()), Told()
    kinds: list[Outcome] = ["finished", "oom", "skipped", "failed", "killed"]

    def launch(folder: Path, numbers: Sequence[int]) -> None:
        for number, kind in zip(numbers, kinds, strict=True):
            record_of(Sweep(folder), number, kind)

    assert became(run_sweep(found, launch, 1, Heard(), told)) == kinds
    assert told.sweep is not None
    launched: list[int] = []
    sweep = Sweep(told.sweep.sweep_dir)
    again = run_sweep(found, recording(launched=launched), 1, Heard(), told, sweep)
    assert launched == [4, 5]
    assert again.has_failures is False


# -- a limit of time -----------------------------------------------------------------------------------------


def test_when_the_time_of_a_sweep_is_up_its_points_are_left_and_gone_on_with(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first point ends in time, the second is ended by it, the third is not begun."""
    begun: list[tuple[str, float]] = []

    def train(order: supervisor.TrainJob, folder: Path, _: object) -> None:
        assert order.deadline is not None
        begun.append((order.name or "", order.deadline))
        run = (
            runs.reopen_run(folder)
            if (folder / "run.json").exists()
            else runs.create_run(order.requested, order.requested, folder)
        )
        run.write_json("environment.json", {"code_sha256": runs.code_sha256()})
        time.sleep(max(0.0, order.deadline - time.time()) if len(begun) == 2 else 0.0)
        run.close(*(("KILLED", "TimeLimitReached") if len(begun) == 2 else ("FINISHED", None)))

    def launch(folder: Path, numbers: Sequence[int], *_: object) -> None:
        for number in numbers:
            supervisor.run_job(folder, number)

    monkeypatch.setattr(supervisor, "_train_in_child", train)
    monkeypatch.setattr(sweeping, "_launch", launch)
    words = (*TINY, "tracking=none", "seed=1,2,3")
    with pytest.raises(TimeLimitReached, match="run the same command to resume") as caught:
        train_all(*words, "train.max_minutes=0.05")
    assert caught.value.exit_code == 75
    (path,) = (root / "outputs").glob("*/*/sweep.json")
    sweep = Sweep(path.parent)
    assert (sweep.state["status"], sweep.state["error"]) == ("KILLED", "TimeLimitReached")
    assert json.loads((path.parent / "summary.json").read_text())["title"].startswith("sweep over seed: ")
    assert [row.outcome for row in collect_results(sweep)] == ["finished", "killed", "not run"]
    assert len({moment for _, moment in begun}) == 1, "the points have one time together"

    assert train_all(*words, "train.max_minutes=5", resume="auto") == 0
    assert [name for name, _ in begun] == ["seed=1", "seed=2", "seed=2", "seed=3"]
    assert begun[-1][1] > begun[0][1] + 60
    assert [row.attempts for row in collect_results(Sweep(path.parent))] == [1, 1, 1]


def test_a_point_on_another_machine_has_a_time_of_its_own(root: Path, launched: list[Any]) -> None:
    assert train_all(*GRID, "train.max_minutes=2") == 0
    sweep = Sweep(next((root / "outputs").glob("*/*/sweep.json")).parent)
    until = datetime.fromisoformat(sweep.state["time_limit"]["deadline"]).timestamp()
    assert supervisor._job_deadline(sweep) == until
    sweep.state["time_limit"]["deadline"] = "2000-01-01T00:00:00+00:00"
    sweep.state["host"] = "elsewhere"
    leave_at = supervisor._job_deadline(sweep)
    assert leave_at is not None
    assert time.time() + 100 < leave_at < time.time() + 121
    del sweep.state["time_limit"]  # a record of before
    assert supervisor._job_deadline(sweep) is None


def test_a_sweep_has_one_limit_of_time(root: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        train_all(*TINY, "train.max_minutes=1,2.5")
    assert caught.value.lines == (
        "train.max_minutes=1.0,2.5: is the time that the whole sweep may take; write one value",
    )
    assert not (root / "outputs").exists()


# -- --resume ------------------------------------------------------------------------------------------------

GRID = (*TINY, "tracking=none", "seed=1,2")


def train_all(*words: str, resume: str = "never", display: Heard | None = None) -> int:
    arguments = Namespace(overrides=list(words), config_dir=None, resume=resume, json=False)
    return sweeping.train_sweep(arguments, detect_machine(best_batch_size=lambda _: 1), display or Heard())


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], int]]:
    """(numbers, points at a time) of each launch; points leave a record alone."""
    found: list[tuple[list[int], int]] = []

    def launch(folder: Path, numbers: Sequence[int], grid: Any, _: object) -> None:
        found.append((list(numbers), grid.n_jobs))
        recording()(folder, numbers)

    monkeypatch.setattr(sweeping, "_launch", launch)
    return found


def cut(place: Path) -> Path:
    """The folder of the only sweep, whose second point is as if it never was."""
    (path,) = (place / "outputs").glob("*/*/sweep.json")
    sweep = Sweep(path.parent)
    (folder,) = sweep.attempts(sweep.jobs[1])
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(state | {"status": "KILLED"}))
    sweep.update(status="KILLED")
    return sweep.sweep_dir


@pytest.mark.parametrize(
    ("words", "resume"),
    [
        ((), "folder"),
        (GRID, "folder"),
        (GRID[::-1], "folder"),
        (GRID, "auto"),
        (("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), "folder"),
        (("train.max_minutes=9",), "folder"),
        ((*GRID, "train.max_minutes=9"), "auto"),
    ],
    ids=["nothing", "the same", "in another order", "auto", "another launcher", "a limit", "auto, a limit"],
)
def test_resume_with(words: tuple[str, ...], resume: str, root: Path, launched: list[Any]) -> None:
    assert train_all(*GRID) == 0
    folder = cut(root)
    moved = folder.with_name("moved away")
    folder.rename(moved)

    assert train_all(*words, resume=str(moved) if resume == "folder" else resume) == 0
    assert [numbers for numbers, _ in launched] == [[1, 2], [2]]
    assert launched[1][1] == (2 if "hydra/launcher=joblib" in words else 1)
    assert [row.attempts for row in collect_results(Sweep(moved))] == [1, 2]
    limit = Sweep(moved).state["time_limit"]
    assert (limit and limit["max_minutes"]) == (9 if "train.max_minutes=9" in words else None)
    assert not folder.exists()


def test_a_finished_sweep_gets_its_verdict_once_more(root: Path, launched: list[Any]) -> None:
    assert train_all(*GRID) == 0
    (path,) = (root / "outputs").glob("*/*/sweep.json")
    (path.parent / "summary.json").unlink()
    assert train_all(resume=str(path.parent)) == 0
    assert (path.parent / "summary.json").is_file()
    assert Sweep(path.parent).state["status"] == "FINISHED"
    assert len(launched) == 1


def test_by_itself_an_unfinished_sweep_of_other_code_is_told_of_and_left(
    root: Path, launched: list[Any]
) -> None:
    assert train_all(*GRID) == 0
    folder = cut(root)
    Sweep(folder).update(code_sha256="0" * 64)
    heard = Heard()
    assert train_all(*GRID, resume="auto", display=heard) == 0
    assert [numbers for numbers, _ in launched] == [[1, 2], [1, 2]]
    assert heard.lines[0] == (
        f"{folder}: is an unfinished sweep of these points, but other code began it; --resume={folder} "
        "goes on with it"
    )
    heard = Heard()
    assert train_all(*GRID, resume="auto", display=heard) == 0
    assert len(launched) == 3, "the second one has finished"
    assert train_all(resume=str(folder)) == 0
    assert launched[3][0] == [2], "by its name it is gone on with"


def test_a_sweep_whose_start_fails_is_left_as_it_was(
    root: Path, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_all(*GRID) == 0
    folder = cut(root)
    before = json.loads((folder / "sweep.json").read_text())

    def fail(*_: object) -> None:
        assert json.loads((folder / "sweep.json").read_text())["status"] == "RUNNING"
        raise UserError("no plan")

    monkeypatch.setattr(sweeping, "plan_jobs", fail)
    with pytest.raises(UserError, match="no plan"):
        train_all(*GRID, resume="auto")
    assert json.loads((folder / "sweep.json").read_text()) == before
    assert len(launched) == 1


def test_what_cannot_be_gone_on_with(root: Path, launched: list[Any]) -> None:
    assert train_all(*GRID) == 0
    folder = cut(root)

    def refused(*words: str) -> str:
        with pytest.raises(UserError) as caught:
            train_all(*words, resume=str(folder))
        (line,) = caught.value.lines
        return line

    assert "its points are not those that these overrides describe" in refused(*GRID, "train.epochs=3")
    sweep = Sweep(folder)
    sweep.reopen()
    assert refused().endswith(f"its process {os.getpid()} is still at work")
    sweep.close("KILLED")
    text = (folder / "jobs" / "2.yaml").read_text()
    (folder / "jobs" / "2.yaml").unlink()
    assert "2.yaml" in refused()
    (folder / "jobs" / "2.yaml").write_text(text)
    (folder / "sweep.json").write_text('{"status": "KILLED", "jobs": [{}]}')
    assert "invalid sweep record" in refused()
    assert len(launched) == 1


def test_a_sweep_is_gone_on_with_as_a_sweep(root: Path, launched: list[Any]) -> None:
    assert train_all(*GRID) == 0
    folder = cut(root)
    with pytest.raises(UserError, match=f"--resume={re.escape(str(folder))}: is a sweep; add -m"):
        main._dispatch(["train", "--resume", str(folder)])
    assert len(launched) == 1


def test_a_parent_that_was_deleted_in_mlflow_is_made_anew(root: Path) -> None:
    parent = SweepParentRun(
        MlflowConfig(backend="mlflow", uri=f"sqlite:///{root}/mlflow.db", experiment="x"), Heard()
    )
    state = {"host": "h", "pid": 1, "process_started": 1.0}
    parent.start(root, state, {"seed": "1, 2"})
    known = parent.run_id
    assert known is not None

    assert parent.resume(known)
    parent._client.delete_run(known)
    assert not parent.resume(known)
    assert not parent.resume("0" * 32), "the store is another one"


# -- odd words, and mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/a b",
        "/a'b\"",
        "/$HOME",
        "/${x}",
        "/a\\${x}",
        "/a\\b",
        "/a\\'b",
        "/a\\",
        "/[x],{y}=é",
        "/a\\\\${x}'\\",
    ],
)
def test_any_folder_gets_through_hydra(path: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    (override,) = OverridesParser.create().parse_overrides([f"dir={sweeping._quote_for_hydra(path)}"])
    assert OmegaConf.create({"dir": override.value()}).dir == path


def test_values_that_no_file_name_can_have_get_folders_of_their_own(tiny: Config) -> None:
    values = ["a/b", "a\\b", "a b", "../..", "", "ä" * 300, "[b]", "x\ny"]
    points = [
        Job(number=n, swept={"captcha.width": v, "data.width": v}, choices={}, requested=tiny)
        for n, v in enumerate(values, 1)
    ]
    sweep = recorded.create_sweep("tiny", points, {})
    folders = [sweep.new_attempt(point) for point in points for _ in range(2)]

    assert len(set(folders)) == 2 * len(values)
    assert {folder.parent for folder in folders} == {sweep.sweep_dir}
    assert all(len(folder.name) < 100 for folder in folders)
    assert Sweep(sweep.sweep_dir).jobs == points
    assert points[0].name == "captcha.width=a/b data.width=a/b"


def test_mistakes_of_all_points_come_before_anything_is_made(root: Path) -> None:
    for name in ("one", "two"):
        (root / name).mkdir()
    words = ("data=folder", f"data.path={root}/one,{root}/two,{root}/three", "tracking=none")
    with pytest.raises(ConfigError) as caught:
        train_all(*words)

    assert [line.partition(":")[0] for line in caught.value.lines] == [
        f"data.path={root}/{name}" for name in ("one", "two", "three")
    ]
    assert not (root / "outputs").exists()


# -- no room, no terminal ------------------------------------------------------------------------------------


def test_a_verdict_that_cannot_be_written_is_told(tiny: Config) -> None:
    told, heard = Told(), Heard()

    def launch(folder: Path, numbers: Sequence[int]) -> None:
        recording()(folder, numbers)
        (folder / "summary.json").mkdir()

    with pytest.raises(RunFailed, match="free disk space"):
        run_sweep(plan_jobs(points_of(tiny), Heard()), launch, 1, heard, told)
    assert became(told.verdicts[0]) == ["finished"] * 3
    assert any("cannot write the summary" in line for line in heard.warnings)


def test_a_record_that_stops_in_the_middle_is_a_row(tiny: Config) -> None:
    """Killed before config.yaml was written; damaged; an empty folder."""
    sweep = recorded.create_sweep("tiny", points_of(tiny), {"predicted": [None] * 3})
    (record_of(sweep, 1, "killed").run_dir / "config.yaml").unlink()
    (record_of(sweep, 2, "finished").run_dir / "run.json").write_text('{"status": "FIN')
    sweep.new_attempt(sweep.jobs[2])

    found = collect_results(sweep)
    assert [row.outcome for row in found] == ["killed", "failed", "not run"]
    assert "invalid run record" in (found[1].error or "")


def process_of(script: str, folder: Path, listen: Callable[[str], None], monkeypatch: Any) -> Any:
    """A process of a training that is this shell script instead."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(path))
    return supervisor._ChildProcess(folder / "gone" / "1-x", listen)


def test_neither_a_log_nor_a_terminal_that_is_gone_stops_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []

    def listen(line: str) -> None:
        heard.append(line)
        raise SystemExit(1)  # what rich does

    with process_of("seq 1 100000; exit 3", tmp_path, listen, monkeypatch) as process:
        process._process.wait(30)  # for ever, if nobody reads
        process.wait()
    assert heard == ["1"]
    assert process.describe_exit() == "100000"


def test_last_words_are_kept_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "head -c 3000000 /dev/zero | tr '\\0' x; exit 3"
    heard: list[str] = []
    with process_of(script, tmp_path, heard.append, monkeypatch) as process:
        process.wait()
    assert process.describe_exit() == "x" * 1000
    assert re.search(r"cannot write .+1-x\.log$", heard[-1])


def test_a_process_that_does_not_stop_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STOP_TIMEOUT_SECONDS", 0.1)
    with process_of("trap '' TERM INT; exec sleep 100", tmp_path, print, monkeypatch) as process:
        pass
    assert process.describe_exit() == "did not stop within 0.1 s; killed"


def test_no_remedy_is_sought_where_the_context_alone_is_too_much(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = plan_jobs(points_of(tiny, 1), Heard())
    assert found.plan is not None
    monkeypatch.setattr(oom, "advise", None)
    plan = replace(found.plan, budget_mib=MiBRange(100.0, 100.0))

    assert oom.find_remedies(plan, found.split_sizes, found.config, Heard()) == []


# -- Ctrl-C for real -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "number", "code"),
    [
        ((), signal.SIGINT, 130),
        pytest.param((), signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(
            ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), signal.SIGINT, 130, marks=pytest.mark.slow
        ),
    ],
    ids=["ctrl-c", "sigterm", "joblib"],
)
def test_interrupted_at_a_terminal(
    root: Path, cache: Path, words: tuple[str, ...], number: signal.Signals, code: int
) -> None:
    """Told, written, and nobody lives on; the point that waits is woken."""
    command = [sys.executable, "-m", "captcha_exp", "train", "-m", *TINY, f"data.cache={cache}", *words]
    process = subprocess.Popen(
        [*command, "tracking=none", "train.batch_size=32,64,16", "--json"],
        env=os.environ | planted(root, {32: "wait"}) | {"WAITING": str(root / "waiting")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    while not (root / "waiting").exists():
        assert process.poll() is None
        time.sleep(0.05)
    there = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)
    said, _ = process.communicate()

    assert process.returncode == code
    assert psutil.wait_procs(there, timeout=2)[1] == []
    told = json.loads(said)
    assert told["jobs"][0]["outcome"] == "killed"
    assert json.loads((Path(told["run_dir"]) / "summary.json").read_text())["title"] == told["title"]
    states = [json.loads(path.read_text()) for path in Path(told["run_dir"]).glob("*/run.json")]
    assert "RUNNING" not in {state["status"] for state in states}
    assert json.loads((Path(told["run_dir"]) / "sweep.json").read_text())["status"] == "KILLED"
    if not words and number == signal.SIGINT:
        assert states[0]["error"] == "interrupted", "it waits inside a step, and was made to end"
