"""Test GPU sessions without a GPU: dry runs, failures and interruptions."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_comparison
import gpu_files
import gpu_limits
import gpu_memory
import gpu_parts
import gpu_predictions
import gpu_processes
import gpu_session
import gpu_speed
import gpu_tables
import gpu_trainings
import psutil
import pytest
import torch
from gpu_cases import Case
from session_to_gpu_file import measurements_from_json

from captcha_exp.config import Config
from captcha_exp.memory.allocator import MIB
from captcha_exp.memory.trace import Trace, trace
from captcha_exp.model.state import TrainState
from captcha_exp.model.step import init_train_state

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_session.py"

CPU = torch.device("cpu")


@pytest.fixture
def restored_settings() -> Iterator[None]:
    """Restore the process-wide settings that a part changes."""
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = benchmark
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)


def session(*arguments: str, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False
    )


def saved(path: Path, parts: dict[str, Any], **values: Any) -> Path:
    """Write a session file of a dry run and return its path."""
    machine = {"gpu": None, "torch": torch.__version__}
    head = {"benchmark": "gpu_session", "date": "2026-11-27", "dry_run": True, "machine": machine}
    path.write_text(json.dumps({**head, "parts": parts, **values}))
    return path


def predicted(sha256: str | None = None) -> dict[str, Any]:
    """Return predictions of this code, or of other code."""
    figures = {"code_sha256": sha256 or gpu_cases.code_sha256(), "plans": {}, "largest": {}}
    return {"began": "2026-11-27T00:00:00.000+00:00", "figures": figures}


# -- children ------------------------------------------------------------------------------------------------


def run_in_new_process(code: str, *arguments: str) -> Any:
    """Run code in a single-threaded process, which may fork, and return the JSON that it prints."""
    head = f"import sys, os, json, time; sys.path.insert(0, {str(SCRIPT.parent)!r}); import gpu_processes\n"
    head += "from gpu_processes import Task, run\n"
    done = subprocess.run(
        [sys.executable, "-c", head + code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_child_has_its_own_environment_and_does_not_change_its_parent() -> None:
    found = run_in_new_process(
        "def act():\n"
        "    print('noise'); values.append(1); return [os.environ['A'], os.environ.get('B')]\n"
        "values = []\n"
        "part = run(Task('x', act), 60, {'A': '8'})\n"
        "print(json.dumps([part['figures'], values, 'A' in os.environ]))"
    )
    assert found == [["8", None], [], False]


@pytest.mark.parametrize(
    ("statement", "code", "message"),
    [
        ("raise KeyError('lost')", 1, "KeyError: 'lost'"),
        ("raise SystemExit('no room')", 1, "no room"),
        ("os._exit(3)", 3, "ended with exit code 3 and no output"),
        ("os.kill(os.getpid(), 9)", -9, "ended with exit code -9 and no output"),
    ],
)
def test_a_failed_part_has_an_error_with_the_end_of_its_output(
    statement: str, code: int, message: str
) -> None:
    found = run_in_new_process(
        f"def act():\n    {statement}\nprint(json.dumps(run(Task('x', act), 60, {{}})))"
    )

    assert found["error"].strip().endswith(message)
    assert found["exit_code"] == code
    assert "figures" not in found


def ended(number: int) -> bool:
    """Return whether the process has exited; else sleep for a moment."""
    try:
        if psutil.Process(number).status() == psutil.STATUS_ZOMBIE:
            return True
    except psutil.NoSuchProcess:
        return True
    time.sleep(0.1)
    return False


HANGS = """
import subprocess
def act():
    gpu_processes.keep_partial({"so": "far"})
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
    time.sleep(600)
"""


def numbers_in(path: Path) -> list[int]:
    """Return the process numbers in a file, once they are there."""
    for _ in range(600):
        if path.exists() and len(fields := path.read_text().split()) == 2:
            return [int(field) for field in fields]
        time.sleep(0.1)
    raise AssertionError(f"{path} was not written")


@pytest.mark.long
def test_a_hanging_part_is_killed_with_its_children_and_keeps_partial_figures(
    tmp_path: Path,
) -> None:
    pids = tmp_path / "pids"
    found = run_in_new_process(HANGS + "print(json.dumps(run(Task('x', act), 5, {})))", str(pids))

    assert found["error"] == "took more than 5 s"
    assert found["partial"] == {"so": "far"}
    for number in numbers_in(pids):
        assert any(ended(number) for _ in range(100))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_running_part_exits_with_the_session(number: int, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = f"import sys, os, time, signal; sys.path.insert(0, {str(SCRIPT.parent)!r}); import gpu_processes\n"
    code += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n" + HANGS
    code += "gpu_processes.run(gpu_processes.Task('x', act), 600, {})"
    with subprocess.Popen([sys.executable, "-c", code, str(pids)]) as process:
        part, child = numbers_in(pids)
        process.send_signal(number)
        assert process.wait(60) == (143 if number == signal.SIGTERM else -number)
    assert any(ended(part) for _ in range(100))
    if number == signal.SIGTERM:  # after SIGKILL the grandchildren are not killed
        assert any(ended(child) for _ in range(100))
    else:
        psutil.Process(child).kill()


def test_a_process_with_threads_or_an_open_gpu_does_not_fork(tmp_path: Path) -> None:
    found = run_in_new_process(
        "import threading\n"
        "first = gpu_processes.reason_not_to_fork()\n"
        "thread = threading.Thread(target=time.sleep, args=(600,), daemon=True); thread.start()\n"
        "print(json.dumps([first, gpu_processes.reason_not_to_fork()]))"
    )
    assert found == [None, "this process has 2 threads"]
    held = run_in_new_process(
        "from pathlib import Path\n"
        "Path.readlink = lambda path: Path('/dev/nvidiactl')\n"
        "print(json.dumps(gpu_processes.reason_not_to_fork()))"
    )
    assert held == "this process has opened the GPU"


# -- the command ---------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    "options", [(), pytest.param(("--fresh-processes",), marks=pytest.mark.long)], ids=["forked", "fresh"]
)
def test_a_part_is_added_to_the_file_and_the_last_line_is_a_summary(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    out = saved(tmp_path / "session.json", {"earlier": {"figures": 1}})

    done = session("--dry-run", "--parts", "matrix-products", "--out", str(out), *options)

    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    assert written["parts"]["earlier"] == {"figures": 1}
    assert set(written["parts"]["matrix-products"]["figures"]) == {"fp32", "tf32", "bf16", "fp16"}
    assert ("Starting each part as a new process: --fresh-processes" in done.stderr) == bool(options)
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["missing"], list(last["part_seconds"])) == ({}, ["matrix-products"])
    machine = {"gpu", "gpu_mib", "driver", "compute_capability", "torch", "cuda", "cudnn", "python", "date"}
    assert machine <= set(written["machine"])
    assert written["machine"]["gpu"] is None
    assert written["article"] == {
        "cpu_seconds_per_1000": 13.60,
        "gpu_seconds_per_1000": 1.90,
        "process_mib": 2915,
    }


@pytest.mark.long
def test_a_killed_call_loses_only_the_running_part_and_the_next_call_runs_it(tmp_path: Path) -> None:
    """The third call has only two remaining parts and is killed during the first."""
    out = tmp_path / "session.json"
    names = gpu_parts.parts_of_call(3, gpu_session.all_parts(True), {})
    left = ("matrix-products", "doctor")
    ready: dict[str, Any] = {name: {"figures": {}} for name in names if name not in left}
    saved(out, ready | {"predictions": predicted()})
    before = out.read_text()
    command = [sys.executable, str(SCRIPT), "--dry-run", "--call", "3", "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        first = next(line for line in process.stderr if line.endswith(" ...\n")).split()[0]
        process.kill()
    assert out.read_text() == before

    done = session("--dry-run", "--call", "3", "--out", str(out))

    assert done.returncode == 0, done.stderr
    ran = list(json.loads(done.stdout.splitlines()[-1])["part_seconds"])
    assert ran[0] == first
    assert sorted(ran) == sorted(left)
    parts = json.loads(out.read_text())["parts"]
    assert all("figures" in parts[name] for name in left)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a JSON file"),
        (b"\xff\xfe", "not a JSON file"),
        (b"[]", "not a session of benchmarks/gpu_session.py"),
        (b'{"benchmark": "trace_accuracy", "machine": {}, "parts": {}}', "not a session of"),
        (b'{"benchmark": "gpu_session", "machine": {}, "parts": {"a": 1}}', "not a session of"),
    ],
)
def test_a_file_that_is_not_a_session_is_rejected_and_unchanged(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)

    for option in ("--out", "--predictions"):
        assert main("--dry-run", "--call", "1", option, str(path)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert line.startswith(str(path))
    assert path.read_bytes() == content


def main(*arguments: str) -> int:
    """Call the program in this process without running parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpu_session.py", *arguments])
        patch.setattr(signal, "signal", lambda *_: None)
        patch.setattr("gpu_session.part_runner", lambda *_: fake_run)
        patch.setattr("gpu_session.BEGAN", time.perf_counter())
        return gpu_session.main()


def fake_run(name: str, part: gpu_parts.Part, limit: float) -> dict[str, Any]:
    """Return the record of a part without running it; the machine has a GPU unless it is a dry run."""
    figures: dict[str, Any] = {"gpu": None, "torch": "2.11.0", "date": "2026-11-27"}
    if name == "machine":
        figures["gpu"] = "NVIDIA H100 80GB HBM3"
    if name == "predictions":
        figures = predicted()["figures"]
    made = figures if name.startswith(("machine", "predictions")) else []
    return {"began": "2026-11-27T01:00:00.000+00:00", "wall_seconds": 1.0, "figures": made}


@pytest.mark.parametrize("option", ["--out", "--predictions"])
def test_predictions_of_other_code_are_rejected(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "old.json", {"predictions": predicted("0" * 64)})
    before = path.read_text()

    assert main("--dry-run", "--call", "1", option, str(path)) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert "its predictions belong to other code (code_sha256 000000000000, this code is " in line
    assert "--parts predictions --out NEW.json" in line
    assert path.read_text() == before


def test_loaded_predictions_are_written_before_a_plan_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    carried = saved(tmp_path / "carried.json", {"predictions": predicted()}, dry_run=False)
    out = tmp_path / "out.json"

    assert main("--call", "1", "--predictions", str(carried), "--out", str(out)) == 0

    written = json.loads(out.read_text())
    assert written["parts"]["predictions"] == predicted()
    assert written["machine"]["gpu"] == "NVIDIA H100 80GB HBM3"
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "predictions" not in last["part_seconds"]
    assert next(iter(last["part_seconds"])).startswith("plan-")


def test_predictions_without_a_gpu_keep_the_machine_of_the_file(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main("--parts", "predictions", "--out", str(out)) == 0
    first = json.loads(out.read_text())
    assert first["machine"]["gpu"] is None
    assert main("--parts", "doctor", "--out", str(out)) == 0
    assert main("--parts", "predictions", "--out", str(out)) == 0

    assert json.loads(out.read_text())["machine"]["gpu"] == "NVIDIA H100 80GB HBM3"
    assert json.loads(out.read_text())["parts"]["predictions"] == first["parts"]["predictions"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"machine": {"gpu": "NVIDIA H200", "torch": "2.11.0"}},
            "holds figures of NVIDIA H200, torch 2.11.0",
        ),
        ({"machine": {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.13.0"}}, "torch 2.13.0; this is"),
        ({}, "dry run; this is NVIDIA H100 80GB HBM3"),
    ],
)
def test_figures_of_another_machine_are_rejected(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"dry_run": False} if change else {}
    path = saved(tmp_path / "x.json", {"doctor": {"figures": []}}, **values, **change)
    before = path.read_text()

    assert main("--call", "2", "--out", str(path)) == 2

    assert message in capsys.readouterr().err
    assert path.read_text() == before


def test_an_unknown_part_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--dry-run", "--parts", "doctr") == 2
    line = capsys.readouterr().err
    assert line.startswith("--parts: no part is named doctr; the parts are predictions, plan-")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--parts", ""), "--parts: no part is named ; the parts are predictions"),
        (("--parts", "doctor", "--seconds", "-5"), "--seconds -5: must be above 0"),
        (("--parts", "doctor", "--seconds", "nan"), "--seconds nan: must be above 0"),
        (("--parts", "doctor", "--out", "no/such/x.json"), "no/such/x.json: cannot be written: No such file"),
    ],
)
def test_invalid_arguments_are_rejected_before_the_first_part(
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "fake_run", None)
    assert main("--dry-run", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


def test_two_sessions_cannot_write_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.json"

    with gpu_files.locked(out):
        assert main("--dry-run", "--parts", "doctor", "--out", str(out)) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{out}: another session is writing it; wait until it ends, or give another --out"
    assert not out.exists()
    assert main("--dry-run", "--parts", "doctor", "--out", str(out)) == 0


def test_a_full_disk_does_not_end_a_session(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpu_files.write_atomically", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    out = tmp_path / "x.json"

    assert main("--dry-run", "--parts", "doctor,determinism-true", "--out", str(out)) == 1

    printed = capsys.readouterr()
    assert "cannot be written: No space left on device; will retry after the next part" in printed.err
    (elsewhere,) = tmp_path.glob("gpu-session-*.json")
    assert json.loads(elsewhere.read_text())["parts"].keys() == {"doctor", "determinism-true"}
    assert str(elsewhere) in json.loads(printed.out.splitlines()[-1])["missing"]["x.json"]


def test_a_failed_part_or_test_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part: dict[str, Any] = {}
    original = fake_run

    def run(name: str, *rest: Any) -> dict[str, Any]:
        return original(name, *rest) if name == "machine-cpu" else part

    monkeypatch.setattr(sys.modules[__name__], "fake_run", run)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"error": "line\nTypeError: no"}, "TypeError: no"),
        ({"figures": {"passed": 3, "failures": {"test_a[fp16]": "assert"}}}, "failed: test_a[fp16]"),
    ]
    for number, (record, message) in enumerate(cases):
        part = {"wall_seconds": 1.0, **record}
        assert main("--dry-run", "--parts", "tests-1", "--out", str(tmp_path / f"{number}.json")) == 1
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert last["missing"] == {"tests-1": message}


# -- parts and calls -----------------------------------------------------------------------------------------


def test_cases_cover_both_networks_with_small_and_large_batches() -> None:
    cases = gpu_parts.FIRST_CASES + gpu_parts.OTHER_CASES
    assert len({case.name for case in cases}) == len(cases) == 14
    assert len(gpu_parts.FIRST_CASES) == 6
    for network, largest in (("resnet18", 1000), ("compact", 4096)):
        first = [case for case in gpu_parts.FIRST_CASES if case.network == network]
        assert {case.variant for case in first} == {"fp32", "bf16"}
        assert max(case.batch for case in first) == largest
        assert min(case.batch for case in first) < 150
    assert {case.variant for case in cases} == {"fp32", "bf16", "fp32-again", "bf16-again"}


def test_each_call_has_its_parts_in_order_and_the_third_the_remaining_ones() -> None:
    names = list(gpu_session.all_parts(False))
    first, second, third = (gpu_parts.parts_of_call(number, names, {}) for number in (1, 2, 3))

    assert first[0] == "predictions"
    assert [name.split("-")[0] for name in first[1:7]] == ["plan"] * 6
    assert first[7:10] == ["allocator-trace-resnet18", "tests-quick", "calibration"]
    assert second[:4] == ["article-cuda", "ours-cuda-fp32", "ours-cuda-bf16", "auto-cuda"]
    assert not {*first} & {*second}
    assert sorted(third) == sorted(names)  # those with figures are left out
    assert third[1] == "largest-article"
    assert third.index("workspaces-8") < third.index(first[1]) < third.index("speed-compact-fp16")
    for number, listed in gpu_parts.CALLS.items():
        assert set(listed) <= set(names), f"call {number}"


def test_parts_with_figures_are_skipped_and_failed_parts_come_last() -> None:
    done: dict[str, dict[str, Any]] = {"article-cuda": {"figures": {}}, "ours-cuda-fp32": {"error": "failed"}}
    names = gpu_parts.parts_of_call(2, gpu_session.all_parts(False), done)

    assert names[0] == "ours-cuda-bf16"
    assert names[-1] == "ours-cuda-fp32"
    assert "article-cuda" not in names


def test_estimates_fit_the_limits_of_the_calls() -> None:
    parts = gpu_session.all_parts(False)
    for number, names in gpu_parts.CALLS.items():
        assert sum(parts[name].estimate for name in names) <= gpu_parts.CALL_SECONDS[number]
    assert sum(gpu_parts.CALL_SECONDS.values()) == 540
    for name, part in parts.items():
        assert part.estimate < part.limit, name
    table = gpu_parts.table(parts).splitlines()
    assert "| tests-quick | 1 | 120 | 65 |" in table
    assert len(table) == 2 + len(parts) + 3


def test_a_dry_run_has_every_kind_of_part_and_each_is_in_a_call() -> None:
    dry, names = list(gpu_session.all_parts(True)), list(gpu_session.all_parts(False))
    kinds = {name.split("-")[0] for name in names}
    assert kinds == {name.split("-")[0] for name in dry}
    first, second = (gpu_parts.parts_of_call(number, dry, {}) for number in (1, 2))
    assert {name for name in dry if name.startswith("plan-")} < {*first}
    assert "auto-cpu" in second


@pytest.mark.long
def test_gpu_tests_are_quick_or_split_into_groups() -> None:
    """Together the groups have each gpu test exactly once."""

    def collected(marks: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-m", marks, "--collect-only", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, "-qq", "-o", "addopts=", str(gpu_trainings.TESTS), "-q"],
            capture_output=True,
            text=True,
            check=False,
            cwd=SCRIPT.parents[1],
            env={name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"},
        )
        return [line for line in done.stdout.splitlines() if ".py" in line]

    counts = [
        int(collected(marks)[-1].rpartition(":")[2])
        for marks in ("gpu", f"gpu and {gpu_trainings.QUICK}", f"gpu and not {gpu_trainings.QUICK}")
    ]
    assert counts[0] == counts[1] + counts[2]
    assert 10 < counts[1] < counts[0]
    items = [object() for _ in range(17)]
    groups = []
    for group in range(3):
        own = list(items)
        gpu_trainings.Outcomes(group, 3).pytest_collection_modifyitems(own)
        groups += own
    assert len(groups) == 17
    assert {*map(id, groups)} == {*map(id, items)}


def test_test_outcomes_are_saved_after_each_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu_processes.PARTIAL, str(tmp_path / "partial.json"))
    plugin = gpu_trainings.Outcomes(None, 1)

    def report(name: str, when: str, outcome: str) -> None:
        found = {"failed": outcome == "failed", "skipped": outcome == "skipped", "duration": 0.5}
        text = {"longreprtext": "x" * 9000 + "the end", "nodeid": f"tests/test_gpu.py::{name}"}
        plugin.pytest_runtest_logreport(types.SimpleNamespace(when=when, outcome=outcome, **found, **text))

    for name, setup, call in (("a", "passed", "passed"), ("b", "skipped", None), ("c", "passed", "failed")):
        report(name, "setup", setup)
        if call:
            report(name, "call", call)
        report(name, "teardown", "passed")

    figures = json.loads((tmp_path / "partial.json").read_text())
    assert figures == plugin.figures()
    assert (figures["passed"], figures["failed"], figures["skipped"]) == (1, 1, 1)
    assert list(figures["failures"]) == ["c"]
    assert figures["failures"]["c"].endswith("the end")
    assert len(figures["failures"]["c"]) == gpu_trainings.TEST_OUTPUT_CHARACTERS
    assert figures["seconds"] == {"a": 1.5, "b": 1.0, "c": 1.5}
    assert gpu_comparison.failed_tests({"tests-1": {"error": "cut", "partial": figures}}) == ["c"]


def test_the_table_has_the_article_first_and_a_line_per_training() -> None:
    figures: dict[str, Any] = {"seconds_per_1000": 0.5, "training_images_per_second": 1700.0}
    parts = {
        "doctor": {"figures": []},
        "article-cuda": {"figures": {**figures, "process_mib": 2915.4}},
        "ours-cuda-bf16": {"figures": {**figures, "process_peak_mib": 900.0}},
        "ours-cuda-fp16": {"error": "failed"},
    }

    lines = gpu_tables.trainings(parts).splitlines()

    assert lines[2:] == [
        "| the article, its CPU | 13.60 | | |",
        "| the article, GTX 1650 | 1.90 | | 2,915 |",
        "| article-cuda | 0.500 | 1,700 | 2,915 |",
        "| ours-cuda-bf16 | 0.500 | 1,700 | 900 |",
    ]


@pytest.mark.parametrize(
    ("selection", "found"),
    [
        ("b", ["b"]),
        ("plan", ["plan-1", "plan-2"]),
        ("plan-2,plan,a", ["plan-2", "plan-1", "a"]),
    ],
)
def test_a_name_selects_a_part_or_all_with_this_prefix(selection: str, found: list[str]) -> None:
    assert gpu_session.select_parts(selection, ["a", "plan-1", "b", "plan-2", "planner"]) == found


@pytest.mark.parametrize("dry_run", [False, True])
def test_every_part_has_the_arguments_of_its_function(dry_run: bool) -> None:
    for part in gpu_session.all_parts(dry_run).values():
        inspect.signature(part.function).bind(**part.arguments)


def test_cudnn_limits_are_set_only_for_their_part() -> None:
    parts = gpu_session.all_parts(False)
    given = {name: part.environment for name, part in parts.items() if part.environment}
    key = "CUDNN_CONV_WSCAP_DBG"
    assert given == {f"workspaces-{cap}": {key: cap} for cap in ("0", "8", "64", "128")}


def test_the_file_has_one_line_per_part() -> None:
    session = {
        "benchmark": "x",
        "machine": {"gpu": None},
        "parts": {"a": {"figures": [[1, 2], [3]]}, "b": {}},
    }
    text = gpu_files.to_text(session)

    assert json.loads(text) == session
    assert text.splitlines()[4:6] == ['"a": {"figures": [[1, 2], [3]]},', '"b": {}']
    assert json.loads(gpu_files.to_text(session | {"parts": {}}))["parts"] == {}


class Session:
    """A session with fake parts, which record the content of the file when they start."""

    def __init__(self, out: Path, **given: dict[str, Any]) -> None:
        self.out, self.given = out, given
        self.parts: dict[str, Any] = {}
        self.ran: list[str] = []
        self.in_file: dict[str, list[str]] = {}  # part -> parts with figures in the file at its start
        self.limits: list[float] = []

    def run_part(self, name: str, part: gpu_parts.Part, limit: float) -> dict[str, Any]:
        self.ran.append(name)
        self.limits.append(limit)
        parts = json.loads(self.out.read_text())["parts"] if self.out.exists() else {}
        self.in_file[name] = [each for each, found in parts.items() if "figures" in found]
        return {"wall_seconds": 1.0, **self.given.get(name, {"figures": {}})}

    def measure(self, names: list[str], seconds: float = 1000) -> list[str]:
        parts = {name: gpu_parts.Part(print, {}, 50, 10) for name in names}
        deadline = time.perf_counter() + seconds
        whole = {"x": 0, "parts": self.parts}
        return gpu_session.measure(whole, names, parts, self.out, deadline, self.run_part)


def test_the_file_is_written_after_each_part_also_if_one_fails(tmp_path: Path) -> None:
    session = Session(tmp_path / "x.json", b={"error": "first\nlast"})
    assert session.measure(["predictions", "b", "plan-1"]) == []

    assert session.in_file == {"predictions": [], "b": ["predictions"], "plan-1": ["predictions"]}
    assert session.parts["b"]["error"] == "first\nlast"
    assert json.loads(session.out.read_text())["parts"] == session.parts
    assert session.limits == [50, 50, 50]


def test_parts_without_predictions_are_skipped(tmp_path: Path) -> None:
    session = Session(tmp_path / "x.json", predictions={"error": "failed"})

    assert session.measure(["predictions", "plan-1", "largest-a", "b"]) == ["plan-1", "largest-a"]
    assert session.ran == ["predictions", "b"]
    assert "plan-1" not in session.parts


def test_parts_without_enough_time_are_skipped_and_none_runs_past_the_deadline(tmp_path: Path) -> None:
    session = Session(tmp_path / "x.json")
    assert session.measure(["a"], seconds=20) == []
    assert 10 < session.limits[0] <= 20
    session.parts["b"] = {"figures": {"of": "an earlier call"}}

    assert session.measure(["b", "c"], seconds=9) == ["b", "c"]

    assert session.ran == ["a"]
    assert session.parts["b"] == {"figures": {"of": "an earlier call"}}
    assert "c" not in session.parts


@pytest.mark.long
def test_a_missing_gpu_is_reported(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    done = session("--parts", "doctor", "--out", str(tmp_path / "x.json"))

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "torch finds no CUDA GPU here; --dry-run runs every part on the CPU"
    )
    assert not (tmp_path / "x.json").exists()


# -- the parts, with small numbers ---------------------------------------------------------------------------


def run_part(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a part and return its figures after a round trip through JSON."""
    return json.loads(json.dumps(function(*arguments), allow_nan=False))


def test_fake_measurements_can_be_read() -> None:
    found = run_part(gpu_memory.calibration, {"resnet18": 2, "compact": 2}, "cpu")

    assert measurements_from_json(found).name == "no GPU, a dry run"


@pytest.mark.usefixtures("restored_settings")
def test_calibration_measures_both_networks_in_a_fresh_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    measurements = gpu_memory._fake_measurements()

    def measure(configs: Any, device: Any, free: Any) -> Any:
        calls.extend([[config.model.name for config in configs], device.type, free])
        return measurements

    monkeypatch.setattr("captcha_exp.memory.gpu_probe.measure", measure)
    monkeypatch.setattr(gpu_cases, "_free_bytes", lambda: 500 * MIB)
    found = run_part(gpu_memory.calibration, {"resnet18": 100, "compact": 128}, "cuda")

    assert calls == [["resnet18", "compact"], "cuda", 500.0]
    assert measurements_from_json(found) == measurements


@pytest.mark.usefixtures("restored_settings")
def test_a_plan_is_measured_on_the_predicted_case() -> None:
    case, split_sizes = Case("compact", "bf16-again", 4), {"train": 12, "validation": 6}

    predicted = run_part(gpu_predictions.predict_case, case, split_sizes, [100, 50_000], ["h200"])["h200"]
    found = run_part(gpu_memory.plan, case, split_sizes, [100, 50_000], "cpu")

    assert (found["case"], found["images"]) == (predicted["case"], predicted["images"])
    assert predicted["verdicts"] == {"100": "does not fit", "50000": "fits"}
    assert predicted["plan"]["fits"] == "fits"
    assert found["training"] == {"requested_mib": None, "allocated_mib": None, "reserved_mib": None}
    assert found["process_peak_mib"] > 100
    assert gpu_comparison.prediction_errors(predicted["plan"], found) is None


def test_a_batch_size_is_traced_once_for_all_gpus_and_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[int] = []

    def counting(config: Config, batch_size: int, split_sizes: Mapping[str, int]) -> Trace:
        traced.append(batch_size)
        return trace(config, batch_size, split_sizes)

    monkeypatch.setattr("captcha_exp.memory.plan.trace", counting)
    gpus, split_sizes = ["h200", "gtx1650"], {"train": 12, "validation": 6}

    found = gpu_predictions.predict_case(Case("compact", "fp32", 4), split_sizes, [600, 3000, 9000], gpus)

    assert traced == [4]
    assert len(set(found["h200"]["verdicts"].values())) > 1
    assert found["h200"]["plan"]["process_mib"] != found["gtx1650"]["plan"]["process_mib"]


@pytest.mark.long
def test_predictions_are_made_for_several_gpus() -> None:
    cases = [(Case("compact", "fp32", 4), {"train": 12, "validation": 6})]
    found = run_part(gpu_predictions.predictions, cases, [600], ["fp32-again"], 300, 1)

    assert list(found["plans"]) == ["h100", "h200"]
    assert list(found["plans"]["h100"]) == ["compact-fp32-4"]
    assert found["largest"] == {gpu: {"fp32-again": None} for gpu in ("h100", "h200", "gtx1650")}
    assert found["code_sha256"] == gpu_cases.code_sha256()


@pytest.mark.usefixtures("restored_settings")
def test_the_context_has_a_row_per_stage() -> None:
    found = run_part(gpu_memory.context, "compact", "bf16", 2, "cpu")

    assert [row["stage"] for row in found["stages"]] == [
        "CUDA starts",
        "training step",
        "epoch",
    ]
    assert all(row["context_mib"] is None and row["process_mib"] > 0 for row in found["stages"])


@pytest.mark.usefixtures("restored_settings")
def test_recordings_of_both_networks_are_small_and_replayed() -> None:
    found = [run_part(gpu_memory.allocator_trace, network, 100, 2, "cpu") for network in gpu_cases.NETWORKS]

    assert len(json.dumps(found)) < MIB
    for recording in found:
        assert recording["from"] == "model"
        assert recording["replayed"]["reserved_error"] == 0
        assert gpu_comparison.recording_problems(recording) == []
        assert 0 < recording["traced_bytes"] <= recording["peaks"]["requested_bytes"]


@pytest.mark.usefixtures("restored_settings")
def test_a_recording_begins_before_the_first_tensor_and_has_a_mark_after_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Record on a fake GPU."""
    config = gpu_cases.make_config(Case("compact", "fp32", 4), "cpu")
    split_sizes = {"train": 8, "validation": 4}
    expected = gpu_memory._record_model(trace(config, 4, split_sizes))
    log: list[Any] = []
    entries = [{"action": "alloc", "addr": 1, "size": 512}, {"action": "snapshot", "addr": 0, "size": 0}]

    def snapshot() -> dict[str, Any]:
        log.append("snapshot")
        return {"device_traces": [entries]}

    def record(**how: Any) -> None:
        log.append(how["enabled"])

    def state_of(config: Config, device: torch.device) -> TrainState:
        log.append("state")
        return init_train_state(config, device)

    stats = {f"{kind}_bytes.all.peak": 512 for kind in ("requested", "allocated", "reserved")}
    monkeypatch.setattr(torch.cuda, "init", lambda: log.append("init"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: stats)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", snapshot)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr("gpu_memory.init_train_state", state_of)

    found = gpu_memory._record_on_gpu(config, split_sizes, CPU)

    assert log == ["init", "all", "state", "snapshot", "snapshot", "snapshot", "snapshot", None]
    assert found["mark_names"] == ["state", "step 1", "step 2"]
    assert (found["events"], found["marks"], found["entries"]) == ([[1, 1, 512]], [1], 2)
    assert set(found) == set(expected)


@pytest.mark.usefixtures("restored_settings")
def test_workspaces_are_the_memory_beyond_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake GPU uses 40 MiB more than predicted, of which 8 are cuBLAS workspace."""
    config = gpu_cases.make_config(Case("compact", "fp32", 2), "cpu")
    predicted_peaks = gpu_limits._tensor_peaks(config, {"train": 6, "validation": 1})
    assert len(predicted_peaks) == 3
    taken = iter([{name: value + 40 for name, value in row.items()} for row in predicted_peaks])
    monkeypatch.setattr(gpu_limits, "peak_memory", lambda _: next(taken))
    monkeypatch.setattr(gpu_limits, "allocated_mib", lambda _: 8.0)

    found = gpu_limits._beyond_tensors(config, 1, CPU)

    assert found["kept_mib"] == 8
    assert found["step_seconds"] > 0
    for row in found["steps"]:
        assert (row["beyond_requested_mib"], row["beyond_allocated_mib"]) == pytest.approx((32, 32))


@pytest.mark.long
@pytest.mark.usefixtures("restored_settings")
def test_workspaces_are_measured_in_four_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDNN_CONV_WSCAP_DBG", "8")
    found = run_part(gpu_limits.workspaces, "8", 1, 1, "cpu")

    assert (found["cap"], found["environment"]) == ("8", "8")
    networks = ("resnet18", "compact")
    assert list(found["cases"]) == [f"{n}-{way}" for n in networks for way in ("deterministic", "tried")]


@pytest.mark.long
@pytest.mark.usefixtures("restored_settings")
@pytest.mark.parametrize("program", ["article", "bf16-again"])
def test_the_largest_batch_is_searched_in_the_articles_loop_and_in_ours(program: str) -> None:
    found = run_part(gpu_limits.largest, program, 3908, 1, 2, 2, "cpu")

    assert (found["largest"], found["rejected"]) == (2, None)
    assert [row["batch"] for row in found["tries"]] == [1, 2]


@pytest.mark.usefixtures("restored_settings")
def test_speed_doubles_the_batch_size_until_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_part(gpu_speed.speed, "compact", "fp32", 16, 0.0, "cpu")
    assert [row["batch"] for row in found["rows"]] == [8, 16]
    assert all(row["images_per_second"] > 0 for row in found["rows"])

    def full(config: Any, *_: Any) -> float:
        if config.train.batch_size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")
        return 1.0

    monkeypatch.setattr(gpu_speed, "_images_per_second", full)
    found = run_part(gpu_speed.speed, "compact", "fp32", 64, 0.0, "cpu")
    assert found["rows"][1:] == [{"batch": 16, "reason": "CUDA out of memory. Tried"}]


@pytest.mark.usefixtures("restored_settings")
def test_without_cuda_graphs_the_eager_step_alone_is_measured() -> None:
    found = run_part(gpu_speed.graphs, {"compact": 2}, ["fp32"], 1, "cpu")["step_seconds"]

    assert found.keys() == {"compact-fp32-2"}
    assert found["compact-fp32-2"].keys() == {"eager"}
    assert found["compact-fp32-2"]["eager"] > 0


@pytest.mark.long
def test_the_cost_of_determinism_has_a_row_per_network() -> None:
    batches = {"resnet18": 1, "compact": 2}
    parts = {
        f"determinism-{str(way).lower()}": {
            "figures": run_part(gpu_speed.determinism, way, batches, 1, "cpu")
        }
        for way in (True, False)
    }

    lines = gpu_tables.tables({"machine": {"gpu": None}, "parts": parts}).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| resnet18", "| compact"]


# -- tries and process memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 63, 64, 65, 127, 500, 1023, 4096])
def test_the_largest_batch_is_found_by_doubling_and_bisection(limit: int) -> None:
    tried: list[int] = []

    def runs(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    found, rejected = gpu_limits.search(runs, 64, 4096, 50)
    assert (found, rejected) == (limit, None if limit == 4096 else limit + 1)
    assert len(tried) == len(set(tried))

    tried.clear()
    found, rejected = gpu_limits.search(runs, 64, 4096, 12)
    assert len(tried) <= 12
    assert found is not None
    assert found <= limit
    assert rejected is None or limit < rejected <= found + max(1, found // 16)


def test_a_search_ends_if_nothing_runs() -> None:
    assert gpu_limits.search(lambda _: False, 64, 4096, 12) == (None, 1)


def test_out_of_memory_is_a_reason_and_other_errors_are_raised() -> None:
    def fail(error: Exception) -> Callable[[], object]:
        def function() -> object:
            raise error

        return function

    assert gpu_cases.oom_reason(lambda: None, CPU) is None
    assert gpu_cases.oom_reason(fail(torch.OutOfMemoryError("CUDA out of memory.\nMore")), CPU) == (
        "CUDA out of memory."
    )
    engine = "GET was unable to find an engine to execute this computation"
    assert gpu_cases.oom_reason(fail(RuntimeError(engine)), CPU) == engine
    with pytest.raises(RuntimeError, match="shape"):
        gpu_cases.oom_reason(fail(RuntimeError("shape")), CPU)


def test_memory_of_a_failed_try_is_freed() -> None:
    held: list[Any] = []

    def function() -> object:
        big = torch.empty(1)
        held.append(weakref.ref(big))
        raise torch.OutOfMemoryError("full")

    gpu_cases.oom_reason(function, CPU)
    assert held[0]() is None


def test_budgets_below_the_unlimited_peak_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(gpu_memory, "limit_memory", lambda budget, context: limits.append(budget - context))

    def run() -> None:
        if limits[-1] < 1000:
            raise torch.OutOfMemoryError("full")

    found = gpu_memory.runs_within((700, 1200, 1800, 2000, 3000), 600, 2000, run, CPU)

    assert found == {"1200": False, "1800": True}


def test_the_limit_is_the_budget_minus_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 100_000 * MIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)

    for budget, context in ((3908, 700), (500, 700), (200_000, 0)):
        gpu_cases.limit_memory(budget, context)

    assert shares == [pytest.approx(0.03208), 0.0, 1.0]
    assert all(isinstance(share, float) for share in shares)  # torch takes no whole number


@pytest.mark.parametrize(
    ("own", "free", "source", "process"),
    [
        (900, [9950, 9000], "NVML, this process", 900),
        (None, [9950, 9000], "NVML, difference since start", 950),
        (None, [None, None], "all used memory of the GPU", 1100),
    ],
)
def test_process_memory_uses_the_best_available_source(
    own: int | None,
    free: list[int | None],
    source: str,
    process: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def mib(value: int | None) -> int | None:
        return None if value is None else value * MIB

    gpu = torch.device("cuda")
    answers = iter(free)
    monkeypatch.setattr(gpu_cases, "_free_bytes", lambda: mib(next(answers)))
    monkeypatch.setattr("captcha_exp.runtime.device.nvml_process_bytes", lambda _: mib(own))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 300 * MIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8900 * MIB, 10_000 * MIB))

    found = gpu_cases.ProcessMeter(gpu).measure()

    assert (found["process_by"], found["process_mib"]) == (source, process)
    assert found["context_mib"] == process - 300
    assert found["gpu_used_mib"] == 1100


def test_free_memory_is_none_without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def refuse() -> None:
        raise NVMLError

    silent = types.SimpleNamespace(NVMLError=NVMLError, nvmlInit=refuse)
    monkeypatch.setitem(sys.modules, "pynvml", silent)

    assert gpu_cases._free_bytes() is None


class FakeGpu:
    """A fake GPU that simulates the memory of a training."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, context_mib: float) -> None:
        self.context_mib, self.limit_mib = context_mib, float("inf")
        self.peak = {"requested_mib": 0.0, "allocated_mib": 0.0, "reserved_mib": 0.0}
        for module in ("gpu_memory", "gpu_limits"):
            monkeypatch.setattr(f"{module}.ProcessMeter", lambda _: self)
            monkeypatch.setattr(f"{module}.limit_memory", self.limit_memory)
            monkeypatch.setattr(f"{module}.clear", lambda _: None)
            monkeypatch.setattr(f"{module}.reserved_mib", lambda _: 0.0)
        monkeypatch.setattr("gpu_cases.clear", lambda _: None)
        monkeypatch.setattr("gpu_limits.reset_peaks", lambda _: None)
        monkeypatch.setattr("gpu_limits.peak_memory", lambda _: dict(self.peak))
        monkeypatch.setattr("captcha_exp.runtime.device.setup_device", lambda _: None)

    def measure(self) -> dict[str, Any]:
        process = self.context_mib + self.peak["reserved_mib"]
        return {"process_mib": process, "process_by": "fake", "context_mib": self.context_mib}

    def limit_memory(self, process_mib: float, context_mib: float) -> None:
        self.limit_mib = process_mib - context_mib

    def take(self, need_mib: float, reserved_mib: float) -> None:
        """Simulate a training that needs `need_mib`, and reserves `reserved_mib` if not limited."""
        if need_mib > self.limit_mib:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        self.peak = {"requested_mib": need_mib, "allocated_mib": need_mib, "reserved_mib": reserved_mib}


def test_a_plan_is_measured_without_a_limit_and_then_within_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch, context_mib=600)

    def epoch(*_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        gpu.take(1000, 2000)
        return gpu.peak, gpu.peak | {"reserved_mib": 2100.0}

    monkeypatch.setattr("gpu_memory.run_epoch", epoch)
    budgets = (768, 1400, 1550, 2048, 2600, 3072)
    found = gpu_memory.plan(Case("compact", "fp32", 2), {"train": 6, "validation": 2}, budgets, "cuda")

    assert found["process_peak_mib"] == 2700
    assert found["training"]["reserved_mib"] == 2000
    assert found["ran_within"] == {"1400": False, "1550": False, "2048": True, "2600": True}
    verdicts = {"1400": "does not fit", "1550": "fits", "2048": "does not fit", "3072": "fits"}
    assert gpu_comparison.false_fits(verdicts, found) == [1550]
    assert gpu_comparison.false_no_fits(verdicts, found) == [2048]


@pytest.mark.parametrize("program", ["article", "bf16"])
def test_the_largest_batch_respects_the_budget_minus_the_context(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(monkeypatch, context_mib=708)
    monkeypatch.setattr("gpu_limits._article_run", lambda batch, _: gpu.take(8 * batch, 8 * batch))
    monkeypatch.setattr("gpu_limits._our_run", lambda _, batch, __: gpu.take(8 * batch, 8 * batch))

    found = gpu_limits.largest(program, 3908, 64, 4096, 40, "cuda")

    assert (found["largest"], found["rejected"]) == (400, 401)
    assert (found["context_mib"], found["context_after_mib"]) == (708, 708)
    assert [row["batch"] for row in found["tries"]][:5] == [64, 128, 256, 512, 384]
    assert [row["reason"] for row in found["tries"]][2:4] == [None, "CUDA out of memory. Tried"]


# -- comparisons ---------------------------------------------------------------------------------------------


def test_bounds_error() -> None:
    assert gpu_comparison.bounds_error(10, (5, 20)) == 0
    assert gpu_comparison.bounds_error(25, (5, 20)) == pytest.approx(0.2)
    assert gpu_comparison.bounds_error(4, (5, 20)) == pytest.approx(-0.25)


def measured(process_mib: float, allocated_mib: float) -> dict[str, Any]:
    found = {"requested_mib": allocated_mib, "allocated_mib": allocated_mib, "reserved_mib": 300.0}
    return {"training": found, "evaluation": found, "process_peak_mib": process_mib, "ran_within": {}}


def test_the_plans_table_counts_errors_and_false_fits() -> None:
    peak = {"requested_mib": 100.0, "allocated_mib": [100.0, 200.0], "reserved_mib": [200.0, 400.0]}
    plan = {"training": peak, "evaluation": peak, "process_mib": [800.0, 1200.0]}
    prediction = {"plan": plan, "verdicts": {"800": "does not fit", "1100": "fits", "3000": "fits"}}
    parts: dict[str, Any] = {
        "predictions": {"figures": {"plans": {"h200": {}, "h100": dict.fromkeys("abcd", prediction)}}},
        "plan-a": {"figures": measured(1000.0, 150.0)},  # as predicted
        "plan-b": {"figures": measured(1250.0, 210.0)},  # more than 1100
        "plan-c": {"figures": measured(800.0, 100.0)},
        "plan-d": {"error": "failed"},
    }

    whole = {"machine": {"gpu": "NVIDIA H100 80GB HBM3"}, "parts": parts}
    found = gpu_comparison.summary(whole)

    assert found == {
        "gpu": "NVIDIA H100 80GB HBM3",
        "gpu_config": "h100",
        "plans": 3,
        "process_error_median": pytest.approx(0.2),  # of the middle, 1000: 0, -0.2 and 0.25
        "process_error_worst": pytest.approx(0.25),
        "process_min_error_median": pytest.approx(0.2),
        "process_outside": 1,
        "process_outside_worst": pytest.approx(50 / 1250),
        "allocated_error_worst": pytest.approx(10 / 210),
        "reserved_error_worst": 0.0,
        "allocated_above_min_mib": 110.0,
        "false_fits": 1,
        "false_no_fits": 1,
        "traces": {},
        "trainings": {},
        "failed_tests": [],
    }
    lines = gpu_tables.tables(whole).splitlines()
    assert lines[3] == "| b | -20.0% | -36.0% | +4.0% | +4.76% | 1100 |"
    assert lines[-1] == (
        "3 plans with the figures of gpu=h100: error of the middle of the process bounds, median 20.0%,"
        " worst 25.0%; outside of the bounds 1 times, worst +4.0%; worst allocated error +4.76%, at most"
        " 110 MiB above the lower bound; false fits 1, false no-fits 1"
    )
    other = {"machine": {"gpu": "NVIDIA A100"}, "parts": parts}
    assert gpu_comparison.gpu_config_of(other) is None
    assert gpu_comparison.plan_errors(gpu_comparison.compare_plans(other)) == {"plans": 0}


def test_the_summary_compares_the_articles_loop_with_ours_and_names_failed_tests() -> None:
    article = {"training_images_per_second": 500.0, "peak_reserved_mib": 900.0, "process_mib": 1500.0}
    ours = {
        "training_images_per_second": 1500.0,
        "train_peak_reserved_mib": 400.0,
        "process_peak_mib": 800.0,
    }
    played = {"allocated_error": 0.0, "reserved_error": -0.002, "first_mismatch": None}
    whole: dict[str, Any] = {
        "machine": {"gpu": "NVIDIA H100"},
        "parts": {
            "ours-cuda-bf16": {"figures": ours},
            "article-cuda": {"figures": article},
            "auto-cuda": {"error": "failed"},
            "allocator-trace-resnet18": {"figures": {"replayed": played}},
            "tests-quick": {"figures": {"failures": {"test_a": "assert"}}},
        },
    }

    found = gpu_comparison.summary(whole)

    assert found is not None
    assert (found["plans"], found["failed_tests"]) == (0, ["test_a"])
    assert found["traces"] == {"allocator-trace-resnet18": {"allocated_error": 0.0, "reserved_error": -0.002}}
    assert list(found["trainings"]) == ["article-cuda", "ours-cuda-bf16"]
    assert found["trainings"]["ours-cuda-bf16"] == {
        "images_per_second": 1500.0,
        "reserved_mib": 400.0,
        "process_mib": 800.0,
        "speedup_over_article": 3.0,
    }


def test_a_session_without_a_gpu_has_no_summary() -> None:
    parts: dict[str, Any] = {"predictions": {"error": "failed"}, "plan-a": {"figures": measured(1.0, 1.0)}}

    whole = {"machine": {"gpu": None}, "parts": parts}
    assert gpu_comparison.summary(whole) is None
    assert gpu_tables.tables({"machine": {}, "parts": {}}) == gpu_tables.tables(whole) == ""


def test_the_table_of_largest_batches_has_predictions() -> None:
    largest = {"h200": {"bf16": None}, "gtx1650": {"bf16": 300}}
    parts: dict[str, Any] = {
        "predictions": {"figures": {"plans": {}, "largest": largest}},
        "largest-article": {"figures": {"largest": 200, "rejected": 208}},
        "largest-bf16": {"figures": {"largest": 400, "rejected": None}},
    }

    whole = {"machine": {"gpu": None}, "parts": parts}
    assert gpu_tables.tables(whole).splitlines()[2:] == [
        "| largest-article | 200 | 208 |  |",
        "| largest-bf16 | 400 | not found | h200 none, gtx1650 300 |",
    ]
