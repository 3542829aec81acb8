"""Addresses of MLflow stores."""

from pathlib import Path

import pytest
from sqlalchemy import make_url

from captcha_exp import compose, load
from captcha_exp.config import MlflowConfig, with_tracking_uri
from captcha_exp.config.uri import absolute_uri, local_store_uri, moved_store_uri, sqlite_path, sqlite_uri
from captcha_exp.errors import ConfigError

ODD_PATHS = ("/a b/m.db", "/a#b/m.db", "/a%20b/m.db", "/a%3Fb/m.db", "/a;b@c:d/m.db", "/Übung/it's.db")


@pytest.mark.parametrize("path", [*ODD_PATHS, "/what?/m.db", "/a?b=c/m.db", "/a?b=c", "/a?mode=ro/b#c%3F.db"])
def test_any_path_survives_its_address(path: str) -> None:
    uri = sqlite_uri(Path(path))
    assert sqlite_path(uri) == Path(path)
    assert absolute_uri(uri) == uri if "?" not in path else sqlite_path(absolute_uri(uri)) == Path(path)
    if "?" not in path:
        assert make_url(uri).database == path  # as MLflow reads it
    else:
        assert dict(make_url(uri).query) == {"uri": "true"}


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:////srv/m.db", "/srv/m.db"),
        ("sqlite+pysqlite:////srv/m.db", "/srv/m.db"),
        ("sqlite:////srv/m.db?timeout=9&check_same_thread=false", "/srv/m.db"),
        ("sqlite:////srv/what?/m.db", "/srv/what?/m.db"),
        ("sqlite:////srv/what?", "/srv/what?"),
        ("sqlite:///m.db", "m.db"),
        ("sqlite://", None),
        ("sqlite:///:memory:", None),
        ("postgresql://host/db", None),
        ("http://host/sqlite:///m.db", None),
    ],
)
def test_the_file_of_an_address(uri: str, path: str | None) -> None:
    assert sqlite_path(uri) == (None if path is None else Path(path))


def test_a_relative_store_is_the_same_from_every_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert absolute_uri("sqlite:///m.db") == f"sqlite:///{tmp_path}/m.db"
    assert absolute_uri("sqlite:///~/m.db") == f"sqlite:///{tmp_path}/home/m.db"
    assert absolute_uri("http://host:5000/x") == "http://host:5000/x"
    config = load(compose("tracking.uri=sqlite:///m.db"))
    resolved = with_tracking_uri(config, tmp_path, None).tracking
    assert isinstance(resolved, MlflowConfig)
    assert resolved.uri == f"sqlite:///{tmp_path}/m.db"


@pytest.mark.parametrize(
    ("requested", "variable", "expected"),
    [
        ("auto", None, "sqlite:////project/mlruns/mlflow.db"),
        ("auto", "", "sqlite:////project/mlruns/mlflow.db"),
        ("auto", "auto", "sqlite:////project/mlruns/mlflow.db"),
        ("auto", "http://host", "http://host"),
        ("auto", "sqlite:////other.db", "sqlite:////other.db"),
        ("http://mine", "http://host", "http://mine"),
    ],
)
def test_auto_follows_the_environment(requested: str, variable: str | None, expected: str) -> None:
    config = load(compose(f"tracking.uri={requested}"))
    resolved = with_tracking_uri(config, Path("/project"), variable).tracking
    assert isinstance(resolved, MlflowConfig)
    assert resolved.uri == expected


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("http://me:hidden@host", "must not contain a secret"),
        ("postgresql://host/db?password=hidden", "must not contain a secret"),
        ("./mlruns", "MLflow no longer supports plain directories"),
        ("file:///mlruns", "MLflow no longer supports plain directories"),
        ("http://[::1", "not a URI"),
    ],
)
def test_an_unusable_address_of_the_environment(variable: str, text: str) -> None:
    config = load(compose())
    with pytest.raises(ConfigError, match=f"^MLFLOW_TRACKING_URI: {text}.*set tracking.uri") as error:
        with_tracking_uri(config, Path("/project"), variable)
    assert "hidden" not in str(error.value)
    untracked = load(compose("tracking=none"))
    assert with_tracking_uri(untracked, Path("/project"), variable) == untracked


def test_a_store_moves_with_its_root(tmp_path: Path) -> None:
    recorded = "sqlite:////gone/project/mlruns/mlflow.db"
    assert moved_store_uri(recorded, tmp_path) == recorded  # neither there nor here
    store = tmp_path / "mlruns" / "mlflow.db"
    store.parent.mkdir()
    store.touch()
    assert moved_store_uri(recorded, tmp_path) == local_store_uri(tmp_path)
    assert moved_store_uri("http://host", tmp_path) == "http://host"
    assert moved_store_uri("sqlite:////gone/chosen.db", tmp_path) == "sqlite:////gone/chosen.db"
    other = tmp_path / "other" / "mlruns" / "mlflow.db"
    other.parent.mkdir(parents=True)
    other.touch()
    assert moved_store_uri(sqlite_uri(other), tmp_path) == sqlite_uri(other)  # it is still there
