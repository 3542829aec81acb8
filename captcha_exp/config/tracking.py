"""The `tracking` group of the config schema."""

import re
from typing import Annotated, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from captcha_exp.config.gpu import STRICT
from captcha_exp.config.validators import expand_user

MAX_MODEL_NAME = 200


def _check_uri(value: str) -> str:
    try:
        parts = urlsplit(value)
        secret = parts.password is not None or re.search(
            r"(?i)(passw(or)?d|pwd|token|secret|(api|access)_?key)=", parts.query
        )
    except ValueError as error:
        raise ValueError(f"not a URI: {error}") from None
    if secret:
        raise PydanticCustomError(
            "secret",
            "must not contain a secret, which would be saved with the run; pass it in the environment "
            "(MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN)",
        )
    if parts.scheme == "file" or (value != "auto" and "://" not in value):
        raise ValueError(
            "MLflow no longer supports plain directories; write auto, sqlite:///PATH or http://HOST"
        )
    scheme, slashes, path = value.partition("sqlite:///")
    return f"{scheme}{slashes}{expand_user(path)}" if slashes and not scheme else value


def check_model_name(value: str) -> str:
    """Return the name of a registered model.

    Raises:
        ValueError: MLflow does not accept it, or it would not show as typed.
    """
    if not value.strip() or len(value) > MAX_MODEL_NAME or not value.isprintable():
        raise ValueError(f"must be a name of 1 to {MAX_MODEL_NAME} printable characters")
    if set(value) & set("/:@\\") or value != value.strip() or value in (".", ".."):
        raise ValueError("must not contain / : @ or \\, or start or end with a space, or be . or ..")
    return value


@dataclass(config=STRICT, frozen=True, kw_only=True)
class MlflowConfig:
    """Tracking in MLflow, in addition to the run directory."""

    backend: Literal["mlflow"]
    uri: Annotated[str, AfterValidator(_check_uri)]
    """tracking URI; auto: SQLite in mlruns/ next to outputs/"""
    experiment: Annotated[str, Field(min_length=1)]
    """name of the MLflow experiment"""
    required: bool
    """fail at the start if the store does not answer; false: train, and send to MLflow once it does"""
    register: Annotated[str, AfterValidator(check_model_name)] | None = None
    """after the test, export the model and register it in MLflow under this name"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class NoTrackingConfig:
    """No tracking: only the run directory is written."""

    backend: Literal["none"]


TrackingConfig: TypeAlias = Annotated[MlflowConfig | NoTrackingConfig, Field(discriminator="backend")]
