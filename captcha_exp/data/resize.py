"""Resize images (N, H, W, C) uint8, and average neighborhoods of pixels.

Pillow's bilinear resize and that of exported graphs differ in up to one pixel of seven; therefore the resize
here is two matrix products with a triangle filter, antialiased when downscaling. The weights are integer
multiples of 1/256 that sum to 1, and all sums are integers below 2**24, which float32 represents exactly:
NumPy, torch and an exported graph give the same bytes in any summation order.

Source: the triangle filter with its support scaled by the downscaling factor, as in Pillow's BILINEAR.
"""

import functools

import numpy as np
import numpy.typing as npt

WEIGHT_SCALE = 256  # weights are integer multiples of 1 / WEIGHT_SCALE
assert 255 * WEIGHT_SCALE**2 + WEIGHT_SCALE**2 // 2 < 2**24  # the largest sum is exact in float32

# Multiplications of a product of matrices that OpenBLAS computes in one thread. Several threads wait for each
# other, which takes a hundred times as long as the product where other processes have the cores.
MAX_PRODUCT = 2**18
BLOCK_SIZES = (32, 16, 8)  # rows or columns of a resized image that are computed at a time


@functools.cache
def resize_weights(source_size: int, target_size: int) -> npt.NDArray[np.float32]:
    """Return (target, source) integers: the weight in 1/256 of each source pixel in each target pixel.

    All is integer arithmetic, in units of 1 / (2 target_size) source pixels: an exported graph computes the
    same numbers.
    """
    radius = 2 * max(source_size, target_size)
    centers = (2 * np.arange(target_size) + 1) * source_size
    pixels = (2 * np.arange(source_size) + 1) * target_size
    triangle = np.maximum(0, radius - np.abs(pixels - centers[:, None])) * WEIGHT_SCALE
    total = triangle.sum(axis=1, keepdims=True) // WEIGHT_SCALE
    rounded, remainder = triangle // total, triangle % total
    # Round up the largest remainders: each row sums to WEIGHT_SCALE, which preserves white.
    order = np.argsort(-remainder, axis=1, kind="stable")
    is_up = np.arange(source_size) < WEIGHT_SCALE - rounded.sum(axis=1, keepdims=True)
    np.put_along_axis(rounded, order, np.take_along_axis(rounded, order, axis=1) + is_up, axis=1)
    weights: npt.NDArray[np.float32] = rounded.astype(np.float32)
    weights.flags.writeable = False  # cached, and shared by all callers
    return weights


@functools.cache
def _weight_blocks(
    source_size: int, target_size: int, num_lines: int
) -> list[tuple[slice, slice, npt.NDArray[np.float32]]]:
    """Return blocks of target pixels, the source pixels that they depend on, and the weights between them.

    The blocks are so small that their product with `num_lines` lines has at most MAX_PRODUCT multiplications.
    """
    weights = resize_weights(source_size, target_size)
    for block_size in BLOCK_SIZES:
        blocks = []
        for start in range(0, target_size, block_size):
            rows = weights[start : start + block_size]
            used = np.flatnonzero(rows.any(axis=0))
            target, source = slice(start, start + block_size), slice(int(used[0]), int(used[-1]) + 1)
            blocks.append((target, source, np.ascontiguousarray(rows[:, source])))
        if max(block.size for _, _, block in blocks) * num_lines <= MAX_PRODUCT:
            break
    return blocks


def resize(images: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Resize images (N, H, W, C) uint8 to (N, height, width, C) uint8."""
    n, source_height, source_width, channels = images.shape
    if (source_height, source_width) == (height, width):
        return images
    # Height: (height, H) @ (N, H, W*C). Width: (N*height*C, W) @ (W, width), one product for all rows.
    pixels = images.reshape(n, source_height, -1).astype(np.float32)
    tall = np.empty((n, height, pixels.shape[2]), np.float32)
    for target, source, weights in _weight_blocks(source_height, height, pixels.shape[2]):
        np.matmul(weights, pixels[:, source], out=tall[:, target])
    lines = tall.reshape(n, height, source_width, channels).transpose(0, 1, 3, 2).reshape(-1, source_width)
    wide = np.empty((len(lines), width), np.float32)
    for target, source, weights in _weight_blocks(source_width, width, height * channels):
        np.matmul(lines[:, source], weights.T, out=wide[:, target])
    rounded: npt.NDArray[np.uint8] = np.floor((wide + WEIGHT_SCALE**2 / 2) / WEIGHT_SCALE**2).astype(np.uint8)
    return np.ascontiguousarray(rounded.reshape(n, height, channels, width).transpose(0, 1, 3, 2))


def box_mean(images: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.float32]:
    """Return images (..., H, W) with the mean of the size x size pixels around each pixel; size is odd.

    Outside an image are the pixels of its border. The sums are exact for gray levels of text captchas.
    """
    for axis in (-2, -1):
        padding = [(0, 0)] * images.ndim
        padding[axis] = size // 2 + 1, size // 2
        sums = np.pad(images.astype(np.float64), padding, "edge").cumsum(axis)
        count = images.shape[axis]
        windows = sums.take(range(size, size + count), axis) - sums.take(range(count), axis)
        images = (windows / size).astype(np.float32)
    return images
