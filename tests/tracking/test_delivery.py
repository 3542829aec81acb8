"""Delivery of ended runs and of the jobs of a sweep, without a store."""

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import Call, edit_record, infos, sweep_info, write_record

from captcha_exp import runs
from captcha_exp.config import Config, MlflowConfig
from captcha_exp.runs import Run, RunInfo, StaleRun
from captcha_exp.runs.info import MlflowRef, Resumption, now
from captcha_exp.tracking import sync, tracker
from captcha_exp.tracking.content import ParentMissingError
from captcha_exp.tracking.delivery import Delivery, RunDeletedError, StoreError
from captcha_exp.tracking.sync import close_stale_runs, find_owed, sync_owed, sync_reachable
from captcha_exp.tracking.tracker import Sender

TRACKING = MlflowConfig(backend="mlflow", uri="http://127.0.0.1:1", experiment="x", required=False)
REFUSED = "the store is unreachable (Connection refused)"


def make_owed(config: Config, ended_minutes_ago: float = 5, run_dir: Path | None = None) -> Run:
    """Create an ended run of this process that MLflow does not have."""
    config = replace(config, tracking=TRACKING)
    run = runs.create_run(config, config, run_dir)
    run.update(mlflow=MlflowRef(uri=TRACKING.uri))
    run.close("FINISHED", ended=now() - timedelta(minutes=ended_minutes_ago))
    return run


def mlflow_of(run_dir: Path) -> dict[str, Any]:
    ref: dict[str, Any] = json.loads((run_dir / "run.json").read_text())["mlflow"]
    return ref


def test_a_run_of_a_process_that_continues_is_owed_after_a_while(tiny: Config) -> None:
    """A notebook, for example; just after the end its thread may still send."""
    run = make_owed(tiny)
    make_owed(tiny, ended_minutes_ago=0)
    assert [owed.run_dir for owed in find_owed()] == [run.run_dir]
    assert close_stale_runs() == []


def test_a_run_of_another_container_is_owed(tiny: Config) -> None:
    run = make_owed(tiny)
    edit_record(run.run_dir, host="another")
    assert [owed.run_dir for owed in find_owed()] == [run.run_dir]


def test_a_run_that_is_resumed_while_it_is_delivered_keeps_its_record(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_owed(tiny)

    def update(delivery: Delivery) -> None:
        edit_record(run.run_dir, ended=None, status="RUNNING")
        delivery.recorded.update_mlflow(closed=True)

    monkeypatch.setattr(Delivery, "update", update)
    (result,) = sync_owed(find_owed())
    assert result.problem == "the run was resumed, or another process writes its record"
    record = json.loads((run.run_dir / "run.json").read_text())
    assert (record["status"], record["mlflow"]["closed"]) == ("RUNNING", False)


@pytest.mark.parametrize("begun", ["here", "by another process", "resumed"])
def test_a_store_outside_is_created_only_for_a_run_that_begins(
    tiny: Config, tmp_path_factory: pytest.TempPathFactory, begun: str
) -> None:
    """The record of another process may come from another user."""
    path = tmp_path_factory.mktemp("outside") / "new.db"
    tracking = replace(TRACKING, uri=f"sqlite:///{path}")
    config = replace(tiny, tracking=tracking)
    run = runs.create_run(config, config)
    run.update(mlflow=MlflowRef(uri=tracking.uri))
    if begun == "by another process":
        run.update(pid=1)
    elif begun == "resumed":
        run.update(resumed=[Resumption(at=now(), host="a")])
    delivery = Delivery(run)
    if begun == "here":
        delivery.update()
    else:
        with pytest.raises(StoreError, match=r"new.db does not exist; it was deleted, or its disk is"):
            delivery.update()
    assert path.exists() == (begun == "here")


def test_a_job_waits_for_its_sweep(tiny: Config, root: Path) -> None:
    sweep_dir = root / "outputs" / "2026-01-01" / "000000-grid"
    sweep_dir.mkdir(parents=True)
    ref = MlflowRef(uri=TRACKING.uri).model_dump()
    write_record(sweep_dir, "sweep.json", sweep_info(mlflow=ref))
    delivery = Delivery(make_owed(tiny, run_dir=sweep_dir / "1-seed=1"))

    assert delivery.waits_for_parent()
    with pytest.raises(ParentMissingError):
        delivery.content.parent_tag()
    edit_record(sweep_dir, "sweep.json", mlflow=ref | {"run_id": "a1"})
    assert not delivery.waits_for_parent()
    assert delivery.content.parent_tag() == {"mlflow.parentRunId": "a1"}
    edit_record(sweep_dir, "sweep.json", mlflow=ref | {"run_id": "a1", "uri": "http://127.0.0.1:2"})
    assert delivery.content.parent_tag() == {}, "in another store"


def test_one_process_delivers_at_a_time(tiny: Config, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    make_owed(tiny)
    monkeypatch.setattr(sync, "SYNC_LOCK_SECONDS", 0.01)

    def deliver(_: Delivery) -> None:
        code, _out, err = call("sync")
        assert (code, err) == (2, "sync: another process delivers runs to MLflow now; try again later\n")

    monkeypatch.setattr(Delivery, "complete", deliver)
    (result,) = sync_owed(find_owed())
    assert result.problem is None


def test_sync_prints_what_is_not_delivered(tiny: Config, call: Call) -> None:
    run = make_owed(tiny)
    name = run.run_dir.relative_to(run.run_dir.parents[2])
    code, out, _ = call("sync")
    hint = "captcha-exp sync --to URI delivers to another store, if the address is wrong"
    assert (code, out) == (1, f"{name}: http://127.0.0.1:1: not delivered: {REFUSED}\n{hint}\n")
    code, out, _ = call("sync", "--json")
    (result,) = json.loads(out)
    assert (code, result["problem"], result["run_dir"]) == (1, REFUSED, str(run.run_dir))
    assert result["delivered"] == []
    assert mlflow_of(run.run_dir)["closed"] is False


def test_sync_to_another_store_delivers_all_of_a_run(
    tiny: Config,
    root: Path,
    tmp_path_factory: pytest.TempPathFactory,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_owed(tiny)
    run.update_mlflow(run_id="a1", experiment_id="1")
    seen: list[MlflowRef | None] = []

    def complete(delivery: Delivery) -> None:
        seen.append(delivery.recorded.info.mlflow)
        delivery.recorded.update_mlflow(closed=True)

    monkeypatch.setattr(Delivery, "complete", complete)
    outside = tmp_path_factory.mktemp("outside") / "new.db"
    for uri, problem in (
        ("a/b", "tracking.uri='a/b': MLflow no longer supports plain directories; "),
        ("htp://a", "tracking.uri=htp://a: "),
        ("http://127.0.0.1:2", "tracking.uri=http://127.0.0.1:2: "),
        (f"sqlite:///{outside}", f"sync --to sqlite:///{outside}: {outside} does not exist"),
    ):
        code, _, err = call("sync", "--to", uri)
        assert (code, seen, run.info.mlflow) == (2, [], RunInfo.load(run.run_dir).mlflow)
        assert err.startswith(problem)
    uri = f"sqlite:///{root}/mlruns/a b.db"
    code, out, _ = call("sync", "--to", uri)
    assert (code, seen) == (0, [MlflowRef(uri=uri)])
    assert out == f"{run.run_dir.relative_to(root)}: {uri}: has it already\n"


def test_a_run_that_is_deleted_while_it_trains_is_one_warning(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def update(_: Delivery) -> None:
        raise RunDeletedError

    monkeypatch.setattr(Delivery, "update", update)
    run = runs.create_run(tiny, tiny)
    sender = Sender(run, TRACKING)
    run.close("FINISHED")
    sender.finish()
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line == "tracking.uri=http://127.0.0.1:1: run None was deleted there; its directory is complete"
    assert mlflow_of(run.run_dir)["closed"] is True


@pytest.mark.parametrize(
    ("uri", "calls"), [("sqlite:///{root}/mlruns/mlflow.db", 2), ("http://127.0.0.1:1", 1)]
)
def test_the_end_of_a_job_waits_for_its_sweep_in_a_local_store(
    uri: str, calls: int, tiny: Config, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may be away, and then the job would wait in vain."""
    seen: list[Delivery] = []

    def complete(delivery: Delivery) -> None:
        seen.append(delivery)
        if len(seen) == 1:
            raise ParentMissingError
        delivery.recorded.update_mlflow(closed=True)

    def update(_: Delivery) -> None:
        raise ParentMissingError

    monkeypatch.setattr(Delivery, "update", update)
    monkeypatch.setattr(Delivery, "complete", complete)
    monkeypatch.setattr(tracker, "PARENT_INTERVAL_SECONDS", 0.01)
    run = runs.create_run(tiny, tiny)
    sender = Sender(run, replace(TRACKING, uri=uri.format(root=root)))
    run.close("FINISHED")
    sender.finish()
    assert len(seen) == calls
    assert mlflow_of(run.run_dir)["closed"] == (calls == 2)


def test_what_is_not_delivered_in_the_background_is_one_line(
    tiny: Config, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        make_owed(tiny)
    sync_reachable()
    assert infos(caplog)[-1] == (
        f"http://127.0.0.1:1: lacks the end of 2 earlier runs: {REFUSED}; captcha-exp sync delivers it"
    )
    assert [StaleRun.load(RunInfo, owed.run_dir) is not None for owed in find_owed()] == [True, True]
