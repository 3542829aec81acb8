"""Where things stand: the YAML files, and the folder that runs are written into."""

import os
from pathlib import Path

_PACKAGE_DIR = Path(__file__).resolve().parents[1]


def conf_dir() -> Path:
    """The folder of the YAML files: beside the package in a checkout, inside it when installed."""
    inside = _PACKAGE_DIR / "conf"
    return inside if inside.is_dir() else _PACKAGE_DIR.parent / "conf"


def checkout_dir() -> Path | None:
    """The checkout that the package runs from, or None for an installed one."""
    home = _PACKAGE_DIR.parent
    return home if (home / "pyproject.toml").is_file() and conf_dir().parent == home else None


def root_dir() -> Path:
    """The folder in which outputs/ and mlruns/ stand.

    CAPTCHA_EXP_ROOT names it; else it is the checkout that the package runs from; else, for an installed
    package, the working directory.
    """
    if named := os.environ.get("CAPTCHA_EXP_ROOT"):
        return Path(named).expanduser().resolve()
    return checkout_dir() or Path.cwd()
