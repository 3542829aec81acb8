"""Addresses of MLflow stores: parsed and composed without importing MLflow."""

import re
from pathlib import Path
from urllib.parse import quote, unquote

_SQLITE = re.compile(
    r"sqlite(?:\+\w+)?:///(?P<name>.*?)(?:\?(?P<query>\w+=[^&?/]*(?:&\w+=[^&?/]*)*))?", re.DOTALL
)


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a SQLite store; None for a server, another database, or one in memory."""
    match = _SQLITE.fullmatch(uri)
    if match is None or match["name"] in ("", ":memory:"):
        return None
    if match["name"].startswith("file:"):
        return Path(unquote(match["name"].removeprefix("file:")))
    return Path(match["name"])


def sqlite_uri(path: Path) -> str:
    """Return the URI of a SQLite file. In a plain one, a query would start at the first `?` of the path."""
    return f"sqlite:///file:{quote(str(path))}?uri=true" if "?" in str(path) else f"sqlite:///{path}"


def local_store_uri(root: Path) -> str:
    """Return the URI of the store below the root directory."""
    return sqlite_uri(root / "mlruns" / "mlflow.db")


def absolute_uri(uri: str) -> str:
    """Return the URI of the same store for any working directory.

    Raises:
        RuntimeError: the path begins with an unknown ~user.
    """
    path = sqlite_path(uri)
    if path is None or (path.is_absolute() and "?" not in str(path)):
        return uri
    # A path with a `?` is written as such by a user; MLflow would take the rest for a query.
    return sqlite_uri(path.expanduser().absolute())


def moved_store_uri(uri: str, root: Path) -> str:
    """Return the current URI of the store of a record: its root directory may have been moved."""
    path, here = sqlite_path(uri), sqlite_path(local_store_uri(root))
    assert here is not None
    has_moved = path is not None and path.parts[-2:] == here.parts[-2:] and not path.exists()
    return local_store_uri(root) if has_moved and here.is_file() else uri
