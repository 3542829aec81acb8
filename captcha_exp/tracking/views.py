"""What MLflow's pages are to show: the columns, the charts, and the addresses that open them so.

By itself MLflow's list of runs has no figures and hides the runs of a sweep below its parent. It can keep
a view of an experiment as a tag, in which `viewStateShareKey` in an address finds it. That format is
MLflow's own: a version that does not know it opens its page as if there were no view.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import quote, urlencode

from mlflow import MlflowClient
from mlflow.entities import Run

TRAINING = {"workflowType": "machine_learning"}  # and not the pages for chats, MLflow's first choice
MOST_COMPARED = 100  # runs in one address
MOST_SWEPT = 3  # keys with charts of their own

# In the order of the columns; the figures are their widths in pixels, in which the names can be read.
COLUMNS = {
    "attributes.`Created`": 130,
    "params.`train.batch_size`": 130,
    "params.`model.name`": 120,
    "metrics.`val/accuracy`": 115,
    "metrics.`test/accuracy`": 120,
    "metrics.`memory/process_peak_mib`": 205,
    "metrics.`memory/predicted_peak_mib`": 215,
    "metrics.`speed/images_per_second`": 195,
    "tags.`fits`": 110,
    "tags.`oom`": 110,
    "attributes.`Duration`": 90,
}
CURVES = (
    "val/accuracy",
    "val/loss",
    "memory/process_peak_mib",
    "train/accuracy",
    "train/loss",
    "speed/images_per_second",
)
BY_WHAT_WAS_SWEPT = (
    "memory/process_peak_mib",
    "val/accuracy",
    "speed/images_per_second",
    "memory/predicted_peak_mib",  # the only one of a point that was not trained
)

State: TypeAlias = dict[str, Any]
Chart: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class NewestSweep:
    """The sweep that was started last, as MLflow has it."""

    parent: str
    points: tuple[Run, ...]
    """by their start"""

    @property
    def keys(self) -> list[str]:
        """What its points do not have in common, the batch size first."""
        params = [point.data.params for point in self.points]
        names = dict.fromkeys(name for one in params for name in one)
        swept = [name for name in names if len({one.get(name) for one in params}) > 1]
        return sorted(swept, key=lambda name: name != "train.batch_size")


def pages(client: MlflowClient, server: str, experiment: str) -> dict[str, str]:
    """Label -> address of the pages worth opening; the views that they name are kept in the store."""
    found = {"runs": runs_state(), "curves": curves_state()}
    sweep = newest_sweep(client, experiment)
    if sweep is not None:
        found["sweep"] = sweep_state(sweep)
    for name, state in found.items():
        client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{_key(name)}", _kept(name, state))
    addresses = {
        name: runs_address(server, experiment, view=_key(name), charts=name != "runs") for name in found
    }
    if sweep is not None:
        ids = [point.info.run_id for point in sweep.points[-MOST_COMPARED:]]
        addresses["verdict"] = run_address(server, experiment, sweep.parent)
        addresses["compare"] = compare_address(server, experiment, ids)
    return addresses


def newest_sweep(client: MlflowClient, experiment: str) -> NewestSweep | None:
    """The sweep whose point started last; None where there is none."""
    last = client.search_runs(
        [experiment], "tags.`mlflow.parentRunId` LIKE '%'", order_by=["start_time DESC"], max_results=1
    )
    if not last:
        return None
    parent = last[0].data.tags["mlflow.parentRunId"]
    points = client.search_runs([experiment], _points_of(parent), order_by=["start_time ASC"])
    return NewestSweep(parent, tuple(points))


# -- addresses ---------------------------------------------------------------------------------------------


def runs_address(server: str, experiment: str, view: str | None = None, charts: bool = False) -> str:
    """The page of an experiment's runs: a table, or their charts."""
    shown = TRAINING | ({"compareRunsMode": "CHART"} if charts else {})
    if view is not None:
        shown |= {"viewStateShareKey": view}
    return f"{server}/#/experiments/{experiment}/runs?{urlencode(shown)}"


def run_address(server: str, experiment: str, run: str) -> str:
    """The page of a run, which for a sweep has its verdict as the description."""
    return f"{server}/#/experiments/{experiment}/runs/{run}?{urlencode(TRAINING)}"


def compare_address(server: str, experiment: str, run_ids: Sequence[str]) -> str:
    """The page that shows these runs side by side."""
    runs, experiments = quote(json.dumps(list(run_ids))), quote(json.dumps([experiment]))
    return f"{server}/#/compare-runs?runs={runs}&experiments={experiments}&{urlencode(TRAINING)}"


# -- views -------------------------------------------------------------------------------------------------


def runs_state() -> State:
    """Every run in a row of its own, the newest first."""
    return _state()


def curves_state() -> State:
    """The curves of all runs."""
    return _state() | _charts({"curves": [_line(metric) for metric in CURVES]})


def sweep_state(sweep: NewestSweep) -> State:
    """The points of a sweep alone: memory, accuracy and speed by what was swept; then their curves."""
    keys = sweep.keys[:MOST_SWEPT]
    sections = {f"by {key}": [_dots(key, metric) for metric in BY_WHAT_WAS_SWEPT] for key in keys}
    if len(keys) > 1:
        sections["all that was swept"] = [_axes(keys, BY_WHAT_WAS_SWEPT)]
    sections["curves"] = [_line(metric) for metric in CURVES]
    return _state(_points_of(sweep.parent)) | _charts(sections)


def _key(name: str) -> str:
    return f"captcha-exp-{name}"


def _points_of(parent: str) -> str:
    return f"tags.`mlflow.parentRunId` = '{parent}'"


def _kept(name: str, state: State) -> str:
    """The state as MLflow keeps it, under a name in its own list of views."""
    return json.dumps({"name": name, "createdAt": 0, "state": json.dumps(state)})


def _state(filtered: str = "") -> State:
    return {
        "searchFilter": filtered,
        # Sorted by anything but "Created", MLflow gives the runs of a sweep rows of their own instead of
        # hiding them below their parent; runs of one source, as all of ours are, come by their start.
        "orderByKey": "tags.`mlflow.source.name`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "runsHiddenMode": "FIRST_20_RUNS" if not filtered else "SHOW_ALL",
        "selectedColumns": list(COLUMNS),
        "columnOrder": list(COLUMNS),
        "columnWidths": COLUMNS,
    }


def _charts(sections: Mapping[str, Sequence[Chart]]) -> State:
    """These charts, in sections that can be folded; MLflow adds the metrics that are left, in its own."""
    return {
        "compareRunCharts": [
            {"uuid": f"{name} {number}", "metricSectionId": name, "isGenerated": False, "deleted": False}
            | chart
            for name, charts in sections.items()
            for number, chart in enumerate(charts)
        ],
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "isReordered": True} for name in sections
        ],
        "isAccordionReordered": True,
    }


def _line(metric: str) -> Chart:
    """A curve by epoch for each run; a dot for a run of one epoch."""
    return {
        "type": "LINE",
        "runsCountToCompare": MOST_COMPARED,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "lineSmoothness": 0,
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def _dots(param: str, metric: str) -> Chart:
    return {
        "type": "SCATTER",
        "runsCountToCompare": MOST_COMPARED,
        "xaxis": {"key": param, "type": "PARAM"},
        "yaxis": {"key": metric, "type": "METRIC"},
    }


def _axes(params: Sequence[str], metrics: Sequence[str]) -> Chart:
    """Parallel coordinates: a line for each run across an axis for each param and metric."""
    return {
        "type": "PARALLEL",
        "selectedParams": list(params),
        "selectedMetrics": list(metrics),
        "showAllRuns": True,
    }
