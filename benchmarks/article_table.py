"""Update the table of time and memory in README.md from the committed GPU sessions.

    python benchmarks/article_table.py            write it between the two markers
    python benchmarks/article_table.py --check    exit code 1 if README.md is out of date

Reads benchmarks/results/*.json, written by benchmarks/gpu_session.py; needs no GPU. Without a session the
table has only the figures of the article.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
RESULTS = PROJECT / "benchmarks" / "results"
README = PROJECT / "README.md"
BEGIN, END = "<!-- article-table:begin -->", "<!-- article-table:end -->"
HEAD = (
    "| program | device | precision | seconds per 1,000 images | images/s, training | process, MiB |",
    "|---|---|---|---|---|---|",
)
# Source: the article; see benchmarks/article_loop.py.
ARTICLE = {"cpu_seconds_per_1000": 13.60, "gpu_seconds_per_1000": 1.90, "process_mib": 2915}
PARTS = ("article-cuda", "ours-cuda-")  # in the table's order
MEMORY = ("process_peak_mib", "process_mib")  # the first available one is used


def sessions(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return file name -> session for every session on a GPU, sorted by name.

    Raises:
        SystemExit: a JSON file cannot be read; the message names it. Restore it with git checkout.
    """
    found = {}
    for file in sorted(folder.glob("*.json")):
        try:
            session = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise SystemExit(f"{file}: cannot be read: {reason}; restore it with git checkout") from None
        if not isinstance(session, dict) or session.get("benchmark") != "gpu_session":
            continue
        machine, parts = session.get("machine"), session.get("parts")
        if not (isinstance(machine, dict) and isinstance(parts, dict) and "torch" in machine):
            raise SystemExit(f"{file}: has no machine or no parts of a session; restore it with git checkout")
        if machine.get("gpu") and not session.get("dry_run"):
            found[file.name] = session
    return found


def block(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the text between the markers: the table, and a sentence about its sessions."""
    cpu, gpu, mib = ARTICLE["cpu_seconds_per_1000"], ARTICLE["gpu_seconds_per_1000"], ARTICLE["process_mib"]
    lines = [
        *HEAD,
        f"| the article | its CPU | fp32 | {cpu:.2f} | | |",
        f"| the article | GTX 1650 | fp32 | {gpu:.2f} | | {mib:,} |",
        *(line for session in found.values() for line in _rows(session)),
    ]
    if found:
        each = ", ".join(_described(name, session) for name, session in found.items())
        sentence = f"Measured in `benchmarks/results/`: {each}."
    else:
        sentence = "No GPU has been measured yet: these are the article's own figures."
    return "\n".join([*lines, "", sentence])


def _rows(session: Mapping[str, Any]) -> Iterator[str]:
    for begin in PARTS:
        for name, part in session["parts"].items():
            figures = part.get("figures")
            if name.startswith(begin) and isinstance(figures, dict) and "seconds_per_1000" in figures:
                yield _row(name, figures, session["machine"])


def _row(name: str, figures: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    program = "the article's loop" if name.startswith("article-") else "captcha-exp"
    device, precision = machine["gpu"], figures.get("precision", "fp32")
    memory = next((f"{figures[key]:,.0f}" for key in MEMORY if figures.get(key)), "unknown")
    seconds, speed = figures["seconds_per_1000"], figures["training_images_per_second"]
    return f"| {program} | {device} | {precision} | {seconds:.3f} | {speed:,.0f} | {memory} |"


def _described(name: str, session: Mapping[str, Any]) -> str:
    machine = session["machine"]
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    return f"`{name}` (torch {machine['torch']}{driver})"


def insert_table(text: str, table: str) -> str:
    """Return the README's text with the table between its markers.

    Raises:
        SystemExit: a marker is missing, repeated or out of order. Restore them.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"README.md: must have {BEGIN} and then {END}, once each; restore them")
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the table; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if out of date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the sessions")
    parser.add_argument("--readme", type=Path, default=README, help="the file with the markers")
    options = parser.parse_args(arguments)
    if not options.readme.is_file():
        raise SystemExit(f"{options.readme}: no such file; name the README with --readme")
    old = options.readme.read_text(encoding="utf-8")
    new = insert_table(old, block(sessions(options.results)))
    if old == new:
        return 0
    if options.check:
        print(f"{options.readme.name}: out of date; run python benchmarks/article_table.py", file=sys.stderr)
        return 1
    options.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
