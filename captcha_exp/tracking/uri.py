"""What a store's address says by itself; imports no MLflow."""

from pathlib import Path


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite store; None for a server or another database."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
