"""Bytes of a picture file -> (H, W, C) uint8: decoding, colour, transparency, and the one resize.

Pillow only decodes. Its bilinear resize differs from that of exported graphs in up to one pixel of seven, so
the resize here is ours and the same wherever it runs: two small matrix products with the triangle filter,
widened when shrinking so that no pixel is skipped. The weights are whole numbers of 1/256, each row adding
up to 256. All products and sums are then whole numbers below 2**24, which float32 holds exactly, so that
NumPy, torch and an exported graph give the same bytes in whatever order they add.

Source: the triangle filter with support scaled by the shrinking factor is the one that Pillow documents as
BILINEAR.
"""

import functools
import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

WEIGHT_SCALE = 256  # weights are whole multiples of 1/UNIT

# 255 * UNIT**2 + UNIT**2 / 2 is the largest sum that occurs.
assert 255 * WEIGHT_SCALE**2 + WEIGHT_SCALE**2 // 2 < 2**24  # a fact about the constant, true at every import


FORMATS = {"PNG": "PNG", "JPEG": "JPEG", "GIF": "GIF", "BMP": "BMP", "WEBP": "WebP"}  # Pillow's -> people's
MAX_PIXELS = 4_000_000  # pixels of one picture; a text captcha has some ten thousand


EXIF_TRANSPOSE_METHODS = {  # EXIF orientation -> how the picture comes to stand upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class InvalidImage(Exception):
    """Why a file cannot be used as a picture, in words that follow its name."""


@dataclass(frozen=True)
class DecodedImage:
    """A picture as it came out of its file."""

    image: Image.Image
    format: str
    remarks: tuple[str, ...]  # what a person may want to know of how it was read


def decode(content: bytes) -> DecodedImage:
    """The picture in a file's bytes, whatever the file's name says.

    Raises:
        Unusable: the bytes are no whole picture, or one of a kind or size that is not read.
    """
    if not content:
        raise InvalidImage("is empty (0 bytes)")
    kinds = ", ".join(FORMATS.values())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of EXIF data that are damaged, while the picture is whole
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = Image.open(io.BytesIO(content), formats=tuple(FORMATS))
            if file.width * file.height > MAX_PIXELS:
                size = f"{file.width}x{file.height}"
                raise InvalidImage(f"is {size} pixels; at most {MAX_PIXELS:,} in all are read")
            frames = getattr(file, "n_frames", 1)
            frame = file.tile[0].extents if file.format == "GIF" else None
            file.load()
            turn = _exif_transpose_method(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidImage(
            f"has over {Image.MAX_IMAGE_PIXELS:,} pixels; at most {MAX_PIXELS:,} are read"
        ) from None
    except UnidentifiedImageError:
        raise InvalidImage(f"is no picture of a known kind ({kinds}), or only the beginning of one") from None
    except InvalidImage:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them into
        what = " ".join(str(error).split()) or type(error).__name__
        raise InvalidImage(f"is damaged or cut short: {what}") from None
    image: Image.Image = file
    if image.format == "PNG" and b"IEND" not in content:  # Pillow is content without the end
        raise InvalidImage("is cut short: a PNG without its end")
    kind = FORMATS.get(str(image.format), "JPEG")  # Pillow calls a JPEG with two pictures MPO
    notes = [f"has {frames} frames; the first is read"] if frames > 1 else []
    if image.mode == "I;16":  # Pillow would make every value above 255 white
        notes.append("has 16 bits for each pixel; the upper 8 are read")
        image = _to_8_bit(image)
    if frame and frame != (0, 0, *image.size) and "transparency" not in image.info:
        image = _paste_on_canvas(image, frame)  # Pillow would fill the rest with the first colour
    if turn is not None:  # who wrote the label has seen it so
        notes.append("is turned as its EXIF data say")
        image = image.transpose(turn)
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise InvalidImage(f"has pixels of mode {image.mode}; save it as grey or RGB with 8 bits")
    if has_transparency(image):
        notes.append("is transparent in places; they become white")
    return DecodedImage(image, kind, tuple(notes))


def _exif_transpose_method(image: Image.Image) -> Image.Transpose | None:
    """What its EXIF data have every viewer do to the picture."""
    try:
        return EXIF_TRANSPOSE_METHODS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as above; but nothing is lost with the EXIF data
        return None


def _to_8_bit(image: Image.Image) -> Image.Image:
    """(H, W) of 16 bits as LA of 8; what has the transparent value lets the page through."""
    values = np.asarray(image)
    opaque = np.where(values == image.info.get("transparency", -1), 0, 255)
    eight = Image.fromarray(np.stack([values >> 8, opaque], axis=2).astype(np.uint8))
    eight.info.update({key: value for key, value in image.info.items() if key != "transparency"})
    return eight


def _paste_on_canvas(image: Image.Image, frame: tuple[int, int, int, int]) -> Image.Image:
    """A picture on a larger canvas; around it the page is seen."""
    canvas = Image.new("RGBA", image.size, (0, 0, 0, 0))
    canvas.paste(image.crop(frame).convert("RGBA"), frame)
    return canvas


def has_transparency(image: Image.Image) -> bool:
    """Whether any pixel lets the page behind it through."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return False
    return bool(np.asarray(image.convert("RGBA"))[..., 3].min() < 255)


def to_array(image: Image.Image, channels: int) -> npt.NDArray[np.uint8]:
    """(H, W, C) uint8 of a decoded picture; what is transparent becomes white, as on a page."""
    if "A" in image.getbands() or "transparency" in image.info:
        colours = image.convert("RGBA")
        image = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image.alpha_composite(colours)
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.uint8)
    return array.reshape(image.height, image.width, channels)


@functools.cache
def resize_weights(source_size: int, target_size: int) -> npt.NDArray[np.float32]:
    """(target, source) whole numbers: the share, in 1/256, of each source pixel in each target pixel."""
    scale = source_size / target_size
    support = max(scale, 1.0)
    centres = (np.arange(target_size) + 0.5) * scale
    distance = np.abs(np.arange(source_size) + 0.5 - centres[:, None])
    shares = np.maximum(0.0, 1.0 - distance / support)
    exact = shares / shares.sum(axis=1, keepdims=True) * WEIGHT_SCALE
    whole = np.floor(exact)
    # The largest remainders are rounded up: a row adds up to UNIT, and white stays white.
    order = np.argsort(whole - exact, axis=1, kind="stable")
    missing = WEIGHT_SCALE - whole.sum(axis=1)
    for row in range(target_size):
        whole[row, order[row, : int(missing[row])]] += 1
    weights: npt.NDArray[np.float32] = whole.astype(np.float32)
    weights.flags.writeable = False  # shared by all who ask
    return weights


def resize(images: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """(N, height, width, C) uint8 of pictures (N, H, W, C) uint8."""
    n, source_height, source_width, channels = images.shape
    if (source_height, source_width) == (height, width):
        return images
    rows: npt.NDArray[Any] = resize_weights(source_height, height)
    columns: npt.NDArray[Any] = resize_weights(source_width, width)
    # Heights first: (height, H) @ (N, H, W*C). Then widths, with the colour moved out of the way of the
    # product.
    tall = rows @ images.reshape(n, source_height, -1).astype(np.float32)
    wide = tall.reshape(n, height, source_width, channels).transpose(0, 1, 3, 2) @ columns.T
    rounded: npt.NDArray[np.uint8] = np.floor((wide + WEIGHT_SCALE**2 / 2) / WEIGHT_SCALE**2).astype(np.uint8)
    return np.ascontiguousarray(rounded.transpose(0, 1, 3, 2))
