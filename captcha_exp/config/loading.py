"""`load` types and checks, the same for a fresh config and for the file of an old run; `resolve` ends every
`auto`.

`load` reports all mistakes at once and never edits. Values are checked as JSON in pydantic's strict mode, so
nothing is converted on the way: an alphabet that YAML has read as a number is refused, not turned into text.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import omegaconf
import yaml
from pydantic import TypeAdapter, ValidationError

from captcha_exp.config import schema
from captcha_exp.config.gpu import GpuSpec
from captcha_exp.config.messages import format_errors
from captcha_exp.config.schema import Config, DataConfig, FolderConfig, MlflowConfig
from captcha_exp.errors import ConfigError

_GPU_ADAPTER = TypeAdapter(GpuSpec)
_CONFIG_ADAPTER = TypeAdapter(Config)
_DATA_ADAPTER: TypeAdapter[DataConfig] = TypeAdapter(DataConfig)


@dataclass(frozen=True)
class Machine:
    """What `resolve` has to know of the machine."""

    devices: tuple[str, ...]
    """every name that device.name may have here, the preferred one first"""
    num_cores: int
    """cores that this process may use"""
    root: Path
    """the folder in which outputs/ and mlruns/ stand"""
    unavailable_reason: Mapping[str, str]
    """for device kinds that are not here: the likely reason"""


def load(
    source: Mapping[str, Any] | omegaconf.DictConfig | Path,
    machine: Machine | None = None,
    raw_overrides: Mapping[str, str] | None = None,
) -> Config:
    """A checked config, from a composed one or from the file of a run.

    With a machine, device.name is checked against it too, so that all mistakes are reported together.
    `written` holds values as a person typed them, by key, for the words of a mistake: YAML has made 100000.0
    of a typed 1e5.

    Raises:
        ConfigError: one line for each mistake: the key, the value, what is allowed.
    """
    raw = _load_raw(source)
    mistakes: list[str] = []
    config: Config | None = None
    try:
        config = _CONFIG_ADAPTER.validate_json(json.dumps(raw, default=lambda value: [repr(value)]))
    except ValidationError as error:
        mistakes = format_errors(error, raw, _json_schema(), raw_overrides or {})
    told = any(line.startswith("device.name") for line in mistakes)
    if machine is not None and not told and (mistake := _device_error(raw, machine, raw_overrides or {})):
        mistakes.append(mistake)
    if mistakes or config is None:
        raise ConfigError(*mistakes)
    return config


def load_gpu(path: Path) -> GpuSpec:
    """The checked card of a card file.

    Raises:
        ConfigError: one line for each mistake: the file, the key, the value, what is allowed.
    """
    raw = _load_raw(path)
    try:
        return _GPU_ADAPTER.validate_json(json.dumps(raw, default=lambda value: [repr(value)]))
    except ValidationError as error:
        lines = format_errors(error, raw, _GPU_ADAPTER.json_schema(), {})
        raise ConfigError(*(f"{path}: {line}" for line in lines)) from None


def resolve(config: Config, machine: Machine) -> Config:
    """Replace every `auto` that the machine determines, and make data.path absolute.

    device.precision=auto and train.batch_size=auto remain: they need trials on the device. Training runs them
    (training.autotune); a command that only plans takes `with_untuned_defaults`.

    Raises:
        ConfigError: the device is not available, or data.path is not a valid path; the line says which.
    """
    if mistake := _device_error({"device": {"name": config.device.name}}, machine, {}):
        raise ConfigError(mistake)
    config = with_tracking_uri(config, machine.root)
    device, data = config.device, config.data
    if device.name == "auto":
        device = dataclasses.replace(device, name=machine.devices[0])
    if device.threads == "auto":
        device = dataclasses.replace(device, threads=machine.num_cores)
    if isinstance(data, FolderConfig):
        data = dataclasses.replace(data, path=_absolute(data.path))
    elif data.workers == "auto":
        data = dataclasses.replace(data, workers=machine.num_cores)
    train = config.train
    if train.on_oom == "auto":  # a sweep has said "record" by now
        train = dataclasses.replace(train, on_oom="fail")
    return dataclasses.replace(config, device=device, data=data, train=train)


def with_untuned_defaults(config: Config) -> Config:
    """Replace the `auto` values that `resolve` leaves, for a plan, which runs no trials.

    The precision becomes fp32, which needs the most memory; the batch size a placeholder larger than the
    micro-batch, which the planner replaces by each size it plans.
    """
    device, train = config.device, config.train
    if device.precision == "auto":
        device = dataclasses.replace(device, precision="fp32")
    if train.batch_size == "auto":
        train = dataclasses.replace(train, batch_size=(train.micro_batch_size or 0) + 1)
    return dataclasses.replace(config, device=device, train=train)


def with_tracking_uri(config: Config, root: Path) -> Config:
    """The config with the store that tracking.uri=auto is."""
    tracking = config.tracking
    if not isinstance(tracking, MlflowConfig) or tracking.uri != "auto":
        return config
    uri = f"sqlite:///{root / 'mlruns' / 'mlflow.db'}"
    return dataclasses.replace(config, tracking=dataclasses.replace(tracking, uri=uri))


def _absolute(path: str) -> str:
    """The whole path of the folder that data.path names.

    Raises:
        ConfigError: it names a person that this machine does not know, or a link in a circle.
    """
    try:
        return str(Path(path).expanduser().resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"data.path={path}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values, as they are written to config.yaml; lists for tuples."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values


def to_yaml(config: Config) -> str:
    """The text of config.yaml, in the order of the dataclasses."""
    return omegaconf.OmegaConf.to_yaml(omegaconf.OmegaConf.create(to_dict(config)))


def gpu_to_yaml(gpu: GpuSpec) -> str:
    """The text of a card file, in the order of the dataclass, a line for each value."""
    values = {
        key: {name: _drop_trailing_zero(inner) for name, inner in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in to_dict(gpu).items()
    }
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1_000_000)
    return text


def _drop_trailing_zero(value: Any) -> Any:
    """A whole number without its `.0`, as a person writes it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def data_from_json(text: str) -> DataConfig:
    """The data group from JSON, as a drawing process receives it."""
    return _DATA_ADAPTER.validate_json(text)


def flatten(config: Config) -> dict[str, str]:
    """Every leaf as `group.key` -> text; a list is one leaf, written as YAML writes it on one line."""
    return {key: _format_leaf(value) for key, value in _iter_leaves(to_dict(config))}


def _iter_leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _iter_leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _format_leaf(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _load_raw(source: Mapping[str, Any] | omegaconf.DictConfig | Path) -> Any:
    """Plain values of a composed config or of a file, with the types that YAML gave them."""
    try:
        if isinstance(source, Path):
            # A saved file is data: what looks like an interpolation in it is text and is never followed.
            return omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.load(source), resolve=False)
        if isinstance(source, omegaconf.DictConfig):
            return _drop_missing(omegaconf.OmegaConf.to_container(source, resolve=True))
    except FileNotFoundError:
        raise ConfigError(f"{source}: there is no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{source}: cannot be read as a config: {reason}") from None
    except omegaconf.errors.OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{getattr(error, 'full_key', None) or 'config'}: {reason}") from None
    return dict(source)


@functools.cache
def _json_schema() -> dict[str, Any]:
    """What each key may be, as JSON schema, with the texts under the fields."""
    rules = _CONFIG_ADAPTER.json_schema()
    for name, rule in rules["$defs"].items():
        # pydantic reads the texts of a class itself and forgets those of the classes that it extends.
        for base in getattr(schema, name).__mro__:
            for key, field in getattr(base, "__pydantic_fields__", {}).items():
                if field.description:
                    rule["properties"][key].setdefault("description", field.description)
    return rules


def _drop_missing(node: Any) -> Any:
    """Without the keys that are marked `???`: a value has still to be given."""
    if isinstance(node, dict):
        return {key: _drop_missing(value) for key, value in node.items() if value != "???"}
    return node


def with_gpu(config: omegaconf.DictConfig, path: Path, overrides: Mapping[str, Any]) -> omegaconf.DictConfig:
    """A composed config with the card of a file, and then with these values, by their keys.

    Raises:
        ConfigError: the file cannot be read; the line says why.
    """
    card = _load_raw(path)
    with omegaconf.open_dict(config):
        config.card = card
        for key, value in overrides.items():
            # Where the file has a list and no group of keys; load says so.
            with contextlib.suppress(TypeError, ValueError):
                omegaconf.OmegaConf.update(config, key, value, force_add=True)
    return config


def frozen_without(config: omegaconf.DictConfig, group: str) -> omegaconf.DictConfig:
    """A composed config that cannot be changed any more, without one of its groups."""
    with omegaconf.open_dict(config):
        del config[group]
    omegaconf.OmegaConf.set_readonly(config, True)
    return config


def _device_error(raw: Any, machine: Machine, raw_overrides: Mapping[str, str]) -> str | None:
    try:
        name = raw["device"]["name"]
    except (KeyError, TypeError):
        return None
    if not isinstance(name, str) or name == "auto" or name in machine.devices:
        return None
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        return None  # not a device name at all: the schema says so
    here = ", ".join(["auto", *machine.devices])
    reason = machine.unavailable_reason.get(kind, f"this machine has no {name}")
    return f"device.name={raw_overrides.get('device.name', name)}: {reason}; available here: {here}"
