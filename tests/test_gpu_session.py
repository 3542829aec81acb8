"""The session for a graphics card does all that it does without one, and loses nothing when a part fails."""

import json
import os
import subprocess
import sys
import time
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from captcha_exp.checkpoint import TrainState
from captcha_exp.config import Config
from captcha_exp.memory.allocator import MIB
from captcha_exp.memory.trace import Trace, trace
from captcha_exp.step import fresh_state

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_session.py"
sys.path.append(str(SCRIPT.parent))

import gpu_cases  # noqa: E402 - benchmarks/ is no package
import gpu_judging  # noqa: E402
import gpu_memory  # noqa: E402
import gpu_session  # noqa: E402
import gpu_speed  # noqa: E402
from gpu_cases import Case  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture
def settings_kept() -> Iterator[None]:
    """What a part sets for its whole process is undone: here it shares it with tests."""
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = benchmark
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)


def session(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_part_runs_in_its_own_process_and_a_second_call_adds_to_the_file(tmp_path: Path) -> None:
    out = tmp_path / "session.json"
    out.write_text(json.dumps({"parts": {"earlier": {"figures": 1}}}))

    done = session("--dry-run", "--parts", "doctor", "--out", str(out))

    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    assert json.loads(done.stdout) == written
    assert written["parts"]["earlier"] == {"figures": 1}
    levels = {finding["level"] for finding in written["parts"]["doctor"]["figures"]}
    assert levels <= {"ok", "note", "problem"}
    assert written["machine"]["card"] is None
    assert written["article"] == {
        "cpu_seconds_per_1000": 13.60,
        "gpu_seconds_per_1000": 1.90,
        "process_mib": 2915,
    }


def test_a_name_that_is_no_part_is_one_line(tmp_path: Path) -> None:
    done = session("--dry-run", "--parts", "doctr", "--out", str(tmp_path / "x.json"))

    assert done.returncode == 1
    assert done.stderr.startswith("--parts: there is no doctr; there are doctor, tests, article-cpu, ")
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("name", "limit", "words"), [("nothing", 60, "KeyError"), ("doctor", 0, "took more than 0 s")]
)
def test_a_part_that_fails_or_takes_too_long_is_an_error_and_not_the_end(
    name: str, limit: int, words: str
) -> None:
    part = gpu_session.run_part(name, dry_run=True, limit=limit)

    assert words in part["error"]
    assert "figures" not in part


def ended(number: int) -> bool:
    """Whether the process is gone, or soon will be; a killed one takes a moment."""
    try:
        if psutil.Process(number).status() == psutil.STATUS_ZOMBIE:
            return True
    except psutil.NoSuchProcess:
        return True
    time.sleep(0.1)
    return False


def test_a_part_that_takes_too_long_ends_with_all_that_it_started(tmp_path: Path) -> None:
    """A process that it started would keep its pipes open, and the session waiting."""
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    began = time.perf_counter()

    assert gpu_session.bounded([sys.executable, "-c", parent], dict(os.environ), 3) is None

    assert time.perf_counter() - began < 30
    number = int((tmp_path / "pid").read_text())
    assert any(ended(number) for _ in range(100))


def test_a_test_of_the_card_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "1 failed", "")
    monkeypatch.setattr("gpu_session.subprocess.run", lambda *_, **__: failed)

    with pytest.raises(SystemExit, match="1 failed"):
        gpu_session.tests(collect_only=False)


def test_the_parts_of_a_card_hold_every_precision_beside_the_article() -> None:
    names = list(gpu_session.Numbers(dry_run=False).parts())
    dry = list(gpu_session.Numbers(dry_run=True).parts())

    assert [name for name in names if "cuda" in name] == [
        "article-cuda",
        "ours-cuda-fp32",
        "ours-cuda-bf16",
        "ours-cuda-fp16",
        "auto-cuda",
    ]
    assert names[:4] == dry[:4] == ["doctor", "tests", "article-cpu", "ours-cpu-fp32"]
    kinds = {name.split("-")[0] for name in names}
    assert kinds == {name.split("-")[0] for name in dry}


def test_the_table_has_a_line_for_each_training_and_the_articles_first() -> None:
    figures: dict[str, Any] = {"seconds_per_1000": 0.5, "training_pictures_per_second": 1700.0}
    parts = {
        "doctor": {"figures": []},
        "article-cuda": {"figures": {**figures, "process_mib": 2915.4}},
        "ours-cuda-bf16": {"figures": {**figures, "process_peak_mib": 900.0}},
        "ours-cuda-fp16": {"error": "died"},
    }

    lines = gpu_session.table(parts).splitlines()

    assert lines[2:] == [
        "| the article, its CPU | 13.60 | | |",
        "| the article, GTX 1650 | 1.90 | | 2,915 |",
        "| article-cuda | 0.500 | 1,700 | 2,915 |",
        "| ours-cuda-bf16 | 0.500 | 1,700 | 900 |",
    ]


# -- parts, calls and the file -------------------------------------------------------------------------------


def test_24_trainings_are_foretold_in_four_batches_and_three_variants_of_each_network() -> None:
    cases = [case for case, _ in gpu_session.Numbers(dry_run=False).cases()]

    assert len({case.name for case in cases}) == 24
    for network, largest in (("resnet18", 1000), ("compact", 4096)):
        own = [case for case in cases if case.network == network]
        assert len({case.batch for case in own}) == 4
        assert max(case.batch for case in own) == largest
        assert {case.variant for case in own} == {"fp32", "bf16", "fp32-again"}


def test_every_part_is_in_a_call_and_the_first_has_what_plans_are_judged_by() -> None:
    names = list(gpu_session.Numbers(dry_run=False).parts())
    first, second, third = (gpu_session.call(number, names) for number in (1, 2, 3))

    assert first[0] == "predictions"
    assert {name for name in names if name.startswith(("plan-", "allocator-trace-", "context-"))} < {*first}
    assert {*first} & {*second} == {"predictions"}
    assert sorted(third) == sorted(names)  # those that have their figures by then are left alone
    assert third[:2] == ["tests", "article-cpu"]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("b", ["b"]),
        ("plan", ["plan-1", "plan-2"]),
        ("plan-2,plan,a", ["plan-2", "plan-1", "a"]),
    ],
)
def test_a_name_means_a_part_or_all_that_begin_with_it(asked: str, found: list[str]) -> None:
    assert gpu_session.chosen_parts(asked, ["a", "plan-1", "b", "plan-2", "planner"]) == found


def test_limits_of_cudnn_stand_in_the_environment_of_their_part_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = gpu_session.Numbers(dry_run=False).parts()
    given = {name: part.environment for name, part in parts.items() if part.environment}
    key = "CUDNN_CONV_WSCAP_DBG"
    assert given == {f"workspaces-{cap}": {key: cap} for cap in ("0", "8", "64", "128")}

    seen: list[dict[str, str]] = []

    def bounded(_: Any, environment: dict[str, str], __: float) -> subprocess.CompletedProcess[str]:
        seen.append(environment)
        return subprocess.CompletedProcess([], 0, "told before\n[1]\n", "")

    monkeypatch.setattr("gpu_session.bounded", bounded)
    part = gpu_session.run_part("workspaces-8", False, 9, given["workspaces-8"])
    gpu_session.run_part("workspaces-none", False, 9, {})

    assert part["figures"] == [1]
    assert [environment.get(key) for environment in seen] == ["8", None]


def test_the_file_has_a_line_for_each_part() -> None:
    session = {
        "benchmark": "x",
        "machine": {"card": None},
        "parts": {"a": {"figures": [[1, 2], [3]]}, "b": {}},
    }
    text = gpu_session.as_text(session)

    assert json.loads(text) == session
    assert text.splitlines()[4:6] == ['"a": {"figures": [[1, 2], [3]]},', '"b": {}']
    assert json.loads(gpu_session.as_text(session | {"parts": {}}))["parts"] == {}


class Session:
    """A session whose parts are not run: each is told what to give, and what stood in the file by then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: Path, **given: dict[str, Any]) -> None:
        self.out, self.given = out, given
        self.parts: dict[str, Any] = {}
        self.ran: list[str] = []
        self.in_file: dict[str, list[str]] = {}  # part -> those that had figures in the file when it began
        self.limits: list[float] = []
        monkeypatch.setattr("gpu_session.run_part", self.run_part)

    def run_part(self, name: str, dry_run: bool, limit: float, environment: Any) -> dict[str, Any]:
        self.ran.append(name)
        self.limits.append(limit)
        parts = json.loads(self.out.read_text())["parts"] if self.out.exists() else {}
        self.in_file[name] = [part for part, found in parts.items() if "figures" in found]
        return self.given.get(name, {"figures": {}})

    def measure(self, names: list[str], seconds: float = 100) -> None:
        parts = {
            name: gpu_session.Part(print, {}, 50) for name in ("predictions", "plan-1", "largest-a", "b")
        }
        gpu_session.measure({"x": 0, "parts": self.parts}, names, parts, self.out, True, seconds)


@pytest.mark.parametrize("names", [["b", "plan-1", "predictions"], ["b", "plan-1"]])
def test_what_is_foretold_stands_in_the_file_before_anything_is_measured(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(monkeypatch, tmp_path / "x.json")
    session.measure(names)

    assert session.ran == ["predictions", "b", "plan-1"]
    assert session.in_file == {"predictions": [], "b": ["predictions"], "plan-1": ["predictions", "b"]}


def test_what_was_foretold_earlier_is_not_foretold_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(monkeypatch, tmp_path / "x.json")
    session.parts["predictions"] = {"figures": {"said": 1}}
    session.measure(["predictions", "plan-1"])

    assert session.ran == ["plan-1"]
    assert session.parts["predictions"] == {"figures": {"said": 1}}


def test_a_part_that_fails_costs_itself_and_what_it_foretold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = {"error": "died"}
    session = Session(monkeypatch, tmp_path / "a.json", b=failed)
    session.measure(["predictions", "b", "plan-1"])
    assert session.parts == {"predictions": {"figures": {}}, "b": failed, "plan-1": {"figures": {}}}

    session = Session(monkeypatch, tmp_path / "b.json", predictions=failed)
    session.measure(["plan-1", "largest-a", "b"])
    assert session.ran == ["predictions", "b"]
    assert session.parts["predictions"] == failed
    assert session.parts["plan-1"]["error"].startswith("not begun: what it measures is not foretold")
    assert session.parts["largest-a"] == session.parts["plan-1"]
    assert session.parts["b"] == {"figures": {}}


def test_no_part_begins_when_the_time_is_over_and_none_goes_on_past_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(monkeypatch, tmp_path / "x.json")
    session.measure(["predictions"], seconds=20)
    assert session.limits[0] <= 20
    session.parts["b"] = {"figures": {"of": "an earlier call"}}
    session.measure(["plan-1", "b"], seconds=5)

    assert session.ran == ["predictions"]
    assert session.parts["plan-1"] == {"error": "not begun: 5 s were left"}
    assert session.parts["b"] == {"figures": {"of": "an earlier call"}}


def test_calls_of_a_dry_run_end_in_time_and_go_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    """The same file again: nothing that has its figures is done twice."""
    out = tmp_path / "session.json"
    names = gpu_session.call(3, list(gpu_session.Numbers(dry_run=True).parts()))
    ready: dict[str, Any] = {name: {"figures": {}} for name in names if name != "matrix-products"}
    out.write_text(json.dumps({"parts": ready}))

    done = session("--dry-run", "--call", "3", "--out", str(out))

    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line.endswith(": done")] == ["matrix-products: done"]
    assert set(json.loads(out.read_text())["parts"]["matrix-products"]["figures"]) == {
        "fp32",
        "tf32",
        "bf16",
        "fp16",
    }


def test_predictions_need_no_card_and_all_others_do(tmp_path: Path) -> None:
    done = session("--parts", "predictions,doctor", "--out", str(tmp_path / "x.json"))

    assert done.returncode == 1
    assert "finds no CUDA card" in done.stderr
    assert gpu_session.machine(True)["card"] is None


# -- the parts, with small numbers ---------------------------------------------------------------------------


def small(act: Callable[..., Any], *arguments: Any) -> Any:
    """What a part gives, as it comes out of the file."""
    return json.loads(json.dumps(act(*arguments), allow_nan=False))


@pytest.mark.usefixtures("settings_kept")
def test_a_plan_is_measured_on_what_it_was_foretold_for() -> None:
    case, pictures = Case("compact", "bf16-again", 4), {"train": 12, "validation": 6}

    foretold = small(gpu_memory.foretell, case, pictures, [100, 50_000])
    found = small(gpu_memory.plan, case, pictures, [100, 50_000], "cpu")

    assert (found["case"], found["pictures"]) == (foretold["case"], foretold["pictures"])
    assert foretold["verdicts"] == {"100": "does not fit", "50000": "fits"}
    assert foretold["plan"]["fits"] == "fits"  # on the card of CARD
    assert found["training"] == {"requested_mib": None, "allocated_mib": None, "reserved_mib": None}
    assert found["process_peak_mib"] > 100
    assert gpu_judging.errors(foretold["plan"], found) is None


def test_a_batch_is_traced_once_for_all_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[int] = []

    def counting(config: Config, batch_size: int, pictures: Mapping[str, int]) -> Trace:
        traced.append(batch_size)
        return trace(config, batch_size, pictures)

    monkeypatch.setattr("gpu_memory.trace", counting)

    found = gpu_memory.foretell(Case("compact", "fp32", 4), {"train": 12, "validation": 6}, [600, 3000, 9000])

    assert traced == [4]
    assert len(set(found["verdicts"].values())) > 1


@pytest.mark.usefixtures("settings_kept")
def test_the_context_has_a_row_for_each_thing_that_is_done_first() -> None:
    found = small(gpu_memory.context, "compact", "bf16", 2, "cpu")

    assert [row["stage"] for row in found["stages"]] == [
        "CUDA starts",
        "matrix product",
        "matrix product and its gradient",
        "linear layer and its gradient",
        "convolution and its gradient",
        "training step",
        "epoch",
    ]
    assert all(row["context_mib"] is None and row["process_mib"] > 0 for row in found["stages"])


@pytest.mark.usefixtures("settings_kept")
def test_recordings_of_both_networks_are_small_and_played_at_once() -> None:
    found = [small(gpu_memory.allocator_trace, network, 100, 2, "cpu") for network in gpu_session.BATCHES]

    assert len(json.dumps(found)) < MIB
    for recording in found:
        assert recording["from"] == "model"
        assert recording["replayed"]["reserved_error"] == 0
        assert gpu_judging.recording_mistakes(recording) == []
        assert 0 < recording["traced_bytes"] <= recording["peaks"]["requested_bytes"]


@pytest.mark.usefixtures("settings_kept")
def test_a_recording_begins_before_the_first_tensor_and_has_a_mark_after_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a card that writes down what our model does."""
    config = gpu_cases.config_of(Case("compact", "fp32", 4), "cpu")
    pictures = {"train": 8, "validation": 4}
    modelled = gpu_memory._modelled(trace(config, 4, pictures))
    log: list[Any] = []
    entries = [{"action": "alloc", "addr": 1, "size": 512}, {"action": "snapshot", "addr": 0, "size": 0}]

    def snapshot() -> dict[str, Any]:
        log.append("snapshot")
        return {"device_traces": [entries]}

    def record(**how: Any) -> None:
        log.append(how["enabled"])

    def state_of(config: Config, device: torch.device) -> TrainState:
        log.append("state")
        return fresh_state(config, device)

    stats = {f"{kind}_bytes.all.peak": 512 for kind in ("requested", "allocated", "reserved")}
    monkeypatch.setattr(torch.cuda, "init", lambda: log.append("init"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: stats)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", snapshot)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr("gpu_memory.fresh_state", state_of)

    found = gpu_memory._recorded(config, pictures, CPU)

    assert log == ["init", "all", "state", "snapshot", "snapshot", "snapshot", "snapshot", None]
    assert found["mark_names"] == ["state", "step 1", "step 2"]
    assert (found["events"], found["marks"], found["entries"]) == ([[1, 1, 512]], [1], 2)
    assert set(found) == set(modelled)


@pytest.mark.usefixtures("settings_kept")
def test_workspaces_are_what_is_above_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card that takes 40 MiB more than foretold, of which 8 are kept."""
    config = gpu_cases.config_of(Case("compact", "fp32", 2), "cpu")
    said = gpu_memory._tensors_alone(config, {"train": 6, "validation": 1})
    assert len(said) == 3
    taken = iter([{name: value + 40 for name, value in row.items()} for row in said])
    monkeypatch.setattr(gpu_memory, "peaks", lambda _: next(taken))
    monkeypatch.setattr(gpu_memory, "allocated_mib", lambda _: 8.0)

    found = gpu_memory._beyond_tensors(config, 1, CPU)

    assert found["kept_mib"] == 8
    assert found["step_seconds"] > 0
    for row in found["steps"]:
        assert (row["beyond_requested_mib"], row["beyond_allocated_mib"]) == pytest.approx((32, 32))


@pytest.mark.usefixtures("settings_kept")
def test_workspaces_are_looked_for_in_four_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDNN_CONV_WSCAP_DBG", "8")
    found = small(gpu_memory.workspaces, "8", 1, 1, "cpu")

    assert (found["cap"], found["seen"]) == ("8", "8")
    networks = ("resnet18", "compact")
    assert list(found["cases"]) == [f"{n}-{way}" for n in networks for way in ("deterministic", "tried")]


@pytest.mark.usefixtures("settings_kept")
@pytest.mark.parametrize("who", ["article", "bf16-again"])
def test_the_largest_batch_is_looked_for_in_the_articles_loop_and_in_ours(who: str) -> None:
    found = small(gpu_memory.largest, who, 3908, 1, 2, 2, "cpu")

    assert (found["largest"], found["refused"]) == (2, None)
    assert [row["batch"] for row in found["tries"]] == [1, 2]


@pytest.mark.usefixtures("settings_kept")
def test_speed_doubles_the_batch_until_none_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = small(gpu_speed.speed, "compact", "fp32", 16, 0.0, "cpu")
    assert [row["batch"] for row in found["rows"]] == [8, 16]
    assert all(row["pictures_per_second"] > 0 for row in found["rows"])

    def full(config: Any, *_: Any) -> float:
        if config.train.batch_size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")
        return 1.0

    monkeypatch.setattr(gpu_speed, "_pictures_per_second", full)
    found = small(gpu_speed.speed, "compact", "fp32", 64, 0.0, "cpu")
    assert found["rows"][1:] == [{"batch": 16, "reason": "CUDA out of memory. Tried"}]


@pytest.mark.usefixtures("settings_kept")
def test_the_price_of_determinism_is_a_step_with_it_and_one_without() -> None:
    batches = {"resnet18": 1, "compact": 2}
    parts = {
        f"determinism-{str(way).lower()}": {"figures": small(gpu_speed.determinism, way, batches, 1, "cpu")}
        for way in (True, False)
    }

    lines = gpu_judging.tables(parts).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| resnet18", "| compact"]


# -- tries, and what a process holds -------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 63, 64, 65, 127, 500, 1023, 4096])
def test_the_largest_batch_is_found_by_doubling_and_bisection(limit: int) -> None:
    tried: list[int] = []

    def runs(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    found, refused = gpu_memory.search(runs, 64, 4096, 50)
    assert (found, refused) == (limit, None if limit == 4096 else limit + 1)
    assert len(tried) == len(set(tried))

    tried.clear()
    found, refused = gpu_memory.search(runs, 64, 4096, 12)
    assert len(tried) <= 12
    assert found is not None
    assert found <= limit
    assert refused is None or limit < refused <= found + max(1, found // 16)


def test_a_search_in_which_nothing_runs_ends() -> None:
    assert gpu_memory.search(lambda _: False, 64, 4096, 12) == (None, 1)


def test_a_try_that_finds_no_memory_has_a_reason_and_other_errors_are_errors() -> None:
    def fail(error: Exception) -> Callable[[], object]:
        def act() -> object:
            raise error

        return act

    assert gpu_cases.attempt(lambda: None, CPU) is None
    assert gpu_cases.attempt(fail(torch.OutOfMemoryError("CUDA out of memory.\nMore")), CPU) == (
        "CUDA out of memory."
    )
    engine = "GET was unable to find an engine to execute this computation"
    assert gpu_cases.attempt(fail(RuntimeError(engine)), CPU) == engine
    with pytest.raises(RuntimeError, match="shape"):
        gpu_cases.attempt(fail(RuntimeError("shape")), CPU)


def test_what_a_failed_try_held_is_gone_before_the_next() -> None:
    held: list[Any] = []

    def act() -> object:
        big = torch.empty(1)
        held.append(weakref.ref(big))
        raise torch.OutOfMemoryError("full")

    gpu_cases.attempt(act, CPU)
    assert held[0]() is None


def test_budgets_below_a_free_runs_peak_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(gpu_memory, "hold", lambda budget, context: limits.append(budget - context))

    def run() -> None:
        if limits[-1] < 1000:
            raise torch.OutOfMemoryError("full")

    found = gpu_memory.runs_within((700, 1200, 1800, 2000, 3000), 600, 2000, run, CPU)

    assert found == {"1200": False, "1800": True}


def test_a_limit_is_the_budget_without_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 100_000 * MIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)

    for budget, context in ((3908, 700), (500, 700), (200_000, 0)):
        gpu_cases.hold(budget, context)

    assert shares == [pytest.approx(0.03208), 0.0, 1.0]
    assert all(isinstance(share, float) for share in shares)  # torch takes no whole number


@pytest.mark.parametrize(
    ("own", "free", "by", "process"),
    [
        (900, [9950, 9000], "NVML, this process", 900),
        (None, [9950, 9000], "NVML, the card now and before", 950),
        (None, [None, None], "all that the card has in use", 1100),
    ],
)
def test_a_process_is_measured_by_whoever_knows(
    own: int | None,
    free: list[int | None],
    by: str,
    process: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def mib(value: int | None) -> int | None:
        return None if value is None else value * MIB

    card = torch.device("cuda")
    answers = iter(free)
    monkeypatch.setattr(gpu_cases, "_free_bytes", lambda: mib(next(answers)))
    monkeypatch.setattr("captcha_exp.device.nvml_bytes", lambda _: mib(own))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 300 * MIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8900 * MIB, 10_000 * MIB))

    found = gpu_cases.ProcessMeter(card).now()

    assert (found["process_by"], found["process_mib"]) == (by, process)
    assert found["context_mib"] == process - 300
    assert found["card_used_mib"] == 1100


def test_a_driver_that_does_not_answer_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def refuse() -> None:
        raise NVMLError

    silent = types.SimpleNamespace(NVMLError=NVMLError, nvmlInit=refuse)
    monkeypatch.setitem(sys.modules, "pynvml", silent)

    assert gpu_cases._free_bytes() is None


class MadeUpCard:
    """A card of which a training takes so much, as far as the parts ask: no tensor is on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, context_mib: float) -> None:
        self.context_mib, self.limit_mib = context_mib, float("inf")
        self.peak = {"requested_mib": 0.0, "allocated_mib": 0.0, "reserved_mib": 0.0}
        monkeypatch.setattr("gpu_memory.ProcessMeter", lambda _: self)
        monkeypatch.setattr("gpu_memory.hold", self.hold)
        monkeypatch.setattr("gpu_memory.clear", lambda _: None)
        monkeypatch.setattr("gpu_cases.clear", lambda _: None)
        monkeypatch.setattr("gpu_memory.start", lambda _: None)
        monkeypatch.setattr("gpu_memory.peaks", lambda _: dict(self.peak))
        monkeypatch.setattr("gpu_memory.reserved_mib", lambda _: 0.0)
        monkeypatch.setattr("captcha_exp.device.set_up", lambda _: None)

    def now(self) -> dict[str, Any]:
        process = self.context_mib + self.peak["reserved_mib"]
        return {"process_mib": process, "process_by": "nobody", "context_mib": self.context_mib}

    def hold(self, process_mib: float, context_mib: float) -> None:
        self.limit_mib = process_mib - context_mib

    def take(self, need_mib: float, reserved_mib: float) -> None:
        """A training that needs so much, and reserves so much where there is plenty."""
        if need_mib > self.limit_mib:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        self.peak = {"requested_mib": need_mib, "allocated_mib": need_mib, "reserved_mib": reserved_mib}


def test_a_plan_is_measured_free_and_then_within_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    card = MadeUpCard(monkeypatch, context_mib=600)

    def epoch(*_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        card.take(1000, 2000)
        return card.peak, card.peak | {"reserved_mib": 2100.0}

    monkeypatch.setattr("gpu_memory.epoch", epoch)
    budgets = (768, 1400, 1550, 2048, 2600, 3072)
    found = gpu_memory.plan(Case("compact", "fp32", 2), {"train": 6, "validation": 2}, budgets, "cuda")

    assert found["process_peak_mib"] == 2700
    assert found["training"]["reserved_mib"] == 2000
    assert found["ran_within"] == {"1400": False, "1550": False, "2048": True, "2600": True}
    verdicts = {"1400": "does not fit", "1550": "fits", "2048": "does not fit", "3072": "fits"}
    assert gpu_judging.false_fits(verdicts, found) == [1550]
    assert gpu_judging.false_noes(verdicts, found) == [2048]


@pytest.mark.parametrize("who", ["article", "bf16"])
def test_the_largest_batch_is_that_of_the_budget_without_the_context(
    who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = MadeUpCard(monkeypatch, context_mib=708)
    monkeypatch.setattr("gpu_memory._article_run", lambda batch, _: card.take(8 * batch, 8 * batch))
    monkeypatch.setattr("gpu_memory._our_run", lambda _, batch, __: card.take(8 * batch, 8 * batch))

    found = gpu_memory.largest(who, 3908, 64, 4096, 40, "cuda")

    assert (found["largest"], found["refused"]) == (400, 401)
    assert (found["context_mib"], found["context_after_mib"]) == (708, 708)
    assert [row["batch"] for row in found["tries"]][:5] == [64, 128, 256, 512, 384]
    assert [row["reason"] for row in found["tries"]][2:4] == [None, "CUDA out of memory. Tried"]


# -- what is made of it --------------------------------------------------------------------------------------


def test_percentiles_and_distances() -> None:
    assert gpu_judging.percentile([3, 1, 2], 0.5) == 2
    assert gpu_judging.percentile([0, 10], 0.95) == pytest.approx(9.5)
    assert gpu_judging.percentile([7], 0.95) == 7
    assert gpu_judging.percentile(list(range(101)), 0.95) == 95
    assert gpu_judging.outside(10, (5, 20)) == 0
    assert gpu_judging.outside(25, (5, 20)) == pytest.approx(0.2)
    assert gpu_judging.outside(4, (5, 20)) == pytest.approx(-0.25)


def measured(process_mib: float, allocated_mib: float) -> dict[str, Any]:
    found = {"requested_mib": allocated_mib, "allocated_mib": allocated_mib, "reserved_mib": 300.0}
    return {"training": found, "evaluation": found, "process_peak_mib": process_mib, "ran_within": {}}


def test_the_plans_table_counts_errors_and_false_fits() -> None:
    peak = {"requested_mib": 100.0, "allocated_mib": [100.0, 200.0], "reserved_mib": [200.0, 400.0]}
    plan = {"training": peak, "evaluation": peak, "process_mib": [800.0, 1200.0]}
    foretold = {"plan": plan, "verdicts": {"800": "does not fit", "1100": "fits", "3000": "fits"}}
    parts: dict[str, Any] = {
        "predictions": {"figures": {"plans": dict.fromkeys("abcd", foretold)}},
        "plan-a": {"figures": measured(1000.0, 150.0)},  # all as foretold
        "plan-b": {"figures": measured(1250.0, 210.0)},  # more than 1100
        "plan-c": {"figures": measured(800.0, 100.0)},
        "plan-d": {"error": "died"},
    }

    found = gpu_judging.summary(parts)

    assert found == {
        "plans": 3,
        "process_error_median": pytest.approx(0.2),
        "process_error_95": pytest.approx(0.245),
        "least_error_median": pytest.approx(0.2),
        "least_error_95": pytest.approx(0.344),
        "process_outside": 1,
        "allocated_error_worst": pytest.approx(10 / 210),
        "allocated_above_least_mib": 110.0,
        "false_fits": 1,
        "false_noes": 1,
    }
    lines = gpu_judging.tables(parts).splitlines()
    assert lines[3] == "| b | -20.0% | -36.0% | +4.0% | +4.76% | 1100 |"
    assert lines[-1] == (
        "3 plans: process error, median 20.0%, 95th percentile 24.5%; of the lower bound 20.0%"
        " and 34.4%; outside of the bounds 1 times; worst allocated error +4.76%, at most"
        " 110 MiB above the least; false fits 1, false noes 1"
    )


def test_without_a_card_there_is_nothing_to_be_judged() -> None:
    parts: dict[str, Any] = {"predictions": {"error": "died"}, "plan-a": {"figures": measured(1.0, 1.0)}}

    assert gpu_judging.summary(parts) is None
    assert gpu_judging.tables({}) == gpu_judging.tables(parts) == ""


def test_the_largest_batches_stand_beside_what_was_said() -> None:
    said = {"bf16": {"h200": None, "gtx1650": 300}}
    parts: dict[str, Any] = {
        "predictions": {"figures": {"plans": {}, "largest": said}},
        "largest-article": {"figures": {"largest": 200, "refused": 208}},
        "largest-bf16": {"figures": {"largest": 400, "refused": None}},
    }

    assert gpu_judging.tables(parts).splitlines()[2:] == [
        "| largest-article | 200 | 208 |  |",
        "| largest-bf16 | 400 | not found | h200 none, gtx1650 300 |",
    ]
