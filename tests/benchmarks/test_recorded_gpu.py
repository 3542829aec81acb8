"""Compare every GPU session in benchmarks/results with the current code.

The comparison itself is tested on a recording of our own model and on deliberately wrong ones.
"""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_comparison
import gpu_predictions
import pytest
from gpu_cases import Case, make_config

from captcha_exp.memory.allocator import CachingAllocator, MemoryEvent, replay_events
from captcha_exp.memory.trace import trace

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

RESERVED = 0.01  # allowed error of the allocator model, relative to the recorded peak
ALLOCATED = 0.01  # allowed distance from the bounds of a plan, relative to the measured peak
PROCESS = 0.02  # likewise, for the process

Session = dict[str, Any]


def sessions(folder: Path = BENCHMARKS / "results") -> dict[str, Session]:
    """Return file name -> session for sessions on a GPU that have recordings or plans."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        session = json.loads(file.read_text())
        if session.get("benchmark") != "gpu_session" or not session.get("machine", {}).get("gpu"):
            continue
        if recordings(session) or plans(session):
            found[file.name] = session
    return found


def recordings(session: Session) -> dict[str, dict[str, Any]]:
    """Return name -> recording of the allocator."""
    return _figures(session, "allocator-trace-")


def plans(session: Session) -> dict[str, dict[str, Any]]:
    """Return name -> measured figures of a predicted training."""
    return _figures(session, "plan-")


def _figures(session: Session, begin: str) -> dict[str, dict[str, Any]]:
    parts = {name: part.get("figures") for name, part in session["parts"].items() if name.startswith(begin)}
    return {name: figures for name, figures in parts.items() if figures}


def plan_problems(plan: dict[str, Any], verdicts: dict[str, str], measured: dict[str, Any]) -> list[str]:
    """Return the differences between a plan and the measurements that exceed the tolerances."""
    errors = gpu_comparison.prediction_errors(plan, measured)
    assert errors is not None, "not measured on a GPU"
    problems = [
        f"{what} is {errors[f'{what}_outside']:+.2%} outside the bounds"
        for what, tolerance in (("allocated", ALLOCATED), ("process", PROCESS))
        if abs(errors[f"{what}_outside"]) > tolerance
    ]
    false = gpu_comparison.false_fits(verdicts, measured)
    return problems + [f"predicted to fit {budget} MiB, but did not" for budget in false]


# -- committed sessions --------------------------------------------------------------------------------------


def committed_sessions() -> dict[str, Session]:
    """Return the committed sessions; skip the test if there are none."""
    if not (found := sessions()):
        pytest.skip("no GPU session in benchmarks/results yet")
    return found


def test_the_allocator_model_reserves_as_much_as_the_gpu() -> None:
    for name, session in committed_sessions().items():
        for part, recording in recordings(session).items():
            assert gpu_comparison.recording_problems(recording, RESERVED) == [], f"{name}: {part}"


@pytest.mark.parametrize("known", [True, False])
def test_the_h200_is_replayed_exactly_only_with_descending_segments(known: bool) -> None:
    """With recorded addresses, and with each new segment below the earlier ones."""
    session = committed_sessions()["2026-11-27-nvidia-h200.json"]
    for part, recording in recordings(session).items():
        chosen = recording if known else {key: recording[key] for key in recording if key != "addresses"}
        found = gpu_comparison.replay_recording(chosen)
        assert (found["reserved_error"], found["allocated_error"]) == (0.0, 0.0), part
        assert found["first_mismatch"] is None, part
    recording = recordings(session)["allocator-trace-resnet18"]
    events = (
        MemoryEvent(tensor, size[0] if kind > 0 else None) for kind, tensor, *size in recording["events"]
    )
    upward = replay_events(events, CachingAllocator(downward=False), {}).reserved_bytes
    assert upward / recording["peaks"]["reserved_bytes"] == pytest.approx(1 - 0.0519, abs=1e-4)


@pytest.mark.long
def test_current_plans_match_the_measurements() -> None:
    for name, session in committed_sessions().items():
        budgets = [int(budget) for budget in _budgets(session)]
        for part, measured in plans(session).items():
            case = Case(*measured["case"])
            gpu = gpu_comparison.gpu_config_of(session)
            assert gpu is not None, f"{name}: no predictions for {session['machine']['gpu']}"
            current = gpu_predictions.predict_case(case, measured["images"], budgets, [gpu])[gpu]
            problems = plan_problems(current["plan"], current["verdicts"], measured)
            assert problems == [], f"{name}: {part}"


def test_predictions_were_made_before_the_measurements() -> None:
    for name, session in committed_sessions().items():
        parts = session["parts"]
        for part in plans(session):
            assert parts["predictions"]["began"] < parts[part]["began"], f"{name}: {part}"
            gpu = gpu_comparison.gpu_config_of(session)
            assert gpu is not None, f"{name}: no predictions for {session['machine']['gpu']}"
            predicted = parts["predictions"]["figures"]["plans"][gpu]
            assert part.removeprefix("plan-") in predicted, f"{name}: {part}"


def _budgets(session: Session) -> list[str]:
    by_gpu = session["parts"]["predictions"]["figures"]["plans"].values()
    return sorted(
        {budget for plans in by_gpu for plan in plans.values() for budget in plan["verdicts"]}, key=int
    )


# -- the comparison ------------------------------------------------------------------------------------------


@functools.cache
def model_recording() -> dict[str, Any]:
    """Return a recording of two steps of `compact`, from our own model in torch's format."""
    traced = trace(make_config(Case("compact", "fp32", 64), "cpu"), 64, {"train": 128, "validation": 64})
    phases = [traced.events[phase.begin : phase.end] for phase in traced.phases]
    usage = replay_events(traced.events, CachingAllocator(), {})
    events = gpu_comparison.compact_events(gpu_comparison.model_entries(phases))
    return {"expandable_segments": False, "peaks": usage._asdict(), **events}


@pytest.fixture
def recording() -> dict[str, Any]:
    """Return a copy that a test may modify."""
    return copy.deepcopy(model_recording())


def test_a_recording_of_our_model_is_replayed_without_error(recording: dict[str, Any]) -> None:
    found = gpu_comparison.replay_recording(recording)

    assert gpu_comparison.recording_problems(recording) == []
    assert (found["reserved_error"], found["allocated_error"]) == (0.0, 0.0)
    assert found["first_mismatch"] is None
    assert recording["marks"] == sorted(recording["marks"])
    assert recording["marks"][-1] == len(recording["events"])


def more_segments(wrong: dict[str, Any]) -> None:
    wrong["peaks"]["reserved_bytes"] = int(wrong["peaks"]["reserved_bytes"] * 1.02)
    wrong["segments"].append([len(wrong["events"]), wrong["peaks"]["reserved_bytes"] // 50])


def lost_events(wrong: dict[str, Any]) -> None:
    del wrong["events"][: len(wrong["events"]) // 2]


def lost_ends(wrong: dict[str, Any]) -> None:
    wrong["events"] = [event for event in wrong["events"] if event[0] > 0]


def lost_segments(wrong: dict[str, Any]) -> None:
    wrong["segments"].pop()


def larger_tensors(wrong: dict[str, Any]) -> None:
    wrong["events"] = [
        [kind, tensor, *(2 * size for size in rest)] for kind, tensor, *rest in wrong["events"]
    ]


def a_tensor_twice(wrong: dict[str, Any]) -> None:
    wrong["events"].insert(1, wrong["events"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (more_segments, "reserved is off by -1."),
        (lost_events, "the events cannot be replayed: KeyError"),
        (lost_ends, "allocated is off by +"),
        (lost_segments, "events are missing"),
        (larger_tensors, "allocated is off by +"),
        (a_tensor_twice, "the events cannot be replayed: ValueError"),
    ],
)
def test_a_wrong_recording_is_detected(
    recording: dict[str, Any], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    change(recording)

    assert any(message in line for line in gpu_comparison.recording_problems(recording))


def test_the_first_differing_segment_is_reported(recording: dict[str, Any]) -> None:
    index, size = recording["segments"][2]
    recording["segments"][2] = [index, size + 512]

    assert gpu_comparison.replay_recording(recording)["first_mismatch"] == index


def test_torchs_history_is_converted_to_compact_lists() -> None:
    """A block is freed once its memory is reusable; earlier blocks are ignored."""
    entries = [
        {"action": "free_completed", "addr": 7, "size": 512},
        {"action": "segment_alloc", "addr": 1, "size": 2097152},
        {"action": "alloc", "addr": 1, "size": 512},
        {"action": "free_requested", "addr": 1, "size": 512},
        {"action": "snapshot", "addr": 0, "size": 0},
        {"action": "free_completed", "addr": 1, "size": 512},
        {"action": "alloc", "addr": 1, "size": 1024},
        {"action": "oom", "size": 99, "device_free": 0},
        {"action": "segment_free", "addr": 9, "size": 1024},
        {"action": "segment_map", "addr": 9, "size": 4096},
        {"action": "segment_unmap", "addr": 9, "size": 2048},
    ]

    assert gpu_comparison.compact_events(entries) == {
        "events": [[1, 1, 512], [-1, 1], [1, 2, 1024]],
        "segments": [[0, 2097152], [3, -1024], [3, 4096], [3, -2048]],
        "addresses": [1, 9, 9, 9],
        "marks": [1],
    }
    assert gpu_comparison.peak_reserved_bytes([[0, 2097152], [3, -1024], [3, 512]]) == 2097152


def test_an_empty_tensor_is_not_an_event() -> None:
    entries = list(
        gpu_comparison.model_entries(
            [[MemoryEvent(1, 0), MemoryEvent(2, 5), MemoryEvent(1, None), MemoryEvent(2, None)]]
        )
    )

    assert [entry["action"] for entry in entries] == [
        "segment_alloc",
        "alloc",
        "free_requested",
        "free_completed",
        "snapshot",
    ]


def make_prediction() -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Return a plan, its verdicts and a measurement that agrees with them."""
    peak = {"requested_mib": 100.0, "allocated_mib": [100.0, 300.0], "reserved_mib": [120.0, 400.0]}
    plan = {"training": peak, "evaluation": peak, "process_mib": [600.0, 1400.0]}
    found = {"requested_mib": 150.0, "allocated_mib": 160.0, "reserved_mib": 200.0}
    measured = {"training": found, "evaluation": dict(found), "process_peak_mib": 1000.0}
    return plan, {"900": "unsure", "2000": "fits"}, measured | {"ran_within": {"900": False}}


def test_a_correct_plan_has_no_problems() -> None:
    assert plan_problems(*make_prediction()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"allocated_mib": 310.0, "reserved_mib": 320.0}}, "allocated is +3.23% outside"),
        ({"evaluation": {"allocated_mib": 98.0, "reserved_mib": 320.0}}, "allocated is -2.04% outside"),
        ({"process_peak_mib": 1500.0}, "process is +6.67% outside"),
        ({"process_peak_mib": 500.0}, "process is -20.00% outside"),
        ({"process_peak_mib": 2001.0, "ran_within": {}}, "predicted to fit 2000 MiB, but did not"),
        (
            {"process_peak_mib": 2001.0, "ran_within": {"2000": False}},
            "predicted to fit 2000 MiB, but did not",
        ),
    ],
)
def test_a_wrong_plan_is_detected(change: dict[str, Any], message: str) -> None:
    plan, verdicts, measured = make_prediction()

    assert any(message in line for line in plan_problems(plan, verdicts, measured | change))


def test_a_run_that_fits_when_limited_is_not_a_false_fit() -> None:
    _, verdicts, measured = make_prediction()
    measured |= {"process_peak_mib": 2001.0, "ran_within": {"2000": True}}

    assert gpu_comparison.false_fits(verdicts, measured) == []


def test_sessions_without_a_gpu_or_figures_are_ignored(tmp_path: Path, recording: dict[str, Any]) -> None:
    part = {"allocator-trace-resnet18": {"figures": recording}}
    written: dict[str, Session] = {
        "gpu": {"machine": {"gpu": "NVIDIA H200"}, "parts": part},
        "dry": {"machine": {"gpu": None}, "parts": copy.deepcopy(part)},
        "failed": {"machine": {"gpu": "NVIDIA H200"}, "parts": {"plan-a": {"error": "died"}}},
        "older": {"machine": {"gpu": "NVIDIA H200"}, "parts": {"doctor": {"figures": []}}},
    }
    for name, session in written.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"benchmark": "gpu_session", **session}))
    (tmp_path / "other.json").write_text(json.dumps({"benchmark": "trace_accuracy", **written["gpu"]}))
    (tmp_path / "lines.jsonl").write_text("{}\n{}\n")

    found = sessions(tmp_path)

    assert list(found) == ["gpu.json"]
    assert gpu_comparison.recording_problems(recordings(found["gpu.json"])["allocator-trace-resnet18"]) == []


def test_a_case_is_predicted_from_its_recorded_figures() -> None:
    """Case and split sizes, as stored in JSON, are sufficient."""
    figures = json.loads(
        json.dumps({"case": Case("compact", "bf16", 16), "images": {"train": 48, "validation": 8}})
    )
    case = Case(*figures["case"])
    plan = gpu_predictions.predict_case(case, figures["images"], [300, 100_000], ["h200"])["h200"]

    assert plan["plan"]["batch_size"] == 16
    assert plan["verdicts"] == {"300": "does not fit", "100000": "fits"}
    low, high = plan["plan"]["process_mib"]
    assert 0 < low < high
