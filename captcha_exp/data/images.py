"""Convert the bytes of an image file to (H, W, C) uint8: decoding, color, transparency, resizing.

Pillow only decodes. Its bilinear resize and that of exported graphs differ in up to one pixel of seven;
therefore the resize here is two matrix products with a triangle filter, antialiased when downscaling. The
weights are integer multiples of 1/256 that sum to 1, and all sums are integers below 2**24, which float32
represents exactly: NumPy, torch and an exported graph give the same bytes in any summation order.

Source: the triangle filter with its support scaled by the downscaling factor, as in Pillow's BILINEAR.
"""

import functools
import io
import re
import stat
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from captcha_exp.errors import one_line

WEIGHT_SCALE = 256  # weights are integer multiples of 1 / WEIGHT_SCALE
assert 255 * WEIGHT_SCALE**2 + WEIGHT_SCALE**2 // 2 < 2**24  # the largest sum is exact in float32

# Multiplications of a product of matrices that OpenBLAS computes in one thread. Several threads wait for each
# other, which takes a hundred times as long as the product where other processes have the cores.
MAX_PRODUCT = 2**18
BLOCK_SIZES = (32, 16, 8)  # rows or columns of a resized image that are computed at a time

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".webp"),
    *(".tif", ".tiff", ".ico", ".avif", ".heic", ".jp2"),  # not supported, and reported as such
)
SIGNATURE_BYTES = 16
_SIGNATURE = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|BM.{4}\0{4}|RIFF.{4}WEBP"
    rb"|II\*\0|MM\0\*|\0\0\0\x0cjP  |.{4}ftyp(avif|heic|heix|mif1)",  # not supported, and reported as such
    re.DOTALL,
)
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # color type -> samples per pixel
ADAM7_PASSES = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
"""x, y, and steps in x and y of the passes of an interlaced PNG"""
MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 4_000_000  # per image; a text captcha has about 10,000

# Not PIL.ImageOps.exif_transpose: it also rewrites the other EXIF tags, and raises if one of them is damaged.
EXIF_TRANSPOSE_METHODS = {  # EXIF orientation -> transposition to the upright image
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class InvalidImage(Exception):
    """The reason why a file cannot be used as an image, phrased to follow the file name."""


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image file."""

    image: Image.Image
    remarks: tuple[str, ...]  # how the image differs from the file, for the user
    format: str  # of the file, with its mode, as in "PNG RGBA"


def is_image_name(name: str) -> bool:
    """Return whether the name of a file, with its path, is that of an image, supported or not."""
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def has_signature(start: bytes) -> bool:
    """Return whether the first `SIGNATURE_BYTES` of a file are those of an image, supported or not."""
    return _SIGNATURE.match(start) is not None


def read_bytes(path: Path) -> bytes:
    """Read a regular file of limited size; not a device or pipe, which might block.

    Raises:
        InvalidImage: the file cannot be read.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise InvalidImage("is a folder" if stat.S_ISDIR(state.st_mode) else "is not a regular file")
        if state.st_size > MAX_FILE_BYTES:
            raise too_large(state.st_size)
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a NUL in the name raises ValueError
        reason = getattr(error, "strerror", None) or error
        raise InvalidImage(f"cannot be read: {reason}") from None


def too_large(size: int) -> InvalidImage:
    """Return the reason of a file of more than MAX_FILE_BYTES."""
    return InvalidImage(f"has {size / 2**20:,.0f} MiB; the maximum is {MAX_FILE_BYTES / 2**20:.0f} MiB")


def decode(content: bytes) -> DecodedImage:
    """Decode the bytes of an image file; the format is detected from the content.

    Raises:
        InvalidImage: the image is damaged, truncated, too large or in an unsupported format.
    """
    if not content:
        raise InvalidImage("is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged EXIF data of an intact image
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = Image.open(io.BytesIO(content), formats=FORMATS)
            if file.width * file.height > MAX_PIXELS:
                size = f"{file.width}x{file.height}"
                raise InvalidImage(f"has {size} pixels; the maximum is {MAX_PIXELS:,}")
            frames = getattr(file, "n_frames", 1)
            frame = file.tile[0].extents if file.format == "GIF" else None
            file.load()
            transpose_method = _exif_transpose_method(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidImage(
            f"has over {Image.MAX_IMAGE_PIXELS:,} pixels; the maximum is {MAX_PIXELS:,}"
        ) from None
    except UnidentifiedImageError:
        formats = ", ".join(FORMATS)
        raise InvalidImage(f"is not an image in a supported format ({formats}), or is truncated") from None
    except InvalidImage:
        raise
    except Exception as error:  # decoders of Pillow raise any exception on damaged files
        raise InvalidImage(f"is damaged or truncated: {one_line(error)}") from None
    image: Image.Image = file
    kind = f"{file.format} {file.mode}"
    if image.format == "PNG":  # Pillow accepts both
        if b"IEND" not in content:
            raise InvalidImage("is truncated: a PNG without its IEND chunk")
        if not _has_last_row(image) and not _has_all_rows(content):
            raise InvalidImage("is damaged: a PNG with fewer rows of pixels than its header says")
    remarks = [f"has {frames} frames; only the first is used"] if frames > 1 else []
    image, more = _standardize(image, transpose_method, frame)
    return DecodedImage(image, (*remarks, *more), kind)


def from_pillow(image: Image.Image) -> Image.Image:
    """Return an image that Pillow has opened as `decode` returns it from the bytes of its file.

    Raises:
        InvalidImage: the image is damaged, or its mode is not supported.
    """
    try:
        image.load()
    except Exception as error:  # any, as in decode
        raise InvalidImage(f"is damaged or truncated: {one_line(error)}") from None
    return _standardize(image, _exif_transpose_method(image))[0]


def _standardize(
    image: Image.Image,
    transpose_method: Image.Transpose | None,
    frame: tuple[int, int, int, int] | None = None,
) -> tuple[Image.Image, list[str]]:
    """Return an upright image with 8 bits per channel, and how it differs; `frame` is the part that it has.

    Raises:
        InvalidImage: its mode is not supported.
    """
    remarks = []
    if image.mode == "I;16":  # Pillow would clip every value above 255 to white
        remarks.append("has 16 bits per pixel; only the upper 8 are used")
        image = _to_8_bit(image)
    if frame and frame != (0, 0, *image.size) and "transparency" not in image.info:
        image = _paste_on_canvas(image, frame)  # Pillow would fill the rest with color 0
    if transpose_method is not None:  # as image viewers do
        remarks.append("is transposed according to its EXIF orientation")
        image = image.transpose(transpose_method)
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise InvalidImage(
            f"has pixel mode {image.mode}; save it as grayscale or RGB with 8 bits per channel"
        )
    if has_transparency(image):
        remarks.append("has transparent pixels, which become white")
    return image, remarks


def _has_last_row(png: Image.Image) -> bool:
    """Return whether an image has a last row that is not 0; Pillow leaves missing rows 0.

    An interlaced image may have its last row and miss others.
    """
    last_row = png.crop((0, png.height - 1, *png.size))
    return not png.info.get("interlace") and last_row.getbbox(alpha_only=False) is not None


def _has_all_rows(png: bytes) -> bool:
    """Return whether the compressed data of a PNG, which Pillow has decoded, has all rows of its header.

    Source: Portable network graphics specification, RFC 2083, sections 2.3 and 2.6.
    """
    data, position, header = [], 8, b""
    while position + 8 <= len(png):
        size, kind = int.from_bytes(png[position : position + 4]), png[position + 4 : position + 8]
        if kind == b"IDAT":
            data.append(png[position + 8 : position + 8 + size])
        elif kind == b"IHDR":
            header = png[position + 8 : position + 8 + size]
        elif kind == b"IEND":
            break
        position += 12 + size
    width, height, depth, color_type, *_, interlace = struct.unpack(">IIBBBBB", header)
    bits = depth * PNG_CHANNELS[color_type]
    expected = 0
    for x, y, dx, dy in ADAM7_PASSES if interlace else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
        if columns > 0 and rows > 0:
            expected += rows * (1 + (columns * bits + 7) // 8)
    try:
        return len(zlib.decompressobj().decompress(b"".join(data), expected)) == expected
    except zlib.error:
        return False


def _exif_transpose_method(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that the EXIF orientation asks for, or None."""
    try:
        return EXIF_TRANSPOSE_METHODS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # any, as in decode; the image is intact without its EXIF data
        return None


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Convert a 16-bit grayscale image to mode LA; pixels of the transparent value get alpha 0."""
    values = np.asarray(image)
    opaque = np.where(values == image.info.get("transparency", -1), 0, 255)
    eight = Image.fromarray(np.stack([values >> 8, opaque], axis=2).astype(np.uint8))
    eight.info.update({key: value for key, value in image.info.items() if key != "transparency"})
    return eight


def _paste_on_canvas(image: Image.Image, frame: tuple[int, int, int, int]) -> Image.Image:
    """Crop an image to its frame and paste it on a transparent canvas of the full size."""
    canvas = Image.new("RGBA", image.size, (0, 0, 0, 0))
    canvas.paste(image.crop(frame).convert("RGBA"), frame)
    return canvas


def is_blank(pixels: npt.NDArray[np.uint8]) -> bool:
    """Return whether an image (H, W, C) has one color."""
    middle = pixels[len(pixels) // 2]  # decides for almost all images
    return bool((middle == pixels[0, 0]).all() and (pixels == pixels[0, 0]).all())


def has_transparency(image: Image.Image) -> bool:
    """Return whether any pixel is not fully opaque."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return False
    if image.mode == "RGBA":  # several times faster
        return image.getchannel("A").getextrema() != (255, 255)
    return bool(np.asarray(image.convert("RGBA"))[..., 3].min() < 255)


def to_array(image: Image.Image, channels: int) -> npt.NDArray[np.uint8]:
    """Convert an image to (H, W, C) uint8 on a white background."""
    is_opaque = image.mode == "RGBA" and not has_transparency(image)  # compositing would change no pixel
    if ("A" in image.getbands() or "transparency" in image.info) and not is_opaque:
        foreground = image.convert("RGBA")
        image = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image.alpha_composite(foreground)
    mode = "L" if channels == 1 else "RGB"
    array = np.asarray(image if image.mode == mode else image.convert(mode), dtype=np.uint8)
    return array.reshape(image.height, image.width, channels)


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
