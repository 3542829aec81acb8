"""What a card showed once, held against today's code on any machine: every session in benchmarks/results.

The reader is tested too, on a recording of our own model and on ones that are wrong on purpose: a test that
cannot fail would tell nothing.
"""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_judging
import gpu_predictions
import pytest
from gpu_cases import Case, config_of

from captcha_exp.memory.allocator import CachingAllocator, MemoryEvent, replay_events
from captcha_exp.memory.trace import trace

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

RESERVED = 0.01  # a share of the recorded peak: so far our model of the allocator may be off
ALLOCATED = 0.01  # a share of the measured peak: so far it may lie outside of a plan's bounds
PROCESS = 0.02  # likewise, of what the process held

Session = dict[str, Any]


def sessions(folder: Path = BENCHMARKS / "results") -> dict[str, Session]:
    """File name -> a session that was on a card and has what can be held against today's code."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        session = json.loads(file.read_text())
        if session.get("benchmark") != "gpu_session" or not session.get("machine", {}).get("gpu"):
            continue
        if recordings(session) or plans(session):
            found[file.name] = session
    return found


def recordings(session: Session) -> dict[str, dict[str, Any]]:
    """Name -> a recording of the card's allocator."""
    return _figures(session, "allocator-trace-")


def plans(session: Session) -> dict[str, dict[str, Any]]:
    """Name -> what was measured of a training that was foretold."""
    return _figures(session, "plan-")


def _figures(session: Session, begin: str) -> dict[str, dict[str, Any]]:
    parts = {name: part.get("figures") for name, part in session["parts"].items() if name.startswith(begin)}
    return {name: figures for name, figures in parts.items() if figures}


def plan_mistakes(plan: dict[str, Any], verdicts: dict[str, str], measured: dict[str, Any]) -> list[str]:
    """Where a plan is not what was measured, beyond what is borne."""
    off = gpu_judging.errors(plan, measured)
    assert off is not None, "measured on no card"
    mistakes = [
        f"{what} lies {off[f'{what}_outside']:+.2%} outside of the plan"
        for what, most in (("allocated", ALLOCATED), ("process", PROCESS))
        if abs(off[f"{what}_outside"]) > most
    ]
    false = gpu_judging.false_fits(verdicts, measured)
    return mistakes + [f"it was to fit {budget} MiB and did not" for budget in false]


# -- what was recorded ---------------------------------------------------------------------------------------


def recorded() -> dict[str, Session]:
    """The committed sessions; without any the test is left out."""
    if not (found := sessions()):
        pytest.skip("no recorded session of a card in benchmarks/results yet")
    return found


def test_our_allocator_reserves_what_a_card_reserved() -> None:
    for name, session in recorded().items():
        for part, recording in recordings(session).items():
            assert gpu_judging.recording_mistakes(recording, RESERVED) == [], f"{name}: {part}"


@pytest.mark.parametrize("known", [True, False])
def test_the_h200_is_replayed_to_the_byte_and_with_segments_upward_it_is_not(known: bool) -> None:
    """Whether the driver's addresses are known, or each new segment lies below the earlier ones."""
    session = recorded()["2026-11-27-nvidia-h200.json"]
    for part, recording in recordings(session).items():
        chosen = recording if known else {key: recording[key] for key in recording if key != "addresses"}
        found = gpu_judging.replayed(chosen)
        assert (found["reserved_error"], found["allocated_error"]) == (0.0, 0.0), part
        assert found["first_other_segment"] is None, part
    recording = recordings(session)["allocator-trace-resnet18"]
    events = (
        MemoryEvent(tensor, size[0] if kind > 0 else None) for kind, tensor, *size in recording["events"]
    )
    upward = replay_events(events, CachingAllocator(downward=False), {}).reserved_bytes
    assert upward / recording["peaks"]["reserved_bytes"] == pytest.approx(1 - 0.0519, abs=1e-4)


def test_todays_plans_are_what_a_card_showed() -> None:
    for name, session in recorded().items():
        budgets = [int(budget) for budget in _budgets(session)]
        for part, measured in plans(session).items():
            case = Case(*measured["case"])
            card = gpu_judging.card_of(session)
            assert card is not None, f"{name}: no predictions for {session['machine']['gpu']}"
            today = gpu_predictions.predict_case(case, measured["images"], budgets, [card])[card]
            mistakes = plan_mistakes(today["plan"], today["verdicts"], measured)
            assert mistakes == [], f"{name}: {part}"


def test_what_was_foretold_then_stood_in_the_file_before_it_was_measured() -> None:
    for name, session in recorded().items():
        parts = session["parts"]
        for part in plans(session):
            assert parts["predictions"]["began"] < parts[part]["began"], f"{name}: {part}"
            card = gpu_judging.card_of(session)
            assert card is not None, f"{name}: no predictions for {session['machine']['gpu']}"
            predicted = parts["predictions"]["figures"]["plans"][card]
            assert part.removeprefix("plan-") in predicted, f"{name}: {part}"


def _budgets(session: Session) -> list[str]:
    cards = session["parts"]["predictions"]["figures"]["plans"].values()
    return sorted(
        {budget for plans in cards for plan in plans.values() for budget in plan["verdicts"]}, key=int
    )


# -- the reader ----------------------------------------------------------------------------------------------


@functools.cache
def made() -> dict[str, Any]:
    """The events of two steps of `compact`, from our own model as torch would write them down."""
    traced = trace(config_of(Case("compact", "fp32", 64), "cpu"), 64, {"train": 128, "validation": 64})
    phases = [traced.events[phase.begin : phase.end] for phase in traced.phases]
    usage = replay_events(traced.events, CachingAllocator(), {})
    compacted = gpu_judging.compacted(gpu_judging.entries_of_model(phases))
    return {"expandable_segments": False, "peaks": usage._asdict(), **compacted}


@pytest.fixture
def recording() -> dict[str, Any]:
    """A copy, for a test to spoil."""
    return copy.deepcopy(made())


def test_a_recording_of_our_model_is_played_without_a_mistake(recording: dict[str, Any]) -> None:
    found = gpu_judging.replayed(recording)

    assert gpu_judging.recording_mistakes(recording) == []
    assert (found["reserved_error"], found["allocated_error"]) == (0.0, 0.0)
    assert found["first_other_segment"] is None
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
    ("plant", "words"),
    [
        (more_segments, "reserved is off by -1."),
        (lost_events, "the events cannot be played: KeyError"),
        (lost_ends, "allocated is off by +"),
        (lost_segments, "events are lost"),
        (larger_tensors, "allocated is off by +"),
        (a_tensor_twice, "the events cannot be played: ValueError"),
    ],
)
def test_a_wrong_recording_is_seen(
    recording: dict[str, Any], plant: Callable[[dict[str, Any]], None], words: str
) -> None:
    plant(recording)

    assert any(words in line for line in gpu_judging.recording_mistakes(recording))


def test_the_first_segment_that_differs_is_told(recording: dict[str, Any]) -> None:
    place, size = recording["segments"][2]
    recording["segments"][2] = [place, size + 512]

    assert gpu_judging.replayed(recording)["first_other_segment"] == place


def test_torchs_entries_become_short_lists() -> None:
    """A block counts until its memory can be used again; what was there before has no number."""
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

    assert gpu_judging.compacted(entries) == {
        "events": [[1, 1, 512], [-1, 1], [1, 2, 1024]],
        "segments": [[0, 2097152], [3, -1024], [3, 4096], [3, -2048]],
        "addresses": [1, 9, 9, 9],
        "marks": [1],
    }
    assert gpu_judging.reserved_of([[0, 2097152], [3, -1024], [3, 512]]) == 2097152


def test_an_empty_tensor_is_no_event_for_torch() -> None:
    entries = list(
        gpu_judging.entries_of_model(
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


def foretold_and_measured() -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """A plan and a measurement that is all right by it."""
    peak = {"requested_mib": 100.0, "allocated_mib": [100.0, 300.0], "reserved_mib": [120.0, 400.0]}
    plan = {"training": peak, "evaluation": peak, "process_mib": [600.0, 1400.0]}
    found = {"requested_mib": 150.0, "allocated_mib": 160.0, "reserved_mib": 200.0}
    measured = {"training": found, "evaluation": dict(found), "process_peak_mib": 1000.0}
    return plan, {"900": "unsure", "2000": "fits"}, measured | {"ran_within": {"900": False}}


def test_a_plan_that_holds_has_no_mistake() -> None:
    assert plan_mistakes(*foretold_and_measured()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training": {"allocated_mib": 310.0, "reserved_mib": 320.0}}, "allocated lies +3.23% outside"),
        ({"evaluation": {"allocated_mib": 98.0, "reserved_mib": 320.0}}, "allocated lies -2.04% outside"),
        ({"process_peak_mib": 1500.0}, "process lies +6.67% outside"),
        ({"process_peak_mib": 500.0}, "process lies -20.00% outside"),
        ({"process_peak_mib": 2001.0, "ran_within": {}}, "it was to fit 2000 MiB and did not"),
        (
            {"process_peak_mib": 2001.0, "ran_within": {"2000": False}},
            "it was to fit 2000 MiB and did not",
        ),
    ],
)
def test_a_plan_that_does_not_hold_is_seen(change: dict[str, Any], words: str) -> None:
    plan, verdicts, measured = foretold_and_measured()

    assert any(words in line for line in plan_mistakes(plan, verdicts, measured | change))


def test_a_run_that_took_more_where_there_was_plenty_is_no_false_fit_if_it_ran_within() -> None:
    _, verdicts, measured = foretold_and_measured()
    measured |= {"process_peak_mib": 2001.0, "ran_within": {"2000": True}}

    assert gpu_judging.false_fits(verdicts, measured) == []


def test_a_session_of_no_card_or_without_figures_is_left_alone(
    tmp_path: Path, recording: dict[str, Any]
) -> None:
    part = {"allocator-trace-resnet18": {"figures": recording}}
    written: dict[str, Session] = {
        "gpu": {"machine": {"gpu": "NVIDIA H200"}, "parts": part},
        "dry": {"machine": {"gpu": None}, "parts": copy.deepcopy(part)},
        "failed": {"machine": {"gpu": "NVIDIA H200"}, "parts": {"plan-a": {"error": "died"}}},
        "older": {"machine": {"gpu": "NVIDIA H200"}, "parts": {"doctor": {"figures": []}}},
    }
    for name, session in written.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"benchmark": "gpu_session", **session}))
    (tmp_path / "other.json").write_text(json.dumps({"benchmark": "oracle", **written["gpu"]}))
    (tmp_path / "lines.jsonl").write_text("{}\n{}\n")

    found = sessions(tmp_path)

    assert list(found) == ["card.json"]
    assert gpu_judging.recording_mistakes(recordings(found["card.json"])["allocator-trace-resnet18"]) == []


def test_todays_plan_of_a_case_is_made_from_what_its_figures_say() -> None:
    """Case and pictures, as JSON has them, are all that is needed to foretell it again."""
    figures = json.loads(
        json.dumps({"case": Case("compact", "bf16", 16), "images": {"train": 48, "validation": 8}})
    )
    case = Case(*figures["case"])
    plan = gpu_predictions.predict_case(case, figures["images"], [300, 100_000], ["h200"])["h200"]

    assert plan["plan"]["batch_size"] == 16
    assert plan["verdicts"] == {"300": "does not fit", "100000": "fits"}
    least, most = plan["plan"]["process_mib"]
    assert 0 < least < most
