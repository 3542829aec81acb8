"""Compare predictions with what a GPU showed; read from a session's file, without a GPU.

Used by gpu_session for its tables, and by tests/benchmarks/test_recorded_gpu.py for every committed session.
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

Parts = Mapping[str, Mapping[str, Any]]  # name -> what stands in the session's file


# -- recordings of the allocator -----------------------------------------------------------------------------


def compacted(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What torch recorded of its allocator, in short lists.

    events    [1, number, bytes]: it gave a block; [-1, number]: it got it back
    segments  [place, bytes]: before events[place] the driver gave so much; less than 0: got it back
    addresses the driver's address of each of these segments
    marks     places at which a snapshot was taken

    A block counts as free when its memory can be used again. One that was there before the recording began
    has no number; its end is left out.
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


def entries_of_model(phases: Iterable[Iterable[MemoryEvent]]) -> Iterator[dict[str, Any]]:
    """What torch would record of these phases if its allocator were our model, a snapshot after each."""
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
            block, now = live[event.tensor_id], allocator.usage.reserved_bytes
            if now > reserved:
                yield {"action": "segment_alloc", "addr": block.address, "size": now - reserved}
                reserved = now
            if block.size_bytes:  # for an empty tensor torch asks for nothing
                yield {"action": "alloc", "addr": block.address, "size": event.requested_bytes}
        yield {"action": "snapshot", "addr": 0, "size": 0}


def reserved_of(segments: Iterable[Sequence[int]]) -> int:
    """The most bytes that the driver had given at one time."""
    now = most = 0
    for _, size in segments:
        now += size
        most = max(most, now)
    return most


def replayed(recording: Mapping[str, Any]) -> dict[str, Any]:
    """Our model's peaks for a recording's events, and how far they are off: shares of what was measured.

    `first_other_segment` is the event at which the driver's memory is first another than the card's. Segments
    lie where the driver placed them; in a recording without addresses, each below the earlier ones.
    """
    segments = recording["segments"]
    kept = takewhile(lambda segment: segment[1] > 0, segments)  # an address may come again after that
    addresses = [address for _, address in zip(kept, recording.get("addresses", ()), strict=False)]
    allocator = CachingAllocator(expandable=recording["expandable_segments"], addresses=addresses)
    live: dict[int, Block] = {}
    places = [place for place, _ in segments]
    theirs, first_other = 0, None
    known = 0
    for place, (kind, tensor, *size) in enumerate(recording["events"]):
        replay_events([MemoryEvent(tensor, size[0] if kind > 0 else None)], allocator, live)
        until = bisect_left(places, place + 1)
        theirs += sum(bytes_ for _, bytes_ in segments[known:until])
        known = until
        if first_other is None and theirs != allocator.usage.reserved_bytes:
            first_other = place
    measured = recording["peaks"]
    return {
        "allocated_bytes": allocator.peak.allocated_bytes,
        "reserved_bytes": allocator.peak.reserved_bytes,
        "allocated_error": allocator.peak.allocated_bytes / measured["allocated_bytes"] - 1,
        "reserved_error": allocator.peak.reserved_bytes / measured["reserved_bytes"] - 1,
        "first_other_segment": first_other,
    }


def recording_mistakes(recording: Mapping[str, Any], most: float = 0.01) -> list[str]:
    """What is wrong with a recording, or with our model of it; nothing where all is well."""
    try:
        found = replayed(recording)
    except (SimulatedOutOfMemoryError, KeyError, ValueError) as error:
        return [f"the events cannot be played: {type(error).__name__}: {error}"]
    mistakes = []
    for what in ("allocated", "reserved"):
        if abs(off := found[f"{what}_error"]) > most:
            mistakes.append(f"{what} is off by {off:+.2%}; {most:.0%} is borne")
    given, measured = reserved_of(recording["segments"]), recording["peaks"]["reserved_bytes"]
    if given != measured:
        mistakes.append(f"the segments come to {given} bytes, but {measured} were reserved: events are lost")
    return mistakes


# -- plans ---------------------------------------------------------------------------------------------------


def outside(value: float, bounds: Sequence[float]) -> float:
    """How far a value lies outside of bounds, as a share of it; 0 within, below 0 where it is too small."""
    least, most = bounds
    if least <= value <= most:
        return 0.0
    return (value - most) / value if value > most else (value - least) / value


def errors(plan: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, float] | None:
    """How far a plan, as JSON, is off what was measured, in shares of that; None without a card."""
    if measured["training"]["allocated_mib"] is None:
        return None
    process, bounds = measured["process_peak_mib"], plan["process_mib"]
    kinds = ("training", "evaluation")

    def worst(what: str) -> float:
        return max((outside(measured[kind][what], plan[kind][what]) for kind in kinds), key=abs)

    return {
        "process": (bounds[0] + bounds[1]) / 2 / process - 1,
        "process_least": bounds[0] / process - 1,
        "process_outside": outside(process, bounds),
        "allocated_outside": worst("allocated_mib"),
        "reserved_outside": worst("reserved_mib"),
        "allocated_above_least_mib": max(
            measured[kind]["allocated_mib"] - plan[kind]["allocated_mib"][0] for kind in kinds
        ),
    }


def false_fits(verdicts: Mapping[str, str], measured: Mapping[str, Any]) -> list[int]:
    """The budgets, in MiB, that were said to do and did not.

    A run that took more where there was plenty may yet do with less; so it counts if the limited run within
    the budget, or for want of one the free run, took more.
    """
    ran = measured.get("ran_within", {})
    return [
        int(budget)
        for budget, verdict in verdicts.items()
        if verdict == "fits" and measured["process_peak_mib"] > int(budget) and not ran.get(budget, False)
    ]


def false_noes(verdicts: Mapping[str, str], measured: Mapping[str, Any]) -> list[int]:
    """The budgets, in MiB, that were said not to do, and did."""
    ran = measured.get("ran_within", {})
    return [
        int(budget)
        for budget, verdict in verdicts.items()
        if verdict == "does not fit"
        and (measured["process_peak_mib"] <= int(budget) or ran.get(budget, False))
    ]


def card_of(session: Mapping[str, Any]) -> str | None:
    """Return the card file whose predictions a session is judged by: the one that the device's name contains.

    None without a GPU, without predictions, and for a GPU that nothing was predicted for.
    """
    device = session["machine"].get("gpu")
    predicted = (session["parts"].get("predictions", {}).get("figures") or {}).get("plans", {})
    if not device:
        return None
    words = device.lower().replace("-", " ").split()
    return next((card for card in predicted if card in words), None)


def judged(session: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each plan that was predicted and measured on a GPU, with its errors and false fits."""
    card, parts, rows = card_of(session), session["parts"], []
    plans = parts["predictions"]["figures"]["plans"][card] if card else {}
    for name, predicted in plans.items():
        measured = parts.get(f"plan-{name}", {}).get("figures")
        if measured and (found := errors(predicted["plan"], measured)):
            yes, no = (check(predicted["verdicts"], measured) for check in (false_fits, false_noes))
            rows.append({"name": name, **found, "false_fits": yes, "false_noes": no})
    return rows


def plan_errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the errors of all judged plans together; shares of what was measured.

    `process_error` is that of the middle of the predicted bounds of the process peak, the number that the
    goal (median 2 %, worst 5 %) speaks of; `process_outside_worst` is how far a peak lies outside of them.
    """
    if not rows:
        return {"plans": 0}
    process = [abs(row["process"]) for row in rows]
    return {
        "plans": len(rows),
        "process_error_median": statistics.median(process),
        "process_error_worst": max(process),
        "process_least_error_median": statistics.median(abs(row["process_least"]) for row in rows),
        "process_outside": sum(row["process_outside"] != 0 for row in rows),
        "process_outside_worst": max((row["process_outside"] for row in rows), key=abs),
        "allocated_error_worst": max((row["allocated_outside"] for row in rows), key=abs),
        "reserved_error_worst": max((row["reserved_outside"] for row in rows), key=abs),
        "allocated_above_least_mib": max(row["allocated_above_least_mib"] for row in rows),
        "false_fits": sum(len(row["false_fits"]) for row in rows),
        "false_noes": sum(len(row["false_noes"]) for row in rows),
    }


def traces(parts: Parts) -> dict[str, dict[str, float]]:
    """Return, for each recorded trace, the errors of our allocator model played on its events."""
    found = {}
    for name, part in parts.items():
        if name.startswith("allocator-trace-") and (figures := part.get("figures")):
            played = figures["replayed"]
            found[name] = {key: played[key] for key in ("allocated_error", "reserved_error")}
    return found


def comparison(parts: Parts) -> dict[str, dict[str, Any]]:
    """Return images per second and MiB of the article's loop and of our trainings, and how they compare."""
    rows: dict[str, dict[str, Any]] = {}
    for name in ("article-cuda", *(name for name in parts if name.startswith(("ours-cuda-", "auto-cuda")))):
        if figures := parts.get(name, {}).get("figures"):
            rows[name] = {
                "images_per_second": figures["training_pictures_per_second"],
                "reserved_mib": figures.get("peak_reserved_mib", figures.get("train_peak_reserved_mib")),
                "process_mib": figures.get("process_peak_mib", figures.get("process_mib")),
            }
    if article := rows.get("article-cuda"):
        for row in rows.values():
            row["times_article_speed"] = row["images_per_second"] / article["images_per_second"]
    return rows


def failed_tests(parts: Parts) -> list[str]:
    """Return the names of the gpu tests that failed; of a part that was cut, those until then."""
    found = []
    for name, part in parts.items():
        if name.startswith("tests-"):
            found += list((part.get("figures") or part.get("partial") or {}).get("failures", {}))
    return found


def summary(session: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how good the plans are and how our loop compares with the article's; None without a GPU."""
    if not session["machine"].get("gpu"):
        return None
    parts = session["parts"]
    return {
        "gpu": session["machine"]["gpu"],
        "card_file": card_of(session),
        **plan_errors(judged(session)),
        "traces": traces(parts),
        "trainings": comparison(parts),
        "failed_tests": failed_tests(parts),
    }
