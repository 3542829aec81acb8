"""The weights of a model, and their file.

The file is safetensors: numbers and text, nothing that runs when it is read. Config and alphabet stand in
it, so that the file alone is enough to read pictures with.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from captcha_exp.config import Config, load, to_dict
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.model import networks
from captcha_exp.model.networks import Recognizer


def weights_to_bytes(model: Recognizer, config: Config) -> bytes:
    """The content of model.safetensors. Axes stand in their logical order, whatever the layout in memory."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # One key alone: safetensors orders several by chance, and the same model is to be the same file.
    return to_safetensors(tensors, {"config": json.dumps(to_dict(config))})


def weights_sha256(model: Recognizer) -> str:
    """SHA-256 over names, shapes and bytes of all weights and statistics, whatever their layout in memory."""
    return tensors_sha256(model.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes, whatever the layout in memory."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        array = value.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def load_weights(path: Path, device: torch.device) -> tuple[Recognizer, Config]:
    """The recogniser in a weights file, in evaluation mode, with the config that it was trained by.

    Raises:
        UserError: the file is missing, damaged, or from a network that this version does not have.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; a run has one from its first epoch on") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: is no whole safetensors file: {error}") from None
    if "config" not in metadata:
        raise UserError(f"{path}: holds no config, so it is not from captcha-exp")
    try:
        config = load(dict(json.loads(metadata["config"])))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: its config cannot be read, so it is not from captcha-exp: {error}"
        ) from None
    except ConfigError as error:
        raise UserError(*(f"{path}: {line}" for line in error.lines)) from None
    model = networks.build(config.model, config.captcha)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: does not fit the network that its config names: {reason}") from None
    return networks.to_device(model, device).eval(), config
