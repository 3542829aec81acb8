"""The record of the code: the same for the same files, wherever they stand, and another for any other."""

import hashlib
import shutil
from pathlib import Path

import pytest

from captcha_exp import places
from captcha_exp.record import code


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of a few files, in the place of this one."""
    home = tmp_path / "captcha_exp"
    (home / "record").mkdir(parents=True)
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (home / "__init__.py").write_bytes(b"x = 1\n")
    (home / "record" / "code.py").write_bytes(b"y = 2\n")
    (tmp_path / "conf" / "data" / "a.yaml").write_bytes(b"a: 1\n")
    monkeypatch.setattr(code, "__file__", str(home / "record" / "code.py"))
    monkeypatch.setattr(places, "_PACKAGE", home)
    return home


def test_each_source_file_is_there_by_name(package: Path) -> None:
    found = code.source_files()
    assert list(found) == ["captcha_exp/__init__.py", "captcha_exp/record/code.py", "conf/data/a.yaml"]
    assert found["captcha_exp/__init__.py"] == hashlib.sha256(b"x = 1\n").hexdigest()


def test_this_package_has_its_code_and_its_configs() -> None:
    found = code.source_files()
    assert {"captcha_exp/train.py", "captcha_exp/record/code.py", "conf/config.yaml"} <= found.keys()
    assert not any("__pycache__" in name or name.startswith("tests/") for name in found)


def test_an_installed_package_has_the_names_of_a_checkout(package: Path) -> None:
    before = code.source_files()
    shutil.move(package.parent / "conf", package / "conf")
    assert places.conf() == package / "conf"
    assert code.source_files() == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "captcha_exp/__init__.py",
            "x = 1  # why\n",
        ),  # a comment is another file; who compares says what it is
        ("captcha_exp/new.py", ""),
        ("conf/data/a.yaml", "a: 2\n"),
        ("conf/b.yaml", "a: 1\n"),
    ],
)
def test_any_change_is_another_sha256(package: Path, name: str, text: str) -> None:
    before = code.code_sha256()
    (package.parent / name).write_text(text)
    assert code.code_sha256() != before


@pytest.mark.parametrize("name", ["notes.txt", "captcha_exp/__pycache__/x.pyc", "conf/README.md"])
def test_what_is_no_source_does_not_count(package: Path, name: str) -> None:
    before = code.code_sha256()
    (package.parent / name).parent.mkdir(exist_ok=True)
    (package.parent / name).write_text("other")
    assert code.code_sha256() == before


def test_how_a_line_ends_does_not_count(package: Path) -> None:
    before = code.code_sha256()
    (package / "__init__.py").write_bytes(b"x = 1\r\n")
    assert code.code_sha256() == before
