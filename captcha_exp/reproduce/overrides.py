"""The config of the new run: what is wanted, in this root's own store; and what it changes of the old one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from captcha_exp.config import Config, Machine, MlflowConfig, to_dict
from captcha_exp.errors import ConfigError
from captcha_exp.runs.fields import flatten


def with_overrides(
    saved: Config, requested: Config, machine: Machine
) -> tuple[Config, Mapping[str, tuple[Any, Any]]]:
    """The config that runs, and key -> (saved, new) of what it changes.

    A store in a SQLite file becomes that of this root, unless another is wanted; a server stays.

    Raises:
        ConfigError: the device is not here.
    """
    name = requested.device.name
    if name not in ("auto", *machine.devices):
        reason = machine.unavailable_reason.get(name.split(":")[0], "there is no such device")
        raise ConfigError(f"device.name={name}: {reason}; device.name=cpu runs it here, as a variation")
    then, now = flatten(to_dict(saved)), flatten(to_dict(requested))
    changes = {key: (then.get(key), now.get(key)) for key in (*then, *now) if then.get(key) != now.get(key)}
    tracking = requested.tracking
    if (
        isinstance(tracking, MlflowConfig)
        and tracking.uri.startswith("sqlite:")
        and tracking == saved.tracking
    ):
        requested = replace(requested, tracking=replace(tracking, uri="auto"))
    return requested, changes
