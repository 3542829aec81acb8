"""The tables of a GPU session, in Markdown."""

from collections.abc import Mapping
from typing import Any

from gpu_judging import Parts, card_of, failed_tests, judged, plan_errors

from captcha_exp.memory.allocator import MIB

ARTICLE = {"cpu_seconds_per_1000": 13.60, "gpu_seconds_per_1000": 1.90, "process_mib": 2915}


def trainings(parts: Mapping[str, Any]) -> str:
    """Return time and memory beside the article's."""
    lines = ["| | seconds per 1,000 pictures | pictures/s | process, MiB |", "|---|---|---|---|"]
    lines.append(f"| the article, its CPU | {ARTICLE['cpu_seconds_per_1000']:.2f} | | |")
    lines.append(
        f"| the article, GTX 1650 | {ARTICLE['gpu_seconds_per_1000']:.2f} | | {ARTICLE['process_mib']:,} |"
    )
    for name, part in parts.items():
        figures = part.get("figures")
        if not isinstance(figures, dict) or "seconds_per_1000" not in figures:
            continue
        memory = next(
            (figures[k] for k in ("process_peak_mib", "process_mib", "peak_rss_mib") if figures.get(k)), None
        )
        speed = f"{figures['seconds_per_1000']:.3f} | {figures['training_pictures_per_second']:,.0f}"
        lines.append(f"| {name} | {speed} | {f'{memory:,.0f}' if memory else 'unknown'} |")
    return "\n".join(lines)


def tables(session: Mapping[str, Any]) -> str:
    """Return what the parts about memory and speed found, in Markdown; empty if there is nothing."""
    parts = session["parts"]
    found = (_plans(session), _recordings(parts), _largest(parts), _prices(parts), _tests(parts))
    return "\n\n".join(filter(None, found))


def _plans(session: Mapping[str, Any]) -> str:
    rows = judged(session)
    if not rows:
        return ""
    found = plan_errors(rows)
    lines = [
        "| plan | process, middle of the bounds | lower bound | outside | allocated, outside | false fits |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = " | ".join(f"{row[what]:+.1%}" for what in ("process", "process_least", "process_outside"))
        false = ", ".join(map(str, row["false_fits"])) or "none"
        lines.append(f"| {row['name']} | {shares} | {row['allocated_outside']:+.2%} | {false} |")
    lines += [
        "",
        f"{found['plans']} plans with the figures of gpu={card_of(session)}: error of the middle of the"
        f" process bounds, median {found['process_error_median']:.1%}, worst"
        f" {found['process_error_worst']:.1%}; outside of the bounds {found['process_outside']} times, worst"
        f" {found['process_outside_worst']:+.1%}; worst"
        f" allocated error {found['allocated_error_worst']:+.2%}, at most"
        f" {found['allocated_above_least_mib']:,.0f} MiB above the least; false fits {found['false_fits']},"
        f" false noes {found['false_noes']}",
    ]
    return "\n".join(lines)


def _recordings(parts: Parts) -> str:
    lines = []
    for name, part in parts.items():
        figures = part.get("figures")
        if name.startswith("allocator-trace") and figures:
            found, off = figures["replayed"], figures["replayed"]["reserved_error"]
            where = "as the GPU" if found["first_other_segment"] is None else "differs in between"
            reserved = figures["peaks"]["reserved_bytes"] / MIB
            lines.append(f"| {name} | {reserved:,.0f} | {off:+.2%} | {where} |")
    head = ["| | reserved, MiB | our model | segment by segment |", "|---|---|---|---|"]
    return "\n".join([*head, *lines]) if lines else ""


def _largest(parts: Parts) -> str:
    predicted = (parts.get("predictions", {}).get("figures") or {}).get("largest", {})
    lines = []
    for name, part in parts.items():
        figures = part.get("figures")
        if name.startswith("largest-") and figures:
            variant = name.removeprefix("largest-")
            said = {card: batches[variant] for card, batches in predicted.items() if variant in batches}
            words = ", ".join(f"{card} {batch if batch else 'none'}" for card, batch in said.items())
            refused = figures["rejected"] or "not found"
            lines.append(f"| {name} | {figures['largest']} | {refused} | {words} |")
    head = ["| | largest batch that ran | one that did not | predicted to fit |", "|---|---|---|---|"]
    return "\n".join([*head, *lines]) if lines else ""


def _prices(parts: Parts) -> str:
    both = [(parts.get(f"determinism-{way}") or {}).get("figures") for way in ("true", "false")]
    if not all(both):
        return ""
    head = ["| | seconds of a step, deterministic | not | price |", "|---|---|---|---|"]
    on, off = (figures["step_seconds"] for figures in both if figures)
    lines = [
        f"| {name} | {on[name]:.5f} | {off[name]:.5f} | {on[name] / off[name] - 1:+.1%} |" for name in on
    ]
    return "\n".join([*head, *lines])


def _tests(parts: Parts) -> str:
    counts = [
        part.get("figures") or part.get("partial") for name, part in parts.items() if name[:6] == "tests-"
    ]
    passed, failed = sum((each or {}).get("passed", 0) for each in counts), failed_tests(parts)
    if not passed and not failed:
        return ""
    return f"gpu tests: {passed} passed, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}"
