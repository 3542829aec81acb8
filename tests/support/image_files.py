"""Image files, including unusual ones that Pillow does not write."""

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Bytes = npt.NDArray[np.uint8]

ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""x, y, step in x, step in y of each pass of an interlaced PNG (RFC 2083, 2.6)"""


def noise(*shape: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the bytes of an image file written by Pillow."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def page(seed: int = 0, width: int = 32, height: int = 16) -> Image.Image:
    """Return a grayscale image of noise, different for each seed."""
    return Image.fromarray(noise(height, width, seed=seed))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int,
    height: int,
    depth: int,
    color_type: int,
    passes: Sequence[Sequence[bytes]],
    *chunks: bytes,
    interlaced: bool = False,
) -> bytes:
    """Return a PNG with rows of bytes, in one pass or seven; `chunks` come before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, int(interlaced))
    rows = b"".join(b"\0" + row for rows in passes for row in rows)
    parts = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def interlaced(pixels: Bytes, num_passes: int = 7) -> bytes:
    """Return a PNG of (H, W) uint8 in the seven passes of Adam7, or only the first ones."""
    used = ADAM7[:num_passes]
    passes = [[row.tobytes() for row in pixels[y::dy, x::dx] if row.size] for x, y, dx, dy in used]
    return png(pixels.shape[1], pixels.shape[0], 8, 0, passes, interlaced=True)


def bomb(width: int, height: int) -> bytes:
    """Return a small PNG whose header claims this size."""
    return png(width, height, 8, 0, [[bytes(100)]])


def gif_with_a_margin(inner: Bytes, left: int, top: int, width: int, height: int) -> bytes:
    """Return a GIF whose frame (H, W) of color indices 0 to 3 covers part of its canvas; color 0 is black."""
    image = Image.fromarray(inner, "L").convert("P")
    image.putdata(inner.ravel().tolist())
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    content = bytearray(saved(image, "GIF", optimize=False))
    frame = content.index(b",", content.index(b"\0\0\xff") + 3)  # after the color table
    content[6:10] = struct.pack("<HH", width, height)
    content[frame + 1 : frame + 5] = struct.pack("<HH", left, top)
    return bytes(content)
