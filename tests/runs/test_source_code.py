"""Source code hashes, git information, and the recorded environment."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from captcha_exp.config import Config
from captcha_exp.runs import Run, RunInfo, source_code
from captcha_exp.runs.environment import collect_environment, numerics_variables
from captcha_exp.runs.info import now, running_fields
from captcha_exp.runtime import paths
from captcha_exp.runtime.cpu_name import parse_cpu_name


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a package of a few files that replaces captcha_exp."""
    home = tmp_path / "captcha_exp"
    (home / "runs").mkdir(parents=True)
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (home / "__init__.py").write_bytes(b"x = 1\n")
    (home / "runs" / "source_code.py").write_bytes(b"y = 2\n")
    (tmp_path / "conf" / "data" / "a.yaml").write_bytes(b"a: 1\n")
    monkeypatch.setattr(source_code, "__file__", str(home / "runs" / "source_code.py"))
    monkeypatch.setattr(paths, "_PACKAGE_DIR", home)
    return home


def test_each_source_file_is_hashed(package: Path) -> None:
    hashes = source_code.hash_source_files()
    assert list(hashes) == ["captcha_exp/__init__.py", "captcha_exp/runs/source_code.py", "conf/data/a.yaml"]
    assert hashes["captcha_exp/__init__.py"] == hashlib.sha256(b"x = 1\n").hexdigest()


def test_the_real_package_and_conf_are_hashed() -> None:
    hashes = source_code.hash_source_files()
    assert {
        "captcha_exp/training/train.py",
        "captcha_exp/runs/source_code.py",
        "conf/config.yaml",
    } <= hashes.keys()
    assert not any("__pycache__" in name or name.startswith("tests/") for name in hashes)


def test_names_are_equal_for_an_installed_package(package: Path) -> None:
    before = source_code.hash_source_files()
    shutil.move(package.parent / "conf", package / "conf")
    assert paths.conf_dir() == package / "conf"
    assert source_code.hash_source_files() == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captcha_exp/__init__.py", "x = 1  # a comment counts too\n"),
        ("captcha_exp/new.py", ""),
    ],
)
def test_any_change_changes_the_hash(package: Path, name: str, text: str) -> None:
    before = source_code.code_sha256()
    (package.parent / name).write_text(text)
    assert source_code.code_sha256() != before


@pytest.mark.parametrize(
    "name", ["notes.txt", "captcha_exp/__pycache__/x.pyc", "conf/README.md", "conf/b.yaml"]
)
def test_other_files_do_not_change_the_hash(package: Path, name: str) -> None:
    before = source_code.code_sha256()
    (package.parent / name).parent.mkdir(exist_ok=True)
    (package.parent / name).write_text("other")
    assert source_code.code_sha256() == before


def test_line_endings_do_not_change_the_hash(package: Path) -> None:
    before = source_code.code_sha256()
    (package / "__init__.py").write_bytes(b"x = 1\r\n")
    assert source_code.code_sha256() == before


# -- git -----------------------------------------------------------------------------------------------------

GIT = ("git", "-c", "user.name=n", "-c", "user.email=n@example.invalid", "-c", "commit.gpgsign=false")


@pytest.fixture
def checkout(package: Path) -> Path:
    """Return a repository with the package committed."""
    home = package.parent
    for args in (("init", "-q"), ("add", "--all"), ("commit", "-qm", "all")):
        subprocess.run([*GIT, *args], cwd=home, check=True)
    return home


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    info = RunInfo(**running_fields(), name="tiny", started=now())
    return Run(tmp_path_factory.mktemp("run"), info)


def test_a_clean_checkout_has_a_commit_and_no_diff(checkout: Path, run: Run) -> None:
    hashes = source_code.git_info()
    assert hashes is not None
    assert len(hashes["commit"]) == 40
    assert (hashes["dirty"], hashes["diff_sha256"]) == (False, None)
    source_code.write_source_info(run)
    assert json.loads((run.run_dir / "code.json").read_text()) == source_code.hash_source_files()
    assert not (run.run_dir / "code.diff").exists()


def test_applying_the_diff_restores_the_code(checkout: Path, run: Run, tmp_path: Path) -> None:
    # Trailing spaces, invalid UTF-8, a new file, and the user's git settings.
    (checkout / "captcha_exp" / "__init__.py").write_bytes(b"x = 3  \n# \xff\n\n")
    (checkout / "captcha_exp" / "new one.py").write_bytes(b"z = 1\n")
    for key, value in (("color.ui", "always"), ("diff.noprefix", "true"), ("diff.external", "false")):
        subprocess.run(["git", "config", key, value], cwd=checkout, check=True)
    source_code.write_source_info(run)
    hashes = source_code.git_info()
    assert hashes is not None
    assert hashes["dirty"]
    assert hashes["diff_sha256"] == hashlib.sha256((run.run_dir / "code.diff").read_bytes()).hexdigest()
    changed = source_code.hash_source_files()
    for args in (("stash", "-qu"), ("apply", str(run.run_dir / "code.diff"))):
        subprocess.run([*GIT, *args], cwd=checkout, check=True)
    assert source_code.hash_source_files() == changed


def test_a_diff_over_the_limit_is_a_warning_and_not_saved(
    checkout: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_code, "MAX_DIFF_BYTES", 100)
    (checkout / "captcha_exp" / "__init__.py").write_text("x = 3\n" * 50)
    source_code.write_source_info(run)
    (warning,) = run.info.warnings
    assert warning.startswith("code.diff not saved: ")
    assert not (run.run_dir / "code.diff").exists()


def test_without_git_only_the_hashes_are_written(package: Path, run: Run) -> None:
    assert source_code.git_info() is None
    source_code.write_source_info(run)
    assert sorted(path.name for path in run.run_dir.iterdir()) == ["code.json", "run.json"]


# -- environment variables -----------------------------------------------------------------------------------


def test_numerics_variables_are_recorded_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)
    recorded = {
        "ATEN_CPU_CAPABILITY": "default",
        "OMP_NUM_THREADS": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    others = {
        "HOME": "/home/me",
        "TORCH_HUB_TOKEN": "x",
        "CUDA_PASSWORD": "x",
        "MKL_API_KEY": "x",
        "PYTORCH_MIRROR": "https://me:word@example.invalid/",
        "TORCHINDUCTOR_CACHE_DIR": "/home/me/cache",
    }
    for name, value in (recorded | others).items():
        monkeypatch.setenv(name, value)
    assert numerics_variables() == recorded


# -- CPU and packages ----------------------------------------------------------------------------------------


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
def test_the_cpu_name_includes_family_model_and_stepping(cpuinfo: str, name: str | None) -> None:
    assert parse_cpu_name(cpuinfo) == name


@pytest.mark.parametrize("build", ["2.13.0+cu130", "2.13.0+cpu", "2.13.0"])
def test_the_version_of_torch_is_recorded_with_its_build(
    monkeypatch: pytest.MonkeyPatch, tiny: Config, build: str
) -> None:
    """Check against torch.__version__, because the metadata of the default build lack the build tag."""
    monkeypatch.setattr(torch, "__version__", build)

    assert collect_environment(tiny)["packages"]["torch"] == build


def test_a_process_that_forks_later_records_the_code_that_it_has_imported(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_code, "_keeps_info", False)  # restores it
    before = source_code.code_sha256()
    source_code.keep_source_info()
    (package / "__init__.py").write_bytes(b"x = 2\n")
    assert source_code.code_sha256() == before
    source_code._keeps_info = False
    assert source_code.code_sha256() != before
