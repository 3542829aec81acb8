"""MLflow tracking: send a run or sweep while it runs (`tracker`) or later (`sync`), both by `delivery`; the
backend store (`store`, `inspection`, `problems`), the UI (`server`, `views`), artifacts (`download`) and
models (`models`).

Import from the modules: MLflow is imported only where it is needed, in a training by the sending thread.
"""

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from captcha_exp.runtime.environment import fill_in_environment
from captcha_exp.runtime.paths import root_dir, tracking_uri_variable

logger = logging.getLogger(__name__)

fill_in_environment()  # MLflow needs a home directory and the name of the user
# MLflow reads these: no telemetry, and a request fails within seconds, not minutes. `delivery` repeats it,
# after it has asked what the server has: a repeated request to create a run would create a second one.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

if TYPE_CHECKING:
    from captcha_exp.config import Config
    from captcha_exp.training.recorder import Tracker


def check_tracking(config: "Config") -> None:
    """Check the store of a config before anything is begun, and log where runs are recorded.

    A server is not asked: one that is away or slow must not keep a training waiting.

    Raises:
        UserError: the store cannot be used; the line has the remedy.
    """
    from captcha_exp.config import MlflowConfig, with_tracking_uri

    tracking = with_tracking_uri(config, root_dir(), tracking_uri_variable()).tracking
    if not isinstance(tracking, MlflowConfig):
        return
    from captcha_exp.tracking.problems import source_of

    if not tracking.uri.startswith(("http://", "https://")):
        from captcha_exp.tracking.inspection import check_store

        check_store(tracking.uri, tracking.experiment)
    logger.info(f"Recording in MLflow at {tracking.uri} ({source_of(tracking.uri)})")


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


def registered_name(config: "Config") -> str | None:
    """Return the name under which the model is registered after its training, if any."""
    from captcha_exp.config import MlflowConfig

    return config.tracking.register if isinstance(config.tracking, MlflowConfig) else None
