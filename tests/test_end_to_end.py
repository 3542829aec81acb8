"""Train a tiny model with the command line, and the same with three lines of Python."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

SCRIPT = """
import json, sys
from captcha_exp import compose, load
from captcha_exp.training.train import train
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
    """Train once; return the root directory and the output."""
    root = tmp_path_factory.mktemp("root")
    done = run(
        root, "-W", "error", "-m", "captcha_exp", "train", *TINY, "device.threads=2", f"data.cache={cache}"
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return root, done.stdout


def test_train_prints_the_accuracy_and_the_next_commands(trained: tuple[Path, str]) -> None:
    _, printed = trained

    for part in (
        "test accuracy ",
        "95% confidence interval",
        "peak memory",
        "run ",
        "run directory ",
        "next:",
        "evaluate latest",
        "export latest",
        "report/run.html",
    ):
        assert part in printed


def test_files_of_the_run_directory(trained: tuple[Path, str]) -> None:
    root, printed = trained
    (run_dir,) = (root / "outputs").glob("*/*-tiny")

    assert f"run directory {run_dir}" in printed
    optional = {"code.diff"}  # only if the checkout has changes
    assert {path.name for path in run_dir.iterdir()} - optional == {
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
    assert json.loads((run_dir / "run.json").read_text())["status"] == "FINISHED"
    assert "name: cpu" in (run_dir / "config.yaml").read_text()


@pytest.mark.long
def test_evaluate_gives_the_results_of_training(trained: tuple[Path, str]) -> None:
    root, _ = trained
    done = run(root, "-m", "captcha_exp", "evaluate", "latest", "--json")
    evaluation = json.loads(done.stdout)
    (recorded,) = (root / "outputs").glob("*/*/test.json")

    assert done.returncode == 0, done.stderr
    assert evaluation | {"run_dir": "", "split": ""} == json.loads(recorded.read_text()) | {
        "run_dir": "",
        "split": "",
    }
    validation = run(root, "-m", "captcha_exp", "evaluate", "latest", "--split", "validation")
    assert "most frequent confusions" in validation.stdout
    assert "per position" in validation.stdout


def test_runs_lists_the_run(trained: tuple[Path, str]) -> None:
    root, _ = trained

    assert "FINISHED" in run(root, "-m", "captcha_exp", "runs").stdout
    (listed,) = json.loads(run(root, "-m", "captcha_exp", "runs", "--json").stdout)
    assert listed["name"] == "tiny"


@pytest.mark.long
def test_data_builds_a_dataset_with_a_preview(root: Path) -> None:
    done = run(root, "-m", "captcha_exp", "data", *TINY, "data=wheezy", "--json", "--preview")
    dataset = json.loads(done.stdout)

    assert done.returncode == 0, done.stderr
    assert dataset["images"] == 300
    assert sum(dataset["splits"].values()) == 300
    assert Path(dataset["preview"]).is_file()
    assert Path(dataset["page"]).is_file()


@pytest.mark.long
def test_three_lines_of_python_give_the_same_weights_without_mlflow(
    trained: tuple[Path, str], root: Path, cache: Path
) -> None:
    _, printed = trained
    done = run(root, "-c", SCRIPT, *TINY, "device.threads=2", f"data.cache={cache}")
    result = json.loads(done.stdout)

    assert not result["mlflow"]
    assert f"weights {result['weights_sha256']}" in printed


@pytest.mark.long
def test_thread_variables_do_not_change_the_result(
    trained: tuple[Path, str], root: Path, cache: Path
) -> None:
    _, printed = trained
    done = run(
        root,
        "-c",
        SCRIPT,
        *TINY,
        "device.threads=2",
        f"data.cache={cache}",
        OMP_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
    )

    assert f"weights {json.loads(done.stdout)['weights_sha256']}" in printed


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_marks_the_run_killed(root: Path, cache: Path, number: signal.Signals) -> None:
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
    process.send_signal(number)
    process.communicate(timeout=60)

    (path,) = (root / "outputs").glob("*/*/run.json")
    state = json.loads(path.read_text())
    assert process.returncode == 128 + number
    assert (state["status"], state["error"], state["stop_reason"]) == ("KILLED", None, number.name)
