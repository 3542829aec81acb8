"""`train -m`: interruption, time limits, resuming, special characters, and failures of disk and terminal."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import (
    TINY,
    edit_record,
    environment_json,
    infos,
    mlflow_ref,
    out_of_memory,
    sweep_info,
    warnings,
)
from mlflow import MlflowClient
from rich.console import Console
from support.faults import inject_faults

from captcha_exp import compose, load, runs
from captcha_exp.cli import main, output
from captcha_exp.cli import sweep as sweep_command
from captcha_exp.config import Config, MlflowConfig, to_yaml
from captcha_exp.errors import ConfigError, RunFailed, UserError
from captcha_exp.memory.interval import MiBRange
from captcha_exp.runs import RecordedDir
from captcha_exp.runs.info import Skipped, running_fields
from captcha_exp.runtime import fork_server
from captcha_exp.runtime.device import detect_machine
from captcha_exp.runtime.shutdown import StopReason, TimeLimitReached, defer_signals
from captcha_exp.sweep import record, supervisor
from captcha_exp.sweep.planner import plan_jobs
from captcha_exp.sweep.record import Job, Sweep
from captcha_exp.sweep.results import Outcome, collect_results
from captcha_exp.sweep.runner import run_sweep
from captcha_exp.sweep.summary import SweepSummary
from captcha_exp.tracking.tracker import Sender
from captcha_exp.training import oom

Launch = Callable[[Path, Sequence[int]], None]


def make_jobs(tiny: Config, count: int = 3) -> list[Job]:
    return [
        Job(number=n, swept={"seed": str(n)}, choices={}, requested=replace(tiny, seed=n))
        for n in range(1, count + 1)
    ]


def make_launch(outcome: Outcome = "finished", launched: list[int] | None = None) -> Launch:
    """Return a launcher that only creates the run of each job."""

    def launch(sweep_dir: Path, numbers: Sequence[int]) -> None:
        sweep = Sweep(sweep_dir)
        for number in numbers:
            make_run(sweep, number, outcome)
            if launched is not None:
                launched.append(number)

    return launch


def make_run(sweep: Sweep, number: int, outcome: Outcome) -> runs.Run:
    """Create the run of a job with this outcome."""
    job = sweep.jobs[number - 1]
    run = runs.create_run(job.requested, job.requested, sweep.new_attempt(job))
    match outcome:
        case "killed":
            run.update(pid=2**22 + 1)  # above the maximum process id
        case "failed":
            run.close("FAILED", "an error")
        case "oom" | "skipped":
            run.update(**{outcome: out_of_memory() if outcome == "oom" else Skipped(remedies=[])})
            run.close("FINISHED")
        case _:
            run.close("FINISHED")
    return run


class SummaryRecorder:
    """A callback that stores the summaries of a sweep."""

    def __init__(self) -> None:
        self.summaries: list[SweepSummary] = []
        self.sweep: Sweep | None = None

    def __call__(self, sweep: Sweep, summary: SweepSummary) -> None:
        self.sweep = sweep
        self.summaries.append(summary)


def outcomes(summary: SweepSummary) -> list[str]:
    return [result.outcome for result in summary.results]


# -- interruption --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_defer_signals_delays_a_signal(number: signal.Signals) -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    calls = []

    def call() -> None:
        with defer_signals():
            signal.raise_signal(number)
            calls.append("after the signal")

    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            call()
        assert calls
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_defer_signals_in_another_thread() -> None:
    calls = []

    def call() -> None:
        with defer_signals():
            calls.append(True)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert calls


def test_interrupted_in_the_second_job_and_resumed(tiny: Config, caplog: pytest.LogCaptureFixture) -> None:
    found, recorder = plan_jobs(make_jobs(tiny)), SummaryRecorder()

    def interrupted(sweep_dir: Path, numbers: Sequence[int]) -> None:
        make_launch()(sweep_dir, numbers[:1])
        make_launch("killed")(sweep_dir, numbers[1:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(found, interrupted, 1, recorder)
    (summary,) = recorder.summaries
    assert recorder.sweep is not None
    sweep_dir = recorder.sweep.run_dir
    assert outcomes(summary) == ["finished", "killed", "not run"]
    assert json.loads((sweep_dir / "summary.json").read_text())["jobs"][1]["outcome"] == "killed"
    states = [json.loads(path.read_text())["status"] for path in sorted(sweep_dir.glob("*/run.json"))]
    assert states == ["FINISHED", "KILLED"]

    sweep = record.find_sweep(sweep_dir.name if (Path.cwd() / sweep_dir.name).exists() else str(sweep_dir))
    assert (sweep.info.status, sweep.info.error, sweep.info.stop_reason) == ("KILLED", None, "SIGINT")
    sweep.update(pid=2**22 + 1)  # a process that has exited
    launched: list[int] = []
    during: list[runs.SweepInfo] = []

    def launch(sweep_dir: Path, numbers: Sequence[int]) -> None:
        during.append(Sweep(sweep_dir).info)
        make_launch(launched=launched)(sweep_dir, numbers)

    summary = run_sweep(plan_jobs(sweep.jobs), launch, 1, recorder, Sweep(sweep_dir))
    assert (during[0].status, during[0].pid) == ("RUNNING", os.getpid()), "claimed by this process"
    assert during[0].stop_reason is None
    assert launched == [2, 3]
    assert outcomes(summary) == ["finished"] * 3
    assert [result.attempts for result in summary.results] == [1, 2, 1]
    assert Sweep(sweep_dir).info.status == "FINISHED"
    assert "1 of 3 jobs are already done" in infos(caplog)


def test_jobs_with_a_result_are_not_run_again(tiny: Config) -> None:
    found, recorder = plan_jobs(make_jobs(tiny, 5)), SummaryRecorder()
    expected: list[Outcome] = ["finished", "oom", "skipped", "failed", "killed"]

    def launch(sweep_dir: Path, numbers: Sequence[int]) -> None:
        for number, outcome in zip(numbers, expected, strict=True):
            make_run(Sweep(sweep_dir), number, outcome)

    assert outcomes(run_sweep(found, launch, 1, recorder)) == expected
    assert recorder.sweep is not None
    launched: list[int] = []
    sweep = Sweep(recorder.sweep.run_dir)
    again = run_sweep(found, make_launch(launched=launched), 1, recorder, sweep)
    assert launched == [4, 5]
    assert again.has_failures is False


# -- time limit ----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_time_limit_stops_the_sweep_and_it_is_resumed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first job finishes in time, the second is stopped, the third is not started."""
    started: list[tuple[str, float]] = []

    def train(job: supervisor.TrainJob, run_dir: Path, _: object) -> None:
        assert job.deadline is not None
        started.append((job.name or "", job.deadline))
        run = (
            runs.reopen_run(run_dir)
            if (run_dir / "run.json").exists()
            else runs.create_run(job.requested, job.requested, run_dir)
        )
        run.write_json("environment.json", environment_json(code_sha256=runs.code_sha256()))
        time.sleep(max(0.0, job.deadline - time.time()) if len(started) == 2 else 0.0)
        if len(started) == 2:
            run.close("KILLED", stop_reason="time limit")
        else:
            run.close("FINISHED")

    def launch(sweep_dir: Path, numbers: Sequence[int], *_: object) -> None:
        for number in numbers:
            supervisor.run_job(sweep_dir, number)

    monkeypatch.setattr(supervisor, "_train_in_child", train)
    monkeypatch.setattr(sweep_command, "_launch", launch)
    words = (*TINY, "tracking=none", "seed=1,2,3")
    with pytest.raises(TimeLimitReached, match="run the same command to resume") as caught:
        train_all(*words, "train.max_minutes=0.05")
    assert caught.value.exit_code == 75
    (path,) = (root / "outputs").glob("*/*/sweep.json")
    sweep = Sweep(path.parent)
    assert (sweep.info.status, sweep.info.error, sweep.info.stop_reason) == ("KILLED", None, "time limit")
    assert json.loads((path.parent / "summary.json").read_text())["title"].startswith("sweep over seed: ")
    assert [result.outcome for result in collect_results(sweep)] == ["finished", "killed", "not run"]
    assert len({moment for _, moment in started}) == 1, "the jobs share one deadline"

    assert train_all(*words, "train.max_minutes=5", resume="auto") == 0
    assert [name for name, _ in started] == ["seed=1", "seed=2", "seed=2", "seed=3"]
    assert started[-1][1] > started[0][1] + 60
    assert [result.attempts for result in collect_results(Sweep(path.parent))] == [1, 1, 1]


def test_a_job_on_another_machine_has_its_own_deadline(root: Path, launched: list[Any]) -> None:
    assert train_all(*GRID, "train.max_minutes=2") == 0
    sweep = Sweep(next((root / "outputs").glob("*/*/sweep.json")).parent)
    limit = sweep.info.time_limit
    assert limit is not None
    assert supervisor._job_deadline(sweep) == limit.deadline.timestamp()
    past = limit.model_copy(update={"deadline": datetime(2000, 1, 1, tzinfo=UTC)})
    sweep.update(time_limit=past, host="elsewhere")
    deadline = supervisor._job_deadline(sweep)
    assert deadline is not None
    assert time.time() + 100 < deadline < time.time() + 121
    sweep.update(time_limit=None)
    assert supervisor._job_deadline(sweep) is None


def test_a_sweep_has_one_time_limit(root: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        train_all(*TINY, "train.max_minutes=1,2.5")
    assert caught.value.lines == ("train.max_minutes=1.0,2.5: limits the whole sweep; write one value",)
    assert not (root / "outputs").exists()


# -- --resume ------------------------------------------------------------------------------------------------

GRID = (*TINY, "tracking=none", "seed=1,2")


def train_all(*words: str, resume: str = "never", rerun: bool = False) -> int:
    arguments = Namespace(
        overrides=list(words), config_dir=None, resume=resume, json=False, rerun_disturbed=rerun
    )
    return sweep_command.train_sweep(arguments, detect_machine())


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], int]]:
    """Return (numbers, n_jobs) of each launch. Launching only creates the runs."""
    launches: list[tuple[list[int], int]] = []

    def launch(sweep_dir: Path, numbers: Sequence[int], grid: Any) -> None:
        launches.append((list(numbers), grid.n_jobs))
        make_launch()(sweep_dir, numbers)

    monkeypatch.setattr(sweep_command, "_launch", launch)
    return launches


def interrupt(root: Path) -> Path:
    """Mark the only sweep and its second job KILLED, and return the sweep directory."""
    (path,) = (root / "outputs").glob("*/*/sweep.json")
    sweep = Sweep(path.parent)
    (run_dir,) = sweep.attempts(sweep.jobs[1])
    edit_record(run_dir, status="KILLED")
    sweep.update(status="KILLED")
    return sweep.run_dir


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "resume"),
    [
        pytest.param((), "sweep_dir", marks=pytest.mark.long),
        pytest.param(GRID, "sweep_dir", marks=pytest.mark.long),
        (GRID[::-1], "sweep_dir"),
        pytest.param(GRID, "auto", marks=pytest.mark.long),
        pytest.param(
            ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), "sweep_dir", marks=pytest.mark.long
        ),
        pytest.param(("train.max_minutes=9",), "sweep_dir", marks=pytest.mark.long),
        ((*GRID, "train.max_minutes=9"), "auto"),
    ],
    ids=["none", "same", "other order", "auto", "other launcher", "time limit", "auto, time limit"],
)
def test_resume_with_overrides(words: tuple[str, ...], resume: str, root: Path, launched: list[Any]) -> None:
    assert train_all(*GRID) == 0
    sweep_dir = interrupt(root)
    moved = sweep_dir.with_name("moved away")
    sweep_dir.rename(moved)

    assert train_all(*words, resume=str(moved) if resume == "sweep_dir" else resume) == 0
    assert [numbers for numbers, _ in launched] == [[1, 2], [2]]
    assert launched[1][1] == (2 if "hydra/launcher=joblib" in words else 1)
    assert [result.attempts for result in collect_results(Sweep(moved))] == [1, 2]
    limit = Sweep(moved).info.time_limit
    assert (limit and limit.max_minutes) == (9 if "train.max_minutes=9" in words else None)
    assert not sweep_dir.exists()


def test_resuming_a_finished_sweep_writes_its_summary_again(root: Path, launched: list[Any]) -> None:
    assert train_all(*GRID) == 0
    (path,) = (root / "outputs").glob("*/*/sweep.json")
    (path.parent / "summary.json").unlink()
    assert train_all(resume=str(path.parent)) == 0
    assert (path.parent / "summary.json").is_file()
    assert Sweep(path.parent).info.status == "FINISHED"
    assert len(launched) == 1


@pytest.mark.long
def test_auto_skips_an_unfinished_sweep_of_other_code(
    root: Path, launched: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert train_all(*GRID) == 0
    sweep_dir = interrupt(root)
    Sweep(sweep_dir).update(code_sha256="0" * 64)
    caplog.clear()
    assert train_all(*GRID, resume="auto") == 0
    assert [numbers for numbers, _ in launched] == [[1, 2], [1, 2]]
    assert infos(caplog)[0] == (
        f"{sweep_dir}: unfinished sweep with the same jobs, but started with different code; resume it with "
        f"--resume={sweep_dir}"
    )
    caplog.clear()
    assert train_all(*GRID, resume="auto") == 0
    assert len(launched) == 3, "the second sweep is finished"
    assert train_all(resume=str(sweep_dir)) == 0
    assert launched[3][0] == [2], "a named sweep is resumed"


# -- --rerun-disturbed ---------------------------------------------------------------------------------------


def disturb(sweep: Sweep, number: int) -> None:
    """Record a disturbed epoch of the latest attempt of a job."""
    metrics = {"speed/images_per_second": 10.0, "speed/disturbed": 1.0}
    run_dir = sweep.attempts(sweep.jobs[number - 1])[-1]
    runs.Run(run_dir, runs.RunInfo.load(run_dir)).log_metrics(runs.MetricsRow(1, 1, metrics))


def test_rerun_disturbed_trains_the_disturbed_jobs_of_a_finished_sweep_again(
    root: Path, launched: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert train_all(*GRID) == 0
    (path,) = (root / "outputs").glob("*/*/sweep.json")
    sweep = Sweep(path.parent)
    disturb(sweep, 2)
    caplog.clear()

    assert train_all(*GRID, resume="auto", rerun=True) == 0
    assert [numbers for numbers, _ in launched] == [[1, 2], [2]]
    assert f"Resuming {sweep.run_dir}, a finished sweep with the same jobs" in infos(caplog)
    assert "training again: seed=2" in infos(caplog)
    results = collect_results(sweep)
    assert [(result.attempts, result.disturbed) for result in results] == [(1, False), (2, False)]
    assert Sweep(sweep.run_dir).info.status == "FINISHED"

    disturb(sweep, 1)
    assert train_all(resume=str(sweep.run_dir), rerun=True) == 0
    assert launched[2][0] == [1]
    caplog.clear()
    assert train_all(resume=str(sweep.run_dir), rerun=True) == 0
    assert len(launched) == 3
    assert "no speed was disturbed" in infos(caplog)
    assert train_all(*GRID, resume="auto") == 0, "without the flag a finished sweep is not resumed"
    assert launched[3][0] == [1, 2]


def add_attempt(
    sweep: Sweep, number: int, status: runs.Status, error: str | None, reason: StopReason | None
) -> None:
    job = sweep.jobs[number - 1]
    runs.create_run(job.requested, job.requested, sweep.new_attempt(job)).close(status, error, reason)


@pytest.mark.parametrize(
    ("status", "error", "reason", "shown"),
    [
        ("FAILED", "no space left", None, "no space left"),
        ("KILLED", None, "SIGTERM", "SIGTERM"),
        ("KILLED", None, "time limit", "time limit"),
    ],
)
def test_a_finished_attempt_counts_although_a_later_one_has_no_result(
    status: runs.Status,
    error: str | None,
    reason: StopReason | None,
    shown: str,
    root: Path,
    launched: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train_all(*GRID) == 0
    (path,) = (root / "outputs").glob("*/*/sweep.json")
    sweep = Sweep(path.parent)
    before = collect_results(sweep)[0]
    add_attempt(sweep, 1, status, error, reason)
    after = collect_results(sweep)[0]
    expected = f"trained again without a result ({shown}); its earlier one counts"
    assert after == replace(before, attempts=2, error=expected)
    capsys.readouterr()
    assert train_all("train.max_minutes=9", resume=str(sweep.run_dir)) == 0
    assert f"seed=1: {expected}" in " ".join(capsys.readouterr().out.split())
    assert len(launched) == 1, "the job is done"
    assert Sweep(sweep.run_dir).info.status == "FINISHED"


@pytest.mark.parametrize("happens", ["fails", "time limit", "not started"])
def test_training_again_without_a_result_is_not_a_success(
    happens: str, root: Path, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_all(*GRID) == 0
    (path,) = (root / "outputs").glob("*/*/sweep.json")
    sweep = Sweep(path.parent)
    disturb(sweep, 1)
    disturb(sweep, 2)

    def launch(sweep_dir: Path, numbers: Sequence[int], _: Any) -> None:
        assert numbers == [1, 2]
        add_attempt(sweep, 1, "FINISHED", None, None)
        if happens == "fails":
            add_attempt(sweep, 2, "FAILED", "no space left", None)
        elif happens == "time limit":
            add_attempt(sweep, 2, "KILLED", None, "time limit")
        else:
            monkeypatch.setattr(time, "time", lambda: 1e10)

    monkeypatch.setattr(sweep_command, "_launch", launch)
    words = () if happens == "fails" else ("train.max_minutes=9",)
    expected: type[Exception] = RunFailed if happens == "fails" else TimeLimitReached
    with pytest.raises(expected) as raised:
        train_all(*words, resume=str(sweep.run_dir), rerun=True)
    if happens == "fails":
        assert str(raised.value) == "seed=2: could not be trained again; the earlier results count"
    assert [result.outcome for result in collect_results(sweep)] == ["finished", "finished"]


def test_rerun_disturbed_needs_a_sweep(root: Path, launched: list[Any]) -> None:
    with pytest.raises(
        UserError, match=r"^--rerun-disturbed: no sweep of this code has exactly these jobs; "
    ):
        train_all(*GRID, resume="auto", rerun=True)
    with pytest.raises(UserError, match=r"^--rerun-disturbed: .*; remove --resume=never$"):
        train_all(*GRID, rerun=True)
    with pytest.raises(UserError, match=r"^--rerun-disturbed: .*; add -m and the overrides of the sweep$"):
        main._dispatch(["train", *TINY, "tracking=none", "--rerun-disturbed"])
    assert launched == []


# -- threads of jobs in parallel -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "threads", "line"),
    [
        ((), "auto", None),
        (("hydra.launcher.n_jobs=2",), 4, "2 jobs in parallel, device.threads=4 each, on 8 cores (weights"),
        (("hydra.launcher.n_jobs=9",), 2, "4 jobs in parallel, device.threads=2 each, on 8 cores (weights"),
        (
            ("hydra.launcher.n_jobs=2", "device.threads=5"),
            5,
            "2 jobs in parallel, device.threads=5 each, on 8 cores: their speeds will be disturbed; ",
        ),
    ],
)
def test_jobs_in_parallel_share_the_cores(
    words: tuple[str, ...],
    threads: int | str,
    line: str | None,
    root: Path,
    launched: list[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The number is in the requested config of each job: a job alone would take all cores."""
    machine = replace(detect_machine(), num_cores=8)
    grid = [word for word in GRID if not word.startswith(("device.threads", "seed"))]
    launcher = ("hydra/launcher=joblib",) if words else ()
    arguments = Namespace(
        overrides=[*grid, "seed=1,2,3,4", *launcher, *words],
        config_dir=None,
        resume="never",
        json=False,
        rerun_disturbed=False,
    )
    assert sweep_command.train_sweep(arguments, machine) == 0
    (path,) = (root / "outputs").glob("*/*/sweep.json")
    assert {job.requested.device.threads for job in Sweep(path.parent).jobs} == {threads}
    lines = [text for text in (*infos(caplog), *warnings(caplog)) if "in parallel" in text]
    assert [text.startswith(line or "") for text in lines] == ([True] if line else [])


def test_a_sweep_that_fails_to_start_is_unchanged(
    root: Path, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_all(*GRID) == 0
    sweep_dir = interrupt(root)
    before = json.loads((sweep_dir / "sweep.json").read_text())

    def fail(*_: object) -> None:
        assert json.loads((sweep_dir / "sweep.json").read_text())["status"] == "RUNNING"
        raise UserError("no plan")

    monkeypatch.setattr(sweep_command, "plan_jobs", fail)
    with pytest.raises(UserError, match="no plan"):
        train_all(*GRID, resume="auto")
    assert json.loads((sweep_dir / "sweep.json").read_text()) == before
    assert len(launched) == 1


def test_sweeps_that_cannot_be_resumed(root: Path, launched: list[Any]) -> None:
    assert train_all(*GRID) == 0
    sweep_dir = interrupt(root)

    def error_of(*words: str) -> str:
        with pytest.raises(UserError) as caught:
            train_all(*words, resume=str(sweep_dir))
        (line,) = caught.value.lines
        return line

    assert "has other jobs than these overrides" in error_of(*GRID, "train.epochs=3")
    sweep = Sweep(sweep_dir)
    sweep.update(**running_fields())
    assert error_of().endswith(f"its process {os.getpid()} is still running")
    sweep.close("KILLED")
    text = (sweep_dir / "jobs" / "2.yaml").read_text()
    (sweep_dir / "jobs" / "2.yaml").unlink()
    assert "2.yaml" in error_of()
    (sweep_dir / "jobs" / "2.yaml").write_text(text)
    edit_record(sweep_dir, "sweep.json", jobs=[{}])
    assert "sweep.json: is not a valid sweep.json: jobs.0.number: Field required; " in error_of()
    assert len(launched) == 1


@pytest.mark.parametrize(
    ("key", "override"),
    [("data.cache", "data.cache={}/new"), ("tracking.uri", "tracking.uri=sqlite:///{}/new.db")],
)
def test_a_named_sweep_creates_nothing_outside_unless_its_overrides_are_typed(
    root: Path, launched: list[Any], tmp_path_factory: pytest.TempPathFactory, key: str, override: str
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    grid = [*GRID, "tracking=mlflow", override.format(outside)]
    assert train_all(*grid) == 0
    sweep_dir = interrupt(root)
    shutil.rmtree(outside)
    with pytest.raises(
        UserError, match=rf"job 1 would create {key}={outside}/new\S*, which is outside {root}"
    ):
        train_all(resume=str(sweep_dir))
    assert train_all(*grid, resume=str(sweep_dir)) == 0
    assert len(launched) == 2


def test_a_sweep_with_a_link_is_not_resumed(root: Path, launched: list[Any], tmp_path: Path) -> None:
    assert train_all(*GRID) == 0
    sweep_dir = interrupt(root)
    (sweep_dir / "9-a").symlink_to(tmp_path)
    with pytest.raises(UserError, match="9-a: is a symbolic link"):
        train_all(*GRID, resume="auto")
    assert len(launched) == 1


def test_a_sweep_cannot_be_resumed_without_m(root: Path, launched: list[Any]) -> None:
    assert train_all(*GRID) == 0
    sweep_dir = interrupt(root)
    with pytest.raises(UserError, match=f"--resume={re.escape(str(sweep_dir))}: is a sweep; add -m"):
        main._dispatch(["train", "--resume", str(sweep_dir)])
    assert len(launched) == 1


def test_a_deleted_parent_run_cannot_be_resumed(root: Path) -> None:
    tracking = MlflowConfig(
        backend="mlflow", uri=f"sqlite:///{root}/mlflow.db", experiment="x", required=True
    )
    sweep = RecordedDir(root, runs.SweepInfo.model_validate(sweep_info()))
    (root / "jobs").mkdir()
    (root / "jobs" / "1.yaml").write_bytes(to_yaml(load(compose(*TINY))).encode())

    def start() -> str | None:
        Sender(sweep, tracking)
        return sweep.info.run_id

    first = start()
    assert first is not None
    assert start() == first
    client = MlflowClient(tracking.uri)
    assert client.get_run(first).data.params["name"] == "tiny"
    client.delete_run(first)
    assert start() != first
    sweep.update_mlflow(run_id="0" * 32)
    assert start() != "0" * 32, "not in the store"


# -- special characters, mistakes ----------------------------------------------------------------------------


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_address_that_compares_runs_is_a_link_in_a_terminal(
    root: Path, is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Console(
        force_terminal=is_terminal,
        soft_wrap=True,
        legacy_windows=False,
        color_system="standard",
        highlight=False,
    )
    monkeypatch.setattr(output, "get_console", lambda: out)
    sweep = RecordedDir(root, runs.SweepInfo.model_validate(sweep_info(mlflow=mlflow_ref("a1"))))
    (root / "summary.md").write_text("a sweep\n", encoding="utf-8")
    url = sweep_command._write_compare_url(sweep, SweepSummary([]))
    sweep_command._print_locations(sweep, url)

    assert url is not None
    assert (root / "summary.md").read_text(encoding="utf-8") == (
        f"a sweep\n\n[Compare the runs in MLflow](<{url}>)\n"
    )
    *_, last = capsys.readouterr().out.strip().splitlines()
    assert last == url or (is_terminal and f";{url}\x1b\\" in last)
    assert ("(address in summary.md)" in last) == is_terminal


def test_values_with_special_characters_get_distinct_directories(tiny: Config) -> None:
    values = ["a/b", "a\\b", "a b", "../..", "", "ä" * 300, "[b]", "x\ny"]
    jobs = [
        Job(number=n, swept={"captcha.width": v, "data.width": v}, choices={}, requested=tiny)
        for n, v in enumerate(values, 1)
    ]
    sweep = record.create_sweep("tiny", jobs, [None] * len(jobs), 1)
    run_dirs = [sweep.new_attempt(job) for job in jobs for _ in range(2)]

    assert len(set(run_dirs)) == 2 * len(values)
    assert {run_dir.parent for run_dir in run_dirs} == {sweep.run_dir}
    assert all(len(run_dir.name) < 100 for run_dir in run_dirs)
    assert Sweep(sweep.run_dir).jobs == jobs
    assert jobs[0].name == "captcha.width=a/b data.width=a/b"


def test_mistakes_of_all_jobs_are_reported_before_anything_is_created(root: Path) -> None:
    for name in ("one", "two"):
        (root / name).mkdir()
    words = ("data=folder", f"data.path={root}/one,{root}/two,{root}/three", "tracking=none")
    with pytest.raises(ConfigError) as caught:
        train_all(*words)

    assert [line.partition(":")[0] for line in caught.value.lines] == [
        f"data.path={root}/{name}" for name in ("one", "two", "three")
    ]
    assert not (root / "outputs").exists()


# -- disk, terminal, process ---------------------------------------------------------------------------------


def test_a_summary_that_cannot_be_written(tiny: Config, caplog: pytest.LogCaptureFixture) -> None:
    recorder = SummaryRecorder()

    def launch(sweep_dir: Path, numbers: Sequence[int]) -> None:
        make_launch()(sweep_dir, numbers)
        (sweep_dir / "summary.json").mkdir()

    with pytest.raises(RunFailed, match="free disk space"):
        run_sweep(plan_jobs(make_jobs(tiny)), launch, 1, recorder)
    assert outcomes(recorder.summaries[0]) == ["finished"] * 3
    assert any("cannot write the summary" in line for line in warnings(caplog))


def test_incomplete_runs_are_listed(tiny: Config) -> None:
    """A deleted config.yaml; a damaged run.json; an empty run directory."""
    sweep = record.create_sweep("tiny", make_jobs(tiny), [None] * 3, 1)
    (make_run(sweep, 1, "killed").run_dir / "config.yaml").unlink()
    (make_run(sweep, 2, "finished").run_dir / "run.json").write_text('{"status": "FIN')
    sweep.new_attempt(sweep.jobs[2])

    results = collect_results(sweep)
    assert [result.outcome for result in results] == ["killed", "failed", "not run"]
    assert "run.json: cannot be read: " in (results[1].error or "")


def child_process(script: str, directory: Path, on_line: Callable[[str], None], monkeypatch: Any) -> Any:
    """Return a child process that runs a shell script instead of a training."""
    path = directory / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setattr(fork_server, "is_supported", lambda: False)
    return supervisor._ChildProcess(directory / "missing" / "1-x", on_line)


def test_a_missing_log_and_terminal_do_not_stop_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = []

    def on_line(line: str) -> None:
        lines.append(line)
        raise SystemExit(1)  # as rich does

    with child_process("seq 1 100000; exit 3", tmp_path, on_line, monkeypatch) as process:
        process._process.wait(30)  # blocks if the pipe is not read
        process.wait()
    assert lines[:2] == ["1", "2"]
    assert process.describe_exit() == "100000"


def test_the_last_line_is_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "head -c 3000000 /dev/zero | tr '\\0' x; exit 3"
    lines: list[str] = []
    with child_process(script, tmp_path, lines.append, monkeypatch) as process:
        process.wait()
    assert process.describe_exit() == "x" * 1000
    assert re.search(r"cannot write .+1-x\.log$", lines[-1])


def test_a_process_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STOP_TIMEOUT_SECONDS", 0.1)
    with child_process("trap '' TERM INT; exec sleep 100", tmp_path, print, monkeypatch) as process:
        pass
    assert process.describe_exit() == "did not stop within 0.1 s; killed"


def test_no_remedies_if_the_context_alone_exceeds_the_budget(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    (planned,) = plan_jobs(make_jobs(tiny, 1))
    assert planned.plan is not None
    monkeypatch.setattr(oom, "advise", None)
    plan = replace(planned.plan, budget_mib=MiBRange(100.0, 100.0))

    assert oom.find_remedies(plan, planned.split_sizes, planned.config) == []


# -- Ctrl-C --------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "number", "code"),
    [
        ((), signal.SIGINT, 130),
        ((), signal.SIGTERM, 143),
        (("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), signal.SIGINT, 130),
    ],
    ids=["ctrl-c", "sigterm", "joblib"],
)
def test_interrupted_at_a_terminal(
    root: Path, cache: Path, words: tuple[str, ...], number: signal.Signals, code: int
) -> None:
    """The summary is printed and written, no process is left, and a waiting job is stopped."""
    command = [sys.executable, "-m", "captcha_exp", "train", "-m", *TINY, f"data.cache={cache}", *words]
    process = subprocess.Popen(
        [*command, "tracking=none", "train.batch_size=32,64,16", "--json"],
        env=os.environ | inject_faults(root, {32: "wait"}) | {"WAITING": str(root / "waiting")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    while not (root / "waiting").exists():
        assert process.poll() is None
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)
    stdout, _ = process.communicate()

    assert process.returncode == code
    assert psutil.wait_procs(children, timeout=2)[1] == []
    summary = json.loads(stdout)
    assert summary["jobs"][0]["outcome"] == "killed"
    assert json.loads((Path(summary["run_dir"]) / "summary.json").read_text())["title"] == summary["title"]
    states = [json.loads(path.read_text()) for path in Path(summary["run_dir"]).glob("*/run.json")]
    assert "RUNNING" not in {state["status"] for state in states}
    sweep = Sweep(Path(summary["run_dir"])).info
    assert (sweep.status, sweep.stop_reason) == ("KILLED", signal.Signals(number).name)
    if not words and number == signal.SIGINT:
        assert states[0]["stop_reason"] == "killed", "it waits inside a step and is killed"
