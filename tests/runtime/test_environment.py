"""What libraries need of the environment: a home, a user name, writable directories."""

import getpass
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from captcha_exp.runtime import environment
from captcha_exp.runtime.environment import fill_in_environment

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")


@pytest.fixture
def cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory of what is filled in; the environment is restored after the test."""
    monkeypatch.setattr(environment, "filled_in", {})
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("HOME", "USER", "TMPDIR", "MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        value = os.environ.get(name)
        monkeypatch.setenv(name, "")  # restored, even if it is not set now
        if value is None or name.startswith(("XDG", "MPL")):
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(root))
    return root / "outputs" / "cache"


def without_passwd_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process have a user ID that /etc/passwd does not have."""

    def fail(user_id: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {user_id}")

    monkeypatch.setattr("pwd.getpwuid", fail)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_nothing_is_filled_in_on_a_healthy_machine(cache: Path) -> None:
    before = dict(os.environ)
    fill_in_environment()
    assert dict(os.environ) == before
    assert environment.filled_in == {}
    assert not cache.exists()


def test_a_user_without_a_name_has_the_number(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_passwd_entry(monkeypatch)
    fill_in_environment()
    assert getpass.getuser() == str(os.getuid())
    assert environment.filled_in == {"USER": f"user ID {os.getuid()} has no name: USER={os.getuid()} is used"}


def test_a_process_without_a_home_gets_one(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_passwd_entry(monkeypatch)
    monkeypatch.setenv("USER", "me")
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv("HOME")
        else:
            monkeypatch.setenv("HOME", value)
        fill_in_environment()
        assert Path.home() == cache / "home"
    assert set(environment.filled_in) == {"HOME"}
    assert not cache.exists()  # a mistake creates nothing


def test_an_empty_home_is_that_of_the_user(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "")
    fill_in_environment()
    assert Path.home().is_absolute()
    assert "HOME" not in environment.filled_in


def test_temporary_files_are_below_the_root_if_nowhere_else(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    fill_in_environment()
    with tempfile.NamedTemporaryFile() as file:
        assert Path(file.name).parent == cache / "tmp" == Path(os.environ["TMPDIR"])


def test_a_read_only_system_names_the_directory(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    cache.parent.write_text("no directory can be created here")
    fill_in_environment()
    with pytest.raises(OSError, match="outputs/cache/tmp"):
        tempfile.TemporaryDirectory()


def test_a_home_that_is_not_writable_has_no_cache_of_matplotlib(
    cache: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "file").touch()
    monkeypatch.setenv("HOME", str(root / "file"))  # not even root can create a file there
    fill_in_environment()
    assert Path(os.environ["MPLCONFIGDIR"]) == cache / "matplotlib"
    assert environment.filled_in["MPLCONFIGDIR"].startswith(f"{root}/file is not writable: ")
    monkeypatch.setenv("MPLCONFIGDIR", "/chosen")
    fill_in_environment()
    assert os.environ["MPLCONFIGDIR"] == "/chosen"
    monkeypatch.delenv("MPLCONFIGDIR")
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(root))
    fill_in_environment()
    assert "MPLCONFIGDIR" not in os.environ
