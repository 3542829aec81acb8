"""Format the tables of a GPU session in Markdown."""

from collections.abc import Mapping
from typing import Any

from gpu_comparison import Parts, compare_plans, failed_tests, gpu_config_of, plan_errors

from captcha_exp.memory.allocator import MIB

ARTICLE = {"cpu_seconds_per_1000": 13.60, "gpu_seconds_per_1000": 1.90, "process_mib": 2915}


def trainings(parts: Mapping[str, Any]) -> str:
    """Return the table of time and memory, including the article's figures."""
    lines = ["| | seconds per 1,000 images | images/s | process, MiB |", "|---|---|---|---|"]
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
        speed = f"{figures['seconds_per_1000']:.3f} | {figures['training_images_per_second']:,.0f}"
        lines.append(f"| {name} | {speed} | {f'{memory:,.0f}' if memory else 'unknown'} |")
    return "\n".join(lines)


def tables(session: Mapping[str, Any]) -> str:
    """Return the tables of memory and speed, or an empty string without figures."""
    parts = session["parts"]
    found = (_plans(session), _recordings(parts), _largest(parts), _determinism_cost(parts), _tests(parts))
    return "\n\n".join(filter(None, found))


def _plans(session: Mapping[str, Any]) -> str:
    rows = compare_plans(session)
    if not rows:
        return ""
    found = plan_errors(rows)
    lines = [
        "| plan | process, middle of the bounds | lower bound | outside | allocated, outside | false fits |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = " | ".join(f"{row[key]:+.1%}" for key in ("process", "process_min", "process_outside"))
        false = ", ".join(map(str, row["false_fits"])) or "none"
        lines.append(f"| {row['name']} | {shares} | {row['allocated_outside']:+.2%} | {false} |")
    lines += [
        "",
        f"{found['plans']} plans with the figures of gpu={gpu_config_of(session)}: error of the middle of the"
        f" process bounds, median {found['process_error_median']:.1%}, worst"
        f" {found['process_error_worst']:.1%}; outside of the bounds {found['process_outside']} times, worst"
        f" {found['process_outside_worst']:+.1%}; worst"
        f" allocated error {found['allocated_error_worst']:+.2%}, at most"
        f" {found['allocated_above_min_mib']:,.0f} MiB above the lower bound; false fits"
        f" {found['false_fits']},"
        f" false no-fits {found['false_no_fits']}",
    ]
    return "\n".join(lines)


def _recordings(parts: Parts) -> str:
    lines = []
    for name, part in parts.items():
        figures = part.get("figures")
        if name.startswith("allocator-trace") and figures:
            found, off = figures["replayed"], figures["replayed"]["reserved_error"]
            where = "as the GPU" if found["first_mismatch"] is None else "differs"
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
            by_gpu = {gpu: batches[variant] for gpu, batches in predicted.items() if variant in batches}
            text = ", ".join(f"{gpu} {batch if batch else 'none'}" for gpu, batch in by_gpu.items())
            rejected = figures["rejected"] or "not found"
            lines.append(f"| {name} | {figures['largest']} | {rejected} | {text} |")
    head = ["| | largest batch that ran | smallest that did not | predicted to fit |", "|---|---|---|---|"]
    return "\n".join([*head, *lines]) if lines else ""


def _determinism_cost(parts: Parts) -> str:
    both = [(parts.get(f"determinism-{value}") or {}).get("figures") for value in ("true", "false")]
    if not all(both):
        return ""
    head = ["| | seconds of a step, deterministic | not | cost |", "|---|---|---|---|"]
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
