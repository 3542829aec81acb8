"""Record the source code of a run: the SHA-256 of each file, the git commit, and the uncommitted changes.

The hashes are recorded because an installed package has no commit, and a checkout may differ from its commit.
"""

import functools
import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from captcha_exp.runs.run import Run
from captcha_exp.runtime.files import sha256_of_json
from captcha_exp.runtime.paths import conf_dir

MAX_DIFF_BYTES = 10 * 2**20
"""Limit of code.diff in bytes; a larger diff contains data rather than code."""

# Overrides the user's git settings, so the diff works with `git apply` everywhere.
_DIFF_COMMAND = (
    *("diff", "--binary", "--no-ext-diff", "--no-textconv", "--no-color"),
    *("--src-prefix=a/", "--dst-prefix=b/"),
)


_keeps_info = False

T = TypeVar("T")


def _kept(read: Callable[[], T]) -> Callable[[], T]:
    """Decorate a function without arguments whose result is kept after `keep_source_info`."""
    read_once = functools.cache(read)

    @functools.wraps(read)
    def read_unless_kept() -> T:
        return read_once() if _keeps_info else read()

    return read_unless_kept


def keep_source_info() -> None:
    """Let the functions of this module return the present state from now on.

    A process that imports the package once and forks later runs this code, whatever is edited meanwhile.
    """
    global _keeps_info
    _keeps_info = True
    hash_source_files()
    if git_info():
        _git_diff()


@_kept
def hash_source_files() -> dict[str, str]:
    """Return name -> SHA-256 of each source file of the package and each YAML file of conf/.

    Names are equal for a checkout and an installed package; hashes do not depend on the line endings.
    """
    package, configs = Path(__file__).resolve().parents[1], conf_dir()
    named = {f"captcha_exp/{_relative_posix(package, path)}": path for path in package.rglob("*.py")}
    named = {name: path for name, path in named.items() if not path.is_relative_to(configs)}
    named |= {f"conf/{_relative_posix(configs, path)}": path for path in configs.rglob("*.yaml")}
    return {name: _sha256_of_text(named[name]) for name in sorted(named)}


def code_sha256() -> str:
    """Return the SHA-256 over names and contents of the package's source files.

    conf/ is left out, because the config of a run contains all values taken from it.
    """
    files = {name: sha256 for name, sha256 in hash_source_files().items() if not name.startswith("conf/")}
    return sha256_of_json(files)


def write_source_info(run: Run) -> None:
    """Write code.json, and code.diff if there are uncommitted changes of at most `MAX_DIFF_BYTES`."""
    run.write_json("code.json", hash_source_files())
    diff = _git_diff() if git_info() else b""
    if len(diff) > MAX_DIFF_BYTES:
        size = f"{len(diff) / 2**20:,.0f} MiB"
        run.add_warning(f"code.diff not saved: the uncommitted changes have {size}; commit them")
    elif diff:
        run.write("code.diff", diff)


@_kept
def git_info() -> dict[str, Any] | None:
    """Return commit, branch and state of the checkout that the code runs from; None without git."""
    here = Path(__file__)
    try:
        if _run_git("ls-files", "--error-unmatch", here.name) is None:
            return None  # installed; a repository around site-packages is unrelated
        diff = _git_diff()
        return {
            "commit": _git_text("rev-parse", "HEAD"),
            "branch": _git_text("rev-parse", "--abbrev-ref", "HEAD"),
            "dirty": bool(diff),
            "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None,
        }
    except OSError:
        return None  # git is not installed


@_kept
def _git_diff() -> bytes:
    """Return the diff from the commit to the working tree, with untracked files of the package and conf/."""
    top = Path(_git_text("rev-parse", "--show-toplevel") or Path(__file__).parent)
    parts = [_run_git(*_DIFF_COMMAND, "HEAD", cwd=top) or b""]
    untracked = ("ls-files", "--others", "--exclude-standard", "-z")
    names = _run_git(*untracked, "--", "captcha_exp", "conf", cwd=top) or b""
    for name in filter(None, names.decode(errors="surrogateescape").split("\0")):
        parts.append(
            _run_git(*_DIFF_COMMAND, "--no-index", "--", "/dev/null", name, cwd=top, ok_codes=(0, 1)) or b""
        )
    return b"".join(parts)


def _git_text(*args: str) -> str | None:
    output = _run_git(*args)
    return None if output is None else output.decode(errors="replace").strip()


def _run_git(*args: str, cwd: Path | None = None, ok_codes: tuple[int, ...] = (0,)) -> bytes | None:
    completed = subprocess.run(
        ["git", *args],  # noqa: S607 - the user's git, found on PATH
        cwd=cwd or Path(__file__).parent,
        capture_output=True,
    )
    return completed.stdout if completed.returncode in ok_codes else None


def _relative_posix(base: Path, path: Path) -> str:
    return path.relative_to(base).as_posix()


def _sha256_of_text(path: Path) -> str:
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
