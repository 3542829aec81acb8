"""Where things stand: the YAML files, and the folder that runs are written into."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def conf() -> Path:
    """The folder of the YAML files: beside the package in a checkout, inside it when installed."""
    inside = _PACKAGE / "conf"
    return inside if inside.is_dir() else _PACKAGE.parent / "conf"


def checkout() -> Path | None:
    """The checkout that the package runs from, or None for an installed one."""
    home = _PACKAGE.parent
    return home if (home / "pyproject.toml").is_file() and conf().parent == home else None


def root() -> Path:
    """The folder in which outputs/ and mlruns/ stand.

    CAPTCHA_EXP_ROOT names it; else it is the checkout that the package runs from; else, for an installed
    package, the working directory.
    """
    if named := os.environ.get("CAPTCHA_EXP_ROOT"):
        return Path(named).expanduser().resolve()
    return checkout() or Path.cwd()
