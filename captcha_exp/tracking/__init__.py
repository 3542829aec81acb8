"""MLflow tracking: runs (`tracker`), sweep parent runs (`parent_run`), the backend store (`store`), the UI
(`server`, `views`), artifacts (`download`), and stale runs (`sync`).

Names are imported on first use, because `sync` runs at each start and rarely needs MLflow.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

# MLflow reads these on import: no telemetry, and an unreachable server fails within seconds, not minutes.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

if TYPE_CHECKING:
    from collections.abc import Mapping

    from captcha_exp.config import Config
    from captcha_exp.tracking.download import download_artifacts as download_artifacts
    from captcha_exp.tracking.parent_run import SweepParentRun as SweepParentRun
    from captcha_exp.tracking.parent_run import ui_url as ui_url
    from captcha_exp.tracking.server import serve_ui as serve_ui
    from captcha_exp.tracking.sync import close_stale_runs as close_stale_runs
    from captcha_exp.tracking.sync import finalize_run as finalize_run
    from captcha_exp.tracking.tracker import MlflowTracker as MlflowTracker
    from captcha_exp.tracking.views import compare_url as compare_url
    from captcha_exp.training.recorder import Tracker

_MODULES = {
    "MlflowTracker": "tracker",
    "SweepParentRun": "parent_run",
    "close_stale_runs": "sync",
    "compare_url": "views",
    "download_artifacts": "download",
    "finalize_run": "sync",
    "serve_ui": "server",
    "ui_url": "parent_run",
}


def make_tracker(
    config: "Config",
    choices: "Mapping[str, str]",
    run_name: str | None = None,
    parent_run_id: str | None = None,
) -> "Tracker":
    """Create the tracker that the config selects; the other arguments are those of `MlflowTracker`."""
    from captcha_exp.config import MlflowConfig
    from captcha_exp.training.recorder import NullTracker

    if not isinstance(config.tracking, MlflowConfig):
        return NullTracker()
    from captcha_exp.tracking.tracker import MlflowTracker

    return MlflowTracker(choices, run_name, parent_run_id)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'captcha_exp.tracking' has no attribute {name!r}")
    return getattr(import_module(f"captcha_exp.tracking.{_MODULES[name]}"), name)
