"""MLflow: a `Tracker` (`tracker`), the store behind it (`store`), its UI (`server`, `views`), the files of
a run that it alone has (`fetching`), and the end of runs whose process is gone (`closing`).

The names are looked up at first use: `closing` is asked at each start and mostly needs no MLflow.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

# Read by MLflow when it is imported, so before any module of this package: nothing about a run leaves the
# machine, and a server that is away is given up after seconds instead of minutes.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

if TYPE_CHECKING:
    from collections.abc import Mapping

    from captcha_exp.config import Config
    from captcha_exp.runtime.console import Display
    from captcha_exp.tracking.download import download_artifacts as download_artifacts
    from captcha_exp.tracking.parent_run import SweepParentRun as SweepParentRun
    from captcha_exp.tracking.parent_run import ui_url as ui_url
    from captcha_exp.tracking.server import serve_ui as serve_ui
    from captcha_exp.tracking.sync import close_stale_runs as close_stale_runs
    from captcha_exp.tracking.sync import finalize_run as finalize_run
    from captcha_exp.tracking.tracker import MlflowTracker as MlflowTracker
    from captcha_exp.tracking.views import compare_url as compare_url
    from captcha_exp.training.recorder import Tracker

_HOMES = {
    "MlflowTracker": "tracker",
    "Parent": "parent_run",
    "close_dead": "sync",
    "close_left": "sync",
    "compare_address": "views",
    "fetch": "download",
    "serve_ui": "server",
    "server_of": "parent_run",
}


def make_tracker(
    config: "Config",
    display: "Display",
    choices: "Mapping[str, str]",
    run_name: str | None = None,
    parent_run_id: str | None = None,
) -> "Tracker":
    """The tracker that the config asks for; the rest is as MlflowTracker has it."""
    from captcha_exp.config import MlflowConfig
    from captcha_exp.training.recorder import NullTracker

    if not isinstance(config.tracking, MlflowConfig):
        return NullTracker()
    from captcha_exp.tracking.tracker import MlflowTracker

    return MlflowTracker(display, choices, run_name, parent_run_id)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'captcha_exp.tracking' has no attribute {name!r}")
    return getattr(import_module(f"captcha_exp.tracking.{_HOMES[name]}"), name)
