"""Weights files: exact round trip, and one-line errors for damaged or foreign files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from captcha_exp.config import Config, to_dict
from captcha_exp.errors import UserError
from captcha_exp.model import networks
from captcha_exp.model.confidence import NOT_CALIBRATED
from captcha_exp.model.networks import Recognizer
from captcha_exp.model.weights import load_weights, weights_to_bytes, with_sha256

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def random_model(config: Config, seed: int = 0) -> Recognizer:
    """Return a model with random weights and running statistics."""
    torch.manual_seed(seed)
    model = networks.to_device(networks.build(config.model, config.captcha), CPU)
    with torch.no_grad():
        for value in model.state_dict().values():
            value += torch.rand(value.shape) if value.is_floating_point() else 3
    return model


@pytest.fixture
def file(tiny: Config, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights_to_bytes(random_model(tiny), tiny))
    return path


def save_as(file: Path, tensors: dict[str, Tensor], config: dict[str, Any], number: int = 2) -> None:
    """Write a weights file with its SHA-256."""
    values = with_sha256(tensors, {"format": number, "config": config})
    save_file(tensors, file, {"captcha_exp": json.dumps(values)})


def load_error(path: Path) -> str:
    """Return the one-line error of loading this file."""
    with pytest.raises(UserError) as error:
        load_weights(path, CPU)
    (line,) = error.value.lines
    assert "\n" not in line
    return line


def test_weights_are_restored_exactly(tiny: Config, file: Path) -> None:
    model, loaded = random_model(tiny), load_weights(file, CPU)[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    images = torch.randint(0, 256, (5, 16, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(model.eval()(images), loaded(images))


def test_the_config_is_restored(tiny: Config, file: Path) -> None:
    model, config = load_weights(file, CPU)
    assert config == tiny
    assert not model.training


def test_the_file_can_be_read_with_safetensors_alone(tiny: Config, file: Path) -> None:
    assert load_file(file).keys() == random_model(tiny).state_dict().keys()
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert list(metadata) == ["captcha_exp"], "safetensors does not keep the order of several entries"
    values = json.loads(metadata["captcha_exp"])
    unsigned = {"format": 2, "config": to_dict(tiny), "calibration": NOT_CALIBRATED.to_json()}
    assert values == unsigned | {"sha256": values["sha256"]}


def test_the_file_does_not_depend_on_the_memory_format(tiny: Config) -> None:
    channels_last = random_model(tiny)
    contiguous = networks.build(tiny.model, tiny.captcha)
    contiguous.load_state_dict(channels_last.state_dict())
    content = weights_to_bytes(channels_last, tiny)
    assert weights_to_bytes(contiguous, tiny) == content == weights_to_bytes(channels_last, tiny)
    assert weights_to_bytes(random_model(tiny, seed=1), tiny) != content


# -- damaged and foreign files -------------------------------------------------------------------------------


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    line = load_error(tmp_path / "model.safetensors")
    assert line.startswith(f"{tmp_path / 'model.safetensors'}: no such file")


def truncated(content: bytes) -> bytes:
    return content[:-5]


def header_only(content: bytes) -> bytes:
    return content[: 8 + int.from_bytes(content[:8], "little")]


def absurd_header(content: bytes) -> bytes:
    return b"\xff" * 8 + content[8:]


@pytest.mark.parametrize(
    "damage",
    [truncated, header_only, absurd_header, lambda content: b"", lambda content: b"PK\x03\x04 a zip"],
)
def test_a_damaged_file_is_reported(file: Path, damage: Callable[[bytes], bytes]) -> None:
    file.write_bytes(damage(file.read_bytes()))
    assert load_error(file).startswith(f"{file}: not a complete safetensors file: ")


def test_every_flipped_bit_is_reported(file: Path) -> None:
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for offset in (*range(0, header, 23), *range(header, len(content), 997), len(content) - 1):
        flipped = bytearray(content)
        flipped[offset] ^= 1 << offset % 8
        file.write_bytes(flipped)
        assert load_error(file).startswith(f"{file}: "), offset


def test_weights_that_are_not_finite_are_reported(tiny: Config, file: Path) -> None:
    tensors = load_file(file)
    tensors["head.classifier.bias"][0] = torch.nan
    save_as(file, tensors, to_dict(tiny))
    assert load_error(file) == f"{file}: has weights that are not finite; train again"


def test_a_network_is_not_built_before_its_tensors_are_there(tiny: Config, file: Path) -> None:
    config = to_dict(tiny)
    config["model"]["channels"] = [4096] * 4  # several GB
    save_as(file, load_file(file), config)
    assert "does not match the network of its config" in load_error(file)


def test_a_directory_is_reported(tmp_path: Path) -> None:
    assert str(tmp_path) in load_error(tmp_path)


FOREIGN = "contains no config that this version reads; pass a run's model.safetensors, or update captcha_exp"


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_foreign_file_is_reported(file: Path, metadata: dict[str, str] | None) -> None:
    save_file({"weight": torch.zeros(2)}, file, metadata)
    assert load_error(file) == f"{file}: {FOREIGN}"


@pytest.mark.parametrize("config", ["resnet50", "[1, 2]", '"text"', "null", "{"])
def test_a_foreign_config_is_reported(file: Path, config: str) -> None:
    """Other projects write a `config` of their own into their files."""
    save_file({"weight": torch.zeros(2)}, file, {"config": config})
    assert load_error(file) == f"{file}: {FOREIGN}"
    save_file({"weight": torch.zeros(2)}, file, {"captcha_exp": config})
    assert load_error(file).startswith(f"{file}: its metadata ")


def test_weights_of_version_0_1_are_refused(tiny: Config, file: Path) -> None:
    """They have the config itself as metadata, with keys that have been renamed since."""
    old = to_dict(tiny)
    old["card"] = old.pop("gpu")
    save_file(load_file(file), file, {"config": json.dumps(old)})
    assert load_error(file) == (
        f"{file}: was written by captcha_exp 0.1, whose weights this version cannot read; "
        "train again, or use captcha_exp 0.1"
    )


def test_weights_of_a_later_format_are_refused(tiny: Config, file: Path) -> None:
    save_as(file, load_file(file), to_dict(tiny), 3)
    assert load_error(file) == f"{file}: {FOREIGN}"


def test_an_invalid_config_is_reported_with_the_file(file: Path) -> None:
    save_as(file, {"weight": torch.zeros(2)}, {"hidden_size": 768})
    with pytest.raises(UserError) as error:
        load_weights(file, CPU)
    assert str(file) in str(error.value)


def test_weights_of_another_network_are_reported(tiny: Config, file: Path) -> None:
    tensors = load_file(file)
    tensors["head.classifier.weight"] = torch.zeros(7, 16)
    save_as(file, tensors, to_dict(tiny))
    line = load_error(file)
    assert line.startswith(f"{file}: does not match the network of its config: ")
    assert "head.classifier.weight" in line


def test_missing_weights_are_reported(tiny: Config, file: Path) -> None:
    tensors = load_file(file)
    del tensors["head.classifier.bias"]
    save_as(file, tensors, to_dict(tiny))
    assert "head.classifier.bias" in load_error(file)
