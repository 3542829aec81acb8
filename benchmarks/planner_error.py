"""Update the measured error of the planner in the docstring of captcha_exp/memory, from committed sessions.

    python benchmarks/planner_error.py            print the paragraph
    python benchmarks/planner_error.py --write    put it into captcha_exp/memory/__init__.py
    python benchmarks/planner_error.py --check    exit code 1 if the docstring is out of date

The errors are those of gpu_comparison.summary: the middle of the predicted bounds of the process peak against
the measured peak. Needs no GPU.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))

from article_table import RESULTS, sessions  # noqa: E402 - found only through the path above

HEADER = HERE.parent / "captcha_exp" / "memory" / "__init__.py"
START = "On a GPU: "
UNMEASURED = f"{START}not measured yet."


def paragraph(summaries: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Return the paragraph on one line, given file name -> gpu_comparison.summary of the session."""
    rows = [_sentence(name, found) for name, found in summaries.items() if found and found["plans"]]
    return START + " ".join(rows) if rows else UNMEASURED


def _sentence(name: str, found: Mapping[str, Any]) -> str:
    median, worst = found["process_error_median"], found["process_error_worst"]
    fits, allocated = found["false_fits"], abs(found["allocated_error_worst"])
    return (
        f"{found['gpu']}, {found['plans']} trainings: the middle of the predicted bounds is off the "
        f"measured process peak by {median:.1%} (median) and {worst:.1%} (worst), "
        f"{fits or 'no'} false *fits*, allocated bytes at most {allocated:.1%} outside the bounds "
        f"(benchmarks/results/{name})."
    )


def current_paragraph(text: str) -> str:
    """Return the paragraph in a docstring, on one line.

    Raises:
        SystemExit: it is missing. Add a paragraph that begins with "On a GPU: ".
    """
    found = re.search(_PARAGRAPH, text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise SystemExit(f'{HEADER.name} of captcha_exp/memory: has no paragraph "{START}..."; add it')
    return " ".join(found[0].split())


_PARAGRAPH = rf"^{START}.*?(?=\n\n|\n\"\"\")"


def measured(folder: Path = RESULTS) -> str:
    """Return the paragraph for the sessions in a folder."""
    import gpu_comparison

    return paragraph({name: gpu_comparison.summary(session) for name, session in sessions(folder).items()})


def main(arguments: Sequence[str] | None = None) -> int:
    """Print, write or check the paragraph; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="write it to the docstring")
    action.add_argument("--check", action="store_true", help="exit code 1 if the docstring is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the sessions")
    parser.add_argument("--header", type=Path, default=HEADER, help="the file with the paragraph")
    options = parser.parse_args(arguments)
    expected = measured(options.results)
    if not options.write and not options.check:
        print(expected)
        return 0
    text = options.header.read_text(encoding="utf-8")
    if current_paragraph(text) == expected:
        return 0
    if options.check:
        print(
            "captcha_exp/memory: docstring out of date; run python benchmarks/planner_error.py --write",
            file=sys.stderr,
        )
        return 1
    lines = textwrap.fill(expected, 110, break_long_words=False, break_on_hyphens=False)
    new = re.sub(_PARAGRAPH, lambda _: lines, text, count=1, flags=re.MULTILINE | re.DOTALL)
    options.header.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
