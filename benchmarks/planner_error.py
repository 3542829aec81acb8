"""State the planner's measured error in the header of captcha_exp/memory, from the committed GPU sessions.

    python benchmarks/planner_error.py            print the paragraph
    python benchmarks/planner_error.py --write    put it into captcha_exp/memory/__init__.py
    python benchmarks/planner_error.py --check    exit code 1 if the header says something else

The errors are those of gpu_judging.summary: the middle of the predicted bounds of the process peak against
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

from article_table import RESULTS, sessions  # noqa: E402 - benchmarks/ is no package

HEADER = HERE.parent / "captcha_exp" / "memory" / "__init__.py"
START = "On a GPU: "
UNMEASURED = f"{START}not measured yet."


def paragraph(summaries: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Return the header's paragraph on one line, from file name -> gpu_judging.summary of the session."""
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


def stated(text: str) -> str:
    """Return the paragraph that a header has, on one line.

    Raises:
        SystemExit: there is none. Put one back that begins with "On a GPU: ".
    """
    found = re.search(_PARAGRAPH, text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise SystemExit(f'{HEADER.name} of captcha_exp/memory: has no paragraph "{START}..."; put it back')
    return " ".join(found[0].split())


_PARAGRAPH = rf"^{START}.*?(?=\n\n|\n\"\"\")"


def measured(folder: Path = RESULTS) -> str:
    """Return the paragraph that the sessions in a folder give."""
    import gpu_judging

    return paragraph({name: gpu_judging.summary(session) for name, session in sessions(folder).items()})


def main(arguments: Sequence[str] | None = None) -> int:
    """Print, write or check the paragraph; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="put it into the header")
    what.add_argument("--check", action="store_true", help="exit code 1 if the header says something else")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the sessions")
    parser.add_argument("--header", type=Path, default=HEADER, help="the file with the paragraph")
    asked = parser.parse_args(arguments)
    wanted = measured(asked.results)
    if not asked.write and not asked.check:
        print(wanted)
        return 0
    text = asked.header.read_text(encoding="utf-8")
    if stated(text) == wanted:
        return 0
    if asked.check:
        print(
            "captcha_exp/memory: the header is out of date; run python benchmarks/planner_error.py --write",
            file=sys.stderr,
        )
        return 1
    lines = textwrap.fill(wanted, 110, break_long_words=False, break_on_hyphens=False)
    new = re.sub(_PARAGRAPH, lambda _: lines, text, count=1, flags=re.MULTILINE | re.DOTALL)
    asked.header.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
