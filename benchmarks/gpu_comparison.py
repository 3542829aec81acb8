"""Compare predictions with the measurements in a session file; needs no GPU.

Used by gpu_session for its tables and by tests/benchmarks/test_recorded_gpu.py for every committed session.
"""

import statistics
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from captcha_exp.memory.allocator import (
    CachingAllocator,
    MemoryEvent,
    SimulatedOutOfMemoryError,
    replay_events,
)
from captcha_exp.memory.blocks import Block

PROJECT = Path(__file__).resolve().parents[1]

Parts = Mapping[str, Mapping[str, Any]]  # part name -> its record in the session file


# -- recordings of the allocator -----------------------------------------------------------------------------


def compact_events(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Convert the history that torch recorded of its allocator to compact lists.

    events    [1, number, bytes]: a block was allocated; [-1, number]: it was freed
    segments  [index, bytes]: a segment was allocated before events[index]; below 0: it was freed
    addresses the address of each of these segments
    marks     indices at which a snapshot was taken

    A block counts as free once its memory is reusable. Frees of blocks that were allocated before the
    recording began are ignored.
    """
    events: list[list[int]] = []
    segments: list[list[int]] = []
    addresses: list[int] = []
    marks: list[int] = []
    live: dict[int, int] = {}
    number = 0
    for entry in entries:
        action = entry["action"]
        if action == "alloc":
            number += 1
            live[entry["addr"]] = number
            events.append([1, number, entry["size"]])
        elif action == "free_completed" and entry["addr"] in live:
            events.append([-1, live.pop(entry["addr"])])
        elif action in ("segment_alloc", "segment_map"):
            segments.append([len(events), entry["size"]])
            addresses.append(entry["addr"])
        elif action in ("segment_free", "segment_unmap"):
            segments.append([len(events), -entry["size"]])
            addresses.append(entry["addr"])
        elif action == "snapshot":
            marks.append(len(events))
    return {"events": events, "segments": segments, "addresses": addresses, "marks": marks}


def model_entries(phases: Iterable[Iterable[MemoryEvent]]) -> Iterator[dict[str, Any]]:
    """Yield the history torch would record if our model were its allocator, with a snapshot per phase."""
    allocator, live, reserved = CachingAllocator(), dict[int, Block](), 0
    for phase in phases:
        for event in phase:
            if event.requested_bytes is None:
                block = live[event.tensor_id]
                if block.size_bytes:
                    yield {"action": "free_requested", "addr": block.address, "size": block.requested_bytes}
                    yield {"action": "free_completed", "addr": block.address, "size": block.requested_bytes}
                replay_events([event], allocator, live)
                continue
            replay_events([event], allocator, live)
            block, new_reserved = live[event.tensor_id], allocator.usage.reserved_bytes
            if new_reserved > reserved:
                yield {"action": "segment_alloc", "addr": block.address, "size": new_reserved - reserved}
                reserved = new_reserved
            if block.size_bytes:  # torch allocates nothing for an empty tensor
                yield {"action": "alloc", "addr": block.address, "size": event.requested_bytes}
        yield {"action": "snapshot", "addr": 0, "size": 0}


def peak_reserved_bytes(segments: Iterable[Sequence[int]]) -> int:
    """Return the peak of the bytes in segments."""
    current = peak = 0
    for _, size in segments:
        current += size
        peak = max(peak, current)
    return peak


def replay_recording(recording: Mapping[str, Any]) -> dict[str, Any]:
    """Replay a recording with our allocator model; return its peaks and their relative errors.

    `first_mismatch` is the index of the first event after which the reserved bytes differ from those on the
    GPU. Segments get the recorded addresses, or, without these, descending ones.
    """
    segments = recording["segments"]
    first_segments = takewhile(lambda segment: segment[1] > 0, segments)  # later, an address may recur
    addresses = [address for _, address in zip(first_segments, recording.get("addresses", ()), strict=False)]
    allocator = CachingAllocator(expandable=recording["expandable_segments"], addresses=addresses)
    live: dict[int, Block] = {}
    indices = [index for index, _ in segments]
    reserved, first_mismatch = 0, None
    counted = 0
    for index, (kind, tensor, *sizes) in enumerate(recording["events"]):
        replay_events([MemoryEvent(tensor, sizes[0] if kind > 0 else None)], allocator, live)
        end = bisect_left(indices, index + 1)
        reserved += sum(size for _, size in segments[counted:end])
        counted = end
        if first_mismatch is None and reserved != allocator.usage.reserved_bytes:
            first_mismatch = index
    measured = recording["peaks"]
    return {
        "allocated_bytes": allocator.peak.allocated_bytes,
        "reserved_bytes": allocator.peak.reserved_bytes,
        "allocated_error": allocator.peak.allocated_bytes / measured["allocated_bytes"] - 1,
        "reserved_error": allocator.peak.reserved_bytes / measured["reserved_bytes"] - 1,
        "first_mismatch": first_mismatch,
    }


def recording_problems(recording: Mapping[str, Any], tolerance: float = 0.01) -> list[str]:
    """Return the errors of a recording or of our replay of it, one line each."""
    try:
        replayed = replay_recording(recording)
    except (SimulatedOutOfMemoryError, KeyError, ValueError) as error:
        return [f"the events cannot be replayed: {type(error).__name__}: {error}"]
    problems = []
    for kind in ("allocated", "reserved"):
        if abs(relative := replayed[f"{kind}_error"]) > tolerance:
            problems.append(f"{kind} is off by {relative:+.2%}; at most {tolerance:.0%} is allowed")
    recorded, measured = peak_reserved_bytes(recording["segments"]), recording["peaks"]["reserved_bytes"]
    if recorded != measured:
        problems.append(f"segments sum to {recorded} bytes, but {measured} were reserved: events are missing")
    return problems


# -- plans ---------------------------------------------------------------------------------------------------


def bounds_error(value: float, bounds: Sequence[float]) -> float:
    """Return the distance of a value from bounds relative to it: 0 within, negative below them."""
    low, high = bounds
    if low <= value <= high:
        return 0.0
    return (value - high) / value if value > high else (value - low) / value


def prediction_errors(plan: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the relative errors of a plan (as JSON), or None if nothing was measured on a GPU."""
    if measured["training"]["allocated_mib"] is None:
        return None
    process, bounds = measured["process_peak_mib"], plan["process_mib"]
    phases = ("training", "evaluation")

    def worst(key: str) -> float:
        return max((bounds_error(measured[phase][key], plan[phase][key]) for phase in phases), key=abs)

    return {
        "process": (bounds[0] + bounds[1]) / 2 / process - 1,
        "process_min": bounds[0] / process - 1,
        "process_outside": bounds_error(process, bounds),
        "allocated_outside": worst("allocated_mib"),
        "reserved_outside": worst("reserved_mib"),
        "allocated_above_min_mib": max(
            measured[phase]["allocated_mib"] - plan[phase]["allocated_mib"][0] for phase in phases
        ),
    }


def false_fits(verdicts: Mapping[str, str], measured: Mapping[str, Any]) -> list[int]:
    """Return the budgets, in MiB, that were predicted to fit and did not.

    A run that took more without a limit may still succeed within the budget: a budget counts only if the run
    limited to it failed, or if there was none.
    """
    ran = measured.get("ran_within", {})
    return [
        int(budget)
        for budget, verdict in verdicts.items()
        if verdict == "fits" and measured["process_peak_mib"] > int(budget) and not ran.get(budget, False)
    ]


def false_no_fits(verdicts: Mapping[str, str], measured: Mapping[str, Any]) -> list[int]:
    """Return the budgets, in MiB, that were predicted not to fit and did."""
    ran = measured.get("ran_within", {})
    return [
        int(budget)
        for budget, verdict in verdicts.items()
        if verdict == "does not fit"
        and (measured["process_peak_mib"] <= int(budget) or ran.get(budget, False))
    ]


def gpu_config_of(session: Mapping[str, Any]) -> str | None:
    """Return the GPU config to compare a session with: the one whose name the device name contains.

    None without a GPU, without predictions, and for a GPU without predictions.
    """
    device = session["machine"].get("gpu")
    predicted = (session["parts"].get("predictions", {}).get("figures") or {}).get("plans", {})
    if not device:
        return None
    words = device.lower().replace("-", " ").split()
    return next((gpu for gpu in predicted if gpu in words), None)


def compare_plans(session: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the errors and false verdicts of each plan that was predicted and measured on a GPU."""
    gpu, parts, rows = gpu_config_of(session), session["parts"], []
    plans = parts["predictions"]["figures"]["plans"][gpu] if gpu else {}
    for name, predicted in plans.items():
        measured = parts.get(f"plan-{name}", {}).get("figures")
        if measured and (errors := prediction_errors(predicted["plan"], measured)):
            fits, no_fits = (find(predicted["verdicts"], measured) for find in (false_fits, false_no_fits))
            rows.append({"name": name, **errors, "false_fits": fits, "false_no_fits": no_fits})
    return rows


def plan_errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Aggregate the relative errors of all compared plans.

    `process_error` is the error of the middle of the predicted bounds of the process peak (the goal: median
    2 %, worst 5 %); `process_outside_worst` is the largest distance of a peak from these bounds.
    """
    if not rows:
        return {"plans": 0}
    process = [abs(row["process"]) for row in rows]
    return {
        "plans": len(rows),
        "process_error_median": statistics.median(process),
        "process_error_worst": max(process),
        "process_min_error_median": statistics.median(abs(row["process_min"]) for row in rows),
        "process_outside": sum(row["process_outside"] != 0 for row in rows),
        "process_outside_worst": max((row["process_outside"] for row in rows), key=abs),
        "allocated_error_worst": max((row["allocated_outside"] for row in rows), key=abs),
        "reserved_error_worst": max((row["reserved_outside"] for row in rows), key=abs),
        "allocated_above_min_mib": max(row["allocated_above_min_mib"] for row in rows),
        "false_fits": sum(len(row["false_fits"]) for row in rows),
        "false_no_fits": sum(len(row["false_no_fits"]) for row in rows),
    }


def trace_errors(parts: Parts) -> dict[str, dict[str, float]]:
    """Return, for each recorded trace, the errors of our allocator model on its events."""
    found = {}
    for name, part in parts.items():
        if name.startswith("allocator-trace-") and (figures := part.get("figures")):
            replayed = figures["replayed"]
            found[name] = {key: replayed[key] for key in ("allocated_error", "reserved_error")}
    return found


def compare_trainings(parts: Parts) -> dict[str, dict[str, Any]]:
    """Return images per second and MiB of the article's loop and of our trainings, and the speedups."""
    rows: dict[str, dict[str, Any]] = {}
    for name in ("article-cuda", *(name for name in parts if name.startswith(("ours-cuda-", "auto-cuda")))):
        if figures := parts.get(name, {}).get("figures"):
            rows[name] = {
                "images_per_second": figures["training_images_per_second"],
                "reserved_mib": figures.get("peak_reserved_mib", figures.get("train_peak_reserved_mib")),
                "process_mib": figures.get("process_peak_mib", figures.get("process_mib")),
            }
    if article := rows.get("article-cuda"):
        for row in rows.values():
            row["speedup_over_article"] = row["images_per_second"] / article["images_per_second"]
    return rows


def failed_tests(parts: Parts) -> list[str]:
    """Return the names of the failed gpu tests, including those of interrupted parts."""
    found = []
    for name, part in parts.items():
        if name.startswith("tests-"):
            found += list((part.get("figures") or part.get("partial") or {}).get("failures", {}))
    return found


def summary(session: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the errors of the plans and the comparison with the article's loop; None without a GPU."""
    if not session["machine"].get("gpu"):
        return None
    parts = session["parts"]
    return {
        "gpu": session["machine"]["gpu"],
        "gpu_config": gpu_config_of(session),
        **plan_errors(compare_plans(session)),
        "traces": trace_errors(parts),
        "trainings": compare_trainings(parts),
        "failed_tests": failed_tests(parts),
    }
