"""The file of a GPU from a session of another machine."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gpu_memory
import pytest
import session_to_gpu_file

from captcha_exp import compose, load
from captcha_exp.config import load_gpu
from captcha_exp.errors import UserError
from captcha_exp.memory.gpu_profile import CONTEXT_MARGIN_MIB, build_gpu_spec

GPU = "NVIDIA GeForce GTX 1650"
MEASUREMENTS = replace(gpu_memory._fake_measurements(), name=GPU)
EXPECTED = build_gpu_spec(MEASUREMENTS, load(compose("gpu=generic")).gpu)
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def make_session(**changes: Any) -> dict[str, Any]:
    """Return a session with a calibration; `parts` are added to its parts."""
    parts = {"doctor": {"error": "took more than 60 s"}, "calibration": {"figures": asdict(MEASUREMENTS)}}
    machine = {"gpu": GPU, "torch": "2.11.0+cu130", "cuda": "13.0", "cudnn": 91002, "driver": "580.65.06"}
    return {
        "benchmark": "gpu_session",
        "date": "2027-03-04",
        "machine": machine,
        "parts": parts | changes.pop("parts", {}),
        **changes,
    }


def write_gpu_file(folder: Path, session: object, *flags: str) -> Path:
    """Run the script on a session, and return the path of the file for gpu=mine."""
    path = folder / "session.json"
    path.write_text(session if isinstance(session, str) else json.dumps(session))
    session_to_gpu_file.main([str(path), "--config-dir", str(folder), "--name", "mine", *flags])
    return folder / "gpu" / "mine.yaml"


def training_part(context: Any, by: str = "NVML, this process") -> dict[str, Any]:
    return {"figures": {"context_mib": context, "process_by": by}}


def test_a_session_gives_the_bounds_of_its_measurements(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_gpu_file(tmp_path, make_session())
    assert capsys.readouterr().out == f"{path}\n"
    assert load_gpu(path) == EXPECTED
    first, second, third, *_ = path.read_text().splitlines()
    assert first == (
        f"# {GPU}, measured on 2027-03-04 with torch 2.11.0+cu130, CUDA 13.0, cuDNN 91002, driver 580.65.06"
    )
    assert (second, third[:60]) == (
        "# Session: session.json",
        "# Command: python benchmarks/session_to_gpu_file.py /"[:60] + third[53:60],
    )
    assert load(compose("gpu=mine", config_dir=str(tmp_path))).gpu == EXPECTED


@pytest.mark.parametrize("recorded", sorted(RESULTS.glob("*nvidia*.json")), ids=lambda path: path.name)
def test_the_recorded_sessions_can_be_read(recorded: Path, tmp_path: Path) -> None:
    session = session_to_gpu_file.read_session(recorded)
    if "stages" not in session["parts"].get("calibration", {}).get("figures", {}):
        pytest.skip("recorded with other keys, by an earlier version")
    assert load_gpu(write_gpu_file(tmp_path, session)).name == session["machine"]["gpu"]


def test_an_existing_file_is_overwritten_only_with_force(tmp_path: Path) -> None:
    path = write_gpu_file(tmp_path, make_session())
    path.write_text("other content")
    with pytest.raises(UserError, match=r"exists already; use --force"):
        write_gpu_file(tmp_path, make_session())
    assert path.read_text() == "other content"
    write_gpu_file(tmp_path, make_session(), "--force")
    assert load_gpu(path).name == GPU


def test_trainings_widen_the_context(tmp_path: Path) -> None:
    low, high = EXPECTED.context_mib.min - 8.5, EXPECTED.context_mib.max + 100.25
    parts = {
        "plan-a": training_part(low),
        "plan-b": training_part(high),
        "plan-c": {"error": "no"},
        "plan-d": training_part(9000, "all memory in use on the GPU"),
        "context-x": training_part(5000),
    }
    context = load_gpu(write_gpu_file(tmp_path, make_session(parts=parts))).context_mib
    assert low - 1 < context.min <= low
    assert high + CONTEXT_MARGIN_MIB <= context.max < high + CONTEXT_MARGIN_MIB + 1
    assert "; 2 trainings of the session used" in context.source


@pytest.mark.parametrize(
    ("session", "message"),
    [
        (json.dumps(make_session())[:-400], "cannot be read: .+; copy it again, or measure it with"),
        ("[]", "not a session of"),
        (make_session(benchmark="startup"), "not a session of"),
        (make_session(machine={"gpu": None}), "only a dry run or predictions"),
        (make_session(parts={"calibration": None}), "calibration failed: the session does not have it"),
        (
            make_session(parts={"calibration": {"error": "Traceback\n  line\nRunFailed: no room\n\n"}}),
            "calibration failed: RunFailed: no room",
        ),
        (
            make_session(parts={"calibration": {"figures": asdict(MEASUREMENTS) | {"cublas_mib": "64"}}}),
            "part calibration: cublas_mib: .+number",
        ),
        (make_session(machine={"gpu": "NVIDIA H100 80GB HBM3"}), f"part calibration is of '{GPU}'"),
    ],
)
def test_a_session_without_a_calibration_is_rejected(tmp_path: Path, session: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        write_gpu_file(tmp_path, session)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "gpu").exists()
