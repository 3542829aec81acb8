"""MLflow tracking: runs and the parent runs of sweeps (`tracker`), their ends (`sync`), the backend store
(`store`), the UI (`server`, `views`) and artifacts (`download`).

Import from the modules: `sync` runs at each start and rarely needs MLflow.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

# MLflow reads these on import: no telemetry, and an unreachable server fails within seconds, not minutes.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

if TYPE_CHECKING:
    from captcha_exp.config import Config
    from captcha_exp.training.recorder import Tracker


def make_tracker(
    config: "Config",
    choices: Mapping[str, str],
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
