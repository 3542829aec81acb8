"""The record of the code: the same for the same files, wherever they stand, and another for any other."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from captcha_exp.config import Config
from captcha_exp.runs import Run, source_code
from captcha_exp.runs.environment import collect_environment, numerics_variables, parse_cpu_name
from captcha_exp.runtime import paths


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of a few files, in the place of this one."""
    home = tmp_path / "captcha_exp"
    (home / "record").mkdir(parents=True)
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (home / "__init__.py").write_bytes(b"x = 1\n")
    (home / "record" / "code.py").write_bytes(b"y = 2\n")
    (tmp_path / "conf" / "data" / "a.yaml").write_bytes(b"a: 1\n")
    monkeypatch.setattr(source_code, "__file__", str(home / "record" / "code.py"))
    monkeypatch.setattr(paths, "_PACKAGE", home)
    return home


def test_each_source_file_is_there_by_name(package: Path) -> None:
    found = source_code.hash_source_files()
    assert list(found) == ["captcha_exp/__init__.py", "captcha_exp/runs/source_code.py", "conf/data/a.yaml"]
    assert found["captcha_exp/__init__.py"] == hashlib.sha256(b"x = 1\n").hexdigest()


def test_this_package_has_its_code_and_its_configs() -> None:
    found = source_code.hash_source_files()
    assert {
        "captcha_exp/training/train.py",
        "captcha_exp/runs/source_code.py",
        "conf/config.yaml",
    } <= found.keys()
    assert not any("__pycache__" in name or name.startswith("tests/") for name in found)


def test_an_installed_package_has_the_names_of_a_checkout(package: Path) -> None:
    before = source_code.hash_source_files()
    shutil.move(package.parent / "conf", package / "conf")
    assert paths.conf_dir() == package / "conf"
    assert source_code.hash_source_files() == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "captcha_exp/__init__.py",
            "x = 1  # why\n",
        ),  # a comment is another file; who compares says what it is
        ("captcha_exp/new.py", ""),
    ],
)
def test_any_change_is_another_sha256(package: Path, name: str, text: str) -> None:
    before = source_code.code_sha256()
    (package.parent / name).write_text(text)
    assert source_code.code_sha256() != before


@pytest.mark.parametrize(
    "name", ["notes.txt", "captcha_exp/__pycache__/x.pyc", "conf/README.md", "conf/b.yaml"]
)
def test_what_is_no_source_does_not_count(package: Path, name: str) -> None:
    before = source_code.code_sha256()
    (package.parent / name).parent.mkdir(exist_ok=True)
    (package.parent / name).write_text("other")
    assert source_code.code_sha256() == before


def test_how_a_line_ends_does_not_count(package: Path) -> None:
    before = source_code.code_sha256()
    (package / "__init__.py").write_bytes(b"x = 1\r\n")
    assert source_code.code_sha256() == before


# -- git -----------------------------------------------------------------------------------------------------

GIT = ("git", "-c", "user.name=n", "-c", "user.email=n@example.invalid", "-c", "commit.gpgsign=false")


@pytest.fixture
def checkout(package: Path) -> Path:
    """The package in a repository of its own, committed."""
    home = package.parent
    for words in (("init", "-q"), ("add", "--all"), ("commit", "-qm", "all")):
        subprocess.run([*GIT, *words], cwd=home, check=True)
    return home


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"), {})


def written(run: Run) -> list[str]:
    """The troubles that it told."""
    told: list[str] = []
    source_code.write_source_info(run, told.append)
    return told


def test_a_clean_checkout_has_a_commit_and_no_diff(checkout: Path, run: Run) -> None:
    found = source_code.git_info()
    assert found is not None
    assert len(found["commit"]) == 40
    assert (found["dirty"], found["diff_sha256"]) == (False, None)
    assert written(run) == []
    assert json.loads((run.run_dir / "code.json").read_text()) == source_code.hash_source_files()
    assert not (run.run_dir / "code.diff").exists()


def test_the_diff_makes_the_code_of_its_commit_again(checkout: Path, run: Run, tmp_path: Path) -> None:
    # Spaces at the end of a line, bytes that are no UTF-8, a new file, settings of the person's own.
    (checkout / "captcha_exp" / "__init__.py").write_bytes(b"x = 3  \n# \xff\n\n")
    (checkout / "captcha_exp" / "new one.py").write_bytes(b"z = 1\n")
    for key, value in (("color.ui", "always"), ("diff.noprefix", "true"), ("diff.external", "false")):
        subprocess.run(["git", "config", key, value], cwd=checkout, check=True)
    assert written(run) == []
    found = source_code.git_info()
    assert found is not None
    assert found["dirty"]
    assert found["diff_sha256"] == hashlib.sha256((run.run_dir / "code.diff").read_bytes()).hexdigest()
    changed = source_code.hash_source_files()
    for words in (("stash", "-qu"), ("apply", str(run.run_dir / "code.diff"))):
        subprocess.run([*GIT, *words], cwd=checkout, check=True)
    assert source_code.hash_source_files() == changed


def test_a_diff_too_large_is_told_and_left_out(
    checkout: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_code, "LARGEST_DIFF", 100)
    (checkout / "captcha_exp" / "__init__.py").write_text("x = 3\n" * 50)
    (told,) = written(run)
    assert "too much for the run's record: commit them" in told
    assert not (run.run_dir / "code.diff").exists()


def test_without_git_there_are_the_files_alone(package: Path, run: Run) -> None:
    assert source_code.git_info() is None
    assert written(run) == []
    assert sorted(path.name for path in run.run_dir.iterdir()) == ["code.json", "run.json"]


# -- environment variables -----------------------------------------------------------------------------------


def test_variables_that_change_numbers_are_kept_and_secrets_never(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)
    kept = {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    others = {
        "HOME": "/home/me",
        "TORCH_HUB_TOKEN": "x",
        "CUDA_PASSWORD": "x",
        "MKL_API_KEY": "x",
        "PYTORCH_MIRROR": "https://me:word@example.invalid/",
    }
    for name, value in (kept | others).items():
        monkeypatch.setenv(name, value)
    assert numerics_variables() == kept


# -- the processor -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (
            "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping\t: 1\n\n"
            "processor\t: 1\ncpu family\t: 9\nmodel\t\t: 9\nmodel name\t: another\nstepping\t: 9\n",
            "AMD EPYC (family 25, model 17, stepping 1)",
        ),
        ("processor\t: 0\nmodel name\t: ARMv7 Processor rev 4 (v7l)\n", "ARMv7 Processor rev 4 (v7l)"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", None),
        ("", None),
    ],
)
def test_a_processor_is_told_from_others_of_its_name(cpuinfo: str, name: str | None) -> None:
    assert parse_cpu_name(cpuinfo) == name


@pytest.mark.parametrize("build", ["2.13.0+cu130", "2.13.0+cpu", "2.13.0"])
def test_the_version_of_torch_is_recorded_with_its_build(
    monkeypatch: pytest.MonkeyPatch, tiny: Config, build: str
) -> None:
    """The metadata of the build that pip takes by default leave it out."""
    monkeypatch.setattr(torch, "__version__", build)

    assert collect_environment(tiny)["packages"]["torch"] == build
