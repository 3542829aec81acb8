"""Which addresses of a saved config are written to: it may come from another user."""

import os
from pathlib import Path

from captcha_exp.config.schema import Config
from captcha_exp.config.tracking import MlflowConfig
from captcha_exp.config.uri import sqlite_path


def untrusted_keys(config: Config, root: Path) -> dict[str, str]:
    """Return key -> value of the addresses that nothing may be written to, if the config is a saved one.

    Trusted are those inside the root directory, caches that have images, existing stores, and servers.
    """
    found = {}
    cache = root / config.data.cache
    if not is_inside(cache, root) and not _has_cached_images(cache):
        found["data.cache"] = config.data.cache
    store = sqlite_path(config.tracking.uri) if isinstance(config.tracking, MlflowConfig) else None
    if store is not None and not os.path.exists(store) and not is_inside(store, root):  # noqa: PTH110 - pathlib's raises
        found["tracking.uri"] = str(store)
    return found


def is_inside(path: Path, root: Path) -> bool:
    """Return whether a path is inside the root directory, with symbolic links followed."""
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # a circular link, a null character
        return False


def _has_cached_images(directory: Path) -> bool:
    try:
        return any(directory.glob("*.sha256"))
    except (OSError, ValueError):
        return False
