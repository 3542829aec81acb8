"""Sweeps through the real command: what one point meets is its own, and nothing is lost or run twice.

A test is a whole sweep, so that each runs once wherever the tests are spread. Faults come from tests/faults.
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
from support.faults import SECONDS_OF_A_SLOW_STEP, planted

from captcha_exp import compose, load
from captcha_exp.training.train import train

SECONDS_TO_END = 2.0  # of every process, after the one that they serve


class Place:
    """A root of its own, and the command in it."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.root, self.cache = root, cache

    def command(self, *words: str) -> list[str]:
        given = [*TINY, f"data.cache={self.cache}", *words]
        return [sys.executable, "-m", "captcha_exp", "train", "-m", *given]

    def environment(self, faults: Mapping[int, str] | None = None) -> dict[str, str]:
        own = {"CAPTCHA_EXP_ROOT": str(self.root), "WAITING": str(self.root / "waiting")}
        return os.environ | own | (planted(self.root, faults) if faults else {})

    def sweep(self, *words: str, faults: Mapping[int, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            env=self.environment(faults),
            capture_output=True,
            text=True,
            check=False,
        )

    def folder(self) -> Path:
        (record,) = (self.root / "outputs").glob("*/*/sweep.json")
        return record.parent

    def verdict(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder() / "summary.json").read_text())
        return found

    def points(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.verdict()["points"]
        return found


@pytest.fixture
def place(root: Path, cache: Path) -> Place:
    return Place(root, cache)


def became(place: Place) -> list[str]:
    return [point["became"] for point in place.points()]


def solo(place: Place, *words: str) -> str:
    """The hash of the weights of a single training, in a root beside."""
    config = load(compose(*TINY, f"data.cache={place.cache}", "tracking=none", *words))
    return train(config).weights_sha256


def statuses(folder: Path) -> set[str]:
    """What all records of a sweep say."""
    records = [folder / "sweep.json", *folder.glob("*/run.json")]
    return {json.loads(path.read_text())["status"] for path in records}


def in_mlflow(place: Place) -> tuple[MlflowClient, list[Any]]:
    """All runs of the only experiment, the oldest first."""
    client = MlflowClient(f"sqlite:///{place.root}/mlruns/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "captcha_exp")
    return client, list(client.search_runs([experiment.experiment_id], order_by=["start_time ASC"]))


def test_from_the_grid_to_the_verdict(place: Place, tmp_path: Path) -> None:
    """Two points that fit and one that does not, in MLflow and in the folder."""
    grid = ("device.vram_budget_mib=900,1000,40", "train.epochs=1")
    done = place.sweep(*grid)
    assert done.returncode == 0, done.stderr
    folder, points = place.folder(), place.points()

    assert became(place) == ["finished", "finished", "unfit"]
    assert [point["swept"] for point in points] == [
        {"device.vram_budget_mib": budget} for budget in ("900", "1000", "40")
    ]
    assert [point["fits"] for point in points] == ["fits", "fits", "does not fit"]
    assert points[0]["weights_sha256"] == solo(place, *(w for w in grid[1:]))
    assert all(point["predicted_mib"] for point in points)
    assert [point["val_accuracy"] is None for point in points] == [False, False, True]
    for part in ("sweep of device.vram_budget_mib", "does not fit", "finished", "/#/compare-runs?runs="):
        assert part in done.stdout, part
    assert done.stdout.count("\nfolder ") == 1
    assert statuses(folder) == {"FINISHED"}
    with Image.open(folder / "summary.png") as picture:
        assert picture.width > 600
    with (folder / "summary.csv").open(newline="") as file:
        assert [row["device.vram_budget_mib"] for row in csv.DictReader(file)] == ["900", "1000", "40"]
    assert not (folder / "multirun.yaml").exists()

    client, runs = in_mlflow(place)
    parent = next(run for run in runs if run.info.run_name == folder.name)
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
    assert parent.data.metrics["sweep/unfit"] == 1
    assert {name for name in parent.data.metrics if name.startswith("sweep/")} >= {
        "sweep/points",
        "sweep/val_accuracy",
        "sweep/images_per_second",
        "sweep/predicted_mib",
    }
    for sentence in place.verdict()["sentences"]:
        assert sentence in done.stdout
    assert "| 1000 |" in parent.data.tags["mlflow.note.content"]
    artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert artifacts >= {"summary.json", "summary.csv", "summary.png", "sweep.json"}
    unfit = children[0]
    assert (unfit.data.tags["fits"], unfit.data.tags["trained"]) == ("does not fit", "false")
    assert unfit.data.metrics["memory/predicted_peak_mib"] == points[2]["predicted_mib"][1]
    assert str([run["run_id"] for run in points])[2:10] in done.stdout


def test_what_breaks_one_point_ends_that_point_alone(place: Place) -> None:
    faults = {16: "segfault", 24: "kill", 32: "raise", 40: "nan", 48: "forward"}
    sizes = [*faults, 64]
    words = (f"train.batch_size={','.join(map(str, sizes))}", "tracking=none")
    done = place.sweep(*words, faults=faults)
    points = place.points()

    assert done.returncode == 1
    assert became(place) == ["failed", "failed", "failed", "failed", "oom", "finished"]
    assert statuses(place.folder()) == {"FAILED", "FINISHED"}
    for point, error in zip(
        points, ("SIGSEGV", "SIGKILL", "[brackets]", "not a finite number"), strict=False
    ):
        assert error in point["error"]
        assert f"{point['name']}: " in done.stdout
        assert point["error"] in " ".join(done.stdout.split())
    assert "Traceback" not in done.stderr, "the log has it"
    log = (place.folder() / "3-batch_size=32.log").read_text()
    assert "Traceback" in log
    assert "ValueError: a mistake of a test, with [brackets]" in log
    assert "Fatal Python error: Segmentation fault" in (place.folder() / "1-batch_size=16.log").read_text()
    assert points[5]["weights_sha256"] == solo(place, "train.batch_size=64")
    assert "out of memory in training, epoch 1, step 3" in done.stderr


def processes_of(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def killed_in_the_middle(place: Place, words: Sequence[str], waits_at: int, whole: bool) -> None:
    """A sweep of which the parent alone, or all at once, gets SIGKILL in the point that waits."""
    process = subprocess.Popen(
        place.command(*words),
        env=place.environment({waits_at: "wait"}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (place.root / "waiting").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    there = processes_of(process.pid)
    assert len(there) >= 2
    if whole:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    _, alive = psutil.wait_procs(there[1:], timeout=SECONDS_TO_END)
    assert alive == []


WITHOUT_TIME_AND_MEMORY = (
    "number",
    "name",
    "swept",
    "became",
    "error",
    "batch_size",
    "predicted_mib",
    "fits",
    "val_accuracy",
    "test_accuracy",
    "weights_sha256",
)


def table(place: Place) -> list[dict[str, Any]]:
    """The verdict's points in all that is not time or memory."""
    return [{key: point[key] for key in WITHOUT_TIME_AND_MEMORY} for point in place.points()]


@pytest.fixture
def beside(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Place:
    """Another root."""
    return Place(tmp_path_factory.mktemp("beside"), cache)


def gone_on_with(place: Place, words: Sequence[str], waits_at: int) -> None:
    """Each point in one folder; the one that was cut has gone on in its own."""
    done = place.sweep(*words)
    assert done.returncode == 0, done.stderr
    assert [point["attempts"] for point in place.points()] == [1] * len(place.points())
    number = [point["batch_size"] for point in place.points()].index(waits_at)
    cut = json.loads((place.folder() / f"{number + 1}-batch_size={waits_at}" / "run.json").read_text())
    assert (cut["status"], len(cut["resumed"])) == ("FINISHED", 1)
    assert f"Resuming {place.folder()}, an unfinished sweep with the same jobs" in done.stderr
    assert f"batch_size={waits_at}] goes on from its beginning: it had no checkpoint yet" in done.stderr
    assert f"{number} of them are settled already" in done.stderr


def test_a_sweep_that_lost_its_parent_is_gone_on_with(place: Place) -> None:
    words = ("train.batch_size=32,48", "tracking=none", "train.epochs=1")
    killed_in_the_middle(place, words, 48, whole=False)
    gone_on_with(place, words, 48)

    assert [point["weights_sha256"] for point in place.points()] == [
        solo(place, f"train.batch_size={size}", "train.epochs=1") for size in (32, 48)
    ]


def test_a_point_that_was_killed_goes_on_from_its_checkpoint(place: Place) -> None:
    words = ("train.batch_size=32,48", "tracking=none", "train.checkpoint_every='1 step'")
    done = place.sweep(*words, faults={48: "kill"})
    assert (done.returncode, became(place)) == (1, ["finished", "failed"])

    done = place.sweep(*words)
    assert done.returncode == 0, done.stderr
    assert "batch_size=48] goes on from epoch 1, step 2 (saved " in done.stderr
    assert "1 of them are settled already" in done.stderr
    assert [point["attempts"] for point in place.points()] == [1, 1]
    assert [point["weights_sha256"] for point in place.points()] == [
        solo(place, f"train.batch_size={size}") for size in (32, 48)
    ]


def test_a_sweep_that_is_out_of_time_goes_on_when_it_gets_more(place: Place) -> None:
    words = ("train.batch_size=32,48", "tracking=none")
    minutes = 0.95 * SECONDS_OF_A_SLOW_STEP / 60  # enough to begin a point, also on a machine at work
    done = place.sweep(*words, f"train.max_minutes={minutes}", faults={32: "slow"})
    assert done.returncode == 75, done.stderr
    assert became(place) == ["killed", "not run"]
    assert done.stderr.splitlines()[-1].startswith("train.max_minutes: the time is up; what the points")
    assert "Traceback" not in done.stderr

    done = place.sweep(*words, "train.max_minutes=30")
    assert done.returncode == 0, done.stderr
    assert "batch_size=32] goes on from epoch 1, step 3 (saved " in done.stderr
    assert [point["attempts"] for point in place.points()] == [1, 1]
    assert [point["weights_sha256"] for point in place.points()] == [
        solo(place, f"train.batch_size={size}") for size in (32, 48)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
@pytest.mark.parametrize("whole", [True, False], ids=["all", "parent"])
def test_five_points_of_which_the_third_was_cut(
    place: Place, beside: Place, whole: bool, launcher: str
) -> None:
    words = ("train.batch_size=16,32,48,64,80", f"hydra/launcher={launcher}")
    one_at_a_time = ("hydra.launcher.n_jobs=1",) if launcher == "joblib" else ()
    words = (*words, *one_at_a_time)
    killed_in_the_middle(place, words, 48, whole)
    gone_on_with(place, words, 48)
    assert beside.sweep(*words).returncode == 0
    assert table(place) == table(beside)

    _, runs = in_mlflow(place)
    assert [run.info.status for run in runs] == ["FINISHED"] * 6
    assert len({run.data.tags.get("mlflow.parentRunId") for run in runs}) == 2


def test_joblib_gives_the_same_weights_in_a_new_store(place: Place) -> None:
    words = ("train.batch_size=32,64", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "train.epochs=1")
    done = place.sweep(*words)
    assert done.returncode == 0, done.stderr

    assert [point["weights_sha256"] for point in place.points()] == [
        solo(place, f"train.batch_size={size}", "train.epochs=1") for size in (32, 64)
    ]
    _, runs = in_mlflow(place)
    assert len(runs) == 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert "2 points ran at a time" in done.stdout
    assert "Error" not in done.stderr


SITES = ("forward", "backward", "optimizer", "evaluation")


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_too_little_memory_in_the_third_of_five_points(place: Place, site: str) -> None:
    sizes = (16, 32, 48, 64, 80)
    done = place.sweep("train.batch_size=16,32,48,64,80", faults={48: site})

    assert done.returncode == 0, done.stderr
    assert became(place) == ["finished", "finished", "oom", "finished", "finished"]
    for size, point in zip(sizes, place.points(), strict=True):
        if size != 48:
            assert point["weights_sha256"] == solo(place, f"train.batch_size={size}")
    (short,) = (run for run in in_mlflow(place)[1] if run.info.run_name == "batch_size=48")
    assert (short.info.status, short.data.tags["oom"]) == ("FINISHED", "true")
    assert {"memory/process_peak_mib", "memory/predicted_peak_mib"} <= set(short.data.metrics)
    during = "evaluation" if site == "evaluation" else "training"
    assert re.search(rf"out of memory in {during}, epoch 1, step \d+: .+", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_split_equals_a_run_that_was_asked_for_those_parts(place: Place, site: str) -> None:
    words = ("train.batch_size=16,32,48,64,80", "train.on_oom=split", "tracking=none")
    done = place.sweep(*words, faults={48: site})

    assert done.returncode == 0, done.stderr
    assert became(place) == ["finished"] * 5
    third = place.points()[2]
    assert third["attempts"] == 2
    tried = load(Path(third["run_dir"]) / "config.yaml").train
    if site == "evaluation":
        parts = f"train.eval_batch_size={tried.eval_batch_size}"
        assert tried.eval_batch_size < 512
    else:
        parts = "train.micro_batch_size=24"
    assert third["weights_sha256"] == solo(place, "train.batch_size=48", parts)
    assert third["micro_batch_size"] == (None if site == "evaluation" else 24)
    first = json.loads((place.folder() / "3-batch_size=48" / "run.json").read_text())
    assert (first["status"], first["tags"]) == ("FINISHED", {"oom": "true"})


def test_a_single_training_starts_again_with_half_the_micro_batch(place: Place) -> None:
    words = ("train.batch_size=48", "train.on_oom=split", "tracking=none", "train.epochs=1")
    command = [word for word in place.command(*words, "--json") if word != "-m" or word == "captcha_exp"]
    command[1:1] = ["-m"]
    done = subprocess.run(
        command, env=place.environment({48: "backward"}), capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["weights_sha256"] == solo(place, *words[::3], "train.micro_batch_size=24")
    assert len(list((place.root / "outputs").glob("*/*/run.json"))) == 3, "two attempts, and the solo one"
    assert "out of memory in training, epoch 1, step 3" in done.stderr


@pytest.mark.slow
def test_two_keys_and_three_seeds_are_grouped(place: Place) -> None:
    # The networks have different settings, so that what they share of TINY is left out.
    words = [word for word in TINY if not word.startswith("model.")]
    command = [sys.executable, "-m", "captcha_exp", "train", "-m", *words, f"data.cache={place.cache}"]
    grid = ["model=compact,resnet18", "seed=0,1,2", "train.epochs=1", "tracking=none"]
    done = subprocess.run(
        [*command, *grid], env=place.environment(), capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert became(place) == ["finished"] * 6
    groups = place.verdict()["groups"]
    assert [group["swept"] for group in groups] == [{"model": "compact"}, {"model": "resnet18"}]
    assert [group["points"] for group in groups] == [[1, 2, 3], [4, 5, 6]]
    for group in groups:
        low, high = group["figures"]["test_accuracy"]["interval"]
        assert low <= group["figures"]["test_accuracy"]["value"] <= high
    assert done.stdout.count("±") >= 2
    with Image.open(place.folder() / "summary.png") as picture:
        assert picture.width > 600


@pytest.fixture(autouse=True)
def nothing_is_left(place: Place) -> Iterator[None]:
    """However a test ends, none of its processes stays."""
    yield
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("CAPTCHA_EXP_ROOT") == str(place.root):
            process.kill()
