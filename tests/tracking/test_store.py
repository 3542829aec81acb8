"""The check of a store before anything is begun, and artifacts that stay beside a store that moves."""

import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from conftest import TINY, Call, infos
from mlflow import MlflowClient

from captcha_exp import compose, load
from captcha_exp.config import MlflowConfig, local_store_uri
from captcha_exp.errors import UserError
from captcha_exp.tracking import check_tracking
from captcha_exp.tracking.download import download_artifacts
from captcha_exp.tracking.inspection import check_store, inspect_store
from captcha_exp.tracking.server import serve_ui
from captcha_exp.tracking.store import (
    find_moved_artifacts,
    get_or_create_experiment,
    open_store,
    send_artifact,
)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store with an experiment; creating one takes two seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    get_or_create_experiment(open_store(f"sqlite:///{path}"), f"sqlite:///{path}", "captcha_exp")
    return path


@pytest.fixture
def store(root: Path, empty_store: Path) -> Path:
    """Return a copy of the store where tracking.uri=auto looks for it."""
    path = root / "mlruns" / "mlflow.db"
    path.parent.mkdir()
    shutil.copy(empty_store, path)
    return path


def edit(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        for statement in statements:
            database.execute(statement)


# -- odd stores ----------------------------------------------------------------------------------------------


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for page in range(3, len(content) // 4096, 2):
        content[page * 4096 : page * 4096 + 64] = b"\xa5" * 64
    path.write_bytes(content)


def _foreign(path: Path) -> None:
    path.unlink()
    edit(path, "CREATE TABLE users (id)")


def _of_another_program_with_alembic(path: Path) -> None:
    _foreign(path)
    edit(
        path, "CREATE TABLE alembic_version (version_num)", "INSERT INTO alembic_version VALUES ('v3.2.0.a')"
    )


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _half_page(path: Path) -> None:
    os.truncate(path, 2000)


ODD_STORES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a directory": (_directory, "is a directory, not a file"),
    "text": (lambda path: path.write_text("date,label\n" * 99), "file is not a database"),
    "an image": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" * 999), "file is not a database"),
    "half of it": (_truncate, "malformed"),
    "half a page": (_half_page, "malformed|not a database"),
    "damaged pages": (_corrupt, "malformed|Tree|tree|btree|page|Page"),
    "another database": (_foreign, "not an MLflow database"),
    "another program's schema": (_of_another_program_with_alembic, "not an MLflow database"),
    "no schema": (lambda path: edit(path, "DELETE FROM alembic_version"), "not an MLflow database"),
    "a missing table": (lambda path: edit(path, "DROP TABLE metrics"), "not an MLflow database"),
    "a newer schema": (
        lambda path: edit(path, "UPDATE alembic_version SET version_num = 'ffff'"),
        "created by a newer MLflow",
    ),
    "an older schema": (
        lambda path: edit(path, "UPDATE alembic_version SET version_num = '451aebb31d03'"),
        "created by an older MLflow .* mlflow db upgrade",
    ),
    "a deleted experiment": (
        lambda path: edit(path, "UPDATE experiments SET lifecycle_stage = 'deleted'"),
        "the experiment of this config is deleted; restore it",
    ),
    "a FIFO": (_fifo, "not a regular file"),
}


@pytest.mark.parametrize("kind", ODD_STORES)
def test_an_odd_store_is_refused_in_one_line_and_not_touched(store: Path, kind: str) -> None:
    make, text = ODD_STORES[kind]
    make(store)
    before = store.read_bytes() if store.is_file() else None
    uri = f"sqlite:///{store}"
    tracking = MlflowConfig(backend="mlflow", uri=uri, experiment="captcha_exp", required=False)
    calls: tuple[Callable[[], object], ...] = (
        lambda: check_store(uri, "captcha_exp"),
        lambda: check_tracking(load(compose())),
        lambda: serve_ui(tracking, None),
        lambda: download_artifacts("0" * 32, uri, [], store.parent),
    )
    start = time.monotonic()
    for call in calls[: 3 if kind == "a deleted experiment" else 4]:
        with pytest.raises(UserError, match=rf"(?s)^tracking.uri=sqlite:///.*({text})") as error:
            call()
        assert len(error.value.lines) == 1
    assert time.monotonic() - start < 60  # seconds on an idle machine; MLflow's own tries take minutes
    assert [path.name for path in store.parent.iterdir()] == ["mlflow.db"]
    assert before is None or store.read_bytes() == before


def test_an_interrupted_transaction_is_rolled_back(store: Path) -> None:
    """What a process leaves that was killed while it committed."""
    with closing(sqlite3.connect(store, isolation_level=None)) as database:
        database.execute("PRAGMA synchronous=EXTRA")
        database.execute("PRAGMA cache_size=1")  # pages are written before the end
        database.execute("BEGIN")
        database.execute("CREATE TABLE filler (t)")
        database.executemany("INSERT INTO filler VALUES (?)", [("x" * 100,)] * 5_000)
        journal = store.with_name(f"{store.name}-journal")
        left = [(path, path.read_bytes()) for path in (store, journal)]
        database.execute("ROLLBACK")
    for path, content in left:
        path.write_bytes(content)
    uri = f"sqlite:///{store}"
    reader = sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)
    with closing(reader), pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.execute("SELECT * FROM experiments")
    assert inspect_store(uri, "captcha_exp", is_written=False) == ("current", "")
    assert not journal.exists()
    check_store(uri, "captcha_exp")


def test_a_store_on_a_disk_that_is_not_mounted_is_named(root: Path) -> None:
    (root / "mlruns").symlink_to(root / "disk")
    with pytest.raises(UserError, match=r"mlruns: is a symbolic link to .*disk, which does not exist; mount"):
        check_store(f"sqlite:///{root}/mlruns/mlflow.db", "")


def test_a_locked_store_delays_no_run(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captcha_exp.tracking.inspection.LOCK_TIMEOUT_SECONDS", 0.05)
    uri = f"sqlite:///{store}"
    tracking = MlflowConfig(backend="mlflow", uri=uri, experiment="captcha_exp", required=False)
    with closing(sqlite3.connect(store, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert inspect_store(uri, "", is_written=False) == ("current", "")  # a writer does not lock readers
        assert inspect_store(uri, "")[0] == "locked"
        check_store(uri, "")
        other.execute("ROLLBACK")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="locked by another process"):
            serve_ui(tracking, None)


def test_a_large_store_is_checked_in_part(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captcha_exp.tracking.inspection.INTEGRITY_SECONDS", -1.0)
    edit(
        store,
        "CREATE TABLE filler (i, t)",
        "INSERT INTO filler WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50000)"
        " SELECT i, hex(i) FROM n",
    )
    assert inspect_store(f"sqlite:///{store}", "captcha_exp") == ("current", "")


def test_a_server_that_is_away_may_come_back(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_tracking(load(compose("tracking.uri=http://127.0.0.1:9")))
    assert infos(caplog) == ["Recording in MLflow at http://127.0.0.1:9 (tracking.uri)"]


def test_where_a_run_is_recorded_is_said(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check_tracking(load(compose("tracking=none")))
    check_tracking(load(compose()))
    local, other = f"sqlite:///{root}/mlruns/mlflow.db", f"sqlite:///{root}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    check_tracking(load(compose()))
    check_tracking(load(compose(f"tracking.uri={local}")))
    assert infos(caplog) == [
        f"Recording in MLflow at {local} (tracking.uri=auto)",
        f"Recording in MLflow at {other} (MLFLOW_TRACKING_URI)",
        f"Recording in MLflow at {local} (tracking.uri, which precedes MLFLOW_TRACKING_URI)",
    ]
    assert list(root.iterdir()) == []
    (root / "other.db").write_text("no database, " * 99)
    with pytest.raises(
        UserError, match=r"^MLFLOW_TRACKING_URI=sqlite.* name another file in MLFLOW_TRACKING_URI"
    ):
        check_tracking(load(compose()))


@pytest.mark.parametrize(
    "words",
    [("train",), ("train", "-m", "seed=1,2"), ("train", "train.on_oom=split"), ("ui",)],
    ids=["train", "sweep", "split", "ui"],
)
def test_nothing_is_begun_with_a_store_that_cannot_be_used(
    store: Path, call: Call, words: tuple[str, ...]
) -> None:
    edit(store, "UPDATE experiments SET lifecycle_stage = 'deleted'")
    arguments = [] if words == ("ui",) else TINY
    code, out, err = call(words[0], *arguments, *words[1:])
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == (
        f"tracking.uri=sqlite:///{store}: the experiment of this config is deleted; "
        "restore it (see mlflow experiments restore --help), or set another tracking.experiment"
    )
    assert not list(store.parents[1].glob("outputs/2*"))


def test_a_root_with_characters_that_mean_something_in_addresses(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "what? #1 100% %20 a=b&c"
    (root / "mlruns").mkdir(parents=True)
    shutil.copy(empty_store, root / "mlruns" / "mlflow.db")
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(root))
    uri = local_store_uri(root)
    client = open_store(uri)
    experiment = get_or_create_experiment(client, uri, "another")
    run_id = client.create_run(experiment).info.run_id
    _record(client, run_id, tmp_path / "run")
    assert (root / "mlruns" / "artifacts" / run_id / "artifacts" / "config.yaml").is_file()
    assert download_artifacts(run_id, uri, ["config.yaml"], tmp_path)
    assert inspect_store(uri, "another") == ("current", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "run", root.name]


# -- stores that move ----------------------------------------------------------------------------------------


def _record(client: MlflowClient, run_id: str, run_dir: Path) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text("a: 1\n")
    send_artifact(client, run_id, run_dir, run_dir / "config.yaml")


def _new_run(path: Path, tmp_path: Path) -> str:
    """Record a run with an artifact as a training does, and return its ID."""
    uri = f"sqlite:///{path}"
    client = open_store(uri)
    run_id: str = client.create_run(get_or_create_experiment(client, uri, "moving")).info.run_id
    _record(client, run_id, tmp_path / "run")
    return run_id


def _has_artifact(path: Path, run_id: str, tmp_path: Path) -> bool:
    target = tmp_path / f"downloaded-{run_id}"
    target.mkdir(exist_ok=True)
    download_artifacts(run_id, f"sqlite:///{path}", ["config.yaml"], target)
    is_beside = (path.parent / "artifacts" / run_id / "artifacts" / "config.yaml").is_file()
    return is_beside and (target / "config.yaml").is_file()


@pytest.mark.parametrize("how", ["moved", "copied", "moved twice"])
def test_artifacts_are_beside_the_store_wherever_it_stands(
    tmp_path: Path, store: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    old = tmp_path / "mlruns"
    first = _new_run(store, tmp_path)
    new = tmp_path / "new #2" / "mlruns"
    new.parent.mkdir()
    if how == "copied":
        shutil.copytree(old, new)
    else:
        old.rename(new)
    if how == "moved twice":
        new = new.rename(tmp_path / "renamed")  # also the folder itself
    before = sorted(old.rglob("*"))
    second = _new_run(new / "mlflow.db", tmp_path)

    assert _has_artifact(new / "mlflow.db", first, tmp_path)
    assert _has_artifact(new / "mlflow.db", second, tmp_path)
    assert sorted(old.rglob("*")) == before
    assert find_moved_artifacts(new / "mlflow.db") == []
    (line,) = [line for line in infos(caplog) if "was moved" in line]
    assert line.endswith(f"the artifacts of 1 runs are now found in {new}/artifacts")
    if how == "copied":
        assert _has_artifact(old / "mlflow.db", first, tmp_path)


def test_a_run_that_ends_after_the_move_sends_its_artifacts_to_the_new_place(
    tmp_path: Path, store: Path
) -> None:
    uri = f"sqlite:///{store}"
    client = open_store(uri)
    run_id = client.create_run(get_or_create_experiment(client, uri, "moving")).info.run_id
    (tmp_path / "new").mkdir()
    new = (tmp_path / "mlruns").rename(tmp_path / "new" / "mlruns")
    _record(open_store(f"sqlite:///{new}/mlflow.db"), run_id, tmp_path / "run")
    assert _has_artifact(new / "mlflow.db", run_id, tmp_path)
    assert not (tmp_path / "mlruns").exists()


def test_a_location_that_was_chosen_is_kept(tmp_path: Path, store: Path) -> None:
    client = open_store(f"sqlite:///{store}")
    existing = tmp_path / "big disk" / "artifacts"
    existing.mkdir(parents=True)
    locations = [
        existing.as_uri(),
        "file:///not/mounted/artifacts",
        "s3://bucket/artifacts",
        "file:///data/x",
    ]
    ids = [
        client.create_experiment(f"chosen {number}", artifact_location=location)
        for number, location in enumerate(locations)
    ]
    client.create_run(ids[1])
    open_store(f"sqlite:///{store}")
    assert [client.get_experiment(each).artifact_location for each in ids] == locations
