"""What the addresses of MLflow's pages say, and the views that they name; test_ui.py opens them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest
from conftest import Heard
from mlflow import MlflowClient
from mlflow.entities import Param

from captcha_exp.tracking import compare_url, server, views
from captcha_exp.tracking.store import open_store

SERVER = "http://127.0.0.1:5000"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    """One store for the tests of this file, an experiment for each: a new store takes two seconds."""
    return open_store(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")


@pytest.fixture
def experiment(client: MlflowClient, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(client.create_experiment(request.node.name, artifact_location=tmp_path.as_uri()))


def run(client: MlflowClient, experiment: str, start: int, parent: str = "", **params: object) -> str:
    tags = {"mlflow.parentRunId": parent} if parent else {}
    made: str = client.create_run(experiment, start_time=start, tags=tags).info.run_id
    named = [Param(name.replace("__", "."), str(value)) for name, value in params.items()]
    client.log_batch(made, params=named)
    return made


def query(address: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(address.split("?", 1)[1]).items()}


def kept(client: MlflowClient, experiment: str, address: str) -> Mapping[str, Any]:
    """The view that an address names, as MLflow keeps it."""
    tags = client.get_experiment(experiment).tags
    view = json.loads(tags[f"mlflow.sharedViewState.{query(address)['viewStateShareKey']}"])
    assert set(view) == {"name", "createdAt", "state"}
    state: Mapping[str, Any] = json.loads(view["state"])
    return state


def test_without_a_sweep_there_are_the_runs_and_their_curves(client: MlflowClient, experiment: str) -> None:
    run(client, experiment, 1)
    found = views.create_views(client, SERVER, experiment)

    assert list(found) == ["runs", "curves"]
    assert found["runs"].startswith(f"{SERVER}/#/experiments/{experiment}/runs?")
    assert "compareRunsMode" not in query(found["runs"])
    assert query(found["curves"])["compareRunsMode"] == "CHART"
    assert {query(address)["workflowType"] for address in found.values()} == {"machine_learning"}
    assert kept(client, experiment, found["runs"])["searchFilter"] == ""


def test_the_newest_sweep_is_that_of_the_newest_point(client: MlflowClient, experiment: str) -> None:
    older, newer = run(client, experiment, 1), run(client, experiment, 2)
    second = run(client, experiment, 6, newer)
    first = run(client, experiment, 5, newer)
    run(client, experiment, 4, older)
    run(client, experiment, 9)  # alone
    found = views.create_views(client, SERVER, experiment)

    assert list(found) == ["runs", "curves", "sweep", "verdict", "compare"]
    assert f"/runs/{newer}?" in found["verdict"]
    assert json.loads(query(found["compare"])["runs"]) == [first, second]
    assert (
        kept(client, experiment, found["sweep"])["searchFilter"] == f"tags.`mlflow.parentRunId` = '{newer}'"
    )
    assert kept(client, experiment, found["curves"])["searchFilter"] == ""


def test_what_was_swept_has_charts_the_batch_size_first(client: MlflowClient, experiment: str) -> None:
    parent = run(client, experiment, 1, seed="0, 1", train__batch_size="8, 16")
    run(client, experiment, 2, parent, seed=0, data__count=300, train__batch_size=8, only="here")
    run(client, experiment, 3, parent, seed=1, data__count=300, train__batch_size=16)
    sweep = views.find_latest_sweep(client, experiment)
    assert sweep is not None

    assert sweep.swept_keys[0] == "train.batch_size"
    assert set(sweep.swept_keys) == {"train.batch_size", "seed", "only"}
    state = views.sweep_view(sweep)
    charts = state["compareRunCharts"]
    dots = [chart for chart in charts if chart["type"] == "SCATTER"]
    assert [(dot["xaxis"]["key"], dot["yaxis"]["key"]) for dot in dots[:2]] == [
        ("train.batch_size", "memory/process_peak_mib"),
        ("train.batch_size", "val/accuracy"),
    ]
    assert len(dots) == 4 * 3
    assert [chart["selectedParams"] for chart in charts if chart["type"] == "PARALLEL"] == [sweep.swept_keys]
    sections = [section["uuid"] for section in state["compareRunSections"]]
    assert {chart["metricSectionId"] for chart in charts} == {*sections}
    assert len({chart["uuid"] for chart in charts}) == len(charts)


def test_a_sweep_of_one_point_has_its_curves_alone(client: MlflowClient, experiment: str) -> None:
    run(client, experiment, 2, run(client, experiment, 1), seed=0)
    sweep = views.find_latest_sweep(client, experiment)
    assert sweep is not None

    assert sweep.swept_keys == []
    assert {chart["type"] for chart in views.sweep_view(sweep)["compareRunCharts"]} == {"LINE"}


def test_all_points_of_a_sweep_are_drawn(client: MlflowClient, experiment: str) -> None:
    run(client, experiment, 2, run(client, experiment, 1))
    found = views.create_views(client, SERVER, experiment)

    assert kept(client, experiment, found["sweep"])["runsHiddenMode"] == "SHOW_ALL"


def test_a_list_sorted_by_start_would_hide_the_points_of_a_sweep() -> None:
    state = views.runs_view()

    assert state["orderByKey"] != "attributes.start_time"
    assert state["selectedColumns"] == state["columnOrder"] == list(state["columnWidths"])


def test_an_address_compares_no_more_runs_than_it_can_hold(
    client: MlflowClient, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "MOST_COMPARED", 2)
    parent = run(client, experiment, 1)
    points = [run(client, experiment, start, parent) for start in (2, 3, 4)]
    found = views.create_views(client, SERVER, experiment)

    assert json.loads(query(found["compare"])["runs"]) == points[1:]


def test_the_compare_page_is_asked_for_runs_and_experiments_as_json() -> None:
    address = compare_url(SERVER, "7", ["a", "b"])

    assert address.startswith(f"{SERVER}/#/compare-runs?")
    assert unquote(address).endswith('?runs=["a", "b"]&experiments=["7"]&workflowType=machine_learning')


def test_a_store_that_takes_no_view_costs_the_views_alone(
    client: MlflowClient, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("attempt to write a readonly database\nand more")

    monkeypatch.setattr(client, "set_experiment_tag", refuse)
    heard = Heard()
    server._print_pages(client, SERVER, experiment, heard)

    (warning,) = heard.warnings
    assert "attempt to write a readonly database;" in warning
    assert "viewStateShareKey" not in heard.lines[0]
    assert [line.split()[0] for line in heard.lines[0].splitlines()] == ["runs", "curves", "Ctrl-C"]
