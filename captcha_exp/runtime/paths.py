"""Locations of the config files, GPU files, the checkout, and the directory that runs are written to."""

import os
from difflib import get_close_matches
from pathlib import Path

from captcha_exp.errors import ConfigError

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


def tracking_uri_variable() -> str | None:
    """Return MLFLOW_TRACKING_URI, the store of tracking.uri=auto; None if it is not set."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def find_gpu_file(name: str, config_dir: str | None = None) -> Path:
    """Return the path of a GPU's file: the name itself if it ends in .yaml, else that of a file in conf/gpu/.

    Raises:
        ConfigError: there is no such file; the line suggests the closest name.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises if there is no such user
    known = list_gpu_files(config_dir)
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"gpu={name}: no such file in conf/gpu; {hint}one of {', '.join(sorted(known))}")
    return known[name]


def list_gpu_files(config_dir: str | None = None) -> dict[str, Path]:
    """Return the file of each GPU by name; a file of `config_dir` takes precedence over conf/."""
    dirs = [conf_dir(), *([Path(config_dir)] if config_dir is not None else [])]
    folders = [each / "gpu" for each in dirs]
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in folders
        for path in sorted(folder.rglob("*.yaml"))
    }
