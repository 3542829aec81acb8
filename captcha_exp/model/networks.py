"""The networks, and the recognizer, which is a network with a head.

Axes: B batch, C channels, H height, W width, D features, S columns of the feature map.

A network maps images (B, H, W, C) uint8 to features (B, D, S), one vector per column from left to right. To
add one: add a class here, a class in config/schema.py, a case in `build`, and a file in conf/model/.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import assert_never, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captcha_exp.config import CaptchaConfig, CompactConfig, ModelConfig, ResNet18Config, choose_head
from captcha_exp.model.confidence import EPSILON, NOT_CALIBRATED, Calibration
from captcha_exp.model.heads import Decoded, Head, build_head
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.compiler import without_compiler


class CheckpointedSequential(nn.Sequential):
    """A sequence of blocks with optional activation checkpointing; a ReLU belongs to the layer before it.

    With activation checkpointing, training keeps only the input of each block and computes the activations
    inside it again in the backward pass.

    Source: Chen et al., Training deep nets with sublinear memory cost, 2016.
    """

    activation_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return cast(Tensor, super().forward(x))  # type: ignore[no-untyped-call]  # torch has no types for it
        for block in self._split_blocks():
            contexts = functools.partial(_checkpoint_contexts, block)
            # No layer here is random, so no RNG state has to be kept.
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        return x

    def _split_blocks(self) -> list[nn.Sequential]:
        layers = list(self)
        starts = [index for index, layer in enumerate(layers) if not isinstance(layer, nn.ReLU)]
        return [nn.Sequential(*layers[start:end]) for start, end in pairwise([*starts, len(layers)])]


def _checkpoint_contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a block's forward pass and of its recomputation."""
    return contextlib.nullcontext(), _skip_stats_update(block)


@contextlib.contextmanager
def _skip_stats_update(block: nn.Module) -> Iterator[None]:
    """Keep the running statistics of a block's batch norms unchanged."""
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, num_batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches


def conv_bn(
    in_channels: int, out_channels: int, kernel_size: int, stride: int | tuple[int, int] = 1
) -> nn.Sequential:
    """Return a convolution without bias and its batch norm."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=(kernel_size - 1) // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class CompactNet(nn.Module):
    """The small network of this project.

    Early downsampling makes it cheap: the stem and the first stage halve both height and width, each later
    stage only the height. A quarter of the width remains, in which characters are still in separate columns.
    Each image is normalized to mean 0 and standard deviation 1, which makes the network invariant to
    brightness and contrast.
    """

    def __init__(self, in_channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        stages: list[nn.Module] = [conv_bn(in_channels, widths[0], 4, stride=2), nn.ReLU()]
        for number, (inputs, outputs) in enumerate(pairwise(widths)):
            last = number == len(widths) - 2
            stages += [conv_bn(inputs, outputs, 3, stride=2 if number == 0 else (2, 1)), nn.ReLU()]
            stages += [] if last else [CompactResidual(outputs)]
        self.stages = CheckpointedSequential(*stages)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.stages(normalize(images.movedim(-1, 1)))
        if features.requires_grad:
            # In the memory format of the head, the backward passes of ReLU and batch norm are slow.
            features.register_hook(  # type: ignore[no-untyped-call]  # torch has no types for it
                lambda gradient: gradient.contiguous(memory_format=torch.channels_last)
            )
        # Height becomes features: (B, C, H, W) -> (B, C*H, W), in memory column by column, as heads need it.
        return features.permute(0, 3, 1, 2).flatten(2).mT


def normalize(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) with mean 0 and standard deviation 1; a blank one with zeros.

    The sums over a row of up to 1,024 pixels are integers below 2**24, which fp32 adds exactly in any order,
    and all others are added in fp64: every runtime finds the same mean and deviation. ONNX Runtime would
    add all pixels in fp32 one after another, and move confidences by 1e-3; `torch.std_mean` is slow.
    """
    centered = images.float() - 128
    number, fp64 = centered[0].numel(), devices.widest_float(images.device)
    dtype = torch.float32 if images.shape[3] <= 1024 else fp64
    rows = (each.sum(dim=3, dtype=dtype).to(fp64) for each in (centered, centered**2))
    total, squares = (each.sum(dim=(1, 2)) for each in rows)
    variance = (squares - total * total / number).clamp(min=0) / (number - 1)
    mean, scale = (total / number).float(), (1 / (variance.sqrt() + 0.255)).float()
    shape = (-1, 1, 1, 1)
    return (centered - mean.view(shape)) * scale.view(shape)


class CompactResidual(nn.Module):
    """A residual block: x + relu(norm(conv(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = conv_bn(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.body(x))


class ResNet18Net(nn.Module):
    """The article's network: ResNet-18 with a 3x3 stem of stride 1 and no max-pool.

    Features are averaged over the whole image, or over the height alone for a head that needs columns.

    Source: He et al., Deep residual learning for image recognition, CVPR 2016, table 1, option B.
    """

    def __init__(self, in_channels: int, keep_width: bool) -> None:
        super().__init__()
        self.keep_width = keep_width
        blocks: list[nn.Module] = [conv_bn(in_channels, 64, 3), nn.ReLU()]
        inputs = 64
        for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = CheckpointedSequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.blocks(images.movedim(-1, 1).float() / 255)
        return features.mean(dim=2) if self.keep_width else features.mean(dim=(2, 3)).unsqueeze(-1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution if the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_bn(in_channels, out_channels, 3, stride)
        self.conv2 = conv_bn(out_channels, out_channels, 3)
        same_shape = in_channels == out_channels and stride == 1
        self.downsample = nn.Identity() if same_shape else conv_bn(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.downsample(x))


class Recognizer(nn.Module):
    """A network with a head: images (B, H, W, C) uint8 -> the logits of its head."""

    def __init__(self, network: nn.Module, head: Head) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.calibration: Calibration = NOT_CALIBRATED

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.network(images))
        return logits

    def log_probs(self, logits: Tensor) -> Tensor:
        """Return the calibrated log probabilities (B, T or S, classes) of the classes, given fp32 logits."""
        return (logits / self.calibration.temperature).log_softmax(dim=-1)

    def decode(self, logits: Tensor) -> Decoded:
        """Return the texts that fp32 logits predict, with calibrated confidences."""
        if self.calibration == NOT_CALIBRATED:
            return self.head.decode(logits)
        decoded = self.head.decode(logits / self.calibration.temperature)
        odds = decoded.text_confidence.logit(eps=EPSILON)
        confidence = torch.sigmoid(self.calibration.slope * odds + self.calibration.intercept)
        return decoded._replace(text_confidence=confidence)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Set whether training recomputes the activations of blocks instead of keeping them."""
        for module in self.modules():
            if isinstance(module, CheckpointedSequential):
                module.activation_checkpointing = enabled


@without_compiler()  # which a network without values would import
def build(model: ModelConfig, captcha: CaptchaConfig) -> Recognizer:
    """Build the recognizer of a config; its weights are drawn from torch's global RNG.

    Raises:
        UserError: the images are too narrow for labels of this length; the line says what to change.
    """
    head_name = choose_head(model, captcha)
    network: nn.Module
    match model:
        case CompactConfig():
            network = CompactNet(captcha.channels, model.channels)
        case ResNet18Config():
            network = ResNet18Net(captcha.channels, keep_width=head_name != "grouped_softmax")
        case _:
            assert_never(model)
    with torch.no_grad():
        blank = torch.zeros(1, captcha.height, captcha.width, captcha.channels, dtype=torch.uint8)
        _, features, columns = network.eval()(blank).shape
    head = build_head(head_name, features, columns, captcha)
    return Recognizer(network, head).train()


def to_device(model: Recognizer, device: torch.device) -> Recognizer:
    """Move the recognizer to the device, in channels_last, the fastest memory format for convolutions."""
    model.to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's overloads
    return model
