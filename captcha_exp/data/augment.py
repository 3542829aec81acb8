"""Pictures that could have been: the training pictures moved, bent and recoloured, anew in each epoch.

Axes: N pictures of the dataset, B pictures of a batch, H height, W width, C channels, P numbers for one
picture.

What happens to a picture is a function of (seed, epoch, number of the picture): a row of a table of chance
that is drawn once per epoch, on the CPU, and looked up on the device. So neither the size nor the order of
the batches changes it, nor the device that trains.

All movements are one sampling: where each pixel of the new picture lies in the old one is added up first, and
the old one is looked at once, between four pixels. The answer is bytes again, as what the network is served
later is bytes.
"""

import math
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from captcha_exp.config import AugmentConfig, Config
from captcha_exp.data.dataset import Batch
from captcha_exp.runtime import seeding

GRID = (3, 5)  # rows and columns of the grid of points that `warp` pulls at
_NUM_AFFINE = 6  # numbers: shift right, shift down, wider, taller, rotation, slant
_NUM_ELASTIC = 2 * GRID[0] * GRID[1]  # numbers: right and down at each knot
_NUM_COLOR = 7  # numbers: contrast and brightness of up to 3 channels, and whether to invert
NUM_PARAMS = _NUM_AFFINE + _NUM_ELASTIC + _NUM_COLOR  # P


class Augmenter:
    """The changes of all pictures in one epoch."""

    def __init__(self, config: Config, epoch: int, num_images: int, device: torch.device) -> None:
        """For `pictures` pictures in the dataset; epochs are counted from 1."""
        self._config = apply_warmup(config.augment, epoch, config.train.epochs)
        self._params = (
            None if is_off(self._config) else sample_params(config.seed, epoch, num_images).to(device)
        )

    def __call__(self, batch: Batch) -> Batch:
        """The batch with its pictures changed."""
        if self._params is None:
            return batch
        return batch._replace(images=augment(batch.images, self._params[batch.indices], self._config))


def apply_warmup(config: AugmentConfig, epoch: int, num_epochs: int) -> AugmentConfig:
    """What holds in an epoch, counted from 1: grown along the ramp, from nothing in the first."""
    if not config.warmup_fraction:
        return config
    share = min(1.0, (epoch - 1) / (config.warmup_fraction * num_epochs))
    grown = {
        field.name: getattr(config, field.name) * share for field in fields(config) if field.name != "ramp"
    }
    return replace(config, **grown)


def is_off(config: AugmentConfig) -> bool:
    """Whether every picture stays as it is."""
    return not any(
        (
            config.translate,
            config.scale,
            config.rotate,
            config.shear,
            config.elastic,
            config.color_jitter,
            config.invert_p,
        )
    )


def sample_params(seed: int, epoch: int, num_images: int) -> Tensor:
    """(N, P) even numbers in [-1, 1): the chance of each picture in this epoch, on the CPU."""
    generator = torch.Generator().manual_seed(seeding.derive_seed(seed, "augment", epoch))
    return torch.rand(num_images, NUM_PARAMS, generator=generator) * 2 - 1


@torch.no_grad()
def augment(images: Tensor, params: Tensor, config: AugmentConfig) -> Tensor:
    """(B, H, W, C) uint8 of pictures (B, H, W, C) uint8, each changed by its own row of draws (B, P)."""
    moves = any((config.translate, config.scale, config.rotate, config.shear, config.elastic))
    recolours = config.color_jitter > 0 or config.invert_p > 0
    affine, warp, colour = torch.tensor_split(params, (_NUM_AFFINE, _NUM_AFFINE + _NUM_ELASTIC), dim=1)
    pixels = images.movedim(-1, 1).float()
    if moves:
        height, width = images.shape[1:3]
        pixels = F.grid_sample(
            pixels,
            _sampling_grid(affine, warp, height, width, config),
            padding_mode="zeros",
            align_corners=True,
        )
    if recolours:
        pixels = _jitter_color(pixels, colour, config)
    return pixels.round_().clamp_(0, 255).to(torch.uint8).movedim(1, -1)


def _sampling_grid(affine: Tensor, elastic: Tensor, height: int, width: int, config: AugmentConfig) -> Tensor:
    """(B, H, W, 2) where each new pixel lies in the old picture: right and down, from -1 to 1 edge to edge.

    Beyond the edge the picture goes on as at the edge. The places are held there by hand, because not every
    device has a sampling that does it.
    """
    # In units of half the height, so that a turned picture keeps its angles.
    ratio = (width - 1) / (height - 1)
    down = torch.linspace(-1, 1, height, device=affine.device).view(1, height, 1)
    right = torch.linspace(-ratio, ratio, width, device=affine.device).view(1, 1, width)
    shift_x, shift_y, wider, taller, rotate, slant = affine.view(-1, 6, 1, 1).unbind(1)
    wide, tall = torch.exp(wider * math.log1p(config.scale)), torch.exp(taller * math.log1p(config.scale))
    angle = rotate * math.radians(config.rotate)
    lean = torch.tan(slant * math.radians(config.shear))
    cos, sin = torch.cos(angle), torch.sin(angle)
    x = (cos * wide) * right + (lean * cos - sin * tall) * down + shift_x * (2 * config.translate)
    y = (sin * wide) * right + (lean * sin + cos * tall) * down + shift_y * (2 * config.translate)
    if config.elastic:
        knots = elastic.view(-1, 2, *GRID) * (2 * config.elastic)
        pull = F.interpolate(knots, (height, width), mode="bicubic", align_corners=True)
        x, y = x + pull[:, 0], y + pull[:, 1]
    return torch.stack((x / ratio, y), dim=-1).clamp_(-1, 1)


def _jitter_color(pixels: Tensor, params: Tensor, config: AugmentConfig) -> Tensor:
    """(B, C, H, W) of pixels (B, C, H, W) from 0 to 255."""
    channels = pixels.shape[1]
    gain = torch.exp(params[:, :channels] * math.log1p(config.color_jitter))
    offset = params[:, 3 : 3 + channels] * (255 * config.color_jitter)
    # A number even in [-1, 1) is below 2 * share - 1 in that share of the pictures.
    negative = params[:, 6:] < 2 * config.invert_p - 1
    gain, offset = torch.where(negative, -gain, gain), torch.where(negative, -offset, offset)
    return (pixels - 127.5) * gain[..., None, None] + (127.5 + offset[..., None, None])
