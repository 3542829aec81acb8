"""Random geometric and color changes of training images, on the device.

Shapes: N images of the dataset, B images of a batch, H height, W width, C channels, P parameters per image.

The changes of an image are a function of (seed, epoch, index of the image): the parameters of all images are
drawn once per epoch on the CPU and indexed on the device. They do not depend on batch size, order or device.

All geometric changes are composed into one sampling grid, which is applied once with bilinear interpolation.
The result is uint8, like the images that the network receives in inference.
"""

import math
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from captcha_exp.config import AugmentConfig, Config
from captcha_exp.data.dataset import Batch
from captcha_exp.runtime import seeding

GRID = (3, 5)  # rows and columns of the control points of the elastic transform
_NUM_AFFINE = 6  # translate x, translate y, scale x, scale y, rotate, shear
_NUM_ELASTIC = 2 * GRID[0] * GRID[1]  # x and y of each control point
_NUM_COLOR = 7  # contrast and brightness of up to 3 channels, and inversion
NUM_PARAMS = _NUM_AFFINE + _NUM_ELASTIC + _NUM_COLOR  # P


class Augmenter:
    """The augmentation of one epoch, called with each batch."""

    def __init__(self, config: Config, epoch: int, num_images: int, device: torch.device) -> None:
        """Draw the parameters of `num_images` images on the CPU; epochs count from 1."""
        self._config = apply_warmup(config.augment, epoch, config.train.epochs)
        self._params = (
            None if is_off(self._config) else sample_params(config.seed, epoch, num_images).to(device)
        )

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with augmented images."""
        if self._params is None:
            return batch
        return batch._replace(images=augment(batch.images, self._params[batch.indices], self._config))


def apply_warmup(config: AugmentConfig, epoch: int, num_epochs: int) -> AugmentConfig:
    """Scale the augmentation by the warmup of an epoch, counted from 1; the first epoch has none."""
    if not config.warmup_fraction:
        return config
    factor = min(1.0, (epoch - 1) / (config.warmup_fraction * num_epochs))
    return replace(config, **{name: value * factor for name, value in _strengths(config).items()})


def _strengths(config: AugmentConfig) -> dict[str, float]:
    """Return every setting that is 0 if its change is off."""
    return {name: value for name, value in asdict(config).items() if name != "warmup_fraction"}


def is_off(config: AugmentConfig) -> bool:
    """Return whether the augmentation changes nothing."""
    return not any(_strengths(config).values())


def sample_params(seed: int, epoch: int, num_images: int) -> Tensor:
    """Return (N, P) uniform numbers in [-1, 1), the parameters of each image in an epoch, on the CPU."""
    generator = torch.Generator().manual_seed(seeding.derive_seed(seed, "augment", epoch))
    return torch.rand(num_images, NUM_PARAMS, generator=generator) * 2 - 1


@torch.no_grad()
def augment(images: Tensor, params: Tensor, config: AugmentConfig) -> Tensor:
    """Augment images (B, H, W, C) uint8 with parameters (B, P); returns (B, H, W, C) uint8."""
    is_geometric = any((config.translate, config.scale, config.rotate, config.shear, config.elastic))
    changes_color = config.color_jitter > 0 or config.invert_p > 0
    affine, elastic, color = torch.tensor_split(params, (_NUM_AFFINE, _NUM_AFFINE + _NUM_ELASTIC), dim=1)
    pixels = images.movedim(-1, 1).float()
    if is_geometric:
        height, width = images.shape[1:3]
        pixels = F.grid_sample(
            pixels,
            _sampling_grid(affine, elastic, height, width, config),
            padding_mode="zeros",
            align_corners=True,
        )
    if changes_color:
        pixels = _jitter_color(pixels, color, config)
    return pixels.round_().clamp_(0, 255).to(torch.uint8).movedim(1, -1)


def _sampling_grid(affine: Tensor, elastic: Tensor, height: int, width: int, config: AugmentConfig) -> Tensor:
    """Return the (B, H, W, 2) sampling grid: x and y in the source image, from -1 to 1 edge to edge.

    Coordinates are clamped, which repeats the edge pixels: not every device supports padding_mode="border".
    """
    # In units of half the height: rotation then preserves angles.
    ratio = (width - 1) / (height - 1)
    y0 = torch.linspace(-1, 1, height, device=affine.device).view(1, height, 1)
    x0 = torch.linspace(-ratio, ratio, width, device=affine.device).view(1, 1, width)
    translate_x, translate_y, scale_x, scale_y, rotate, shear = affine.view(-1, 6, 1, 1).unbind(1)
    scale_x, scale_y = (torch.exp(scale * math.log1p(config.scale)) for scale in (scale_x, scale_y))
    angle = rotate * math.radians(config.rotate)
    slope = torch.tan(shear * math.radians(config.shear))
    cos, sin = torch.cos(angle), torch.sin(angle)
    x = (cos * scale_x) * x0 + (slope * cos - sin * scale_y) * y0 + translate_x * (2 * config.translate)
    y = (sin * scale_x) * x0 + (slope * sin + cos * scale_y) * y0 + translate_y * (2 * config.translate)
    if config.elastic:
        control_points = elastic.view(-1, 2, *GRID) * (2 * config.elastic)
        displacement = F.interpolate(control_points, (height, width), mode="bicubic", align_corners=True)
        x, y = x + displacement[:, 0], y + displacement[:, 1]
    return torch.stack((x / ratio, y), dim=-1).clamp_(-1, 1)


def _jitter_color(pixels: Tensor, params: Tensor, config: AugmentConfig) -> Tensor:
    """Change contrast and brightness of pixels (B, C, H, W) in [0, 255], and invert some images."""
    channels = pixels.shape[1]
    contrast = torch.exp(params[:, :channels] * math.log1p(config.color_jitter))
    brightness = params[:, 3 : 3 + channels] * (255 * config.color_jitter)
    # A uniform number in [-1, 1) is below 2 * p - 1 with probability p.
    is_inverted = params[:, 6:] < 2 * config.invert_p - 1
    contrast = torch.where(is_inverted, -contrast, contrast)
    brightness = torch.where(is_inverted, -brightness, brightness)
    return (pixels - 127.5) * contrast[..., None, None] + (127.5 + brightness[..., None, None])
