"""MLflow tracking: send a run or sweep while it runs (`tracker`) or later (`sync`), both by `delivery`; the
backend store (`store`), the UI (`server`, `views`) and artifacts (`download`).

Import from the modules: MLflow is imported only where it is needed, in a training by the sending thread.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

# MLflow reads these: no telemetry, and a request fails within seconds, not minutes. `delivery` repeats it,
# after it has asked what the server has: a repeated request to create a run would create a second one.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

if TYPE_CHECKING:
    from captcha_exp.config import Config
    from captcha_exp.training.recorder import Tracker


def make_tracker(
    config: "Config",
    choices: Mapping[str, str],
    run_name: str | None = None,
) -> "Tracker":
    """Create the tracker that the config selects; the other arguments are those of `MlflowTracker`."""
    from captcha_exp.config import MlflowConfig
    from captcha_exp.training.recorder import NullTracker

    if not isinstance(config.tracking, MlflowConfig):
        return NullTracker()
    from captcha_exp.tracking.tracker import MlflowTracker

    return MlflowTracker(choices, run_name)
