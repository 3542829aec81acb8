"""Check what a process imports: what is imported later for no good reason costs each start of a command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

PRINT_MODULES = """
import json, sys
from captcha_exp.cli.main import main

def print_modules():
    print(json.dumps(sorted(sys.modules)), file=sys.__stdout__, flush=True)

sys.argv = ["captcha-exp", *sys.argv[1:]]
if sys.argv[1] == "train":
    import captcha_exp.training.train as train
    from captcha_exp.tracking import tracker

    def stop(*_):
        print_modules()
        raise KeyboardInterrupt

    train.train_step = stop
    tracker.MAX_START_SECONDS = 600  # however slow this machine is
try:
    main()
except SystemExit as end:
    if end.code == 0:
        print_modules()
"""

# Seconds on an idle core: MLflow 1.3, torch's compiler 1, matplotlib 0.4, sympy and scipy 0.4 each.
NOT_FOR_A_STEP = (
    *("mlflow", "sqlalchemy", "alembic", "pandas", "scipy", "matplotlib", "onnx", "onnxruntime"),
    *("torch._dynamo.eval_frame", "torch._inductor", "torch.onnx", "captcha_exp.report"),
)
NOT_WITH_A_SECOND_CORE = ("sympy",)  # a child process makes the plan
NOT_FOR_A_LIST = (*NOT_FOR_A_STEP, "torch", "numpy", "PIL", "hydra")


def imported_by(arguments: list[str], root: Path) -> set[str]:
    """Return the modules that a command has imported at its end, or a training at its first step."""
    done = subprocess.run(
        [sys.executable, "-c", PRINT_MODULES, *arguments],
        env={**os.environ, "CAPTCHA_EXP_ROOT": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.long
def test_the_first_step_waits_for_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    store = f"tracking.uri=sqlite:///{tmp_path}/mlruns/mlflow.db"
    imported = imported_by(["train", *TINY, "tracking=mlflow", store], tmp_path)
    assert "captcha_exp.training.train" in imported
    assert imported.isdisjoint(NOT_FOR_A_STEP)
    if sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1:
        assert imported.isdisjoint(NOT_WITH_A_SECOND_CORE)


def test_the_list_of_runs_imports_no_torch(tmp_path: Path) -> None:
    imported = imported_by(["runs"], tmp_path)
    assert "captcha_exp.cli.runs" in imported
    assert imported.isdisjoint(NOT_FOR_A_LIST)


@pytest.mark.long
def test_an_evaluation_does_not_import_the_compiler(tmp_path: Path) -> None:
    environment = {**os.environ, "CAPTCHA_EXP_ROOT": str(tmp_path)}
    command = [sys.executable, "-m", "captcha_exp", "train", *TINY, "train.epochs=1", "tracking=none"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    imported = imported_by(["evaluate", "latest"], tmp_path)
    assert "torch" in imported
    assert imported.isdisjoint(NOT_FOR_A_STEP)
