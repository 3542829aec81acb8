"""Draw the images of the package `captcha`, bit for bit, in less time.

Each character is rotated and warped by the same Pillow calls as in the package. Everything else is done once,
or not at all: spaces have no pixels; a glyph is drawn once per font and size, and colored by a table; all
dots are copies of one; and the smoothing filter is integer arithmetic. `is_known` guards against another
version of the package, and a test compares the pixels with those of the package.

Source: captcha/image.py of captcha 0.7.1 (BSD license).
"""

import functools
import hashlib
import math
import random
from pathlib import Path
from typing import Any

import captcha.image
import numpy as np
import numpy.typing as npt
from captcha.image import ImageCaptcha
from PIL import Image, ImageDraw, _imaging

KNOWN_SOURCE = "9bf0c6b25c81ce8199ca84c911152f53cf16f0bfb5cd41b3b9d2b96d7ffdbda2"  # of captcha/image.py
MAX_GLYPHS = 4096  # that are kept, of about 1,500 bytes each
NUM_DOTS, DOT_WIDTH = 30, 3

Pixels = npt.NDArray[np.uint8]
Size = tuple[int, int]


def is_known() -> bool:
    """Return whether the installed package is the one whose images are drawn here."""
    return hashlib.sha256(Path(captcha.image.__file__).read_bytes()).hexdigest() == KNOWN_SOURCE


class Renderer:
    """Draws the image that `ImageCaptcha.generate_image` draws with the same random numbers."""

    def __init__(self, width: int, height: int, fonts: list[str] | None) -> None:
        self._size = width, height
        self._fonts = ImageCaptcha(width, height, fonts=fonts).truefonts
        self._measure = functools.lru_cache(MAX_GLYPHS)(self._measure_character)
        self._glyph = functools.lru_cache(MAX_GLYPHS)(self._draw_glyph)
        self._dot = _draw_dot()

    def __call__(self, text: str, rng: random.Random) -> Image.Image:
        """Return the RGB image of a text."""
        red, green, blue = (_below(18, rng) + 238 for _ in range(3))
        opacity = _below(36, rng) + 220
        color = (*(_below(191, rng) + 10 for _ in range(3)), opacity)
        image = self._draw_text(text, (red, green, blue), color, rng)
        self._draw_noise(image, color, rng)
        return Image.fromarray(_smooth(np.asarray(image)))

    def _draw_text(
        self, text: str, background: tuple[int, ...], color: tuple[int, ...], rng: random.Random
    ) -> Image.Image:
        """Return a background with the characters, in the size of the image."""
        width, height = self._size
        colors = _color_table(color)
        parts = []
        for character in text:
            if rng.getrandbits(32) / 2**32 > ImageCaptcha.word_space_probability:
                parts.append(self._draw_character(" ", colors, rng))
            parts.append(self._draw_character(character, colors, rng))
        text_width = sum(size[0] for size, _ in parts)
        image = Image.new("RGB", (max(text_width, width), height), background)
        average = int(text_width / len(text))
        max_overlap = int(ImageCaptcha.word_offset_dx * average)
        offset = int(average * 0.1)
        for (part_width, part_height), pixels in parts:
            if pixels is not None:
                mask = pixels.convert("L").point(ImageCaptcha.lookup_table, "L")
                top = int((height - part_height) / 2)
                image.im.paste(pixels, (offset, top, offset + part_width, top + part_height), mask)
            offset += part_width - _below(max_overlap + 1, rng)
        return image.resize(self._size)

    def _draw_character(
        self, character: str, colors: npt.NDArray[np.uint32], rng: random.Random
    ) -> tuple[Size, Any]:
        """Return the size of a warped character and its RGBA pixels, None if it has no ink."""
        font = _below(len(self._fonts), rng)
        left, top, w, h = self._measure(character, font)
        dx, dy = _below(5, rng), _below(7, rng)
        units = [rng.getrandbits(32) / 2**32 for _ in range(7)]
        # The position matters only for ink that it would place outside the image.
        glyph = self._glyph(character, font, min(dx, max(0, -left)), min(dy, max(0, -top)))
        if glyph is None:
            return (int(w), int(h)), None
        pixels = Image.frombuffer("RGBA", glyph.shape[::-1], colors[glyph], "raw", "RGBA", 0, 1).im
        pixels = _rotate(pixels, -30 + units[0] * 60)
        max_dx = w * units[1] * (0.3 - 0.1) + 0.1
        max_dy = h * units[2] * (0.3 - 0.2) + 0.2
        x1, x2 = (int(unit * (max_dx + max_dx) - max_dx) for unit in (units[3], units[5]))
        y1, y2 = (int(unit * (max_dy + max_dy) - max_dy) for unit in (units[4], units[6]))
        return (int(w), int(h)), _warp(pixels, w, h, x1, y1, x2, y2)

    def _measure_character(self, character: str, font: int) -> tuple[Any, Any, Any, Any]:
        """Return the box of a character: where its ink starts, and the size of its image."""
        draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
        left, top, right, bottom = draw.multiline_textbbox((1, 1), character, font=self._fonts[font])
        return left - 1, top - 1, right, bottom

    def _draw_glyph(self, character: str, font: int, dx: int, dy: int) -> Pixels | None:
        """Draw the mask (H, W) of the ink of a character, None if there is none."""
        _, _, w, h = self._measure(character, font)
        mask = Image.new("L", (int(w) + dx, int(h) + dy))
        ImageDraw.Draw(mask).text((dx, dy), character, font=self._fonts[font], fill=255)
        box = mask.getbbox()
        return None if box is None else np.asarray(mask.crop(box))

    def _draw_noise(self, image: Image.Image, color: tuple[int, ...], rng: random.Random) -> None:
        """Draw the dots and the curve."""
        w, h = self._size
        dots = [(_below(w + 1, rng), _below(h + 1, rng)) for _ in range(NUM_DOTS)]
        draw = ImageDraw.Draw(image)
        draw.point((np.array(dots)[:, None] + self._dot).ravel().tolist(), color)
        x1 = _below(int(w / 5) + 1, rng)
        x2 = _below(w - int(w / 5) + 1, rng) + int(w / 5)
        y1 = _below(h - 2 * int(h / 5) + 1, rng) + int(h / 5)
        y2 = _below(h - y1 - int(h / 5) + 1, rng) + y1
        end = _below(41, rng) + 160
        draw.arc([x1, y1, x2, y2], _below(21, rng), end, fill=color)


def _rotate(pixels: Any, angle: float) -> Any:
    """Rotate RGBA pixels like Image.rotate(angle, BILINEAR, expand=True)."""
    if angle == 0:
        return pixels
    w, h = pixels.size
    radians = -math.radians(angle % 360)
    cos, sin = round(math.cos(radians), 15), round(math.sin(radians), 15)

    def rotate(x: float, y: float, x0: float, y0: float) -> tuple[float, float]:
        return cos * x + sin * y + x0, -sin * x + cos * y + y0

    x0, y0 = rotate(-w / 2, -h / 2, 0, 0)
    x0, y0 = x0 + w / 2, y0 + h / 2
    xs, ys = zip(*(rotate(x, y, x0, y0) for x, y in ((0, 0), (w, 0), (w, h), (0, h))), strict=True)
    size = math.ceil(max(xs)) - math.floor(min(xs)), math.ceil(max(ys)) - math.floor(min(ys))
    x0, y0 = rotate(-(size[0] - w) / 2, -(size[1] - h) / 2, x0, y0)
    matrix = cos, sin, x0, -sin, cos, y0
    premultiplied = pixels.convert("RGBa")
    return _transform(premultiplied, size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR).convert(
        "RGBA"
    )


def _warp(pixels: Any, w: int, h: int, x1: int, y1: int, x2: int, y2: int) -> Any:
    """Enlarge RGBA pixels, and map a quadrilateral in them to (w, h) pixels like Transform.QUAD."""
    w2, h2 = w + abs(x1) + abs(x2), h + abs(y1) + abs(y2)
    if pixels.size != (w2, h2):
        enlarged = pixels.convert("RGBa").resize((w2, h2), Image.Resampling.BICUBIC, (0, 0, *pixels.size))
        pixels = enlarged.convert("RGBA")
    per_x, per_y = 1.0 / w, 1.0 / h
    # The corners are (x1, y1), (-x1, h2 - y2), (w2 + x2, h2 + y2) and (w2 - x2, -y1), from the top left one.
    data = (
        *(x1, (w2 - x2 - x1) * per_x, (-x1 - x1) * per_y),
        (w2 + x2 + x1 - (w2 - x2) + x1) * per_x * per_y,
        *(y1, (-y1 - y1) * per_x, (h2 - y2 - y1) * per_y),
        (h2 + y2 - (h2 - y2) + y1 + y1) * per_x * per_y,
    )
    return _transform(pixels, (w, h), Image.Transform.QUAD, data, Image.Resampling.NEAREST)


def _transform(pixels: Any, size: Size, method: int, data: tuple[float, ...], resample: int) -> Any:
    """Return transformed pixels, transparent where there are none."""
    result = _imaging.new(pixels.mode, size)
    result.transform((0, 0, *size), pixels, method, data, resample, True)
    return result


def _below(n: int, rng: random.Random) -> int:
    """Return rng.randrange(n), in half of the time."""
    bits = n.bit_length()
    number = rng.getrandbits(bits)
    while number >= n:
        number = rng.getrandbits(bits)
    return number


def _draw_dot() -> npt.NDArray[np.int64]:
    """Return the pixels (P, 2) of a dot at (0, 0), a thick line of two pixels."""
    image = Image.new("L", (16, 16))
    ImageDraw.Draw(image).line(((8, 8), (7, 7)), 255, DOT_WIDTH)
    return np.argwhere(np.asarray(image).T) - 8


def _color_table(color: tuple[int, ...]) -> npt.NDArray[np.uint32]:
    """Return the RGBA pixels (256,) of ink of a color with each coverage."""
    image = Image.new("RGBA", (256, 1))
    ImageDraw.Draw(image).bitmap((0, 0), _COVERAGES, color)
    return np.asarray(image).view(np.uint32).ravel()


_COVERAGES = Image.frombytes("L", (256, 1), bytes(range(256)))


def _smooth(image: Pixels) -> Pixels:
    """Apply Pillow's filter SMOOTH to an image (H, W, 3): weights of 5 in the center and 1 around, of 13."""
    height, width, channels = image.shape
    wide = image.reshape(height, width * channels).astype(np.uint16)
    rows = wide[:, : -2 * channels] + wide[:, channels:-channels] + wide[:, 2 * channels :]
    total = rows[:-2] + rows[1:-1] + rows[2:]
    total += 4 * wide[1:-1, channels:-channels]
    smoothed = image.reshape(height, width * channels).copy()  # the filter keeps the border
    smoothed[1:-1, channels:-channels] = (total + 6) // 13  # rounded, and never halfway
    return smoothed.reshape(image.shape)
