"""Build the config of the rerun, and list the keys that its overrides change."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from captcha_exp.config import Config, Machine, MlflowConfig, flatten_mapping, to_dict
from captcha_exp.errors import ConfigError


def with_overrides(
    saved: Config, requested: Config, machine: Machine
) -> tuple[Config, Mapping[str, tuple[Any, Any]]]:
    """Return the config to run, and key -> (saved, requested) for each changed key.

    An SQLite store of MLflow is replaced by that of this root directory unless another one is requested; a
    server is kept.

    Raises:
        ConfigError: the device does not exist on this machine; override device.name.
    """
    name = requested.device.name
    if name not in ("auto", *machine.devices):
        reason = machine.unavailable_reason.get(name.split(":")[0], "no such device")
        raise ConfigError(f"device.name={name}: {reason}; reproduce with device.name=cpu")
    old, new = flatten_mapping(to_dict(saved)), flatten_mapping(to_dict(requested))
    changes = {key: (old.get(key), new.get(key)) for key in (*old, *new) if old.get(key) != new.get(key)}
    tracking = requested.tracking
    if (
        isinstance(tracking, MlflowConfig)
        and tracking.uri.startswith("sqlite:")
        and tracking == saved.tracking
    ):
        requested = replace(requested, tracking=replace(tracking, uri="auto"))
    return requested, changes
