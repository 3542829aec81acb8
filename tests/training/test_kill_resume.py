"""A training that is interrupted anywhere and resumed has the same result as an uninterrupted one.

The tests run the real command in the children of a fork server and compare complete snapshots: every tensor
and counter of the last checkpoint, weights, metrics, the MLflow run, and files.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("needs fork and pidfd_open", allow_module_level=True)

from kill_resume import TINY, Storm, Training, new_store
from run_snapshot import differences, reached
from support.fork_server import AFTER_STEP, PHASES, ForkServer, Interruption, Place

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

WRITE = "captcha_exp.runtime.files:write_atomically"
PLACES = {
    "before the first step": Interruption(AFTER_STEP, 1),
    "within an epoch": Interruption(AFTER_STEP, 17, "after"),
    "between a step and its checkpoint": Interruption(PHASES["checkpointing"], 3),
    "while a checkpoint is written": Interruption(Place(WRITE, "/checkpoint/"), 4, "within"),
    "between a checkpoint and the removal of an old one": Interruption(
        Place("captcha_exp.model.state:prune"), 4
    ),
    "before an evaluation": Interruption(PHASES["evaluation"], 2),
    "between an evaluation and its row": Interruption(PHASES["evaluation"], 3, "after"),
    "between the row and the best weights": Interruption(
        Place("captcha_exp.model.state:TrainState.update_best")
    ),
    "while the best weights are written": Interruption(Place(WRITE, "model.safetensors"), 1, "within"),
    "after the best weights": Interruption(PHASES["best"], 1, "after"),
    "between epochs": Interruption(
        Place("captcha_exp.training.sanity:SanityChecker.check_validation"), 2, "after"
    ),
    "in the last epoch": Interruption(AFTER_STEP, 40, "after"),
    "before the test": Interruption(PHASES["evaluation"], 5),
    "between the SHA-256 of a file and the file": Interruption(Place(WRITE, "/dataset.json"), 1),
    "in the report": Interruption(Place("captcha_exp.report.figures:plot_confusion_matrix")),
    "before its status is written": Interruption(PHASES["closing"]),
}
INTERVALS = ("'1 epoch'", "null")
QUICK_PLACES = (
    "within an epoch",
    "while a checkpoint is written",
)
"""the places of `make test`"""


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """A server whose children skip the image grids, which take longer than everything else."""
    with ForkServer(without=["captcha_exp.report.figures:_save_image_grid"]) as server:
        yield server


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def uninterrupted(
    server: ForkServer, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The snapshot of an uninterrupted training; it does not depend on the checkpoint interval."""
    training = Training(server, tmp_path_factory.mktemp("uninterrupted") / "root", (), store)
    assert training.start().code == 0
    return training.run_snapshot()


@pytest.fixture
def training(server: ForkServer, store: Path, tmp_path: Path) -> Training:
    return Training(server, tmp_path / "root", (), store)


@pytest.mark.long
def test_a_forked_training_equals_one_in_a_new_process(uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "captcha_exp", "train", *TINY, "tracking=none", "--json"]
    environment = os.environ | {"CAPTCHA_EXP_ROOT": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    expected = uninterrupted["runs"][0]["result"]["weights_sha256"]
    assert json.loads(done.stdout)["weights_sha256"] == expected


@pytest.mark.parametrize(
    ("place", "interval"),
    [
        *((place, "'3 steps'") for place in QUICK_PLACES),
        *(
            pytest.param(place, interval, marks=pytest.mark.long)
            for place, interval in [
                *((place, "'3 steps'") for place in PLACES if place not in QUICK_PLACES),
                *(("within an epoch", interval) for interval in INTERVALS),
                *(("between epochs", interval) for interval in INTERVALS),
            ]
        ),
    ],
)
def test_an_interruption_does_not_change_the_result(
    training: Training, cache: Path, uninterrupted: dict[str, Any], place: str, interval: str
) -> None:
    training.words += [f"train.checkpoint_every={interval}", "tracking=none", f"data.cache={cache}"]
    ended = training.start(PLACES[place])
    assert (ended.code, ended.signalled) == (-signal.SIGKILL, True), ended.output

    ended = training.start()

    assert ended.code == 0, ended.output
    assert differences(uninterrupted["runs"], training.run_snapshot()["runs"]) == []


@pytest.mark.long
@pytest.mark.parametrize("head", ["end_class", "ctc"])
def test_an_interruption_does_not_change_the_result_with_labels_of_different_lengths(
    server: ForkServer, store: Path, cache: Path, tmp_path: Path, head: str
) -> None:
    words = (
        f"model.head={head}",
        "captcha.min_length=1",
        "train.checkpoint_every='3 steps'",
        "tracking=none",
    )
    expected, training = (
        Training(server, tmp_path / name, (*words, f"data.cache={cache}"), store) for name in ("one", "other")
    )
    assert expected.start().code == 0
    ended = training.start(PLACES["within an epoch"])
    assert (ended.code, ended.signalled) == (-signal.SIGKILL, True), ended.output
    assert training.start().code == 0
    assert differences(expected.run_snapshot()["runs"], training.run_snapshot()["runs"]) == []


@pytest.mark.long
@pytest.mark.parametrize("seed", [1])
def test_25_kills_with_damaged_checkpoints_do_not_change_the_result(
    server: ForkServer, tmp_path: Path, seed: int
) -> None:
    storm = Storm(server, tmp_path, seed)
    while storm.kills.total() < 25:
        storm.kill("onecycle" if storm.kills.total() < 12 else "patience")

    assert storm.faults == []


@pytest.mark.long
@pytest.mark.parametrize(
    "phase",
    ["closing", *(pytest.param(each, marks=pytest.mark.long) for each in ("store", "drawing", "evaluation"))],
)
def test_sigterm_saves_a_checkpoint_and_the_run_resumes(
    server: ForkServer, training: Training, uninterrupted: dict[str, Any], phase: str
) -> None:
    interruption = Interruption(PHASES[phase], after_seconds=0.001, signals=(signal.SIGTERM,))

    ended = training.start(interruption, limit_seconds=120)

    assert not ended.late
    assert ended.code == 128 + signal.SIGTERM, ended.output
    assert training.status() in ("KILLED", "FINISHED")
    saved = max((reached(path.stem) for path in training.root.rglob("step-*")), default=0)
    assert ended.steps_done - saved <= 1
    training.next_start()
    statuses = set(training.run_snapshot()["MLflow"].get("runs", ()))
    assert statuses <= {training.status()}
    assert training.finish().code == 0
    assert differences(uninterrupted, training.run_snapshot()) == []


@pytest.mark.long
def test_ctrl_c_stops_after_the_step_and_a_second_one_immediately(
    training: Training, uninterrupted: dict[str, Any]
) -> None:
    once = Interruption(AFTER_STEP, 5, signals=(signal.SIGINT,))
    ended = training.start(once)
    assert (ended.code, training.status()) == (130, "KILLED"), ended.output
    assert max(reached(path.stem) for path in training.root.rglob("step-*")) == ended.steps_done

    ended = training.start(Interruption(AFTER_STEP, 5, signals=(signal.SIGINT, signal.SIGINT)))
    assert (ended.code, training.status()) == (-signal.SIGINT, "RUNNING"), ended.output
    assert "RUNNING" not in training.next_start().output

    assert training.finish().code == 0
    assert differences(uninterrupted, training.run_snapshot()) == []


@pytest.mark.long
def test_a_run_stopped_by_max_minutes_is_resumed_by_the_same_command(
    training: Training, uninterrupted: dict[str, Any]
) -> None:
    training.words.append("train.max_minutes=0.012")
    codes: list[int] = []
    while not codes or (codes[-1] and len(codes) < 45):
        codes.append(training.start().code)
        assert training.status() == ("KILLED" if codes[-1] else "FINISHED")

    assert set(codes[:-1]) == {75}
    assert codes[-1] == 0
    assert differences(uninterrupted, training.run_snapshot()) == []
