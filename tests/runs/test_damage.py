"""Every command that reads a damaged run names the file, or has the same result; see benchmarks/damage.py."""

import random
from collections import Counter
from pathlib import Path

import pytest
from damage import COMMANDS, Reader, make_runs, plan_cases

NUM_SHORT, NUM_LONG = 24, 120


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    root: Path = tmp_path_factory.mktemp("damage")
    make_runs(root)
    return Reader(root)


def test_damage_is_named_or_harmless(reader: Reader) -> None:
    """One command per damage, each in turn."""
    results = Counter[str]()
    for number, case in enumerate(plan_cases(reader, random.Random(1), NUM_SHORT, NUM_SHORT // 4, 0)):
        found, faults = reader.check(case, [COMMANDS[number % len(COMMANDS)]])
        assert faults == []
        results += found
    assert results["named"] >= NUM_SHORT // 6


@pytest.mark.long
def test_damage_is_named_or_harmless_to_every_command(reader: Reader) -> None:
    for case in plan_cases(reader, random.Random(2), NUM_LONG, NUM_LONG // 4, 6):
        assert reader.check(case)[1] == []
