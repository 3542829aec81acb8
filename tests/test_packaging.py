"""Packaging: the wheel contains every package, and the lock file satisfies pyproject.toml."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())
LOCK = dict(re.findall(r"^([\w.-]+)==(\S+)$", (PROJECT / "requirements.lock").read_text(), re.MULTILINE))


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_package_is_in_the_wheel() -> None:
    package_dirs = {path.parent for path in (PROJECT / "captcha_exp").rglob("*.py")}
    names = {path.relative_to(PROJECT).as_posix().replace("/", ".") for path in package_dirs}

    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == names | {"captcha_exp.conf"}


def test_the_lock_holds_every_dependency_in_an_allowed_version() -> None:
    locked = {normalize(name): version for name, version in LOCK.items()}
    project = PYPROJECT["project"]

    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        assert locked[normalize(requirement.name)] in requirement.specifier, text
