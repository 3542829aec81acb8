"""The code that a run ran: the package's own files by their SHA-256, its commit, and what was changed since.

The files hold without git too: an installed package has no commit, and a file that was edited after a commit
is not that of the commit.
"""

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from captcha_exp.runs.run import Run
from captcha_exp.runtime.paths import conf_dir

MAX_DIFF_BYTES = 10 * 2**20
"""bytes of code.diff: more is no change of code, and every run would keep it"""

# No program, colour or prefix of a person's own settings: `git apply` is to take it anywhere.
_DIFF_COMMAND = (
    "diff",
    "--binary",
    "--no-ext-diff",
    "--no-textconv",
    "--no-color",
    "--src-prefix=a/",
    "--dst-prefix=b/",
)


def hash_source_files() -> dict[str, str]:
    """File -> SHA-256 of each source file of the package and each YAML file of conf/, by name.

    The names are the same for a checkout and for an installed package, and the hashes for either way to end
    a line.
    """
    package, configs = Path(__file__).resolve().parents[1], conf_dir()
    named = {f"captcha_exp/{_relative_posix(package, path)}": path for path in package.rglob("*.py")}
    named = {name: path for name, path in named.items() if not path.is_relative_to(configs)}
    named |= {f"conf/{_relative_posix(configs, path)}": path for path in configs.rglob("*.yaml")}
    return {name: _sha256_of_text(named[name]) for name in sorted(named)}


def code_sha256() -> str:
    """SHA-256 over the names and contents of the package's files: equal for equal code, with git or without.

    Without those of conf/: a run's config has all that it took of them.
    """
    files = {name: sha256 for name, sha256 in hash_source_files().items() if not name.startswith("conf/")}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def write_source_info(run: Run, warn: Callable[[str], None]) -> None:
    """code.json, the SHA-256 of each source file; and code.diff, what the checkout has changed since its
    commit, if that is not too much: then it is told."""
    run.write_json("code.json", hash_source_files())
    difference = _git_diff() if git_info() else b""
    if len(difference) > MAX_DIFF_BYTES:
        size = f"{len(difference) / 2**20:,.0f} MiB"
        warn(f"the checkout's changes are {size}, too much for the run's record: commit them")
    elif difference:
        run.write("code.diff", difference)


def git_info() -> dict[str, Any] | None:
    """Commit, branch and local changes of the checkout that the code runs from, or None."""
    here = Path(__file__)
    try:
        if _run_git("ls-files", "--error-unmatch", here.name) is None:
            return None  # installed: a repository around site-packages is somebody else's
        difference = _git_diff()
        return {
            "commit": _git_text("rev-parse", "HEAD"),
            "branch": _git_text("rev-parse", "--abbrev-ref", "HEAD"),
            "dirty": bool(difference),
            "diff_sha256": hashlib.sha256(difference).hexdigest() if difference else None,
        }
    except OSError:
        return None  # git is not on this machine


def _git_diff() -> bytes:
    """What `git apply` makes this code of its commit: changed files, and new ones of package and conf/."""
    top = Path(_git_text("rev-parse", "--show-toplevel") or Path(__file__).parent)
    parts = [_run_git(*_DIFF_COMMAND, "HEAD", cwd=top) or b""]
    untracked = ("ls-files", "--others", "--exclude-standard", "-z")
    new = _run_git(*untracked, "--", "captcha_exp", "conf", cwd=top) or b""
    for name in filter(None, new.decode(errors="surrogateescape").split("\0")):
        parts.append(
            _run_git(*_DIFF_COMMAND, "--no-index", "--", "/dev/null", name, cwd=top, ok_codes=(0, 1)) or b""
        )
    return b"".join(parts)


def _git_text(*args: str) -> str | None:
    out = _run_git(*args)
    return None if out is None else out.decode(errors="replace").strip()


def _run_git(*args: str, cwd: Path | None = None, ok_codes: tuple[int, ...] = (0,)) -> bytes | None:
    done = subprocess.run(
        ["git", *args],  # noqa: S607 - the git that the person uses, wherever it is
        cwd=cwd or Path(__file__).parent,
        capture_output=True,
    )
    return done.stdout if done.returncode in ok_codes else None


def _relative_posix(base: Path, path: Path) -> str:
    return path.relative_to(base).as_posix()


def _sha256_of_text(path: Path) -> str:
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
