"""What pyproject.toml promises: the wheel holds everything, and the lock is one that it allows."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())
LOCK = dict(re.findall(r"^([\w.-]+)==(\S+)$", (PROJECT / "requirements.lock").read_text(), re.MULTILINE))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_package_is_in_the_wheel() -> None:
    folders = {path.parent for path in (PROJECT / "captcha_exp").rglob("*.py")}
    names = {folder.relative_to(PROJECT).as_posix().replace("/", ".") for folder in folders}

    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == names | {"captcha_exp.conf"}


def test_the_lock_holds_every_dependency_in_an_allowed_version() -> None:
    locked = {normal(name): number for name, number in LOCK.items()}
    project = PYPROJECT["project"]

    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        assert locked[normal(requirement.name)] in requirement.specifier, text
