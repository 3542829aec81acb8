"""One resize, the same bytes wherever it runs; pictures of every mode become the same kind of array."""

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from captcha_exp.pixels import UNIT, resize, resize_weights, to_array

Bytes = npt.NDArray[np.uint8]

# source height, source width, target height, target width
SHAPES = [(60, 160, 24, 56), (50, 120, 24, 56), (37, 91, 16, 17), (24, 56, 48, 100), (16, 16, 16, 33)]
LENGTHS = [(160, 56), (60, 24), (50, 24), (91, 17), (56, 100), (16, 16), (17, 16), (2048, 16)]


def noise(*shape: int) -> Bytes:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def written(width: int, height: int) -> Bytes:
    """(1, H, W, 3) uint8: text on a page, as captchas are."""
    image = Image.new("RGB", (width, height), (250, 240, 230))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(height * 0.7)
    draw.text((4, 2), "a8Kq", font=font, fill=(10, 60, 120))
    draw.line((0, height, width, 0), fill=(90, 20, 20), width=2)
    return np.asarray(image)[None]


def triangle(source: int, target: int) -> list[list[int]]:
    """The triangle filter in exact fractions, in 1/256, by largest remainders."""
    scale = Fraction(source, target)
    support = max(scale, Fraction(1))
    rows = []
    for row in range(target):
        centre = (row + Fraction(1, 2)) * scale
        shares = [max(Fraction(0), 1 - abs(x + Fraction(1, 2) - centre) / support) for x in range(source)]
        exact = [share / sum(shares) * 256 for share in shares]
        whole = [int(share) for share in exact]
        for x in sorted(range(source), key=lambda x: (whole[x] - exact[x], x))[: 256 - sum(whole)]:
            whole[x] += 1
        rows.append(whole)
    return rows


@pytest.mark.parametrize(("source", "target"), LENGTHS)
def test_every_row_of_weights_is_whole_and_sums_to_256(source: int, target: int) -> None:
    weights = resize_weights(source, target)
    assert weights.shape == (target, source)
    assert (weights == np.round(weights)).all()
    assert (weights >= 0).all()
    assert (weights.sum(axis=1) == 256).all()


@pytest.mark.parametrize(("source", "target"), LENGTHS[:-1])
def test_the_weights_are_the_triangle_filter(source: int, target: int) -> None:
    assert resize_weights(source, target).tolist() == triangle(source, target)


@pytest.mark.parametrize("channels", [1, 3])
def test_resize_is_a_loop_over_whole_numbers(channels: int) -> None:
    pictures = noise(2, 11, 13, channels)
    rows, columns = triangle(11, 5), triangle(13, 7)
    resized = resize(pictures, 5, 7)
    assert resized.shape == (2, 5, 7, channels)
    assert resized.dtype == np.uint8
    for n, y, x, c in np.ndindex(2, 5, 7, channels):
        total = sum(
            rows[y][i] * columns[x][j] * int(pictures[n, i, j, c]) for i in range(11) for j in range(13)
        )
        assert resized[n, y, x, c] == (total + 2**15) // 2**16


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_gives_the_same_bytes_in_another_order(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """Widths first, colours first in memory, and through torch's own kernels."""
    source_height, source_width, height, width = shape
    pictures = noise(3, source_height, source_width, 3)
    rows = torch.tensor(resize_weights(source_height, height)).to(dtype)
    columns = torch.tensor(resize_weights(source_width, width)).to(dtype)
    wide = torch.from_numpy(pictures).movedim(-1, 1).to(dtype) @ columns.T
    tall = torch.einsum("nchw,th->nctw", wide, rows)
    expected = torch.floor((tall + 2**15) / 2**16).to(torch.uint8).movedim(1, -1)
    assert resize(pictures, height, width).tobytes() == expected.contiguous().numpy().tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["noise", "written"])
def test_resize_is_within_one_of_pillows_bilinear(shape: tuple[int, int, int, int], kind: str) -> None:
    source_height, source_width, height, width = shape
    pictures = (
        noise(1, source_height, source_width, 3) if kind == "noise" else written(source_width, source_height)
    )
    theirs = np.asarray(Image.fromarray(pictures[0]).resize((width, height), Image.Resampling.BILINEAR))
    ours = resize(pictures, height, width)[0]
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [0, 1, 77, 254, 255])
def test_a_constant_picture_stays_constant(shape: tuple[int, int, int, int], value: int) -> None:
    source_height, source_width, height, width = shape
    pictures = np.full((1, source_height, source_width, 3), value, np.uint8)
    assert (resize(pictures, height, width) == value).all()


def test_the_same_size_changes_nothing() -> None:
    pictures = noise(2, 24, 56, 3)
    assert resize(pictures, 24, 56).tobytes() == pictures.tobytes()


def test_one_side_alone_can_change() -> None:
    pictures = noise(2, 24, 56, 3)
    assert resize(pictures, 24, 28).shape == (2, 24, 28, 3)
    assert resize(pictures, 12, 56).shape == (2, 12, 56, 3)


def test_enlarging_keeps_what_was_there() -> None:
    """Three times as large, each middle pixel lies on an old one: the triangle has nothing to mix in."""
    pictures = noise(1, 16, 20, 3)
    assert (resize(pictures, 48, 60)[:, 1::3, 1::3] == pictures).all()


def test_a_picture_does_not_depend_on_its_neighbours() -> None:
    pictures = noise(7, 60, 160, 3)
    together = resize(pictures, 24, 56)
    for n in range(len(pictures)):
        assert (resize(pictures[n : n + 1], 24, 56)[0] == together[n]).all()


def test_the_largest_sum_is_exact_in_float32() -> None:
    assert float(np.float32(255 * UNIT**2 + UNIT**2 // 2)) == 255 * 65536 + 32768


def grey(red: int, green: int, blue: int) -> int:
    """ITU-R 601, as Pillow rounds it."""
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def two(mode: str, left: Any, right: Any) -> Image.Image:
    """A picture of two pixels."""
    image = Image.new(mode, (2, 1))
    image.putpixel((0, 0), left)
    image.putpixel((1, 0), right)
    return image


def palette(transparent: int | bytes | None) -> Image.Image:
    image = two("P", 0, 1)
    image.putpalette([200, 10, 20, 0, 0, 0])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (200, 10, 20)

MODES = {
    "1": (two("1", 255, 0), WHITE, BLACK),
    "L": (two("L", 7, 250), (7, 7, 7), (250, 250, 250)),
    "LA": (two("LA", (7, 255), (7, 0)), (7, 7, 7), WHITE),
    "P": (palette(None), RED, BLACK),
    "P, a transparent entry": (palette(1), RED, WHITE),
    "P, transparency of each entry": (palette(bytes([0, 255])), WHITE, BLACK),
    "RGB": (two("RGB", RED, BLACK), RED, BLACK),
    "RGBA": (two("RGBA", (*RED, 255), (0, 0, 0, 0)), RED, WHITE),
    "RGBA, half": (two("RGBA", (0, 0, 0, 51), (*RED, 255)), (204, 204, 204), RED),
}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_what_a_white_page_shows(name: str, channels: int) -> None:
    image, left, right = MODES[name]
    array = to_array(image, channels)
    assert array.shape == (1, 2, channels)
    assert array.dtype == np.uint8
    expected = [left, right] if channels == 3 else [(grey(*left),), (grey(*right),)]
    assert array[0].tolist() == [list(pixel) for pixel in expected]


def test_the_axes_are_height_width_colour() -> None:
    image = Image.new("RGB", (5, 3))
    image.putpixel((4, 1), (1, 2, 3))
    array = to_array(image, 3)
    assert array.shape == (3, 5, 3)
    assert array[1, 4].tolist() == [1, 2, 3]


def test_the_picture_itself_is_left_as_it_was() -> None:
    image = palette(1)
    to_array(image, 3)
    assert image.mode == "P"
    assert image.info == {"transparency": 1}
