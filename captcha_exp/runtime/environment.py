"""Fill in what libraries expect of the environment: a home, a user name, and writable directories.

In a container any of them can be missing: a user ID that /etc/passwd does not have, no HOME, a read-only file
system. Libraries then fail when they are imported.
"""

import contextlib
import getpass
import os
import tempfile
from pathlib import Path

from captcha_exp.runtime.paths import root_dir

filled_in: dict[str, str] = {}
"""variable that was set in this process -> what was missing, and what is used"""


def fill_in_environment() -> None:
    """Set HOME, USER, TMPDIR and MPLCONFIGDIR for this process and its children, where they are needed.

    The directories are below outputs/cache of the root directory. Libraries create theirs when they use it.
    """
    cache = root_dir() / "outputs" / "cache"
    if os.environ.get("HOME") == "":
        del os.environ["HOME"]  # otherwise the working directory would be the home
    try:
        home = Path.home()
    except RuntimeError:
        home = cache / "home"
        _fill_in("USERPROFILE" if os.name == "nt" else "HOME", str(home), "there is no home directory")
    try:
        getpass.getuser()
    except (KeyError, ImportError, OSError):  # by version of Python
        user_id = str(os.getuid()) if hasattr(os, "getuid") else "unknown"
        _fill_in("USER", user_id, f"user ID {user_id} has no name")
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        with contextlib.suppress(OSError):
            (cache / "tmp").mkdir(parents=True, exist_ok=True)
        _fill_in("TMPDIR", str(cache / "tmp"), "no directory for temporary files is writable")
        # Even if it is not writable either: a file in it then fails with the reason.
        tempfile.tempdir = str(cache / "tmp")
    bases = (("XDG_CONFIG_HOME", home / ".config"), ("XDG_CACHE_HOME", home / ".cache"))
    are_writable = all(_is_writable(Path(os.environ.get(name) or path)) for name, path in bases)
    if not os.environ.get("MPLCONFIGDIR") and not are_writable and _is_writable(cache):
        _fill_in("MPLCONFIGDIR", str(cache / "matplotlib"), f"{home} is not writable")


def _fill_in(variable: str, value: str, reason: str) -> None:
    os.environ[variable] = value
    filled_in[variable] = f"{reason}: {variable}={value} is used"


def _is_writable(path: Path) -> bool:
    """Return whether a directory can be written to, or created."""
    existing = next((each for each in (path, *path.parents) if os.path.exists(each)), path)  # noqa: PTH110
    return os.access(existing, os.W_OK | os.X_OK) and existing.is_dir()
