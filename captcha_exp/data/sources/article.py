"""Captchas like those of the article: colored, rotated characters under white rings on a light background.

From back to front: a light color with a radial glow of another and a line in the color of the glow; the
characters, each on a square tile with its own font, size, color, rotation and line; a slight blur; rings.
Lengths are in pixels of a 120 x 50 image and scale with the image size. Tiles share the width equally.

The sequence of random draws does not depend on the text: another text of the same length changes only the
shapes of the characters.

Source: reimplementation of Hei.Captcha (MIT license) with its constants and colors. Its four fonts are not
free, and one is outlined: here, a fraction of the characters of any font is outlined. It crops characters
that are wider than the tile; free fonts are wider and would lose too much, so wide characters are drawn
smaller here.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from captcha_exp.errors import UserError

Point = tuple[int, int]

DIGITS = "23456789"
# Letters as drawn: j is always a capital and therefore half as frequent as the others.
LETTERS = "abcdefghkmnpqrstuvwxyzABCDEFGHJKMNPQRSTUVWXYZ"
CLASSES = DIGITS + "".join(sorted(set(LETTERS.lower())))
DIGIT_PROBABILITY = 0.5  # per position, independent of the number of letters in the alphabet

VERSION = 1  # raised when the same seed would give other pixels

REFERENCE_WIDTH, REFERENCE_HEIGHT = 120, 50  # the image size that the lengths below refer to

LIGHT_COLORS = ("#FFFACD", "#FDF5E6", "#F0FFFF", "#BBFFFF", "#FAFAD2", "#FFE4E1", "#DCDCDC", "#F0E68C")
DARK_COLORS = (
    *("#00E5EE", "#000000", "#2F4F4F", "#000000", "#43CD80"),  # black is twice as frequent
    *("#191970", "#006400", "#458B00", "#8B7765", "#CD5B45"),
)
WHITE = "#FFFFFF"
GLOW_FALLOFF = 0.95  # from the center of the image to its left and right edges

BACKGROUND_LINE_CORNERS, TILE_LINE_CORNERS = 8, 6  # corners of a line, without its two ends
LINE_WIDTH = 1  # pixels
MIN_CORNER_DISTANCE = 9  # pixels
MAX_TRIES = 11  # to place a point at the minimum distance; the last one is used in any case

FONT_SIZE_RANGE = 0.9, 1.37  # in tiles; [min, max)
BASELINE = 0.76  # ems below the top of the tile
MAX_TILT_DEGREES = 45  # in either direction
OUTLINE_PROBABILITY = 0.25  # per character
OUTLINE_WIDTH = 1  # pixels

BLUR_SIGMA = 0.4  # pixels, standard deviation; does not scale with the image size
NUM_RINGS = 15
RING_RADIUS_RANGE = 2, 8  # pixels; [min, max)
RING_WIDTH_RANGE = 94, 145  # hundredths of a pixel; [min, max)
MIN_RING_DISTANCE = 10  # pixels between centers

SUPERSAMPLING = 4  # for lines, which Pillow does not antialias

# Pillow's GaussianBlur is wider than the Gaussian, and takes twice as long.
_edge_weight = math.exp(-1 / (2 * BLUR_SIGMA**2))
_BLUR_KERNEL = ImageFilter.Kernel(
    (3, 3), np.outer((_edge_weight, 1, _edge_weight), (_edge_weight, 1, _edge_weight)).ravel().tolist()
)


def sample_label(alphabet: str, length: int, rng: random.Random) -> str:
    """Sample a label from those characters of the generator that the alphabet has in either case.

    Characters are returned as in the alphabet; of a letter in both cases, the later one.

    Raises:
        UserError: the alphabet has no character of the generator.
    """
    pools = _character_pools(alphabet)
    if not any(pools):
        raise UserError(f"captcha.alphabet={alphabet}: data=article: none of {CLASSES} is in the alphabet")
    digits, letters = pools
    text = ""
    for _ in range(length):
        is_digit = not letters or (bool(digits) and rng.random() < DIGIT_PROBABILITY)
        text += rng.choice(digits if is_digit else letters)
    return text


@cache
def _character_pools(alphabet: str) -> tuple[str, str]:
    """Return the digits and letters to sample from; letters are repeated as in LETTERS."""
    in_alphabet = {character.lower(): character for character in alphabet}
    digits, letters = (
        "".join(in_alphabet[character] for character in pool.lower() if character in in_alphabet)
        for pool in (DIGITS, LETTERS)
    )
    return digits, letters


def make_renderer(
    width: int, height: int, font_paths: Sequence[Path]
) -> Callable[[str, random.Random], Image.Image]:
    """Return a function (text, rng) -> RGB image; the case of each drawn letter is random."""
    scale = min(width / REFERENCE_WIDTH, height / REFERENCE_HEIGHT)
    line_width = max(1, round(LINE_WIDTH * scale * SUPERSAMPLING))
    glow = _glow_mask(width, height)

    def sample_points(
        count: int, min_distance: float, existing: Sequence[Point], rng: random.Random
    ) -> list[Point]:
        """Sample points of the image at a minimum distance from each other and from existing points."""
        points = list(existing)
        min_squared = (min_distance * scale) ** 2
        for _ in range(count):
            for _ in range(MAX_TRIES):
                x, y = rng.randrange(width), rng.randrange(height)
                if all((x - a) ** 2 + (y - b) ** 2 >= min_squared for a, b in points):
                    break
            points.append((x, y))
        return points[len(existing) :]

    def line_mask(size: tuple[int, int], num_corners: int, rng: random.Random) -> Image.Image:
        """Draw the mask of a line from corner to corner of the image, cropped to a size."""
        path = [(0, 0), *sample_points(num_corners, MIN_CORNER_DISTANCE, [(0, 0)], rng), (width, height)]
        mask = Image.new("L", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING))
        ImageDraw.Draw(mask).line([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in path], 255, line_width)
        return mask.reduce(SUPERSAMPLING)

    def character_mask(character: str, tile: int, rng: random.Random) -> Image.Image:
        """Draw the mask of a rotated tile, larger than the tile, with a character and a line."""
        min_size, max_size = (int(tile * factor) for factor in FONT_SIZE_RANGE)
        font = rng.choice(font_paths)
        size = rng.randrange(min_size, max_size)
        outline = OUTLINE_WIDTH * scale if rng.random() < OUTLINE_PROBABILITY else 0
        mask = ImageChops.screen(
            _glyph_mask(character, font, size, outline, tile), line_mask((tile, tile), TILE_LINE_CORNERS, rng)
        )
        return mask.rotate(
            -rng.randrange(-MAX_TILT_DEGREES, MAX_TILT_DEGREES), Image.Resampling.BICUBIC, expand=True
        )

    def render(text: str, rng: random.Random) -> Image.Image:
        image = Image.new("RGB", (width, height), rng.choice(LIGHT_COLORS))
        glow_color = rng.choice(LIGHT_COLORS)
        image.paste(glow_color, mask=glow)
        image.paste(glow_color, mask=line_mask((width, height), BACKGROUND_LINE_CORNERS, rng))
        step = width // len(text)
        tile = min(step, height)
        for position, character in enumerate(text):
            forms = _CASE_FORMS.get(character.lower(), character)
            form = forms[int(rng.random() * len(forms))]
            color = rng.choice(DARK_COLORS)
            # Rotation enlarges the tile to the right and below; its top left corner is fixed.
            corner = position * step, (height - tile) // 2
            image.paste(color, corner, character_mask(form, tile, rng))
        image = image.filter(_BLUR_KERNEL)
        for x, y in sample_points(NUM_RINGS, MIN_RING_DISTANCE, [], rng):
            radius = rng.randrange(*RING_RADIUS_RANGE) * scale
            ring = _ring_mask(radius, rng.randrange(*RING_WIDTH_RANGE) / 100 * scale)
            image.paste(WHITE, (x - ring.width // 2, y - ring.height // 2), ring)
        return image

    return render


_CASE_FORMS = {each: "".join(form for form in DIGITS + LETTERS if form.lower() == each) for each in CLASSES}


def _glow_mask(width: int, height: int) -> Image.Image:
    """Return the mask of a radial glow, opaque at the center and almost transparent at the sides."""
    rows, columns = np.ogrid[:height, :width]
    distance = np.hypot(rows + 0.5 - height / 2, columns + 0.5 - width / 2) / (width / 2)
    return Image.fromarray(np.rint(255 * np.clip(1 - GLOW_FALLOFF * distance, 0, 1)).astype(np.uint8))


@lru_cache(4096)  # about 900 bytes each
def _glyph_mask(character: str, path: Path, size: int, outline: float, tile: int) -> Image.Image:
    """Draw the mask of a tile with a character, filled if the outline width is 0, else outlined."""
    font = _fit_font(path, size, character, tile)
    mask = Image.new("L", (tile, tile))
    fill = 0 if outline else 255
    position = 0, BASELINE * font.size
    ImageDraw.Draw(mask).text(position, character, fill, font, "ls", stroke_width=outline, stroke_fill=255)
    return mask


def _fit_font(path: Path, size: int, character: str, max_width: int) -> ImageFont.FreeTypeFont:
    """Load a font in this size, or smaller if the character would be wider than `max_width`."""
    font = _load_font(path, size)
    length = font.getlength(character)
    return font if length <= max_width else _load_font(path, int(size * max_width / length))


@cache
def _load_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@cache
def _ring_mask(radius: float, width: float) -> Image.Image:
    """Return the mask of an antialiased ring; radius and width in pixels."""
    half = math.ceil(radius + width / 2 + 0.5)
    rows, columns = np.ogrid[-half:half, -half:half]
    distance = np.hypot(rows + 0.5, columns + 0.5)
    coverage = np.clip(width / 2 + 0.5 - np.abs(distance - radius), 0, 1)
    return Image.fromarray(np.rint(255 * coverage).astype(np.uint8))
