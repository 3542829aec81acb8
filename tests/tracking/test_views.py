"""URLs and saved views of the MLflow UI; test_ui.py opens them in a browser."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest
from conftest import infos, warnings
from mlflow import MlflowClient
from mlflow.entities import Param

from captcha_exp.tracking import server, views
from captcha_exp.tracking.store import open_store
from captcha_exp.tracking.views import compare_url

SERVER = "http://127.0.0.1:5000"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    """Return a client of one store for all tests of this file; creating one takes two seconds."""
    return open_store(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")


@pytest.fixture
def experiment(client: MlflowClient, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(client.create_experiment(request.node.name, artifact_location=tmp_path.as_uri()))


def create_run(client: MlflowClient, experiment: str, start: int, parent: str = "", **params: object) -> str:
    tags = {"mlflow.parentRunId": parent} if parent else {}
    run_id: str = client.create_run(experiment, start_time=start, tags=tags).info.run_id
    entities = [Param(name.replace("__", "."), str(value)) for name, value in params.items()]
    client.log_batch(run_id, params=entities)
    return run_id


def query(url: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(url.split("?", 1)[1]).items()}


def saved_view(client: MlflowClient, experiment: str, url: str) -> Mapping[str, Any]:
    """Return the saved view that a URL refers to."""
    tags = client.get_experiment(experiment).tags
    view = json.loads(tags[f"mlflow.sharedViewState.{query(url)['viewStateShareKey']}"])
    assert set(view) == {"name", "createdAt", "state"}
    state: Mapping[str, Any] = json.loads(view["state"])
    return state


def test_without_a_sweep_the_pages_are_runs_and_curves(client: MlflowClient, experiment: str) -> None:
    create_run(client, experiment, 1)
    urls = views.create_views(client, SERVER, experiment)

    assert list(urls) == ["runs", "curves"]
    assert urls["runs"].startswith(f"{SERVER}/#/experiments/{experiment}/runs?")
    assert "compareRunsMode" not in query(urls["runs"])
    assert query(urls["curves"])["compareRunsMode"] == "CHART"
    assert {query(url)["workflowType"] for url in urls.values()} == {"machine_learning"}
    assert saved_view(client, experiment, urls["runs"])["searchFilter"] == ""


def test_the_latest_sweep_has_the_latest_job(client: MlflowClient, experiment: str) -> None:
    older, newer = create_run(client, experiment, 1), create_run(client, experiment, 2)
    second = create_run(client, experiment, 6, newer)
    first = create_run(client, experiment, 5, newer)
    create_run(client, experiment, 4, older)
    create_run(client, experiment, 9)  # not in a sweep
    urls = views.create_views(client, SERVER, experiment)

    assert list(urls) == ["runs", "curves", "sweep", "summary", "compare"]
    assert f"/runs/{newer}?" in urls["summary"]
    assert json.loads(query(urls["compare"])["runs"]) == [first, second]
    assert (
        saved_view(client, experiment, urls["sweep"])["searchFilter"]
        == f"tags.`mlflow.parentRunId` = '{newer}'"
    )
    assert saved_view(client, experiment, urls["curves"])["searchFilter"] == ""


def test_swept_keys_have_charts_with_the_batch_size_first(client: MlflowClient, experiment: str) -> None:
    parent = create_run(client, experiment, 1, seed="0, 1", train__batch_size="8, 16")
    create_run(client, experiment, 2, parent, seed=0, data__count=300, train__batch_size=8, only="here")
    create_run(client, experiment, 3, parent, seed=1, data__count=300, train__batch_size=16)
    sweep = views.find_latest_sweep(client, experiment)
    assert sweep is not None

    assert sweep.swept_keys[0] == "train.batch_size"
    assert set(sweep.swept_keys) == {"train.batch_size", "seed", "only"}
    state = views.sweep_view(sweep)
    charts = state["compareRunCharts"]
    scatter = [chart for chart in charts if chart["type"] == "SCATTER"]
    assert [(chart["xaxis"]["key"], chart["yaxis"]["key"]) for chart in scatter[:2]] == [
        ("train.batch_size", "memory/process_peak_mib"),
        ("train.batch_size", "val/accuracy"),
    ]
    assert len(scatter) == 4 * 3
    assert [chart["selectedParams"] for chart in charts if chart["type"] == "PARALLEL"] == [sweep.swept_keys]
    sections = [section["uuid"] for section in state["compareRunSections"]]
    assert {chart["metricSectionId"] for chart in charts} == {*sections}
    assert len({chart["uuid"] for chart in charts}) == len(charts)


def test_a_sweep_of_one_job_has_only_curves(client: MlflowClient, experiment: str) -> None:
    create_run(client, experiment, 2, create_run(client, experiment, 1), seed=0)
    sweep = views.find_latest_sweep(client, experiment)
    assert sweep is not None

    assert sweep.swept_keys == []
    assert {chart["type"] for chart in views.sweep_view(sweep)["compareRunCharts"]} == {"LINE"}


def test_all_jobs_of_a_sweep_are_shown(client: MlflowClient, experiment: str) -> None:
    create_run(client, experiment, 2, create_run(client, experiment, 1))
    urls = views.create_views(client, SERVER, experiment)

    assert saved_view(client, experiment, urls["sweep"])["runsHiddenMode"] == "SHOW_ALL"


def test_runs_are_not_sorted_by_start_time() -> None:
    state = views.runs_view()

    assert state["orderByKey"] != "attributes.start_time"
    assert state["selectedColumns"] == state["columnOrder"] == list(state["columnWidths"])


def test_the_number_of_compared_runs_is_limited(
    client: MlflowClient, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "MAX_COMPARED_RUNS", 2)
    parent = create_run(client, experiment, 1)
    jobs = [create_run(client, experiment, start, parent) for start in (2, 3, 4)]
    urls = views.create_views(client, SERVER, experiment)

    assert json.loads(query(urls["compare"])["runs"]) == jobs[1:]


def test_the_compare_url_contains_runs_and_experiments_as_json() -> None:
    url = compare_url(SERVER, "7", ["a", "b"])

    assert url.startswith(f"{SERVER}/#/compare-runs?")
    assert unquote(url).endswith('?runs=["a", "b"]&experiments=["7"]&workflowType=machine_learning')


def test_a_store_that_rejects_views_shows_the_default_pages(
    client: MlflowClient, experiment: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("attempt to write a readonly database\nand more")

    monkeypatch.setattr(client, "set_experiment_tag", refuse)
    caplog.clear()
    server._print_pages(client, SERVER, experiment)

    (warning,) = warnings(caplog)
    assert "attempt to write a readonly database;" in warning
    assert "viewStateShareKey" not in caplog.text
    assert [line.split()[0] for line in infos(caplog)] == ["runs", "curves"]
