"""The networks compared with computed layer tables; the heads with slow loops and torch's losses."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from captcha_exp.config import CaptchaConfig, CompactConfig, HeadName, ResNet18Config, choose_head
from captcha_exp.model import networks
from captcha_exp.model.networks import Recognizer

pytestmark = pytest.mark.usefixtures("one_thread")

ALNUM = "abcdefghijklmnopqrstuvwxyz0123456789"
ARTICLE = CaptchaConfig(
    width=56, height=24, channels=3, alphabet=ALNUM, length=4, min_length=None, case="fold"
)
RESNET = ResNet18Config(name="resnet18", head="grouped_softmax")
COMPACT = CompactConfig(name="compact", channels=(32, 64, 96, 128), head="position")
SMALL = CompactConfig(name="compact", channels=(4, 6, 8), head="position")


def captcha(width: int = 32, height: int = 16, channels: Literal[1, 3] = 3) -> CaptchaConfig:
    return CaptchaConfig(
        width=width,
        height=height,
        channels=channels,
        alphabet="0123456789",
        length=5,
        min_length=None,
        case="fold",
    )


def random_images(captcha_config: CaptchaConfig, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, captcha_config.height, captcha_config.width, captcha_config.channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def build(model: CompactConfig | ResNet18Config, captcha_config: CaptchaConfig) -> Recognizer:
    torch.manual_seed(0)
    return networks.build(model, captcha_config)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -- the article's network, by formula -----------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A convolution without bias, its batch norm, and the size of its output."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    height: int
    width: int

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * self.kernel**2 + 2 * self.outputs

    @property
    def flop(self) -> int:
        """FLOPs, two per multiply-add."""
        return 2 * self.inputs * self.outputs * self.kernel**2 * self.height * self.width


def article(height: int, width: int) -> list[Layer]:
    """Return the layers of the article's ResNet-18: a 3x3 stem of stride 1 and no max-pool."""
    layers = [Layer(3, 64, 3, 1, height, width)]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        height, width = math.ceil(height / stride), math.ceil(width / stride)
        layers.append(Layer(inputs, outputs, 3, stride, height, width))
        layers.append(Layer(outputs, outputs, 3, 1, height, width))
        if stride == 2:
            layers.append(Layer(inputs, outputs, 1, 2, height, width))
        layers += [Layer(outputs, outputs, 3, 1, height, width)] * 2
        inputs = outputs
    return layers


def observed(model: Recognizer, captcha_config: CaptchaConfig) -> list[Layer]:
    """Return every convolution in order of execution."""
    layers = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        assert module.bias is None
        assert module.kernel_size[0] == module.kernel_size[1]
        kernel, stride = module.kernel_size[0], module.stride[0]
        layers.append(
            Layer(inputs[0].shape[1], output.shape[1], kernel, stride, output.shape[2], output.shape[3])
        )

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(record)
    with torch.no_grad():
        model.eval()(random_images(captcha_config, 1))
    return layers


def in_order(layers: list[Layer]) -> list[tuple[int, ...]]:
    """Return sortable tuples, as a shortcut may run before or after its block."""
    return sorted((x.inputs, x.outputs, x.kernel, x.stride, x.height, x.width) for x in layers)


def test_resnet18_has_the_articles_parameters() -> None:
    model = build(RESNET, ARTICLE)
    assert parameters(model) == 11_242_704
    assert parameters(model.head) == 512 * 144 + 144
    assert sum(layer.weights for layer in article(24, 56)) + parameters(model.head) == 11_242_704


def test_resnet18_is_the_article_s_layer_by_layer() -> None:
    model = build(RESNET, ARTICLE)
    layers = article(24, 56)
    assert len(layers) == 20
    assert (layers[-1].height, layers[-1].width) == (3, 7)
    assert in_order(observed(model, ARTICLE)) == in_order(layers)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sorted(norm.num_features for norm in norms) == sorted(layer.outputs for layer in layers)
    assert not any(isinstance(m, nn.MaxPool2d) for m in model.modules())


def test_resnet18_takes_1458_mflop_forward() -> None:
    model = build(RESNET, ARTICLE).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(random_images(ARTICLE, 1))
    expected = sum(layer.flop for layer in article(24, 56)) + 2 * 512 * 144
    assert counter.get_total_flops() == expected
    assert round(expected / 1e9, 3) == 1.458


def test_a_block_adds_its_shortcut_before_the_last_relu() -> None:
    """Compared with the formula, with batch norms in evaluation mode."""
    torch.manual_seed(0)
    block = networks.BasicBlock(4, 6, 2).eval()
    x = torch.randn(2, 4, 8, 8)
    convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    first, second = (c.weight for c in convolutions if c.kernel_size == (3, 3))
    (short,) = (c.weight for c in convolutions if c.kernel_size == (1, 1))
    scale = (1 + 1e-5) ** -0.5  # fresh statistics: mean 0, variance 1
    inner = F.relu(F.conv2d(x, first, stride=2, padding=1) * scale)
    expected = F.relu(F.conv2d(inner, second, padding=1) * scale + F.conv2d(x, short, stride=2) * scale)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)


# -- compact -------------------------------------------------------------------------------------------------


def test_compact_takes_28_mflop() -> None:
    model = build(COMPACT, ARTICLE).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(random_images(ARTICLE, 1))
    assert counter.get_total_flops() == pytest.approx(28.2e6, rel=0.01)
    assert counter.get_total_flops() < 1.458e9 / 50


@pytest.mark.parametrize("channels", [(4, 6), (4, 6, 8), (4, 6, 8, 10)])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 19), (24, 56), (31, 100)])
def test_compact_keeps_a_quarter_of_the_width(channels: tuple[int, ...], height: int, width: int) -> None:
    model = build(CompactConfig(name="compact", channels=channels, head="position"), captcha(width, height))
    with torch.no_grad():
        features = model.eval().network(random_images(captcha(width, height)))
    rows = math.ceil(height // 2 / 2 ** (len(channels) - 1))
    assert features.shape == (3, channels[-1] * rows, math.ceil(width // 2 / 2))


@pytest.mark.parametrize("gain", [0.5, 0.2])
def test_compact_is_invariant_to_brightness_and_contrast(gain: float) -> None:
    captcha_config = captcha()
    model = build(SMALL, captcha_config).eval()
    images = (random_images(captcha_config) // 16) * 10
    with torch.no_grad():
        bright, pale = model(images), model((images * gain + 90).to(torch.uint8))
    torch.testing.assert_close(bright, pale, atol=0.02, rtol=0.02)


# -- every network with every head ---------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["compact", "resnet18"])
@pytest.mark.parametrize("head", ["position", "grouped_softmax"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 35)])
def test_every_combination_trains(
    network: str,
    head: Literal["position", "grouped_softmax"],
    channels: Literal[1, 3],
    height: int,
    width: int,
) -> None:
    captcha_config = captcha(width, height, channels)
    model = build(
        CompactConfig(name="compact", channels=(4, 6, 8, 10), head=head)
        if network == "compact"
        else ResNet18Config(name="resnet18", head=head),
        captcha_config,
    )
    assert model.training
    logits = model(random_images(captcha_config))
    assert logits.shape == (3, 5, 10)
    targets = torch.arange(15).view(3, 5) % 10
    loss = model.head.loss(logits, targets)
    assert loss.shape == ()
    loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    decoded = model.head.decode(logits.detach())
    assert decoded.ids.shape == decoded.confidences.shape == (3, 5)
    assert decoded.text_confidence.shape == (3,)
    assert decoded.ids.dtype == torch.int64


@pytest.mark.parametrize("model", [SMALL, RESNET], ids=["compact", "resnet18"])
def test_no_convolution_has_a_bias(model: CompactConfig | ResNet18Config) -> None:
    convolutions = [m for m in build(model, captcha()).modules() if isinstance(m, nn.Conv2d)]
    assert convolutions
    assert all(c.bias is None for c in convolutions)


@pytest.mark.parametrize("model", [SMALL, RESNET], ids=["compact", "resnet18"])
def test_logits_do_not_depend_on_the_other_images_of_the_batch(model: CompactConfig | ResNet18Config) -> None:
    captcha_config = captcha()
    images = random_images(captcha_config, 5)
    built = build(model, captcha_config)
    with torch.no_grad():
        built(images)  # updates the running statistics
        built.eval()
        batched = built(images)
        for n in range(5):
            torch.testing.assert_close(built(images[n : n + 1])[0], batched[n], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", [SMALL, RESNET], ids=["compact", "resnet18"])
def test_evaluation_does_not_update_the_statistics(model: CompactConfig | ResNet18Config) -> None:
    built = build(model, captcha()).eval()
    before = {name: value.clone() for name, value in built.state_dict().items()}
    with torch.no_grad():
        built(random_images(captcha()))
    assert all((before[name] == value).all() for name, value in built.state_dict().items())


def test_channels_last_changes_no_value() -> None:
    captcha_config = captcha()
    contiguous, channels_last = build(SMALL, captcha_config), build(SMALL, captcha_config)
    networks.to_device(channels_last, torch.device("cpu"))
    assert all(
        torch.equal(a, b) for a, b in zip(contiguous.parameters(), channels_last.parameters(), strict=True)
    )
    with torch.no_grad():
        images = random_images(captcha_config)
        torch.testing.assert_close(
            contiguous.eval()(images), channels_last.eval()(images), atol=1e-5, rtol=1e-4
        )


def test_the_same_seed_gives_the_same_weights() -> None:
    one, two = build(SMALL, captcha()), build(SMALL, captcha())
    torch.manual_seed(1)
    other = networks.build(SMALL, captcha())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# -- the head that `auto` chooses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model", [replace(SMALL, head="ctc"), replace(RESNET, head="ctc")], ids=lambda m: m.name
)
@pytest.mark.parametrize("width", [*range(40, 57), 120])
def test_the_columns_of_a_network_are_at_least_those_of_its_config(
    model: CompactConfig | ResNet18Config, width: int
) -> None:
    labels = replace(captcha(width), length=2)
    assert build(model, labels).head.num_columns in (
        width // model.column_pixels,
        -(-width // model.column_pixels),
    )


@pytest.mark.parametrize(
    ("width", "min_length", "name"), [(36, None, "position"), (36, 3, "ctc"), (35, 3, "end_class")]
)
def test_auto_chooses_a_head_that_the_width_allows(
    width: int, min_length: int | None, name: HeadName
) -> None:
    labels = replace(captcha(width), min_length=min_length)
    auto = replace(SMALL, head="auto")
    assert choose_head(auto, labels) == name
    assert type(build(auto, labels).head) is type(build(replace(SMALL, head=name), labels).head)
    assert choose_head(replace(SMALL, head="end_class"), captcha(36)) == "end_class"
