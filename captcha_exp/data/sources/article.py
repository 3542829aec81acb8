"""Pictures of the article's kind: coloured, tilted characters under white rings on a light ground.

From the ground up: one light colour with a glow of another, and a line in the colour of the glow; the
characters, each on a square tile of its own, with its own font, size, colour, tilt and line; a slight
blur; rings. Lengths are those in a picture of 120 x 50 pixels and grow and shrink with it. Tiles are as
large as the characters, side by side, leave room for.

The stream is asked for the same chances whatever the text says: another text of the same length changes
the shapes of the characters and nothing else.

Source: the recipe of Hei.Captcha (MIT licence), its numbers and colours; written anew. Its four fonts
are not free, and one is outlined: here, a share of the characters of any font is. It lets the tile cut
off what is wider; free fonts are wider than its own and would lose too much, so their wide characters
are drawn smaller.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

Point = tuple[int, int]

DIGITS = "23456789"
# As drawn: a j is always a capital, so it is half as frequent as the other letters.
LETTERS = "abcdefghkmnpqrstuvwxyzABCDEFGHJKMNPQRSTUVWXYZ"
CLASSES = DIGITS + "".join(sorted(set(LETTERS.lower())))
DIGIT_PROBABILITY = 0.5  # of the places of a label, whatever the number of letters

VERSION = 1  # raised when the same stream would draw other bytes

REFERENCE_WIDTH, REFERENCE_HEIGHT = 120, 50  # pixels: the picture in which the lengths below are pixels

LIGHT_COLORS = ("#FFFACD", "#FDF5E6", "#F0FFFF", "#BBFFFF", "#FAFAD2", "#FFE4E1", "#DCDCDC", "#F0E68C")
DARK_COLORS = (
    *("#00E5EE", "#000000", "#2F4F4F", "#000000", "#43CD80"),  # black twice: it is twice as frequent
    *("#191970", "#006400", "#458B00", "#8B7765", "#CD5B45"),
)
WHITE = "#FFFFFF"
GLOW_FALLOFF = 0.95  # of the glow, from the middle of the picture to its left and right edges

BACKGROUND_LINE_CORNERS, TILE_LINE_CORNERS = 8, 6  # corners of a line, beside its two ends
LINE_WIDTH = 1  # pixels
MIN_CORNER_DISTANCE = 9  # pixels at least between two corners
MAX_TRIES = 11  # for a point with its gap; the last one is taken as it is

FONT_SIZE_RANGE = 0.9, 1.37  # in tiles, least and first not drawn
BASELINE = 0.76  # ems below the upper edge of the tile
MAX_TILT_DEGREES = 45  # degrees at most, to either side
OUTLINE_PROBABILITY = 0.25  # share of the characters
OUTLINE_WIDTH = 1  # pixels

BLUR_SIGMA = 0.4  # pixels, standard deviation; it is there to soften edges of any size, so it does not grow
NUM_RINGS = 15
RING_RADIUS_RANGE = 2, 8  # pixels, least and first not drawn
RING_WIDTH_RANGE = 94, 145  # hundredths of a pixel, least and first not drawn
MIN_RING_DISTANCE = 10  # pixels at least between two centres

SUPERSAMPLING = 4  # lines are drawn so many times larger: Pillow does not smooth them

# Pillow's own GaussianBlur is wider than the Gaussian, and takes twice the time.
_edge_weight = math.exp(-1 / (2 * BLUR_SIGMA**2))
_BLUR_KERNEL = ImageFilter.Kernel(
    (3, 3), np.outer((_edge_weight, 1, _edge_weight), (_edge_weight, 1, _edge_weight)).ravel().tolist()
)


def sample_label(alphabet: str, length: int, rng: random.Random) -> str:
    """A text by the law of the recipe, of those of its characters that the alphabet has in either case.

    They come out as the alphabet writes them; of a letter that it has in both cases, the later one.

    Raises:
        ValueError: the alphabet has none of them.
    """
    pools = _character_pools(alphabet)
    if not any(pools):
        raise ValueError(f"none of {CLASSES} is in the alphabet {alphabet!r}")
    digits, letters = pools
    text = ""
    for _ in range(length):
        digit = not letters or (bool(digits) and rng.random() < DIGIT_PROBABILITY)
        text += rng.choice(digits if digit else letters)
    return text


@cache
def _character_pools(alphabet: str) -> tuple[str, str]:
    """The digits and the letters to choose from, a letter as often as it is in LETTERS."""
    written = {character.lower(): character for character in alphabet}
    digits, letters = (
        "".join(written[character] for character in pool.lower() if character in written)
        for pool in (DIGITS, LETTERS)
    )
    return digits, letters


def make_renderer(
    width: int, height: int, font_paths: Sequence[Path]
) -> Callable[[str, random.Random], Image.Image]:
    """A function (text, random stream) -> RGB picture; a letter's case is drawn by chance, not read."""
    unit = min(width / REFERENCE_WIDTH, height / REFERENCE_HEIGHT)
    line_width = max(1, round(LINE_WIDTH * unit * SUPERSAMPLING))
    glow = _glow_mask(width, height)

    def points(count: int, gap: float, taken: Sequence[Point], stream: random.Random) -> list[Point]:
        """Points anywhere in the picture, none too near to another or to those that are taken."""
        found = list(taken)
        nearest = (gap * unit) ** 2
        for _ in range(count):
            for _ in range(MAX_TRIES):
                x, y = stream.randrange(width), stream.randrange(height)
                if all((x - a) ** 2 + (y - b) ** 2 >= nearest for a, b in found):
                    break
            found.append((x, y))
        return found[len(taken) :]

    def line(size: tuple[int, int], bends: int, stream: random.Random) -> Image.Image:
        """Mask of a line from corner to corner of the picture, as much as is seen at this size."""
        path = [(0, 0), *points(bends, MIN_CORNER_DISTANCE, [(0, 0)], stream), (width, height)]
        mask = Image.new("L", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING))
        ImageDraw.Draw(mask).line([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in path], 255, line_width)
        return mask.reduce(SUPERSAMPLING)

    def character(drawn: str, tile: int, stream: random.Random) -> Image.Image:
        """Mask of a tilted tile, larger than the tile, with a character and a line."""
        least, most = (int(tile * share) for share in FONT_SIZE_RANGE)
        font = stream.choice(font_paths)
        size = stream.randrange(least, most)
        outline = OUTLINE_WIDTH * unit if stream.random() < OUTLINE_PROBABILITY else 0
        mask = ImageChops.screen(
            _glyph_mask(drawn, font, size, outline, tile), line((tile, tile), TILE_LINE_CORNERS, stream)
        )
        return mask.rotate(
            -stream.randrange(-MAX_TILT_DEGREES, MAX_TILT_DEGREES), Image.Resampling.BICUBIC, expand=True
        )

    def draw_one(text: str, stream: random.Random) -> Image.Image:
        picture = Image.new("RGB", (width, height), stream.choice(LIGHT_COLORS))
        glowing = stream.choice(LIGHT_COLORS)
        picture.paste(glowing, mask=glow)
        picture.paste(glowing, mask=line((width, height), BACKGROUND_LINE_CORNERS, stream))
        step = width // len(text)
        tile = min(step, height)
        for place, written in enumerate(text):
            forms = _CASE_FORMS.get(written.lower(), written)
            drawn = forms[int(stream.random() * len(forms))]
            colour = stream.choice(DARK_COLORS)
            # Tilting a tile enlarges it, yet its corner stays: it reaches to the right and below.
            corner = place * step, (height - tile) // 2
            picture.paste(colour, corner, character(drawn, tile, stream))
        picture = picture.filter(_BLUR_KERNEL)
        for x, y in points(NUM_RINGS, MIN_RING_DISTANCE, [], stream):
            radius = stream.randrange(*RING_RADIUS_RANGE) * unit
            ring = _ring_mask(radius, stream.randrange(*RING_WIDTH_RANGE) / 100 * unit)
            picture.paste(WHITE, (x - ring.width // 2, y - ring.height // 2), ring)
        return picture

    return draw_one


_CASE_FORMS = {each: "".join(form for form in DIGITS + LETTERS if form.lower() == each) for each in CLASSES}


def _glow_mask(width: int, height: int) -> Image.Image:
    """Mask of a glow, full in the middle of the picture and next to nothing at its sides."""
    rows, columns = np.ogrid[:height, :width]
    distance = np.hypot(rows + 0.5 - height / 2, columns + 0.5 - width / 2) / (width / 2)
    return Image.fromarray(np.rint(255 * np.clip(1 - GLOW_FALLOFF * distance, 0, 1)).astype(np.uint8))


@lru_cache(4096)  # tiles of 900 bytes, and most come out again; a larger cache draws little faster
def _glyph_mask(character: str, path: Path, size: int, outline: float, tile: int) -> Image.Image:
    """Mask of a tile with a character, filled, or of its outline if that has a width."""
    font = _fit_font(path, size, character, tile)
    mask = Image.new("L", (tile, tile))
    fill = 0 if outline else 255
    place = 0, BASELINE * font.size
    ImageDraw.Draw(mask).text(place, character, fill, font, "ls", stroke_width=outline, stroke_fill=255)
    return mask


def _fit_font(path: Path, size: int, character: str, max_width: int) -> ImageFont.FreeTypeFont:
    """The font in this size, or in the largest in which the character is no wider than this."""
    font = _load_font(path, size)
    length = font.getlength(character)
    return font if length <= max_width else _load_font(path, int(size * max_width / length))


@cache
def _load_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@cache
def _ring_mask(radius: float, width: float) -> Image.Image:
    """Mask of a smooth ring about its middle, all in pixels."""
    half = math.ceil(radius + width / 2 + 0.5)
    rows, columns = np.ogrid[-half:half, -half:half]
    distance = np.hypot(rows + 0.5, columns + 0.5)
    cover = np.clip(width / 2 + 0.5 - np.abs(distance - radius), 0, 1)
    return Image.fromarray(np.rint(255 * cover).astype(np.uint8))
