"""Locations of the config files, the checkout, and the directory that runs are written to."""

import os
from pathlib import Path

_PACKAGE_DIR = Path(__file__).resolve().parents[1]


def conf_dir() -> Path:
    """Return the directory of the config files: next to the package in a checkout, inside it if installed."""
    inside = _PACKAGE_DIR / "conf"
    return inside if inside.is_dir() else _PACKAGE_DIR.parent / "conf"


def checkout_dir() -> Path | None:
    """Return the checkout that the package runs from, or None if it is installed."""
    home = _PACKAGE_DIR.parent
    return home if (home / "pyproject.toml").is_file() and conf_dir().parent == home else None


def root_dir() -> Path:
    """Return the directory that contains outputs/ and mlruns/.

    CAPTCHA_EXP_ROOT if it is set, else the checkout, else (installed) the working directory.
    """
    if root := os.environ.get("CAPTCHA_EXP_ROOT"):
        return Path(root).expanduser().resolve()
    return checkout_dir() or Path.cwd()
