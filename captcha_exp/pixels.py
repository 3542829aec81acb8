"""Decoded picture -> (H, W, C) uint8: colour, transparency, and the one resize.

Pillow only decodes. Its bilinear resize differs from that of exported graphs in up to one pixel of seven, so
the resize here is ours and the same wherever it runs: two small matrix products with the triangle filter,
widened when shrinking so that no pixel is skipped. The weights are whole numbers of 1/256, each row adding
up to 256. All products and sums are then whole numbers below 2**24, which float32 holds exactly, so that
NumPy, torch and an exported graph give the same bytes in whatever order they add.

Source: the triangle filter with support scaled by the shrinking factor is the one that Pillow documents as
BILINEAR.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

UNIT = 256  # weights are whole multiples of 1/UNIT

# 255 * UNIT**2 + UNIT**2 / 2 is the largest sum that occurs.
assert 255 * UNIT**2 + UNIT**2 // 2 < 2**24  # a fact about the constant, true at every import


def to_array(image: Image.Image, channels: int) -> npt.NDArray[np.uint8]:
    """(H, W, C) uint8 of a decoded picture; what is transparent becomes white, as on a page."""
    if "A" in image.getbands() or "transparency" in image.info:
        colours = image.convert("RGBA")
        image = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image.alpha_composite(colours)
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.uint8)
    return array.reshape(image.height, image.width, channels)


def resize_weights(source: int, target: int) -> npt.NDArray[np.float32]:
    """(target, source) whole numbers: the share, in 1/256, of each source pixel in each target pixel."""
    scale = source / target
    support = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale
    distance = np.abs(np.arange(source) + 0.5 - centres[:, None])
    shares = np.maximum(0.0, 1.0 - distance / support)
    exact = shares / shares.sum(axis=1, keepdims=True) * UNIT
    whole = np.floor(exact)
    # The largest remainders are rounded up: a row adds up to UNIT, and white stays white.
    order = np.argsort(whole - exact, axis=1, kind="stable")
    missing = UNIT - whole.sum(axis=1)
    for row in range(target):
        whole[row, order[row, : int(missing[row])]] += 1
    weights: npt.NDArray[np.float32] = whole.astype(np.float32)
    return weights


def resize(pictures: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """(N, height, width, C) uint8 of pictures (N, H, W, C) uint8."""
    n, source_height, source_width, channels = pictures.shape
    if (source_height, source_width) == (height, width):
        return pictures
    rows: npt.NDArray[Any] = resize_weights(source_height, height)
    columns: npt.NDArray[Any] = resize_weights(source_width, width)
    # Heights first: (height, H) @ (N, H, W*C). Then widths, with the colour moved out of the way of the
    # product.
    tall = rows @ pictures.reshape(n, source_height, -1).astype(np.float32)
    wide = tall.reshape(n, height, source_width, channels).transpose(0, 1, 3, 2) @ columns.T
    rounded: npt.NDArray[np.uint8] = np.floor((wide + UNIT**2 / 2) / UNIT**2).astype(np.uint8)
    return np.ascontiguousarray(rounded.transpose(0, 1, 3, 2))
