"""One resize, the same bytes wherever it runs; files and pictures of every kind become the same array."""

import random
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFile, ImageFont
from support.image_files import Bytes, bomb, chunk, gif_with_a_margin, interlaced, noise, png, saved

from captcha_exp.data.images import (
    FORMATS,
    WEIGHT_SCALE,
    InvalidImage,
    decode,
    resize,
    resize_weights,
    to_array,
)

# source height, source width, target height, target width
SHAPES = [(60, 160, 24, 56), (50, 120, 24, 56), (37, 91, 16, 17), (24, 56, 48, 100), (16, 16, 16, 33)]
LENGTHS = [(160, 56), (60, 24), (50, 24), (91, 17), (56, 100), (16, 16), (17, 16), (2048, 16)]


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
    assert float(np.float32(255 * WEIGHT_SCALE**2 + WEIGHT_SCALE**2 // 2)) == 255 * 65536 + 32768


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


# -- decoding ------------------------------------------------------------------------------------------------


def coloured(mode: str) -> Image.Image:
    """Noise in one of Pillow's modes; some of it half or wholly transparent where the mode can say so."""
    image = Image.fromarray(noise(6, 10, 3))
    if mode in ("RGBA", "LA"):
        alpha = Image.fromarray(np.resize(np.array([0, 51, 255], np.uint8), (6, 10)))
        image = image.convert(mode)
        image.putalpha(alpha)
    return image.convert(mode)


def on_white(image: Image.Image) -> Bytes:
    """(H, W, 3): each colour c under alpha a is (c a + 255 (255 - a)) / 255, rounded."""
    pixels = np.asarray(image.convert("RGBA")).astype(int)
    alpha = pixels[..., 3:]
    shown: Bytes = ((pixels[..., :3] * alpha + 255 * (255 - alpha)) / 255 + 0.5).astype(np.uint8)
    return shown


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(("BMP", mode) for mode in ("1", "L", "P", "RGB")),
        *(("GIF", mode) for mode in ("1", "L", "P")),
        *(("WEBP", mode) for mode in ("L", "RGB", "RGBA")),
    ],
)
def test_what_was_saved_without_loss_is_read_without_loss(kind: str, mode: str) -> None:
    image = coloured(mode)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    decoded = decode(saved(image, kind, **options))
    assert decoded.format == {"WEBP": "WebP"}.get(kind, kind)
    assert np.abs(to_array(decoded.image, 3).astype(int) - on_white(image)).max() <= (mode in ("LA", "RGBA"))
    transparent = ["is transparent in places; they become white"] if mode in ("LA", "RGBA") else []
    assert list(decoded.remarks) == transparent


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_read_in_every_colour_space(mode: str, progressive: bool) -> None:
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    image = Image.fromarray(np.stack([np.tile(ramp, (32, 1))] * 3, axis=2)).convert(mode)
    decoded = decode(saved(image, "JPEG", quality=95, progressive=progressive))
    assert (decoded.format, decoded.remarks) == ("JPEG", ())
    assert np.abs(to_array(decoded.image, 1)[..., 0].astype(int) - ramp).max() <= 6


def test_a_colour_that_a_gif_leaves_out_becomes_white() -> None:
    image = Image.new("P", (2, 1))
    image.putdata([0, 1])
    image.putpalette([200, 10, 20, 0, 0, 0])
    decoded = decode(saved(image, "GIF", transparency=1))
    assert to_array(decoded.image, 3)[0].tolist() == [[200, 10, 20], [255, 255, 255]]
    assert decoded.remarks == ("is transparent in places; they become white",)


def test_the_upper_half_of_16_bits_is_read() -> None:
    """Pillow would make everything above 255 white."""
    values = np.array([[0, 255, 256, 7 * 256 + 200, 65535]], np.uint16)
    decoded = decode(saved(Image.fromarray(values), "PNG"))
    assert to_array(decoded.image, 1)[0, :, 0].tolist() == [0, 0, 1, 7, 255]
    assert decoded.remarks == ("has 16 bits for each pixel; the upper 8 are read",)
    colours = png(1, 1, 16, 2, [[bytes([200, 9, 10, 9, 20, 9])]])
    assert to_array(decode(colours).image, 3).tolist() == [[[200, 10, 20]]]


def test_a_transparent_value_of_16_bits_is_white_and_its_neighbour_is_not() -> None:
    values = png(2, 1, 16, 0, [[bytes([7, 200, 7, 201])]], chunk(b"tRNS", bytes([7, 200])))
    decoded = decode(values)
    assert to_array(decoded.image, 1)[0, :, 0].tolist() == [255, 7]
    assert len(decoded.remarks) == 2


def test_an_interlaced_png_is_read_like_any_other() -> None:
    pixels = noise(11, 13)
    assert (to_array(decode(interlaced(pixels)).image, 1)[..., 0] == pixels).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_read(kind: str) -> None:
    frames = [Image.new("RGB", (9, 5), colour) for colour in ((200, 10, 20), (0, 0, 0), (9, 9, 9))]
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode(saved(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert (to_array(decoded.image, 3) == (200, 10, 20)).all()
    assert decoded.remarks == ("has 3 frames; the first is read",)


def test_around_a_frame_that_is_smaller_than_its_gif_the_page_is_seen() -> None:
    """Pillow would fill it with the first colour, as a rule that of the ink."""
    inner = np.array([[1, 2, 3], [0, 1, 2]], np.uint8)
    decoded = decode(gif_with_a_margin(inner, left=2, top=1, width=6, height=4))
    expected = np.full((4, 6, 3), 255)
    expected[1:3, 2:5] = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]])[inner]
    assert to_array(decoded.image, 3).tolist() == expected.tolist()
    assert decoded.remarks == ("is transparent in places; they become white",)


TURNS: dict[int, Callable[[Bytes], Bytes]] = {  # EXIF 2.3, tag 274: where row 0 and column 0 lie
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: a.T[:, ::-1],
    7: lambda a: a.T[::-1, ::-1],
    8: lambda a: a.T[::-1],
}


@pytest.mark.parametrize("orientation", TURNS)
def test_a_picture_is_read_as_every_viewer_turns_it(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    pixels = noise(5, 9)
    decoded = decode(saved(Image.fromarray(pixels), "PNG", exif=exif))
    assert to_array(decoded.image, 1)[..., 0].tolist() == TURNS[orientation](pixels).tolist()
    assert decoded.remarks == (("is turned as its EXIF data say",) if orientation > 1 else ())


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\x08\0\0\0\xff\xff cut", b"Exif\0\0nothing", b"\0"])
def test_damaged_exif_data_do_no_harm_to_the_picture(exif: bytes) -> None:
    decoded = decode(saved(Image.fromarray(noise(8, 8)), "JPEG", exif=exif))
    assert (decoded.format, decoded.remarks) == ("JPEG", ())


def test_a_jpeg_with_a_second_picture_is_a_jpeg() -> None:
    first, second = (Image.fromarray(noise(8, 8, seed=seed)) for seed in (0, 1))
    decoded = decode(saved(first, "MPO", save_all=True, append_images=[second]))
    assert (decoded.format, decoded.remarks) == ("JPEG", ("has 2 frames; the first is read",))


PAGE = Image.fromarray(noise(6, 10, 3))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"R865\n", r"is no picture of a known kind \(PNG, JPEG, GIF, BMP, WebP\), .+"),
        (b"<html><body>403 Forbidden</body></html>", r"is no picture of a known kind .+"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", r"is no picture of a known kind .+"),
        (saved(PAGE, "TIFF"), r"is no picture of a known kind .+"),
        (saved(PAGE, "ICO"), r"is no picture of a known kind .+"),
        (saved(PAGE, "PNG")[:8], r"is no picture of a known kind .+, or only the beginning of one"),
        (saved(PAGE, "PNG")[:60], r"is damaged or cut short: .+"),
        (saved(PAGE, "PNG")[:-12], r"is cut short: a PNG without its end"),
        (saved(PAGE, "JPEG")[:-40], r"is damaged or cut short: .+"),
    ],
)
def test_what_is_no_whole_picture_is_refused_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(InvalidImage) as error:
        decode(content)
    assert re.fullmatch(reason, str(error.value))


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (2001, 2000, "is 2001x2000 pixels; at most 4,000,000 in all are read"),
        (14_000, 10_000, "has over 89,478,485 pixels; at most 4,000,000 are read"),
        (60_000, 60_000, "has over 89,478,485 pixels; at most 4,000,000 are read"),
    ],
)
def test_no_room_is_made_for_a_picture_that_is_too_large(
    monkeypatch: pytest.MonkeyPatch, width: int, height: int, reason: str
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", lambda _: pytest.fail("room was made"))
    with pytest.raises(InvalidImage) as error:
        decode(bomb(width, height))
    assert str(error.value) == reason


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_cut_anywhere_is_refused(kind: str) -> None:
    """But for the last bytes, which hold no pixels: a checksum, the mark that the file ends."""
    content = saved(PAGE, kind)
    for length in range(len(content) - 4):
        with pytest.raises(InvalidImage):
            decode(content[:length])


@pytest.mark.parametrize("kind", FORMATS)
def test_whatever_bytes_are_there_a_picture_comes_out_or_a_reason(kind: str) -> None:
    """The same reason each time: it goes into the cache, where an address in memory would be another."""
    chance = random.Random(0)
    whole = saved(PAGE, kind)
    for _ in range(250):
        content = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        reason = "none"
        try:
            assert to_array(decode(bytes(content)).image, 3).size
        except InvalidImage as error:
            reason = str(error)
        assert reason.isprintable()
        assert " at 0x" not in reason
