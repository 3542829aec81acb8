"""Parse tracking URIs without importing MLflow."""

from pathlib import Path


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a SQLite store; None for a server or another database."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
