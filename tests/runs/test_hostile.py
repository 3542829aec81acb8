"""Hostile files are refused by name and do no harm; benchmarks/hostile.py has the cases."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "hostile.py"
EVERY = 4


@pytest.mark.long
def test_hostile_files_are_refused_and_do_nothing() -> None:
    """In a process of its own, which has an audit hook; a busy machine may be slower than the second."""
    command = [sys.executable, str(PROGRAM), "--every", str(EVERY), "--seconds", "20"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(done.stdout)
    assert figures["faults"] == []
    assert figures["cases"] * EVERY > 600
