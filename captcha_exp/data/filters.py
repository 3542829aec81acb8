"""Filters of images, in NumPy alone: importing scipy takes longer than filtering thousands of captchas."""

import numpy as np
import numpy.typing as npt


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
