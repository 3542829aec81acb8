"""The config of the new run: the saved one, with what the person changes and this machine's own store."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from captcha_exp.config import Config, Machine, Mlflow, load, to_dict
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.places import conf
from captcha_exp.record.facts import flat

_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # text to YAML 1.1, a number to Hydra and to people


def varied(
    saved: Config, overrides: Sequence[str], machine: Machine
) -> tuple[Config, Mapping[str, tuple[Any, Any]]]:
    """The config that runs, and key -> (saved, new) of what the overrides change.

    A store in a SQLite file becomes that of this root; a server stays.

    Raises:
        UserError: an override is none, a value is not allowed, or the device is not here.
    """
    if isinstance(saved.tracking, Mlflow) and saved.tracking.uri.startswith("sqlite:"):
        saved = replace(saved, tracking=replace(saved.tracking, uri="auto"))
    before = to_dict(saved)
    values, written = copy.deepcopy(before), {}
    for text in overrides:
        key, value = _read(text, before)
        *groups, last = key.split(".")
        inner = values
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
        written[key] = text.partition("=")[2]
    if values["tracking"].get("backend") == "none":
        values["tracking"] = {"backend": "none"}
    config = load(values, written=written)
    if config.device.name not in ("auto", *machine.devices):
        name = config.device.name
        reason = machine.why_not.get(name.split(":")[0], "there is no such device")
        raise ConfigError(f"device.name={name}: {reason}; device.name=cpu runs it here, as a variation")
    then, now = flat(before), flat(to_dict(config))
    changes = {key: (then.get(key), now.get(key)) for key in written if then.get(key) != now.get(key)}
    return config, changes


def _read(text: str, saved: Mapping[str, Any]) -> tuple[str, Any]:
    """The key and the value of an override.

    Raises:
        UserError: it is none that a saved config can take.
    """
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", key) or ".." in key or key[-1] == ".":
        group = key.partition("/")[0]
        if not equals or not (conf() / group).is_dir():
            raise UserError(f"{text!r}: is no override of a saved config; write key=value, as in seed=1")
    inner: Any = saved
    for part in key.split("."):
        if not isinstance(inner, Mapping):
            raise UserError(f"{text}: there is no such key; {key.rpartition('.')[0]} is a value")
        inner = inner.get(part)
    if isinstance(inner, Mapping) or (inner is None and (conf() / key.partition("/")[0]).is_dir()):
        hint = "tracking.backend=none keeps no MLflow" if key == "tracking" else f"as in {_example(saved)}"
        raise UserError(
            f"{text}: chooses a group of conf/, of which a saved config has none; set keys, {hint}"
        )
    if _FLOAT.fullmatch(value):
        return key, float(value)
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"{text}: is no YAML value; put odd text into quotes") from None
    if isinstance(read, Mapping):
        raise UserError(f"{text}: must be a value or a list; set keys one by one")
    return key, read


def _example(saved: Mapping[str, Any]) -> str:
    return f"train.epochs={saved['train']['epochs']}"
