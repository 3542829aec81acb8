"""Check that the mutants still fit the code; `python tests/mutants/run.py` checks that each is caught."""

from collections import Counter

import pytest
from mutants.run import PROJECT, Mutant, load_mutants

MUTANTS = load_mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_original_code_occurs_exactly_once(mutant: Mutant) -> None:
    source = (PROJECT / mutant.file).read_text(encoding="utf-8")

    assert source.count(mutant.original) == 1
    assert mutant.mutated != mutant.original
    assert all((PROJECT / test).is_file() for test in mutant.tests)


def test_names_are_unique() -> None:
    repeated = [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1]
    assert repeated == []
