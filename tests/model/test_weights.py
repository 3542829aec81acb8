"""Weights that come back to the bit, and files that are not what they should be, one line each."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from captcha_exp.config import Config, to_dict
from captcha_exp.errors import UserError
from captcha_exp.model import networks
from captcha_exp.model.networks import Recognizer
from captcha_exp.model.weights import load_weights, weights_to_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def trained(config: Config, seed: int = 0) -> Recognizer:
    """Weights and statistics that no fresh model has."""
    torch.manual_seed(seed)
    model = networks.to_device(networks.build(config.model, config.captcha), CPU)
    with torch.no_grad():
        for value in model.state_dict().values():
            value += torch.rand(value.shape) if value.is_floating_point() else 3
    return model


@pytest.fixture
def file(tiny: Config, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights_to_bytes(trained(tiny), tiny))
    return path


def mistake(path: Path) -> str:
    """The one line that reading this file gives."""
    with pytest.raises(UserError) as error:
        load_weights(path, CPU)
    (line,) = error.value.lines
    assert "\n" not in line
    return line


def test_weights_come_back_to_the_bit(tiny: Config, file: Path) -> None:
    model, loaded = trained(tiny), load_weights(file, CPU)[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    images = torch.randint(0, 256, (5, 16, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(model.eval()(images), loaded(images))


def test_the_config_comes_back_with_them(tiny: Config, file: Path) -> None:
    model, config = load_weights(file, CPU)
    assert config == tiny
    assert not model.training


def test_the_file_can_be_read_without_this_project(tiny: Config, file: Path) -> None:
    assert load_file(file).keys() == trained(tiny).state_dict().keys()
    with safetensors.safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["config"]) == to_dict(tiny)


def test_the_same_model_is_the_same_file_whatever_its_layout_in_memory(tiny: Config) -> None:
    placed = trained(tiny)
    plain = networks.build(tiny.model, tiny.captcha)
    plain.load_state_dict(placed.state_dict())
    assert weights_to_bytes(plain, tiny) == weights_to_bytes(placed, tiny) == weights_to_bytes(placed, tiny)
    assert weights_to_bytes(trained(tiny, seed=1), tiny) != weights_to_bytes(placed, tiny)


# -- files that are something else ---------------------------------------------------------------------------


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    line = mistake(tmp_path / "model.safetensors")
    assert line.startswith(f"{tmp_path / 'model.safetensors'}: there is no such file")


def truncated(content: bytes) -> bytes:
    return content[:-5]


def header_alone(content: bytes) -> bytes:
    return content[: 8 + int.from_bytes(content[:8], "little")]


def absurd_header(content: bytes) -> bytes:
    return b"\xff" * 8 + content[8:]


@pytest.mark.parametrize(
    "damage",
    [truncated, header_alone, absurd_header, lambda content: b"", lambda content: b"PK\x03\x04 a zip"],
)
def test_a_damaged_file_is_one_line(file: Path, damage: Callable[[bytes], bytes]) -> None:
    file.write_bytes(damage(file.read_bytes()))
    assert mistake(file).startswith(f"{file}: is no whole safetensors file: ")


def test_a_folder_is_one_line(tmp_path: Path) -> None:
    assert str(tmp_path) in mistake(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_foreign_file_is_one_line(file: Path, metadata: dict[str, str] | None) -> None:
    save_file({"weight": torch.zeros(2)}, file, metadata)
    assert mistake(file) == f"{file}: holds no config, so it is not from captcha-exp"


@pytest.mark.parametrize("config", ["resnet50", "[1, 2]", '"text"', "null", "{"])
def test_a_foreign_config_is_one_line(file: Path, config: str) -> None:
    """Other projects write a `config` of their own into their files."""
    save_file({"weight": torch.zeros(2)}, file, {"config": config})
    assert str(file) in mistake(file)


def test_a_config_with_other_keys_names_the_file(file: Path) -> None:
    save_file({"weight": torch.zeros(2)}, file, {"config": '{"hidden_size": 768}'})
    with pytest.raises(UserError) as error:
        load_weights(file, CPU)
    assert str(file) in str(error.value)


def test_weights_of_another_network_are_one_line(tiny: Config, file: Path) -> None:
    tensors = load_file(file)
    tensors["head.read.weight"] = torch.zeros(7, 16)
    save_file(tensors, file, {"config": json.dumps(to_dict(tiny))})
    line = mistake(file)
    assert line.startswith(f"{file}: does not fit the network that its config names: ")
    assert "head.read.weight" in line


def test_weights_that_lack_one_are_one_line(tiny: Config, file: Path) -> None:
    tensors = load_file(file)
    del tensors["head.read.bias"]
    save_file(tensors, file, {"config": json.dumps(to_dict(tiny))})
    assert "head.read.bias" in mistake(file)


# -- the best weights ----------------------------------------------------------------------------------------
