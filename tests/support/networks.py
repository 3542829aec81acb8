"""Four networks unlike those of this project, and their real training under torch's profiler."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from captcha_exp.memory.module_trace import trace_module
from support.profiling import ONEDNN, moments_of, profiled, real_peaks

# Single operators in a trace that allocate internally on the CPU.
ONE_OPERATOR = (
    *ONEDNN,
    "aten::mm",
    "aten::bmm",
    "aten::native_layer_norm_backward",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::native_batch_norm_backward",
    "aten::upsample_bilinear2d",
)


class Bottleneck(nn.Module):
    """The block of a ResNet-50. Source: He et al., Deep residual learning, CVPR 2016, figure 5."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.downsample(x))


def resnet50(classes: int = 10) -> nn.Module:
    """Return a ResNet-50 (same source): 3, 4, 6, 3 blocks."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(count):
            layers.append(Bottleneck(inputs, width, stride if number == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer. Source: Dosovitskiy et al., An image is worth 16x16 words, ICLR 2021."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class ViT(nn.Module):
    """A small vision transformer with a class token (same source)."""

    def __init__(
        self, side: int = 64, patch: int = 8, width: int = 64, depth: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, (side // patch) ** 2 + 1, width))
        self.layers = nn.Sequential(*(EncoderLayer(width, heads, 0.0) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        y: Tensor = self.head(self.layers(x)[:, 0])
        return y


class Tagger(nn.Module):
    """An LSTM that gives each token of a text a class."""

    def __init__(self, words: int = 500, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, 12)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.lstm(self.embedding(ids))[0]).transpose(1, 2)
        return y


def _double(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(4, outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.GroupNorm(4, outputs),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """A U-Net of three levels. Source: Ronneberger et al., U-Net, MICCAI 2015; group norms are added."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1, self.down2 = _double(3, width), _double(width, 2 * width)
        self.bottom = _double(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.merge2 = _double(4 * width, 2 * width)
        self.up1 = nn.Conv2d(2 * width, width, 1)
        self.merge1 = _double(2 * width, width)
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.down1(images)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.up2(self.bottom(F.max_pool2d(second, 2)))
        x = self.merge2(torch.cat([x, second], dim=1))
        x = F.interpolate(self.up1(x), scale_factor=2, mode="bilinear", align_corners=False)
        y: Tensor = self.head(self.merge1(torch.cat([x, first], dim=1)))
        return y


class Case(NamedTuple):
    """A network, and how it is trained."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]  # inputs and targets of a batch size
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def _images(side: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda size: (torch.rand(size, 3, side, side), torch.randint(0, 10, (size,)))


def _sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.01, momentum=0.9, foreach=True)


def _adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, foreach=True)


def _adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, foreach=True)


CASES = {
    "resnet50": Case(resnet50, _images(96), _sgd),
    "vit": Case(ViT, _images(64), _adamw),
    "lstm": Case(Tagger, lambda n: (torch.randint(0, 500, (n, 40)), torch.randint(0, 12, (n, 40))), _adam),
    "unet": Case(UNet, lambda n: (torch.rand(n, 3, 64, 64), torch.randint(0, 5, (n, 64, 64))), _adamw),
}
STEPS = 2


def train_for_real(
    module: nn.Module,
    inputs: Any,
    targets: Tensor,
    optimizer_factory: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
) -> tuple[int, int]:
    """Return the peak bytes of two steps on the CPU: without blocks inside one operator, and with them."""
    loss_function = nn.CrossEntropyLoss()
    with profiled() as profiler:
        with record_function("state"):
            model = deepcopy(module)
            optimizer = optimizer_factory(model.parameters())
        with record_function("step"):
            for _ in range(STEPS):
                batch, labels = inputs.clone(), targets.clone()
                optimizer.zero_grad()
                output = model(batch)
                loss = loss_function(output, labels)
                loss.backward()
                optimizer.step()
    moments = moments_of(profiler, ONE_OPERATOR)
    without, raw = (real_peaks(moments, inside)["step"] for inside in (False, True))
    return without, raw


def compared(name: str, size: int) -> dict[str, Any]:
    """Return the predicted peak bytes of a case and the relative errors of the prediction."""
    case = CASES[name]
    torch.manual_seed(0)
    module = case.build()
    inputs, targets = case.batch(size)
    traced = trace_module(module, inputs, case.optimizer, nn.CrossEntropyLoss(), targets=targets)
    onednn = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(name != "lstm")  # oneDNN would run it as one call, which a GPU does not
    try:
        without, raw = train_for_real(module, inputs, targets, case.optimizer)
    finally:
        torch._C._set_mkldnn_enabled(onednn)
    predicted = traced.peak_bytes("step")
    return {
        "module": name,
        "size": size,
        "bytes": predicted,
        "state_bytes": traced.state_bytes,
        "error": round(without / predicted - 1, 4),
        "raw_error": round(raw / predicted - 1, 4),
    }
