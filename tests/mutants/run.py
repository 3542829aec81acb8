"""Apply one mutant at a time to a copy of the project, and check that a test fails.

    python tests/mutants/run.py            all mutants; exit code 1 if one is not caught
    python tests/mutants/run.py NAME ...   these

A mutant is a deliberate bug: an entry of a *.toml file beside this program. `original` occurs exactly once in
`file`, which `test_mutants.py` checks, and becomes `mutated`; then `tests` are run.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Mutant:
    """A bug to be caught: in `file`, `original` becomes `mutated`; these test files are run."""

    name: str
    file: str
    original: str
    mutated: str
    tests: tuple[str, ...]


def load_mutants() -> tuple[Mutant, ...]:
    """Read the mutants of all files, in the order of the files."""
    found = []
    for path in sorted(FOLDER.glob("*.toml")):
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]:
            found.append(Mutant(**{**entry, "tests": tuple(entry["tests"])}))
    return tuple(found)


SELECTED = "not slow and not gpu and not ui"
"""the tests of `make test-all`"""
GIT = (
    "git",
    "-c",
    "user.name=mutants",
    "-c",
    "user.email=mutants@example.invalid",
    "-c",
    "commit.gpgsign=false",
)


def is_caught(mutant: Mutant) -> bool:
    """Return whether a test fails where the mutant is applied.

    Raises:
        RuntimeError: the tests cannot be run at all, which is a mistake in the mutant.
    """
    done = run_tests(mutant.tests, mutant)
    if done.returncode not in (0, 1) or "ERROR collecting" in done.stdout:
        raise RuntimeError(
            f"{mutant.name}: pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.returncode == 1


def run_tests(tests: Iterable[str], mutant: Mutant | None) -> "subprocess.CompletedProcess[str]":
    """Run test files in a copy of the project, with the mutant applied if there is one."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("benchmarks", "captcha_exp", "conf", "docs", "tests"):
            shutil.copytree(PROJECT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in [
            *PROJECT.glob("*.md"),
            *(PROJECT / n for n in ("Makefile", "mkdocs.yml", "pyproject.toml")),
        ]:
            shutil.copy(path, copy)
        if mutant is not None:
            file = copy / mutant.file
            file.write_text(file.read_text().replace(mutant.original, mutant.mutated))
        for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "copy"]):
            subprocess.run([*GIT, *command], cwd=copy, check=True)  # runs record the commit of their code
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", SELECTED, *tests],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )


def main(names: Sequence[str]) -> int:
    mutants = load_mutants()
    if unknown := set(names) - {mutant.name for mutant in mutants}:
        print(f"{', '.join(sorted(unknown))}: not a mutant; the names are in {FOLDER}/*.toml")
        return 2
    chosen = [mutant for mutant in mutants if not names or mutant.name in names]
    unchanged = run_tests(sorted({test for mutant in chosen for test in mutant.tests}), None)
    if unchanged.returncode:
        print(f"{unchanged.stdout[-2000:]}\nthe tests fail without a mutant: fix that first")
        return 1
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        results = list(threads.map(is_caught, chosen))
    for mutant, caught in zip(chosen, results, strict=True):
        print(f"{'caught' if caught else 'NOT CAUGHT':10} {mutant.name}")
    print(f"{sum(results)} of {len(chosen)} mutants are caught")
    return 0 if all(results) and chosen else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
