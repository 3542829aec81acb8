"""The weights of a model and their file.

The file is safetensors: numbers and text, no code. Its metadata contains the config and the alphabet, so
inference needs no other file, and a SHA-256 of both and of the tensors, since safetensors does not detect
flipped bits.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from captcha_exp.config import Config, load, to_dict
from captcha_exp.config.documents import parse_json
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.model import networks
from captcha_exp.model.confidence import NOT_CALIBRATED, Calibration
from captcha_exp.model.networks import Recognizer
from captcha_exp.runtime.files import sha256_of_json

METADATA_KEY = "captcha_exp"
HEADER_BYTES = 2**20  # at most, of a file of tensors
UNKNOWN_BYTES = 2**26  # at most, of a file without a valid config
FORMAT = 2  # raised whenever older files become unreadable; captcha_exp 0.1 wrote none


def weights_to_bytes(model: Recognizer, config: Config) -> bytes:
    """Return the content of model.safetensors, with axes in logical order whatever the memory format."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # A single metadata entry: safetensors does not keep the order of several, and equal models must give
    # equal files.
    values = {"format": FORMAT, "config": to_dict(config), "calibration": model.calibration.to_json()}
    return to_safetensors(tensors, {METADATA_KEY: json.dumps(with_sha256(tensors, values))})


def weights_sha256(model: Recognizer) -> str:
    """Return the SHA-256 of the names, shapes and bytes of all weights and buffers."""
    return tensors_sha256(model.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and bytes, which does not depend on the memory format."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        array = value.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def with_sha256(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON values of a file with `sha256`, which covers them and the tensors."""
    return {**values, "sha256": sha256_of_json([tensors_sha256(tensors), values])}


def read_tensors(
    path: Path, key: str, max_bytes: Callable[[Mapping[str, Any], Mapping[str, str]], int]
) -> tuple[dict[str, Tensor], dict[str, Any], Mapping[str, str]]:
    """Return the tensors of a safetensors file, the JSON values under a key of its metadata, and all of that.

    The values are empty if the key is missing. `max_bytes` returns the largest size of the file for these
    values and this metadata; a larger one is not read.

    Raises:
        ValueError: The file is damaged, too large, or does not match the SHA-256 in the values.
        OSError: The file cannot be read.
    """
    if not path.is_file() and path.exists():
        raise ValueError("not a regular file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            values = _parse_values(metadata[key]) if key in metadata else {}
            size, limit = path.stat().st_size, max_bytes(values, metadata)
            if size > limit:
                raise ValueError(f"has {size:,} bytes, but its network at most {limit:,}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except safetensors.SafetensorError as error:
        raise ValueError(f"not a complete safetensors file: {error}") from None
    if key not in metadata:
        return tensors, {}, metadata
    unsigned = {name: value for name, value in values.items() if name != "sha256"}
    try:
        expected = with_sha256(tensors, unsigned)["sha256"]
    except TypeError as error:  # a type of numbers that NumPy lacks
        raise ValueError(str(error)) from None
    if values.get("sha256") != expected:
        raise ValueError("does not match the SHA-256 in it: it was edited, or is damaged")
    return tensors, unsigned, metadata


def _parse_values(text: str) -> dict[str, Any]:
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ValueError(f"its metadata cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError("its metadata has no keys and values")
    return values


def max_file_bytes(config: Config, copies: int = 2) -> int:
    """Return the largest size of a file with this many copies of the weights and buffers of a network."""
    with torch.device("meta"):  # allocates nothing
        own = networks.build(config.model, config.captcha).state_dict()
    return HEADER_BYTES + copies * sum(int(value.nbytes) for value in own.values())


def load_weights(path: Path, device: torch.device) -> tuple[Recognizer, Config]:
    """Return the recognizer of a weights file, in evaluation mode, and the config it was trained with.

    One that was written before confidences were calibrated is not calibrated.

    Raises:
        UserError: the file is missing or damaged, or another program or version wrote it; train again.
    """
    try:
        tensors, values, metadata = read_tensors(path, METADATA_KEY, _max_bytes)
        config = load(_config_of(values, metadata))
        with torch.device("meta"):  # before any memory is allocated: what the file says may not be true
            own = networks.build(config.model, config.captcha).state_dict()
        shapes, own_shapes = ({(k, x.shape, x.dtype) for k, x in each.items()} for each in (tensors, own))
        if different := shapes ^ own_shapes:
            raise ValueError(
                f"does not match the network of its config: {min(name for name, *_ in different)} differs"
            )
        if not all(bool(value.isfinite().all()) for value in tensors.values()):
            raise ValueError("has weights that are not finite; train again")
        calibration = Calibration.from_json(values.get("calibration", NOT_CALIBRATED.to_json()))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a run has one after its first epoch") from None
    except ConfigError as error:
        raise UserError(*(f"{path}: {line}" for line in error.lines)) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    model = networks.build(config.model, config.captcha)
    model.load_state_dict(tensors)
    model.calibration = calibration
    return networks.to_device(model, device).eval(), config


def _max_bytes(values: Mapping[str, Any], metadata: Mapping[str, str]) -> int:
    try:
        config = load(_config_of(values, metadata))
    except (ConfigError, ValueError):  # reading the file shows whether it is damaged
        return UNKNOWN_BYTES
    return max_file_bytes(config)


def _config_of(values: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the config in the JSON values of a weights file.

    Raises:
        ValueError: another program or version wrote the file; the message says which.
    """
    if values.get("format") == FORMAT and isinstance(values.get("config"), dict):
        return dict(values["config"])
    if not values and '"captcha"' in metadata.get("config", ""):
        raise ValueError(
            "was written by captcha_exp 0.1, whose weights this version cannot read; train again, or use "
            "captcha_exp 0.1"
        )
    raise ValueError(
        "contains no config that this version reads; pass a run's model.safetensors, or update captcha_exp"
    )
