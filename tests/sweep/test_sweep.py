"""Test sweeps through the real command: faults stay in one job, and no job is lost or run twice.

Each test runs a whole sweep. `support.faults` injects the faults.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import TINY
from mlflow import MlflowClient
from PIL import Image
from support.faults import SLOW_STEP_SECONDS, inject_faults

from captcha_exp import compose, load
from captcha_exp.training.train import train

EXIT_SECONDS = 2.0  # for child processes to exit after their parent


class Workspace:
    """A root directory, and the command that runs sweeps in it."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.root, self.cache = root, cache

    def command(self, *overrides: str) -> list[str]:
        all_overrides = [*TINY, f"data.cache={self.cache}", *overrides]
        return [sys.executable, "-m", "captcha_exp", "train", "-m", *all_overrides]

    def environment(self, faults: Mapping[int, str] | None = None) -> dict[str, str]:
        variables = {"CAPTCHA_EXP_ROOT": str(self.root), "WAITING": str(self.root / "waiting")}
        return os.environ | variables | (inject_faults(self.root, faults) if faults else {})

    def sweep(
        self, *overrides: str, faults: Mapping[int, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*overrides),
            env=self.environment(faults),
            capture_output=True,
            text=True,
            check=False,
        )

    def sweep_dir(self) -> Path:
        (record,) = (self.root / "outputs").glob("*/*/sweep.json")
        return record.parent

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.sweep_dir() / "summary.json").read_text())
        return summary

    def jobs(self) -> list[dict[str, Any]]:
        jobs: list[dict[str, Any]] = self.summary()["jobs"]
        return jobs


@pytest.fixture
def workspace(root: Path, cache: Path) -> Workspace:
    return Workspace(root, cache)


def outcomes(workspace: Workspace) -> list[str]:
    return [job["outcome"] for job in workspace.jobs()]


def train_alone(workspace: Workspace, *overrides: str) -> str:
    """Return the SHA-256 of the weights of the same training outside a sweep."""
    config = load(compose(*TINY, f"data.cache={workspace.cache}", "tracking=none", *overrides))
    return train(config).weights_sha256


def statuses(sweep_dir: Path) -> set[str]:
    """Return the statuses of a sweep and all its runs."""
    records = [sweep_dir / "sweep.json", *sweep_dir.glob("*/run.json")]
    return {json.loads(path.read_text())["status"] for path in records}


def mlflow_runs(workspace: Workspace) -> tuple[MlflowClient, list[Any]]:
    """Return a client and all runs of the experiment, the oldest first."""
    client = MlflowClient(f"sqlite:///{workspace.root}/mlruns/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "captcha_exp")
    return client, list(client.search_runs([experiment.experiment_id], order_by=["start_time ASC"]))


@pytest.mark.long
def test_a_sweep_is_recorded_in_its_directory_and_in_mlflow(workspace: Workspace, tmp_path: Path) -> None:
    """Two jobs fit, and one is skipped."""
    grid = ("device.vram_budget_mib=900,1000,40", "train.epochs=1")
    result = workspace.sweep(*grid)
    assert result.returncode == 0, result.stderr
    sweep_dir, jobs = workspace.sweep_dir(), workspace.jobs()

    assert outcomes(workspace) == ["finished", "finished", "skipped"]
    assert [job["swept"] for job in jobs] == [
        {"device.vram_budget_mib": budget} for budget in ("900", "1000", "40")
    ]
    assert [job["fits"] for job in jobs] == ["fits", "fits", "does not fit"]
    assert jobs[0]["weights_sha256"] == train_alone(workspace, *(w for w in grid[1:]))
    assert all(job["predicted_mib"] for job in jobs)
    assert [job["val_accuracy"] is None for job in jobs] == [False, False, True]
    for part in ("sweep over device.vram_budget_mib", "does not fit", "finished", "/#/compare-runs?runs="):
        assert part in result.stdout, part
    assert result.stdout.count("\nsweep directory ") == 1
    assert statuses(sweep_dir) == {"FINISHED"}
    with Image.open(sweep_dir / "summary.png") as image:
        assert image.width > 600
    with (sweep_dir / "summary.csv").open(newline="") as file:
        assert [row["device.vram_budget_mib"] for row in csv.DictReader(file)] == ["900", "1000", "40"]
    assert not (sweep_dir / "multirun.yaml").exists()

    client, runs = mlflow_runs(workspace)
    parent = next(run for run in runs if run.info.run_name == sweep_dir.name)
    children = [run for run in runs if run is not parent]
    assert [run.info.run_name for run in children] == [
        "vram_budget_mib=40",
        "vram_budget_mib=900",
        "vram_budget_mib=1000",
    ]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert parent.data.params["device.vram_budget_mib"] == "900, 1000, 40"
    assert parent.data.params["train.epochs"] == "1"
    assert parent.data.metrics["sweep/skipped"] == 1
    assert {name for name in parent.data.metrics if name.startswith("sweep/")} >= {
        "sweep/jobs",
        "sweep/val_accuracy",
        "sweep/images_per_second",
        "sweep/predicted_mib",
    }
    for sentence in workspace.summary()["conclusions"]:
        assert sentence in result.stdout
    assert "| 1000 |" in parent.data.tags["mlflow.note.content"]
    artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert artifacts >= {"summary.json", "summary.csv", "summary.html", "summary.png", "sweep.json"}
    page = (sweep_dir / "summary.html").read_text()
    assert page.count("/report/run.html") == 2
    skipped = children[0]
    assert (skipped.data.tags["fits"], skipped.data.tags["trained"]) == ("does not fit", "false")
    assert skipped.data.metrics["memory/predicted_peak_mib"] == jobs[2]["predicted_mib"][1]
    assert str([run["run_id"] for run in jobs])[2:10] in result.stdout


@pytest.mark.long
def test_a_fault_ends_only_its_own_job(workspace: Workspace) -> None:
    faults = {16: "segfault", 24: "kill", 32: "raise", 40: "nan", 48: "forward"}
    sizes = [*faults, 64]
    overrides = (f"train.batch_size={','.join(map(str, sizes))}", "tracking=none")
    result = workspace.sweep(*overrides, faults=faults)
    jobs = workspace.jobs()

    assert result.returncode == 1
    assert outcomes(workspace) == ["failed", "failed", "failed", "failed", "oom", "finished"]
    assert statuses(workspace.sweep_dir()) == {"FAILED", "FINISHED"}
    for job, error in zip(jobs, ("SIGSEGV", "SIGKILL", "[brackets]", "the loss is not finite"), strict=False):
        assert error in job["error"]
        assert f"{job['name']}: " in result.stdout
        assert job["error"] in " ".join(result.stdout.split())
    assert "Traceback" not in result.stderr, "only in the log"
    log = (workspace.sweep_dir() / "3-batch_size=32.log").read_text()
    assert "Traceback" in log
    assert "ValueError: an injected error, with [brackets]" in log
    assert (
        "Fatal Python error: Segmentation fault"
        in (workspace.sweep_dir() / "1-batch_size=16.log").read_text()
    )
    assert jobs[5]["weights_sha256"] == train_alone(workspace, "train.batch_size=64")
    assert "out of memory in training, epoch 1, step 3" in result.stderr


def process_tree(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def run_and_kill(
    workspace: Workspace, overrides: Sequence[str], blocked_size: int, whole_group: bool
) -> None:
    """Run a sweep until the job with the blocked size, and kill its parent or its whole process group."""
    process = subprocess.Popen(
        workspace.command(*overrides),
        env=workspace.environment({blocked_size: "wait"}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (workspace.root / "waiting").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    there = process_tree(process.pid)
    assert len(there) >= 2
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    _, alive = psutil.wait_procs(there[1:], timeout=EXIT_SECONDS)
    assert alive == []


REPRODUCIBLE_FIELDS = (
    "number",
    "name",
    "swept",
    "outcome",
    "error",
    "batch_size",
    "predicted_mib",
    "fits",
    "val_accuracy",
    "test_accuracy",
    "weights_sha256",
)


def table(workspace: Workspace) -> list[dict[str, Any]]:
    """Return the reproducible fields of each job."""
    return [{key: job[key] for key in REPRODUCIBLE_FIELDS} for job in workspace.jobs()]


@pytest.fixture
def other_workspace(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("other_workspace"), cache)


def check_resumed(workspace: Workspace, overrides: Sequence[str], blocked_size: int) -> None:
    """Run the sweep again, and check that the killed job was resumed in its run directory."""
    result = workspace.sweep(*overrides)
    assert result.returncode == 0, result.stderr
    assert [job["attempts"] for job in workspace.jobs()] == [1] * len(workspace.jobs())
    number = [job["batch_size"] for job in workspace.jobs()].index(blocked_size)
    state = json.loads(
        (workspace.sweep_dir() / f"{number + 1}-batch_size={blocked_size}" / "run.json").read_text()
    )
    assert (state["status"], len(state["resumed"])) == ("FINISHED", 1)
    assert f"Resuming {workspace.sweep_dir()}, an unfinished sweep" in result.stderr
    assert re.search(rf"batch_size={blocked_size}\] Resuming .*no checkpoint", result.stderr)
    assert f"{number} of {len(workspace.jobs())} jobs are already done" in result.stderr


@pytest.mark.long
def test_a_sweep_whose_parent_was_killed_is_resumed(workspace: Workspace) -> None:
    overrides = ("train.batch_size=32,48", "tracking=none", "train.epochs=1")
    run_and_kill(workspace, overrides, 48, whole_group=False)
    check_resumed(workspace, overrides, 48)

    assert [job["weights_sha256"] for job in workspace.jobs()] == [
        train_alone(workspace, f"train.batch_size={size}", "train.epochs=1") for size in (32, 48)
    ]


@pytest.mark.long
def test_a_killed_job_is_resumed_from_its_checkpoint(workspace: Workspace) -> None:
    overrides = ("train.batch_size=32,48", "tracking=none", "train.checkpoint_every='1 step'")
    result = workspace.sweep(*overrides, faults={48: "kill"})
    assert (result.returncode, outcomes(workspace)) == (1, ["finished", "failed"])

    result = workspace.sweep(*overrides)
    assert result.returncode == 0, result.stderr
    assert "batch_size=48] Resuming from epoch 1, step 2 (saved " in result.stderr
    assert "1 of 2 jobs are already done" in result.stderr
    assert [job["attempts"] for job in workspace.jobs()] == [1, 1]
    assert [job["weights_sha256"] for job in workspace.jobs()] == [
        train_alone(workspace, f"train.batch_size={size}") for size in (32, 48)
    ]


@pytest.mark.long
def test_a_sweep_that_reached_its_time_limit_is_resumed(workspace: Workspace) -> None:
    overrides = ("train.batch_size=32,48", "tracking=none")
    minutes = 0.95 * SLOW_STEP_SECONDS / 60  # enough to start a job, also on a busy machine
    result = workspace.sweep(*overrides, f"train.max_minutes={minutes}", faults={32: "slow"})
    assert result.returncode == 75, result.stderr
    assert outcomes(workspace) == ["killed", "not run"]
    assert result.stderr.splitlines()[-1].startswith(
        "train.max_minutes: time limit reached; progress is saved"
    )
    assert "Traceback" not in result.stderr

    result = workspace.sweep(*overrides, "train.max_minutes=30")
    assert result.returncode == 0, result.stderr
    assert "batch_size=32] Resuming from epoch 1, step 3 (saved " in result.stderr
    assert [job["attempts"] for job in workspace.jobs()] == [1, 1]
    assert [job["weights_sha256"] for job in workspace.jobs()] == [
        train_alone(workspace, f"train.batch_size={size}") for size in (32, 48)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
@pytest.mark.parametrize("whole_group", [True, False], ids=["all", "parent"])
def test_five_jobs_of_which_the_third_is_killed(
    workspace: Workspace, other_workspace: Workspace, whole_group: bool, launcher: str
) -> None:
    overrides = ("train.batch_size=16,32,48,64,80", f"hydra/launcher={launcher}")
    n_jobs = ("hydra.launcher.n_jobs=1",) if launcher == "joblib" else ()
    overrides = (*overrides, *n_jobs)
    run_and_kill(workspace, overrides, 48, whole_group)
    check_resumed(workspace, overrides, 48)
    assert other_workspace.sweep(*overrides).returncode == 0
    assert table(workspace) == table(other_workspace)

    _, runs = mlflow_runs(workspace)
    assert [run.info.status for run in runs] == ["FINISHED"] * 6
    assert len({run.data.tags.get("mlflow.parentRunId") for run in runs}) == 2


@pytest.mark.long
def test_the_joblib_launcher_gives_the_same_weights(workspace: Workspace) -> None:
    overrides = (
        "train.batch_size=32,64",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "train.epochs=1",
    )
    result = workspace.sweep(*overrides)
    assert result.returncode == 0, result.stderr

    assert [job["weights_sha256"] for job in workspace.jobs()] == [
        train_alone(workspace, f"train.batch_size={size}", "train.epochs=1") for size in (32, 64)
    ]
    _, runs = mlflow_runs(workspace)
    assert len(runs) == 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert "2 jobs ran in parallel" in result.stdout
    assert "Error" not in result.stderr


SITES = ("forward", "backward", "optimizer", "evaluation")


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_out_of_memory_in_the_third_of_five_jobs(workspace: Workspace, site: str) -> None:
    sizes = (16, 32, 48, 64, 80)
    result = workspace.sweep("train.batch_size=16,32,48,64,80", faults={48: site})

    assert result.returncode == 0, result.stderr
    assert outcomes(workspace) == ["finished", "finished", "oom", "finished", "finished"]
    for size, job in zip(sizes, workspace.jobs(), strict=True):
        if size != 48:
            assert job["weights_sha256"] == train_alone(workspace, f"train.batch_size={size}")
    (oom_run,) = (run for run in mlflow_runs(workspace)[1] if run.info.run_name == "batch_size=48")
    assert (oom_run.info.status, oom_run.data.tags["oom"]) == ("FINISHED", "true")
    assert {"memory/process_peak_mib", "memory/predicted_peak_mib"} <= set(oom_run.data.metrics)
    during = "evaluation" if site == "evaluation" else "training"
    assert re.search(rf"out of memory in {during}, epoch 1, step \d+: .+", result.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_an_automatic_split_equals_an_explicit_micro_batch_size(workspace: Workspace, site: str) -> None:
    overrides = ("train.batch_size=16,32,48,64,80", "train.on_oom=split", "tracking=none")
    result = workspace.sweep(*overrides, faults={48: site})

    assert result.returncode == 0, result.stderr
    assert outcomes(workspace) == ["finished"] * 5
    third = workspace.jobs()[2]
    assert third["attempts"] == 2
    train_config = load(Path(third["run_dir"]) / "config.yaml").train
    if site == "evaluation":
        override = f"train.eval_batch_size={train_config.eval_batch_size}"
        assert train_config.eval_batch_size < 512
    else:
        override = "train.micro_batch_size=24"
    assert third["weights_sha256"] == train_alone(workspace, "train.batch_size=48", override)
    assert third["micro_batch_size"] == (None if site == "evaluation" else 24)
    first = json.loads((workspace.sweep_dir() / "3-batch_size=48" / "run.json").read_text())
    assert (first["status"], first["tags"]) == ("FINISHED", {"oom": "true"})


@pytest.mark.long
def test_a_single_training_retries_with_half_the_micro_batch(workspace: Workspace) -> None:
    overrides = ("train.batch_size=48", "train.on_oom=split", "tracking=none", "train.epochs=1")
    command = [
        word for word in workspace.command(*overrides, "--json") if word != "-m" or word == "captcha_exp"
    ]
    command[1:1] = ["-m"]
    result = subprocess.run(
        command, env=workspace.environment({48: "backward"}), capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["weights_sha256"] == train_alone(workspace, *overrides[::3], "train.micro_batch_size=24")
    assert len(list((workspace.root / "outputs").glob("*/*/run.json"))) == 3, (
        "two attempts, and the one outside the sweep"
    )
    assert "out of memory in training, epoch 1, step 3" in result.stderr


@pytest.mark.slow
def test_a_sweep_over_models_and_seeds_is_grouped(workspace: Workspace) -> None:
    # TINY sets keys that only one of the networks has.
    overrides = [word for word in TINY if not word.startswith("model.")]
    command = [
        sys.executable,
        "-m",
        "captcha_exp",
        "train",
        "-m",
        *overrides,
        f"data.cache={workspace.cache}",
    ]
    grid = ["model=compact,resnet18", "seed=0,1,2", "train.epochs=1", "tracking=none"]
    result = subprocess.run(
        [*command, *grid], env=workspace.environment(), capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stderr
    assert outcomes(workspace) == ["finished"] * 6
    groups = workspace.summary()["groups"]
    assert [group["swept"] for group in groups] == [{"model": "compact"}, {"model": "resnet18"}]
    assert [group["jobs"] for group in groups] == [[1, 2, 3], [4, 5, 6]]
    for group in groups:
        low, high = group["metrics"]["test_accuracy"]["interval"]
        assert low <= group["metrics"]["test_accuracy"]["value"] <= high
    assert result.stdout.count("±") >= 2
    with Image.open(workspace.sweep_dir() / "summary.png") as image:
        assert image.width > 600


@pytest.fixture(autouse=True)
def kill_leftover_processes(workspace: Workspace) -> Iterator[None]:
    yield
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("CAPTCHA_EXP_ROOT") == str(workspace.root):
            process.kill()
