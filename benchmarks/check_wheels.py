"""Check that a folder of wheels is complete for a machine without access to a package index.

    python benchmarks/check_wheels.py WHEELS --have HAVE.txt --python 3.12
    python benchmarks/check_wheels.py WHEELS --have HAVE.txt --also pytest --also 'hypothesis>=6'

Every requirement in the metadata of a wheel (its markers evaluated for the given Python on Linux x86-64, no
extras) and every dependency in pyproject.toml must be satisfied by a wheel in the folder or by a package on
the machine. HAVE.txt lists the latter, one a line, as `pip list --format=freeze` prints them on that machine;
without a version, every requirement on the package is accepted.

Exit code 0: complete. 1: a wheel is missing, has the wrong version, is duplicated, or does not run on that
Python; each in one line. 2: a file or an argument cannot be read. The last line of standard output is a
summary in JSON; problems go to standard error.
"""

import argparse
import json
import re
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from email.parser import HeaderParser
from pathlib import Path
from typing import NamedTuple

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import Tag
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

PROJECT = Path(__file__).resolve().parents[1]


class UnreadableInput(Exception):
    """A wheel, a list or an argument is invalid; the message says which and why."""


class Wheel(NamedTuple):
    """The metadata of a wheel."""

    file: str
    name: str  # canonical
    version: Version
    tags: frozenset[Tag]
    requires: tuple[Requirement, ...]
    requires_python: SpecifierSet


def read_wheel(path: Path) -> Wheel:
    """Return the name, version, tags and requirements of a wheel.

    Raises:
        UnreadableInput: the file is not a wheel or is damaged. Download it again.
    """
    try:
        name, version, _, tags = parse_wheel_filename(path.name)
        with zipfile.ZipFile(path) as archive:
            (member,) = (m for m in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", m))
            headers = HeaderParser().parsestr(archive.read(member).decode())
        requires = tuple(Requirement(line) for line in headers.get_all("Requires-Dist", []))
        requires_python = SpecifierSet(headers.get("Requires-Python", ""))
    except (InvalidWheelFilename, InvalidRequirement, zipfile.BadZipFile, OSError, ValueError) as error:
        raise UnreadableInput(
            f"{path.name}: cannot be read as a wheel ({error}); delete it and collect the wheels again"
        ) from None
    return Wheel(path.name, str(name), version, tags, requires, requires_python)


def read_have(text: str) -> dict[str, Version | None]:
    """Return the packages of a list, canonical name to version; None where a line has no version.

    A line is `name`, `name==version` or `name @ address`; `#` begins a comment.
    """
    have: dict[str, Version | None] = {}
    for line in text.splitlines():
        match = re.match(r"\s*(?:-e\s+)?([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:===?\s*([^\s;#]+))?", line)
        if match is None:
            continue
        try:
            version = Version(match[2]) if match[2] else None
        except InvalidVersion:
            version = None
        have[canonicalize_name(match[1])] = version
    return have


def target_environment(python: str) -> dict[str, str]:
    """Return the marker environment of CPython `python` ("3.12") on Linux x86-64, without extras."""
    target = {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
        "extra": "",
    }
    return {key: str(value) for key, value in default_environment().items()} | target


def runs_on(tags: Iterable[Tag], python: str) -> bool:
    """Return whether a wheel with one of these tags installs on CPython `python` on Linux x86-64."""
    minor = int(python.split(".")[1])
    for tag in tags:
        if tag.platform != "any" and not re.fullmatch(r"(many)?linux.*_x86_64", tag.platform):
            continue
        found = re.fullmatch(r"(cp|py)3(\d*)", tag.interpreter)
        if found is None:
            continue
        oldest = int(found[2] or 0)
        any_later = found[1] == "py" or tag.abi in ("abi3", "none")
        if oldest == minor or (any_later and oldest <= minor):
            return True
    return False


def problems(
    wheels: Iterable[Wheel], have: Mapping[str, Version | None], required: Iterable[Requirement], python: str
) -> list[str]:
    """Return one line per wheel that is missing, wrong, duplicated, or built for another Python."""
    found: list[str] = []
    by_name: dict[str, Wheel] = {}
    for wheel in sorted(wheels, key=lambda wheel: wheel.file):
        if wheel.name in by_name:
            found.append(f"{wheel.name}: two wheels, {by_name[wheel.name].file} and {wheel.file}; delete one")
        by_name[wheel.name] = wheel
        if not runs_on(wheel.tags, python):
            found.append(f"{wheel.file}: does not install on Python {python}, Linux x86-64; collect again")
        elif not wheel.requires_python.contains(f"{python}.99", prereleases=True):
            found.append(f"{wheel.file}: requires Python {wheel.requires_python}; the target has {python}")
    available = dict(have) | {name: wheel.version for name, wheel in by_name.items()}  # wheels come first
    environment = target_environment(python)
    requirements = [("pyproject.toml", one) for one in required]
    requirements += [(wheel.file, one) for wheel in by_name.values() for one in wheel.requires]
    for source, requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        name = canonicalize_name(requirement.name)
        needs = f"{source} requires {requirement.name}{requirement.specifier}"
        if name not in available:
            found.append(
                f"{name}: missing; {needs}; add it to the wheels, or to HAVE.txt if the machine has it"
            )
            continue
        version = available[name]
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            if name in by_name:
                found.append(
                    f"{name}: wrong version; {needs}, and the folder has {by_name[name].file}; replace it"
                )
            else:
                found.append(
                    f"{name}: wrong version; {needs}, and the machine has {version}; delete it from HAVE.txt"
                )
    return found


def project_requirements() -> list[Requirement]:
    """Return the dependencies that pyproject.toml names, without extras."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(line) for line in project["dependencies"]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheels", type=Path, help="a folder of .whl files")
    parser.add_argument(
        "--have", type=Path, required=True, help="file with the packages of the machine, one per line"
    )
    parser.add_argument("--python", default="3.12", choices=("3.11", "3.12", "3.13"), help="(default: 3.12)")
    parser.add_argument("--also", action="append", default=[], help="a further requirement, e.g. pytest")
    arguments = parser.parse_args()
    try:
        if not arguments.wheels.is_dir():
            raise UnreadableInput(f"{arguments.wheels}: no such folder; make it with collect_wheels.sh")
        files = sorted(arguments.wheels.glob("*.whl"))
        wheels = [read_wheel(path) for path in files]
        have = read_have(arguments.have.read_text(encoding="utf-8"))
        required = [*project_requirements(), *(Requirement(one) for one in arguments.also)]
    except (UnreadableInput, OSError, InvalidRequirement) as error:
        print(error, file=sys.stderr)
        return 2
    found = problems(wheels, have, required, arguments.python)
    for line in found:
        print(line, file=sys.stderr)
    mib = sum(path.stat().st_size for path in files) / 2**20
    summary = {"python": arguments.python, "wheels": len(files), "mib": round(mib, 1), "problems": len(found)}
    print(json.dumps({"benchmark": "check_wheels", **summary}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
