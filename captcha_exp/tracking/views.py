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

WORKFLOW_PARAMS = {"workflowType": "machine_learning"}  # and not the pages for chats, MLflow's first choice
MAX_COMPARED_RUNS = 100  # runs in one address
MAX_SWEPT_KEYS = 3  # keys with charts of their own

# In the order of the columns; the figures are their widths in pixels, in which the names can be read.
COLUMN_WIDTHS = {
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
CURVE_METRICS = (
    "val/accuracy",
    "val/loss",
    "memory/process_peak_mib",
    "train/accuracy",
    "train/loss",
    "speed/images_per_second",
)
SWEEP_METRICS = (
    "memory/process_peak_mib",
    "val/accuracy",
    "speed/images_per_second",
    "memory/predicted_peak_mib",  # the only one of a point that was not trained
)

ViewState: TypeAlias = dict[str, Any]
Chart: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class LatestSweep:
    """The sweep that was started last, as MLflow has it."""

    parent_run_id: str
    jobs: tuple[Run, ...]
    """by their start"""

    @property
    def swept_keys(self) -> list[str]:
        """What its points do not have in common, the batch size first."""
        params = [point.data.params for point in self.jobs]
        names = dict.fromkeys(name for one in params for name in one)
        swept = [name for name in names if len({one.get(name) for one in params}) > 1]
        return sorted(swept, key=lambda name: name != "train.batch_size")


def create_views(client: MlflowClient, base_url: str, experiment_id: str) -> dict[str, str]:
    """Label -> address of the pages worth opening; the views that they name are kept in the store."""
    found = {"runs": runs_view(), "curves": curves_view()}
    sweep = find_latest_sweep(client, experiment_id)
    if sweep is not None:
        found["sweep"] = sweep_view(sweep)
    for name, state in found.items():
        client.set_experiment_tag(
            experiment_id, f"mlflow.sharedViewState.{_view_key(name)}", _serialize_view(name, state)
        )
    addresses = {
        name: runs_url(base_url, experiment_id, view=_view_key(name), charts=name != "runs") for name in found
    }
    if sweep is not None:
        ids = [point.info.run_id for point in sweep.jobs[-MAX_COMPARED_RUNS:]]
        addresses["verdict"] = run_url(base_url, experiment_id, sweep.parent_run_id)
        addresses["compare"] = compare_url(base_url, experiment_id, ids)
    return addresses


def find_latest_sweep(client: MlflowClient, experiment_id: str) -> LatestSweep | None:
    """The sweep whose point started last; None where there is none."""
    last = client.search_runs(
        [experiment_id], "tags.`mlflow.parentRunId` LIKE '%'", order_by=["start_time DESC"], max_results=1
    )
    if not last:
        return None
    parent = last[0].data.tags["mlflow.parentRunId"]
    points = client.search_runs([experiment_id], _child_runs_filter(parent), order_by=["start_time ASC"])
    return LatestSweep(parent, tuple(points))


# -- addresses ---------------------------------------------------------------------------------------------


def runs_url(base_url: str, experiment_id: str, view: str | None = None, charts: bool = False) -> str:
    """The page of an experiment's runs: a table, or their charts."""
    shown = WORKFLOW_PARAMS | ({"compareRunsMode": "CHART"} if charts else {})
    if view is not None:
        shown |= {"viewStateShareKey": view}
    return f"{base_url}/#/experiments/{experiment_id}/runs?{urlencode(shown)}"


def run_url(base_url: str, experiment_id: str, run_id: str) -> str:
    """The page of a run, which for a sweep has its verdict as the description."""
    return f"{base_url}/#/experiments/{experiment_id}/runs/{run_id}?{urlencode(WORKFLOW_PARAMS)}"


def compare_url(base_url: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """The page that shows these runs side by side."""
    runs, experiments = quote(json.dumps(list(run_ids))), quote(json.dumps([experiment_id]))
    return f"{base_url}/#/compare-runs?runs={runs}&experiments={experiments}&{urlencode(WORKFLOW_PARAMS)}"


# -- views -------------------------------------------------------------------------------------------------


def runs_view() -> ViewState:
    """Every run in a row of its own, the newest first."""
    return _base_view()


def curves_view() -> ViewState:
    """The curves of all runs."""
    return _base_view() | _chart_sections({"curves": [_line_chart(metric) for metric in CURVE_METRICS]})


def sweep_view(sweep: LatestSweep) -> ViewState:
    """The points of a sweep alone: memory, accuracy and speed by what was swept; then their curves."""
    keys = sweep.swept_keys[:MAX_SWEPT_KEYS]
    sections = {f"by {key}": [_scatter_chart(key, metric) for metric in SWEEP_METRICS] for key in keys}
    if len(keys) > 1:
        sections["all that was swept"] = [_parallel_chart(keys, SWEEP_METRICS)]
    sections["curves"] = [_line_chart(metric) for metric in CURVE_METRICS]
    return _base_view(_child_runs_filter(sweep.parent_run_id)) | _chart_sections(sections)


def _view_key(name: str) -> str:
    return f"captcha-exp-{name}"


def _child_runs_filter(parent_run_id: str) -> str:
    return f"tags.`mlflow.parentRunId` = '{parent_run_id}'"


def _serialize_view(name: str, state: ViewState) -> str:
    """The state as MLflow keeps it, under a name in its own list of views."""
    return json.dumps({"name": name, "createdAt": 0, "state": json.dumps(state)})


def _base_view(search_filter: str = "") -> ViewState:
    return {
        "searchFilter": search_filter,
        # Sorted by anything but "Created", MLflow gives the runs of a sweep rows of their own instead of
        # hiding them below their parent; runs of one source, as all of ours are, come by their start.
        "orderByKey": "tags.`mlflow.source.name`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "runsHiddenMode": "FIRST_20_RUNS" if not search_filter else "SHOW_ALL",
        "selectedColumns": list(COLUMN_WIDTHS),
        "columnOrder": list(COLUMN_WIDTHS),
        "columnWidths": COLUMN_WIDTHS,
    }


def _chart_sections(sections: Mapping[str, Sequence[Chart]]) -> ViewState:
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


def _line_chart(metric: str) -> Chart:
    """A curve by epoch for each run; a dot for a run of one epoch."""
    return {
        "type": "LINE",
        "runsCountToCompare": MAX_COMPARED_RUNS,
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


def _scatter_chart(param: str, metric: str) -> Chart:
    return {
        "type": "SCATTER",
        "runsCountToCompare": MAX_COMPARED_RUNS,
        "xaxis": {"key": param, "type": "PARAM"},
        "yaxis": {"key": metric, "type": "METRIC"},
    }


def _parallel_chart(params: Sequence[str], metrics: Sequence[str]) -> Chart:
    """Parallel coordinates: a line for each run across an axis for each param and metric."""
    return {
        "type": "PARALLEL",
        "selectedParams": list(params),
        "selectedMetrics": list(metrics),
        "showAllRuns": True,
    }
