"""The session for a graphics card does all that it does without one, and loses nothing when a part fails."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_session.py"
sys.path.append(str(SCRIPT.parent))

import gpu_session  # noqa: E402 - benchmarks/ is no package


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
    assert [name for name in names if "cuda" not in name] == dry[:4]


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
