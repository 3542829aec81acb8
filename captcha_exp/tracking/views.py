"""Saved views of the MLflow UI: columns and charts, and the URLs that open them.

By default MLflow's run table shows no metrics and nests the runs of a sweep under their parent. A view is
saved as an experiment tag and opened with `viewStateShareKey` in the URL. The format is internal to MLflow; a
version that does not support it shows its default page.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import quote, urlencode

from mlflow import MlflowClient
from mlflow.entities import Run

WORKFLOW_PARAMS = {"workflowType": "machine_learning"}  # instead of MLflow's default, the GenAI pages
MAX_COMPARED_RUNS = 100  # limited by the length of a URL
MAX_SWEPT_KEYS = 3  # keys with one section of charts each

# Column -> width in pixels, in the order of the table.
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
    "memory/predicted_peak_mib",  # the only metric of a job that was skipped
)

ViewState: TypeAlias = dict[str, Any]
Chart: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class LatestSweep:
    """The most recently started sweep in MLflow."""

    parent_run_id: str
    jobs: tuple[Run, ...]
    """Child runs by start time."""

    @property
    def swept_keys(self) -> list[str]:
        """Return the params that differ between the jobs, the batch size first."""
        params = [job.data.params for job in self.jobs]
        names = dict.fromkeys(name for job_params in params for name in job_params)
        swept = [name for name in names if len({job_params.get(name) for job_params in params}) > 1]
        return sorted(swept, key=lambda name: name != "train.batch_size")


def create_views(client: MlflowClient, base_url: str, experiment_id: str) -> dict[str, str]:
    """Save the views in the store, and return label -> URL of the pages."""
    saved = {"runs": runs_view(), "curves": curves_view()}
    sweep = find_latest_sweep(client, experiment_id)
    if sweep is not None:
        saved["sweep"] = sweep_view(sweep)
    urls = {}
    for name, state in saved.items():
        key, view = f"captcha-exp-{name}", {"name": name, "createdAt": 0, "state": json.dumps(state)}
        client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{key}", json.dumps(view))
        urls[name] = runs_url(base_url, experiment_id, view=key, charts=name != "runs")
    if sweep is not None:
        ids = [job.info.run_id for job in sweep.jobs[-MAX_COMPARED_RUNS:]]
        urls["summary"] = run_url(base_url, experiment_id, sweep.parent_run_id)
        urls["compare"] = compare_url(base_url, experiment_id, ids)
    return urls


def find_latest_sweep(client: MlflowClient, experiment_id: str) -> LatestSweep | None:
    """Return the sweep with the most recently started job, or None."""
    newest = client.search_runs(
        [experiment_id], "tags.`mlflow.parentRunId` LIKE '%'", order_by=["start_time DESC"], max_results=1
    )
    if not newest:
        return None
    parent_run_id = newest[0].data.tags["mlflow.parentRunId"]
    jobs = client.search_runs([experiment_id], _child_runs_filter(parent_run_id), order_by=["start_time ASC"])
    return LatestSweep(parent_run_id, tuple(jobs))


# -- URLs --------------------------------------------------------------------------------------------------


def runs_url(base_url: str, experiment_id: str, view: str | None = None, charts: bool = False) -> str:
    """Return the URL of the run table of an experiment, or of its charts."""
    query = WORKFLOW_PARAMS | ({"compareRunsMode": "CHART"} if charts else {})
    if view is not None:
        query |= {"viewStateShareKey": view}
    return f"{base_url}/#/experiments/{experiment_id}/runs?{urlencode(query)}"


def ui_url(uri: str) -> str:
    """Return the URL of the UI of a store: the tracking server, or the default of `captcha-exp ui`."""
    return uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"


def run_url(base_url: str, experiment_id: str, run_id: str) -> str:
    """Return the URL of a run; the run of a sweep has its summary as the description."""
    return f"{base_url}/#/experiments/{experiment_id}/runs/{run_id}?{urlencode(WORKFLOW_PARAMS)}"


def compare_url(base_url: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """Return the URL of the page that compares these runs."""
    runs, experiments = quote(json.dumps(list(run_ids))), quote(json.dumps([experiment_id]))
    return f"{base_url}/#/compare-runs?runs={runs}&experiments={experiments}&{urlencode(WORKFLOW_PARAMS)}"


# -- views -------------------------------------------------------------------------------------------------


def curves_view() -> ViewState:
    """Return the view with the learning curves of all runs."""
    return runs_view() | _chart_sections({"curves": [_line_chart(metric) for metric in CURVE_METRICS]})


def sweep_view(sweep: LatestSweep) -> ViewState:
    """Return the view of one sweep: memory, accuracy and speed by swept key, then learning curves."""
    keys = sweep.swept_keys[:MAX_SWEPT_KEYS]
    sections = {f"by {key}": [_scatter_chart(key, metric) for metric in SWEEP_METRICS] for key in keys}
    if len(keys) > 1:
        sections["all swept keys"] = [_parallel_chart(keys, SWEEP_METRICS)]
    sections["curves"] = [_line_chart(metric) for metric in CURVE_METRICS]
    return runs_view(_child_runs_filter(sweep.parent_run_id)) | _chart_sections(sections)


def _child_runs_filter(parent_run_id: str) -> str:
    return f"tags.`mlflow.parentRunId` = '{parent_run_id}'"


def runs_view(search_filter: str = "") -> ViewState:
    """Return the view with one row per run, newest first."""
    return {
        "searchFilter": search_filter,
        # MLflow nests child runs under their parent only when sorting by "Created". All runs have the same
        # source, so sorting by it keeps them in the order of their start.
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
    """Return the charts in collapsible sections; MLflow appends one section with all other metrics."""
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
    """Return a chart with one curve over epochs per run."""
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
    """Return a parallel coordinates plot of params and metrics, one line per run."""
    return {
        "type": "PARALLEL",
        "selectedParams": list(params),
        "selectedMetrics": list(metrics),
        "showAllRuns": True,
    }
