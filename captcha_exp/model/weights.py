"""The weights of a model and their file.

The file is safetensors: numbers and text, no code. Its metadata contains the config and the alphabet, so
inference needs no other file.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from captcha_exp.config import Config, load, to_dict
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.model import networks
from captcha_exp.model.networks import Recognizer

METADATA_KEY = "captcha_exp"
FORMAT = 2  # raised whenever older files become unreadable; captcha_exp 0.1 wrote none


def weights_to_bytes(model: Recognizer, config: Config) -> bytes:
    """Return the content of model.safetensors, with axes in logical order whatever the memory format."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # A single metadata entry: safetensors does not keep the order of several, and equal models must give
    # equal files.
    values = {"format": FORMAT, "config": to_dict(config)}
    return to_safetensors(tensors, {METADATA_KEY: json.dumps(values)})


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


def load_weights(path: Path, device: torch.device) -> tuple[Recognizer, Config]:
    """Return the recognizer of a weights file, in evaluation mode, and the config it was trained with.

    Raises:
        UserError: the file is missing or damaged, or another program or version wrote it; train again.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a run has one after its first epoch") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a complete safetensors file: {error}") from None
    try:
        config = load(config_from_metadata(metadata))
    except ConfigError as error:
        raise UserError(*(f"{path}: {line}" for line in error.lines)) from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    model = networks.build(config.model, config.captcha)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: does not match the network of its config: {reason}") from None
    return networks.to_device(model, device).eval(), config


def config_from_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the config in the metadata of a weights file, as plain values.

    Raises:
        ValueError: another program or version wrote the file; the message says which.
    """
    values = _parse_object(metadata.get(METADATA_KEY, ""))
    if values.get("format") == FORMAT and isinstance(values.get("config"), dict):
        return dict(values["config"])
    if _parse_object(metadata.get("config", "")).keys() >= {"captcha", "model"}:
        raise ValueError(
            "was written by captcha_exp 0.1, whose weights this version cannot read; train again, or use "
            "captcha_exp 0.1"
        )
    raise ValueError(
        "contains no config that this version reads; pass a run's model.safetensors, or update captcha_exp"
    )


def _parse_object(text: str) -> dict[str, Any]:
    """Return the JSON object in a text; an empty one if the text is anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
