"""The code that a run ran: the package's own files by their SHA-256, and what the checkout had changed.

Both hold without git: an installed package has no commit, and a file that was edited after a commit has not
that of the commit.
"""

import hashlib
import json
from pathlib import Path

from captcha_exp.places import conf


def source_files() -> dict[str, str]:
    """File -> SHA-256 of each source file of the package and each YAML file of conf/, by name.

    The names are the same for a checkout and for an installed package, and the hashes for either way to end
    a line.
    """
    package, configs = Path(__file__).resolve().parents[1], conf()
    named = {f"captcha_exp/{_below(package, path)}": path for path in package.rglob("*.py")}
    named = {name: path for name, path in named.items() if not path.is_relative_to(configs)}
    named |= {f"conf/{_below(configs, path)}": path for path in configs.rglob("*.yaml")}
    return {name: _sha256_of_text(named[name]) for name in sorted(named)}


def code_sha256() -> str:
    """SHA-256 over the names and contents of all source files: equal for equal code, with git or without."""
    return hashlib.sha256(json.dumps(source_files(), sort_keys=True).encode()).hexdigest()


def _below(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _sha256_of_text(path: Path) -> str:
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
