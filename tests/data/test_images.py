"""Test that the resize gives the same bytes everywhere, and that images are decoded or rejected."""

import io
import random
import re
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFile, ImageFont, ImageOps
from scipy import ndimage
from support.image_files import Bytes, bomb, chunk, gif_with_a_margin, interlaced, noise, png, saved

from captcha_exp.data.filters import box_mean
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


def render_text(width: int, height: int) -> Bytes:
    """Return (1, H, W, 3) uint8: text with a line, like a captcha."""
    image = Image.new("RGB", (width, height), (250, 240, 230))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(height * 0.7)
    draw.text((4, 2), "a8Kq", font=font, fill=(10, 60, 120))
    draw.line((0, height, width, 0), fill=(90, 20, 20), width=2)
    return np.asarray(image)[None]


def triangle(source: int, target: int) -> list[list[int]]:
    """Return the weights of the triangle filter in 1/256, computed with fractions and largest remainders."""
    scale = Fraction(source, target)
    support = max(scale, Fraction(1))
    rows = []
    for row in range(target):
        center = (row + Fraction(1, 2)) * scale
        triangle_weights = [
            max(Fraction(0), 1 - abs(x + Fraction(1, 2) - center) / support) for x in range(source)
        ]
        exact = [weight / sum(triangle_weights) * 256 for weight in triangle_weights]
        rounded = [int(weight) for weight in exact]
        for x in sorted(range(source), key=lambda x: (rounded[x] - exact[x], x))[: 256 - sum(rounded)]:
            rounded[x] += 1
        rows.append(rounded)
    return rows


@pytest.mark.parametrize(("source", "target"), LENGTHS)
def test_weights_are_integers_and_sum_to_256(source: int, target: int) -> None:
    weights = resize_weights(source, target)
    assert weights.shape == (target, source)
    assert (weights == np.round(weights)).all()
    assert (weights >= 0).all()
    assert (weights.sum(axis=1) == 256).all()


@pytest.mark.parametrize(("source", "target"), LENGTHS[:-1])
def test_weights_are_the_triangle_filter(source: int, target: int) -> None:
    assert resize_weights(source, target).tolist() == triangle(source, target)


@pytest.mark.parametrize("channels", [1, 3])
def test_resize_matches_an_integer_loop(channels: int) -> None:
    images = noise(2, 11, 13, channels)
    rows, columns = triangle(11, 5), triangle(13, 7)
    resized = resize(images, 5, 7)
    assert resized.shape == (2, 5, 7, channels)
    assert resized.dtype == np.uint8
    for n, y, x, c in np.ndindex(2, 5, 7, channels):
        total = sum(
            rows[y][i] * columns[x][j] * int(images[n, i, j, c]) for i in range(11) for j in range(13)
        )
        assert resized[n, y, x, c] == (total + 2**15) // 2**16


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_gives_the_same_bytes_in_another_order(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """Resize width first, with channels first in memory."""
    source_height, source_width, height, width = shape
    images = noise(3, source_height, source_width, 3)
    rows = torch.tensor(resize_weights(source_height, height)).to(dtype)
    columns = torch.tensor(resize_weights(source_width, width)).to(dtype)
    wide = torch.from_numpy(images).movedim(-1, 1).to(dtype) @ columns.T
    tall = torch.einsum("nchw,th->nctw", wide, rows)
    expected = torch.floor((tall + 2**15) / 2**16).to(torch.uint8).movedim(1, -1)
    assert resize(images, height, width).tobytes() == expected.contiguous().numpy().tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["noise", "text"])
def test_resize_is_within_one_of_pillows_bilinear(shape: tuple[int, int, int, int], kind: str) -> None:
    source_height, source_width, height, width = shape
    images = (
        noise(1, source_height, source_width, 3)
        if kind == "noise"
        else render_text(source_width, source_height)
    )
    theirs = np.asarray(Image.fromarray(images[0]).resize((width, height), Image.Resampling.BILINEAR))
    ours = resize(images, height, width)[0]
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [0, 1, 77, 254, 255])
def test_a_constant_image_stays_constant(shape: tuple[int, int, int, int], value: int) -> None:
    source_height, source_width, height, width = shape
    images = np.full((1, source_height, source_width, 3), value, np.uint8)
    assert (resize(images, height, width) == value).all()


def test_resize_to_the_same_size_changes_nothing() -> None:
    images = noise(2, 24, 56, 3)
    assert resize(images, 24, 56).tobytes() == images.tobytes()


def test_height_and_width_can_be_resized_alone() -> None:
    images = noise(2, 24, 56, 3)
    assert resize(images, 24, 28).shape == (2, 24, 28, 3)
    assert resize(images, 12, 56).shape == (2, 12, 56, 3)


def test_upscaling_keeps_original_pixels() -> None:
    """At 3x, the center of every third pixel coincides with an original pixel."""
    images = noise(1, 16, 20, 3)
    assert (resize(images, 48, 60)[:, 1::3, 1::3] == images).all()


def test_images_of_a_batch_are_resized_independently() -> None:
    images = noise(7, 60, 160, 3)
    together = resize(images, 24, 56)
    for n in range(len(images)):
        assert (resize(images[n : n + 1], 24, 56)[0] == together[n]).all()


def test_the_largest_sum_is_exact_in_float32() -> None:
    assert float(np.float32(255 * WEIGHT_SCALE**2 + WEIGHT_SCALE**2 // 2)) == 255 * 65536 + 32768


def to_gray(red: int, green: int, blue: int) -> int:
    """Return the luma of ITU-R 601, rounded like Pillow."""
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def two_pixels(mode: str, left: Any, right: Any) -> Image.Image:
    """Return an image of two pixels."""
    image = Image.new(mode, (2, 1))
    image.putpixel((0, 0), left)
    image.putpixel((1, 0), right)
    return image


def palette(transparent: int | bytes | None) -> Image.Image:
    image = two_pixels("P", 0, 1)
    image.putpalette([200, 10, 20, 0, 0, 0])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (200, 10, 20)

MODES = {
    "1": (two_pixels("1", 255, 0), WHITE, BLACK),
    "L": (two_pixels("L", 7, 250), (7, 7, 7), (250, 250, 250)),
    "LA": (two_pixels("LA", (7, 255), (7, 0)), (7, 7, 7), WHITE),
    "P": (palette(None), RED, BLACK),
    "P, a transparent entry": (palette(1), RED, WHITE),
    "P, transparency of each entry": (palette(bytes([0, 255])), WHITE, BLACK),
    "RGB": (two_pixels("RGB", RED, BLACK), RED, BLACK),
    "RGBA": (two_pixels("RGBA", (*RED, 255), (0, 0, 0, 0)), RED, WHITE),
    "RGBA, half": (two_pixels("RGBA", (0, 0, 0, 51), (*RED, 255)), (204, 204, 204), RED),
}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_is_converted_on_a_white_background(name: str, channels: int) -> None:
    image, left, right = MODES[name]
    array = to_array(image, channels)
    assert array.shape == (1, 2, channels)
    assert array.dtype == np.uint8
    expected = [left, right] if channels == 3 else [(to_gray(*left),), (to_gray(*right),)]
    assert array[0].tolist() == [list(pixel) for pixel in expected]


def test_the_axes_are_height_width_channels() -> None:
    image = Image.new("RGB", (5, 3))
    image.putpixel((4, 1), (1, 2, 3))
    array = to_array(image, 3)
    assert array.shape == (3, 5, 3)
    assert array[1, 4].tolist() == [1, 2, 3]


def test_to_array_does_not_modify_the_image() -> None:
    image = palette(1)
    to_array(image, 3)
    assert image.mode == "P"
    assert image.info == {"transparency": 1}


# -- decoding ------------------------------------------------------------------------------------------------


def noise_image(mode: str) -> Image.Image:
    """Return noise in one of Pillow's modes, partly transparent if the mode has alpha."""
    image = Image.fromarray(noise(6, 10, 3))
    if mode in ("RGBA", "LA"):
        alpha = Image.fromarray(np.resize(np.array([0, 51, 255], np.uint8), (6, 10)))
        image = image.convert(mode)
        image.putalpha(alpha)
    return image.convert(mode)


def on_white(image: Image.Image) -> Bytes:
    """Return (H, W, 3): color c with alpha a becomes (c a + 255 (255 - a)) / 255, rounded."""
    pixels = np.asarray(image.convert("RGBA")).astype(int)
    alpha = pixels[..., 3:]
    blended: Bytes = ((pixels[..., :3] * alpha + 255 * (255 - alpha)) / 255 + 0.5).astype(np.uint8)
    return blended


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(("BMP", mode) for mode in ("1", "L", "P", "RGB")),
        *(("GIF", mode) for mode in ("1", "L", "P")),
        *(("WEBP", mode) for mode in ("L", "RGB", "RGBA")),
    ],
)
def test_lossless_formats_are_decoded_without_loss(kind: str, mode: str) -> None:
    image = noise_image(mode)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    decoded = decode(saved(image, kind, **options))
    assert np.abs(to_array(decoded.image, 3).astype(int) - on_white(image)).max() <= (mode in ("LA", "RGBA"))
    transparent = ["has transparent pixels, which become white"] if mode in ("LA", "RGBA") else []
    assert list(decoded.remarks) == transparent


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_decoded_in_every_color_space(mode: str, progressive: bool) -> None:
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    image = Image.fromarray(np.stack([np.tile(ramp, (32, 1))] * 3, axis=2)).convert(mode)
    decoded = decode(saved(image, "JPEG", quality=95, progressive=progressive))
    assert decoded.remarks == ()
    assert np.abs(to_array(decoded.image, 1)[..., 0].astype(int) - ramp).max() <= 6


def test_the_transparent_color_of_a_gif_becomes_white() -> None:
    image = Image.new("P", (2, 1))
    image.putdata([0, 1])
    image.putpalette([200, 10, 20, 0, 0, 0])
    decoded = decode(saved(image, "GIF", transparency=1))
    assert to_array(decoded.image, 3)[0].tolist() == [[200, 10, 20], [255, 255, 255]]
    assert decoded.remarks == ("has transparent pixels, which become white",)


def test_the_upper_8_of_16_bits_are_used() -> None:
    """Pillow would clip values above 255."""
    values = np.array([[0, 255, 256, 7 * 256 + 200, 65535]], np.uint16)
    decoded = decode(saved(Image.fromarray(values), "PNG"))
    assert to_array(decoded.image, 1)[0, :, 0].tolist() == [0, 0, 1, 7, 255]
    assert decoded.remarks == ("has 16 bits per pixel; only the upper 8 are used",)
    rgb = png(1, 1, 16, 2, [[bytes([200, 9, 10, 9, 20, 9])]])
    assert to_array(decode(rgb).image, 3).tolist() == [[[200, 10, 20]]]


def test_only_the_exact_transparent_value_of_16_bits_is_white() -> None:
    values = png(2, 1, 16, 0, [[bytes([7, 200, 7, 201])]], chunk(b"tRNS", bytes([7, 200])))
    decoded = decode(values)
    assert to_array(decoded.image, 1)[0, :, 0].tolist() == [255, 7]
    assert len(decoded.remarks) == 2


def test_an_interlaced_png_is_decoded() -> None:
    pixels = noise(11, 13)
    assert (to_array(decode(interlaced(pixels)).image, 1)[..., 0] == pixels).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_used(kind: str) -> None:
    frames = [Image.new("RGB", (9, 5), color) for color in ((200, 10, 20), (0, 0, 0), (9, 9, 9))]
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode(saved(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert (to_array(decoded.image, 3) == (200, 10, 20)).all()
    assert decoded.remarks == ("has 3 frames; only the first is used",)


def test_the_canvas_around_a_gif_frame_becomes_white() -> None:
    """Pillow would fill it with color 0, which is often the color of the text."""
    inner = np.array([[1, 2, 3], [0, 1, 2]], np.uint8)
    decoded = decode(gif_with_a_margin(inner, left=2, top=1, width=6, height=4))
    expected = np.full((4, 6, 3), 255)
    expected[1:3, 2:5] = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]])[inner]
    assert to_array(decoded.image, 3).tolist() == expected.tolist()
    assert decoded.remarks == ("has transparent pixels, which become white",)


ORIENTATIONS: dict[int, Callable[[Bytes], Bytes]] = {  # EXIF 2.3, tag 274: position of row 0 and column 0
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: a.T[:, ::-1],
    7: lambda a: a.T[::-1, ::-1],
    8: lambda a: a.T[::-1],
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    pixels = noise(5, 9)
    decoded = decode(saved(Image.fromarray(pixels), "PNG", exif=exif))
    assert to_array(decoded.image, 1)[..., 0].tolist() == ORIENTATIONS[orientation](pixels).tolist()
    assert decoded.remarks == (
        ("is transposed according to its EXIF orientation",) if orientation > 1 else ()
    )


def test_the_exif_orientation_is_applied_if_other_tags_are_damaged() -> None:
    """PIL.ImageOps.exif_transpose raises here: it rewrites all tags, and XResolution is not a number."""
    exif = Image.Exif()
    exif[274], exif[282] = 3, 72.0
    content = exif.tobytes().replace(struct.pack(">HH", 282, 5), struct.pack(">HH", 282, 2))
    with pytest.raises(TypeError):
        ImageOps.exif_transpose(Image.open(io.BytesIO(saved(Image.new("L", (9, 5)), "PNG", exif=content))))
    pixels = noise(5, 9)
    file = saved(Image.fromarray(pixels), "PNG", exif=content)
    assert to_array(decode(file).image, 1)[..., 0].tolist() == pixels[::-1, ::-1].tolist()


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\x08\0\0\0\xff\xff cut", b"Exif\0\0nothing", b"\0"])
def test_damaged_exif_data_are_ignored(exif: bytes) -> None:
    decoded = decode(saved(Image.fromarray(noise(8, 8)), "JPEG", exif=exif))
    assert decoded.remarks == ()


def test_the_first_image_of_a_jpeg_with_several_is_used() -> None:
    first, second = (Image.fromarray(noise(8, 8, seed=seed)) for seed in (0, 1))
    decoded = decode(saved(first, "MPO", save_all=True, append_images=[second]))
    assert decoded.remarks == ("has 2 frames; only the first is used",)


PAGE = Image.fromarray(noise(6, 10, 3))
FEWER_ROWS = r"is damaged: a PNG with fewer rows of pixels than its header says"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"R865\n", r"is not an image in a supported format \(PNG, JPEG, GIF, BMP, WEBP\), .+"),
        (b"<html><body>403 Forbidden</body></html>", r"is not an image in a supported format .+"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", r"is not an image in a supported format .+"),
        (saved(PAGE, "TIFF"), r"is not an image in a supported format .+"),
        (saved(PAGE, "ICO"), r"is not an image in a supported format .+"),
        (saved(PAGE, "PNG")[:8], r"is not an image in a supported format .+, or is truncated"),
        (saved(PAGE, "PNG")[:60], r"is damaged or truncated: .+"),
        (saved(PAGE, "PNG")[:-12], r"is truncated: a PNG without its IEND chunk"),
        (png(8, 4, 8, 0, [[bytes(8)] * 3]), FEWER_ROWS),
        (png(8, 4, 8, 0, [[b"w" * 8] * 3]), FEWER_ROWS),
        (interlaced(noise(11, 13), num_passes=6), FEWER_ROWS),  # with all pixels of the last row
        (saved(PAGE, "JPEG")[:-40], r"is damaged or truncated: .+"),
    ],
)
def test_invalid_files_are_rejected_with_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(InvalidImage) as error:
        decode(content)
    assert re.fullmatch(reason, str(error.value))


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (2001, 2000, "has 2001x2000 pixels; the maximum is 4,000,000"),
        (14_000, 10_000, "has over 89,478,485 pixels; the maximum is 4,000,000"),
        (60_000, 60_000, "has over 89,478,485 pixels; the maximum is 4,000,000"),
    ],
)
def test_an_image_that_is_too_large_is_rejected_before_decoding(
    monkeypatch: pytest.MonkeyPatch, width: int, height: int, reason: str
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", lambda _: pytest.fail("memory was allocated"))
    with pytest.raises(InvalidImage) as error:
        decode(bomb(width, height))
    assert str(error.value) == reason


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_truncated_anywhere_is_rejected(kind: str) -> None:
    """Except for the last 4 bytes: a checksum or end marker, after all pixels."""
    content = saved(PAGE, kind)
    for length in range(len(content) - 4):
        with pytest.raises(InvalidImage):
            decode(content[:length])


@pytest.mark.parametrize("kind", FORMATS)
def test_random_bytes_give_an_image_or_a_reason(kind: str) -> None:
    """The reason is stored in the cache and must be reproducible, without memory addresses."""
    rng = random.Random(0)
    valid = saved(PAGE, kind)
    for _ in range(250):
        content = bytearray(valid)
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        reason = "none"
        try:
            assert to_array(decode(bytes(content)).image, 3).size
        except InvalidImage as error:
            reason = str(error)
        assert reason.isprintable()
        assert " at 0x" not in reason


@pytest.mark.parametrize("shape", [(5, 32, 96), (60, 250), (7, 9)])
@pytest.mark.parametrize("size", [7, 31])
def test_the_mean_of_a_neighborhood_is_that_of_scipy(shape: tuple[int, ...], size: int) -> None:
    """Bit for bit, for gray levels and thirds of them."""
    gray = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.float32).mean(axis=-1)
    sizes = (*(1 for _ in shape[:-2]), size, size)
    assert (box_mean(gray, size) == ndimage.uniform_filter(gray, sizes, mode="nearest")).all()


@pytest.mark.parametrize("shape", [(1, 60, 250, 3), (3, 50, 200, 1), (70, 61, 155, 3), (1, 700, 900, 3)])
def test_a_resize_is_the_product_with_all_weights(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    rows, columns = resize_weights(shape[1], 36), resize_weights(shape[2], 144)
    exact = np.einsum(
        "ah,nhwc,bw->nabc", rows.astype(int), array.astype(int), columns.astype(int), optimize=True
    )
    assert (resize(array, 36, 144) == (exact + 2**15) // 2**16).all()
