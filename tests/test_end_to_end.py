"""The whole thing, tiny, through the real command; and the same from three lines of Python."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

SCRIPT = """
import json, sys
from captcha_exp import compose, load
from captcha_exp.train import train
result = train(load(compose(*sys.argv[1:])))
print(json.dumps({"weights_sha256": result.weights_sha256, "mlflow": "mlflow" in sys.modules}))
"""


def run(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"CAPTCHA_EXP_ROOT": str(root)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, str]:
    """A root in which the command has trained once, and what it printed."""
    root = tmp_path_factory.mktemp("whole")
    done = run(root, "-W", "error", "-m", "captcha_exp", "train", *TINY, f"data.cache={cache}")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return root, done.stdout


def test_train_prints_the_figure_with_its_interval_and_what_to_type_next(trained: tuple[Path, str]) -> None:
    _, printed = trained

    for part in (
        "test accuracy ",
        "95 % interval",
        "peak memory",
        "run ",
        "folder ",
        "next:",
        "evaluate latest",
    ):
        assert part in printed


def test_the_folder_is_the_record(trained: tuple[Path, str]) -> None:
    root, printed = trained
    (folder,) = (root / "outputs").glob("*/*-tiny")

    assert f"folder {folder}" in printed
    changed = {"code.diff"}  # is there where the checkout has changes
    assert {path.name for path in folder.iterdir()} - changed == {
        "run.json",
        "config.yaml",
        "requested.yaml",
        "environment.json",
        "code.json",
        "memory.json",
        "dataset.json",
        "metrics.jsonl",
        "model.safetensors",
        "checkpoint",
        "test.json",
        "report",
    }
    assert json.loads((folder / "run.json").read_text())["status"] == "FINISHED"
    assert "name: cpu" in (folder / "config.yaml").read_text()


def test_evaluate_says_what_training_said(trained: tuple[Path, str]) -> None:
    root, _ = trained
    done = run(root, "-m", "captcha_exp", "evaluate", "latest", "--json")
    said = json.loads(done.stdout)
    (recorded,) = (root / "outputs").glob("*/*/test.json")

    assert done.returncode == 0, done.stderr
    assert said | {"run_dir": "", "split": ""} == json.loads(recorded.read_text()) | {
        "run_dir": "",
        "split": "",
    }
    told = run(root, "-m", "captcha_exp", "evaluate", "latest", "--split", "validation")
    assert "most frequent confusions" in told.stdout
    assert "per position" in told.stdout


def test_runs_lists_the_run(trained: tuple[Path, str]) -> None:
    root, _ = trained

    assert "FINISHED" in run(root, "-m", "captcha_exp", "runs").stdout
    (listed,) = json.loads(run(root, "-m", "captcha_exp", "runs", "--json").stdout)
    assert listed["name"] == "tiny"


def test_data_draws_and_shows(root: Path) -> None:
    done = run(root, "-m", "captcha_exp", "data", *TINY, "data=wheezy", "--json")
    said = json.loads(done.stdout)

    assert done.returncode == 0, done.stderr
    assert said["images"] == 300
    assert sum(said["splits"].values()) == 300
    assert Path(said["sheet"]).is_file()


def test_three_lines_of_python_give_the_same_weights_without_mlflow(
    trained: tuple[Path, str], root: Path, cache: Path
) -> None:
    _, printed = trained
    done = run(root, "-c", SCRIPT, *TINY, f"data.cache={cache}")
    said = json.loads(done.stdout)

    assert not said["mlflow"]
    assert f"weights {said['weights_sha256']}" in printed


def test_threads_outside_change_nothing(trained: tuple[Path, str], root: Path, cache: Path) -> None:
    _, printed = trained
    done = run(root, "-c", SCRIPT, *TINY, f"data.cache={cache}", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

    assert f"weights {json.loads(done.stdout)['weights_sha256']}" in printed


def test_sigterm_ends_a_run_in_order(root: Path, cache: Path) -> None:
    command = [
        sys.executable,
        "-u",
        "-m",
        "captcha_exp",
        "train",
        *TINY,
        f"data.cache={cache}",
        "train.epochs=100000",
    ]
    process = subprocess.Popen(
        command, env=os.environ | {"CAPTCHA_EXP_ROOT": str(root)}, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch"):
            break
    process.terminate()
    process.communicate(timeout=60)

    (state,) = (root / "outputs").glob("*/*/run.json")
    assert process.returncode == 143
    assert json.loads(state.read_text())["status"] == "KILLED"
