"""Check the language of the package and of the tests, and the names of modules.

The phrases of README and docs are checked in test_docs.py.
"""

import ast
from pathlib import Path

import pytest
from support.phrases import LIMIT, count_files

import captcha_exp

ROOT = Path(captcha_exp.__file__).parents[1]
PACKAGE = ROOT / "captcha_exp"
MAX_TOP_LEVEL_ENTRIES = 20
NOUNS_OF_THE_FIELD = {"loading", "logging", "rendering", "seeding", "tracking", "training"}


def gerunds(names: list[str]) -> list[str]:
    """Return the module names that end with -ing and are not a noun of the field."""
    return [name for name in names if name.endswith("ing") and name not in NOUNS_OF_THE_FIELD]


@pytest.mark.parametrize("folder", ["captcha_exp", "tests", "benchmarks"])
def test_phrases_of_a_folder(folder: str) -> None:
    found = count_files(sorted((ROOT / folder).rglob("*.py")))
    assert found.per_thousand <= LIMIT, found.phrases


def test_no_module_has_a_gerund_as_its_name() -> None:
    names = [path.stem for path in PACKAGE.rglob("*.py")] + [
        path.parent.name for path in PACKAGE.rglob("*.py")
    ]
    assert gerunds(names) == []
    assert gerunds(["loading", "leaving", "step"]) == ["leaving"]


def test_the_top_level_of_the_package_is_small() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= MAX_TOP_LEVEL_ENTRIES, sorted(entries)


@pytest.mark.parametrize("package", ["runtime", "data", "model"])
def test_packages_of_light_modules_import_nothing(package: str) -> None:
    source = (PACKAGE / package / "__init__.py").read_text(encoding="utf-8")
    assert [type(node) for node in ast.parse(source).body if not isinstance(node, ast.Expr)] == []
