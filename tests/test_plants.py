"""The list of planted bugs still fits the code; `python tests/plant.py` shows that each is caught."""

from pathlib import Path

import pytest
from plant import PLANTS, PROJECT, Plant


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_the_healthy_code_stands_where_the_bug_would_be_planted(plant: Plant) -> None:
    source = (PROJECT / "captcha_exp" / plant.file).read_text()

    assert source.count(plant.healthy) == 1
    assert plant.buggy != plant.healthy
    assert all((Path(__file__).parent / test).is_file() for test in plant.tests)


def test_names_are_told_apart() -> None:
    assert len({plant.name for plant in PLANTS}) == len(PLANTS)
