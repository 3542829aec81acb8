"""MLflow: a `Tracker` (`tracker`), the store behind it (`store`), and its UI (`server`)."""

import os

# Read by MLflow when it is imported, so before the modules below: nothing about a run leaves the machine,
# and a server that is away is given up after seconds instead of minutes.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from captcha_exp.tracking.parent import Parent as Parent
from captcha_exp.tracking.parent import compare_address as compare_address
from captcha_exp.tracking.parent import server_of as server_of
from captcha_exp.tracking.server import serve_ui as serve_ui
from captcha_exp.tracking.tracker import MlflowTracker as MlflowTracker
