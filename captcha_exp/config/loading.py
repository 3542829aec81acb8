"""Load, validate and resolve configs.

`load` validates a composed config or a saved file, reports all errors at once and changes nothing. Values are
validated as JSON in pydantic's strict mode, without conversion: an alphabet that YAML parsed as a number is
rejected, not converted to text. `resolve` replaces every `auto`.
"""

import contextlib
import dataclasses
import functools
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import omegaconf
import yaml
from pydantic import TypeAdapter, ValidationError

from captcha_exp.config import schema
from captcha_exp.config.documents import check_yaml, read_document
from captcha_exp.config.gpu import GpuSpec
from captcha_exp.config.messages import format_errors
from captcha_exp.config.schema import (
    CaptchaConfig,
    Config,
    DataConfig,
    FolderConfig,
    HeadName,
    ModelConfig,
    Precision,
)
from captcha_exp.config.tracking import MlflowConfig
from captcha_exp.config.uri import absolute_uri, local_store_uri, moved_store_uri
from captcha_exp.config.validators import absolute_paths
from captcha_exp.errors import ConfigError, one_line

_GPU_ADAPTER = TypeAdapter(GpuSpec)
_CONFIG_ADAPTER = TypeAdapter(Config)
_DATA_ADAPTER: TypeAdapter[DataConfig] = TypeAdapter(DataConfig)


@dataclass(frozen=True)
class Machine:
    """What `resolve` needs to know about this machine."""

    devices: tuple[str, ...]
    """valid values of device.name on this machine, preferred first"""
    num_cores: int
    """CPU cores that this process may use"""
    root: Path
    """directory that contains outputs/ and mlruns/"""
    unavailable_reason: Mapping[str, str]
    """device type -> likely reason why it is not available"""
    tracking_uri: str | None = None
    """MLFLOW_TRACKING_URI, if it is set: the store of tracking.uri=auto"""
    precisions: Mapping[str, Precision] = dataclasses.field(default_factory=dict)
    """device name -> device.precision=auto; fp32 for those that are not listed"""


def load(
    source: Mapping[str, Any] | omegaconf.DictConfig | Path,
    machine: Machine | None = None,
    raw_overrides: Mapping[str, str] | None = None,
) -> Config:
    """Return the validated config of a composed config or a saved config file.

    With a machine, device.name is checked against it too. `raw_overrides` maps keys to the values as typed on
    the command line, which error messages quote: YAML turns 1e5 into 100000.0.

    Raises:
        ConfigError: the config is invalid; one line per error: the key, the value, the limits.
    """
    raw = plain_values(source)
    errors: list[str] = []
    config: Config | None = None
    try:
        config = _CONFIG_ADAPTER.validate_json(json.dumps(raw, default=lambda value: [repr(value)]))
    except ValidationError as error:
        errors = format_errors(error, raw, _json_schema(), raw_overrides or {})
    has_device_error = any(line.startswith("device.name") for line in errors)
    if machine is not None and not has_device_error:
        errors += filter(None, [_device_error(raw, machine, raw_overrides or {})])
    if errors or config is None:
        raise ConfigError(*(f"{source}: {line}" if isinstance(source, Path) else line for line in errors))
    return config


def load_gpu(path: Path) -> GpuSpec:
    """Return the validated specification in a GPU file.

    Raises:
        ConfigError: the file is invalid; one line per error: the file, the key, the value, the limits.
    """
    raw = plain_values(path)
    try:
        return _GPU_ADAPTER.validate_json(json.dumps(raw, default=lambda value: [repr(value)]))
    except ValidationError as error:
        lines = format_errors(error, raw, _GPU_ADAPTER.json_schema(), {}, group="gpu.")
        raise ConfigError(*(f"{path}: {line}" for line in lines)) from None


def resolve(config: Config, machine: Machine) -> Config:
    """Replace every `auto` that the machine determines, and make the paths of the user absolute.

    Those of the captcha group remain: `dataset.inspect_dataset` infers them from the images of a folder.

    train.batch_size=auto remains: it needs trials on the device. Training runs them (training.autotune); a
    command that only plans takes `with_default_batch_size`.

    Raises:
        ConfigError: the device is not available, or a path or MLFLOW_TRACKING_URI is not valid; the line says
            which.
    """
    if error := _device_error({"device": {"name": config.device.name}}, machine, {}):
        raise ConfigError(error)
    config = with_tracking_uri(config, machine.root, machine.tracking_uri)
    device, data = config.device, config.data
    if device.name == "auto":
        device = dataclasses.replace(device, name=machine.devices[0])
    if device.threads == "auto":
        device = dataclasses.replace(device, threads=machine.num_cores)
    if device.precision == "auto":
        device = dataclasses.replace(device, precision=machine.precisions.get(device.name, "fp32"))
    if isinstance(data, FolderConfig):
        try:
            data = dataclasses.replace(data, path=absolute_paths(data.path))
        except ValueError as error:
            raise ConfigError(f"data.path={error}") from None
    elif data.workers == "auto":
        data = dataclasses.replace(data, workers=machine.num_cores)
    train = config.train
    if train.on_oom == "auto":  # a sweep has set "record" before
        train = dataclasses.replace(train, on_oom="fail")
    config = dataclasses.replace(config, device=device, data=data, train=train)
    return config if config.captcha.inferred_keys else with_captcha(config, config.captcha)


def with_captcha(config: Config, captcha: CaptchaConfig) -> Config:
    """Return the config with a captcha group without `auto`, and the head that `auto` chooses for it.

    Raises:
        ConfigError: model.head is not for such labels; the line says which are.
    """
    model = dataclasses.replace(config.model, head=choose_head(config.model, captcha))
    try:
        return dataclasses.replace(config, captcha=captcha, model=model)
    except ValidationError as error:
        raise ConfigError(*(str(item["ctx"]["error"]) for item in error.errors())) from None


def choose_head(model: ModelConfig, captcha: CaptchaConfig) -> HeadName:
    """Return the head of a network: for `auto`, one for labels of one length or of different lengths.

    CTC needs two columns for a character that follows an equal one.
    """
    if model.head != "auto":
        return model.head
    if captcha.shortest_length == captcha.length:
        return "position"
    num_columns = captcha.width // model.column_pixels
    return "ctc" if num_columns >= 2 * captcha.length - 1 else "end_class"


def with_default_batch_size(config: Config) -> Config:
    """Replace train.batch_size=auto, which `resolve` leaves, for a plan, which runs no trials.

    It becomes a placeholder larger than the micro-batch; the planner replaces it by each size it plans.
    """
    train = config.train
    if train.batch_size == "auto":
        train = dataclasses.replace(train, batch_size=(train.micro_batch_size or 0) + 1)
    return dataclasses.replace(config, train=train)


def with_tracking_uri(config: Config, root: Path, environment_uri: str | None) -> Config:
    """Replace tracking.uri=auto by MLFLOW_TRACKING_URI, else by the SQLite store below the root directory.

    Raises:
        ConfigError: MLFLOW_TRACKING_URI contains a secret or is no URI of a store.
    """
    tracking = config.tracking
    if not isinstance(tracking, MlflowConfig):
        return config
    uri = tracking.uri
    if uri == "auto":
        uri = local_store_uri(root) if environment_uri in (None, "", "auto") else environment_uri
    try:
        tracking = dataclasses.replace(tracking, uri=absolute_uri(uri))
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"MLFLOW_TRACKING_URI: {reason}; or set tracking.uri, which takes precedence"
        ) from None
    except RuntimeError as error:
        raise ConfigError(f"tracking.uri={uri}: {error}") from None
    return dataclasses.replace(config, tracking=tracking)


def with_moved_store(config: Config, root: Path) -> Config:
    """Return the config of a run to resume, with the current address of its store, which may have moved."""
    tracking = config.tracking
    if not isinstance(tracking, MlflowConfig):
        return config
    tracking = dataclasses.replace(tracking, uri=moved_store_uri(tracking.uri, root))
    return dataclasses.replace(config, tracking=tracking)


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to plain values as in config.yaml, with lists for tuples."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values


def to_yaml(config: Config) -> str:
    """Return the text of config.yaml, with keys in the order of the dataclasses."""
    return omegaconf.OmegaConf.to_yaml(omegaconf.OmegaConf.create(to_dict(config)))


def gpu_to_yaml(gpu: GpuSpec) -> str:
    """Return the text of a GPU file, with keys in the order of the dataclass and one value per line."""

    def parse_float(text: str) -> float:
        value = float(text)
        return int(value) if value.is_integer() else value  # 300, not 300.0

    values = json.loads(json.dumps(dataclasses.asdict(gpu)), parse_float=parse_float)
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1_000_000)
    return text


def data_from_json(text: str) -> DataConfig:
    """Return the validated data group of a JSON text, which a rendering process receives."""
    return _DATA_ADAPTER.validate_json(text)


def flatten(config: Config) -> dict[str, str]:
    """Return a flat dict of `group.key` -> text; a list is one value, in JSON."""
    leaves = flatten_mapping(to_dict(config))
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in leaves.items()}


def flatten_mapping(node: object, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to `group.key` -> value; lists and empty mappings are values.

    Raises:
        ValueError: `node` is not a mapping.
    """
    if not isinstance(node, Mapping):
        raise ValueError("not a mapping of keys to values")
    leaves: dict[str, Any] = {}
    for key, value in node.items():
        is_group = isinstance(value, Mapping) and value
        leaves |= flatten_mapping(value, f"{prefix}{key}.") if is_group else {f"{prefix}{key}": value}
    return leaves


def plain_values(source: Mapping[str, Any] | omegaconf.DictConfig | Path) -> Any:
    """Return the plain values of a composed config or a file, with the types that YAML gave them; unchecked.

    Raises:
        ConfigError: the source cannot be read; the line says why.
    """
    try:
        if isinstance(source, Path):
            text = read_document(source).decode("utf-8")
            check_yaml(text)
            # A saved file is data: interpolations in it are text and are never resolved.
            return omegaconf.OmegaConf.to_container(
                omegaconf.OmegaConf.load(io.StringIO(text)), resolve=False
            )
        if isinstance(source, omegaconf.DictConfig):
            return _drop_missing(omegaconf.OmegaConf.to_container(source, resolve=True))
    except FileNotFoundError:
        raise ConfigError(f"{source}: no such file") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{source}: cannot be read as a config: {one_line(error)}") from None
    except omegaconf.errors.OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        key = getattr(error, "full_key", None) or "config"
        raise ConfigError(f"{key}: {reason}; for the text ${{ write \\${{") from None
    return dict(source)


@functools.cache
def _json_schema() -> dict[str, Any]:
    """Return the JSON schema of the config, with a description for each field."""
    rules = _CONFIG_ADAPTER.json_schema()
    for name, rule in rules["$defs"].items():
        # pydantic takes the descriptions of a class itself and omits those of its base classes.
        for base in getattr(schema, name).__mro__:
            for key, field in getattr(base, "__pydantic_fields__", {}).items():
                if field.description:
                    rule["properties"][key].setdefault("description", field.description)
    return rules


def _drop_missing(node: Any) -> Any:
    """Remove the keys marked `???`, which still need a value."""
    if isinstance(node, dict):
        return {key: _drop_missing(value) for key, value in node.items() if value != "???"}
    return node


def with_gpu(config: omegaconf.DictConfig, path: Path, overrides: Mapping[str, Any]) -> omegaconf.DictConfig:
    """Set the gpu group of a composed config to the content of a file, then apply overrides by key.

    Raises:
        ConfigError: the file cannot be read; the line says why.
    """
    gpu = plain_values(path)
    with omegaconf.open_dict(config):
        config.gpu = gpu
        for key, value in overrides.items():
            # The file has a list instead of a group of keys; load reports that.
            with contextlib.suppress(TypeError, ValueError):
                omegaconf.OmegaConf.update(config, key, value, force_add=True)
    return config


def frozen_without(config: omegaconf.DictConfig, group: str) -> omegaconf.DictConfig:
    """Remove a group from a composed config and make it read-only."""
    with omegaconf.open_dict(config):
        del config[group]
    omegaconf.OmegaConf.set_readonly(config, True)
    return config


def _device_error(raw: Any, machine: Machine, raw_overrides: Mapping[str, str]) -> str | None:
    """Return the error message if device.name is valid but not available on the machine."""
    name = flatten_mapping(raw).get("device.name") if isinstance(raw, Mapping) else None
    if not isinstance(name, str) or name == "auto" or name in machine.devices:
        return None
    available = ", ".join(["auto", *machine.devices])
    reason = machine.unavailable_reason.get(name.split(":")[0], f"this machine has no {name}")
    return f"device.name={raw_overrides.get('device.name', name)}: {reason}; available here: {available}"
