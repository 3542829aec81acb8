"""Captcha generators and their fonts.

A generator draws all random numbers from the generator that it is passed. The PyPI packages use module-level
randomness instead: they run in rendering processes (`rendering`), where it is replaced by a seeded one.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distribution, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, assert_never

from PIL import Image, ImageFont, features

from captcha_exp.config import (
    ArticleConfig,
    BaseGeneratorConfig,
    CaptchaConfig,
    CaptchaLibraryConfig,
    GeneratorConfig,
    WheezyLibraryConfig,
)
from captcha_exp.data.sources import article
from captcha_exp.data.sources.texts import sample_length, sample_text
from captcha_exp.errors import UserError, one_line
from captcha_exp.runtime import seeding

MAX_MISSING = 30  # characters without a glyph in one line

RenderFn = Callable[[str, random.Random], Image.Image]


@dataclass(frozen=True)
class RendererSpec:
    """A captcha generator: its name and version, default fonts, renderer and label sampler."""

    package: str
    default_fonts: Sequence[Path]
    make_renderer: Callable[[], RenderFn]
    sample_label: Callable[[CaptchaConfig, random.Random], str]


def get_renderer_spec(data: GeneratorConfig) -> RendererSpec:
    """Return the generator of a config.

    Raises:
        UserError: the generator has no default fonts and the config has none; add one to data.fonts.
    """
    match data:
        case CaptchaLibraryConfig():
            from captcha.image import DEFAULT_FONTS

            package, fonts = f"captcha {version('captcha')}", [Path(path) for path in DEFAULT_FONTS]
            sample = partial(sample_text, data.text)
            return RendererSpec(package, fonts, lambda: _make_captcha_renderer(data), sample)
        case WheezyLibraryConfig():
            _require_fonts(data, "wheezy.captcha")
            package = f"wheezy.captcha {version('wheezy.captcha')}"
            sample = partial(sample_text, data.text)
            return RendererSpec(package, [], lambda: _make_wheezy_renderer(data), sample)
        case ArticleConfig():
            _require_fonts(data, "article")
            return RendererSpec(
                package=f"article {article.VERSION}",
                default_fonts=[],
                make_renderer=lambda: article.make_renderer(data.width, data.height, font_files(data)),
                sample_label=lambda captcha, rng: article.sample_label(
                    captcha.alphabet, sample_length(captcha, rng), rng
                ),
            )
        case _:
            assert_never(data)


def _require_fonts(data: BaseGeneratorConfig, generator: str) -> None:
    if not data.fonts:
        raise UserError(f"data.fonts=[]: {generator} has no default font; add one, such as DejaVuSans.ttf")


def image_rng(data: BaseGeneratorConfig, index: int) -> random.Random:
    """Return the random generator of an image, which draws its label first and then its pixels."""
    return seeding.rng(data.seed, "picture", index)


def generate_labels(data: GeneratorConfig, captcha: CaptchaConfig) -> list[str]:
    """Return the labels of all images."""
    sample_label = get_renderer_spec(data).sample_label
    return [sample_label(captcha, image_rng(data, index)) for index in range(data.count)]


def rendering_dependencies(data: GeneratorConfig) -> dict[str, Any]:
    """Return the packages and font files that the pixels depend on, in addition to the config."""
    return {
        "package": get_renderer_spec(data).package,
        "pillow": version("pillow"),
        "freetype": features.version("freetype2"),
        "raqm": features.version("raqm"),
        "fonts": [hashlib.sha256(path.read_bytes()).hexdigest() for path in font_files(data)],
    }


def font_files(data: BaseGeneratorConfig) -> list[Path]:
    """Return the paths of data.fonts.

    Raises:
        UserError: a font does not exist; the line lists those shipped with matplotlib.
    """
    # Importing matplotlib is slow.
    matplotlib_fonts = Path(str(distribution("matplotlib").locate_file("matplotlib/mpl-data/fonts/ttf")))
    found = []
    for name in data.fonts:
        path = next((path for path in (Path(name), matplotlib_fonts / name) if path.is_file()), None)
        if path is None:
            choices = ", ".join(sorted(path.name for path in matplotlib_fonts.glob("DejaVu*.ttf")))
            raise UserError(
                f"data.fonts: {name!r} is neither a file nor a font of matplotlib, such as {choices}"
            )
        found.append(path)
    return found


def check_glyphs(data: GeneratorConfig, captcha: CaptchaConfig) -> None:
    """Check that every font has a glyph for every character.

    Raises:
        UserError: a font lacks characters; remove them or use another font.
    """
    for path in font_files(data) or get_renderer_spec(data).default_fonts:
        try:
            font = ImageFont.truetype(str(path), 32)
        except OSError as error:
            raise UserError(f"data.fonts: {path} is not a font: {error}") from None
        # A missing glyph is drawn as the same box as a code point that no font has.
        try:
            box = bytes(font.getmask("\U0010fffe"))
            masks = {c: bytes(font.getmask(c)) for c in captcha.alphabet}
        except (OSError, ValueError, MemoryError) as error:
            raise UserError(f"data.fonts: {path} is damaged: {one_line(error)}") from None
        missing = "".join(c for c, mask in masks.items() if mask == box or not any(mask))
        if missing:
            more = f" and {len(missing) - MAX_MISSING:,} more" if len(missing) > MAX_MISSING else ""
            raise UserError(
                f"captcha.alphabet: {path.name} has no glyphs for {missing[:MAX_MISSING]!r}{more}; "
                "remove these characters, or set data.fonts to fonts that have them"
            )


def check_rendering(data: GeneratorConfig, captcha: CaptchaConfig) -> None:
    """Check that an image can be rendered, before anything is created.

    Raises:
        UserError: it cannot, mostly because a font is damaged or the image is too small.
    """
    spec, rng = get_renderer_spec(data), image_rng(data, 0)
    label = spec.sample_label(captcha, rng)
    try:
        spec.make_renderer()(label, rng)
    except Exception as error:  # the packages and Pillow raise any exception
        reason = f"{type(error).__name__}: {one_line(error)}"
        keys = "check data.fonts, data.width and data.height"
        raise UserError(f"data={data.source}: cannot render {label!r}: {reason}; {keys}") from None


def _make_captcha_renderer(data: CaptchaLibraryConfig) -> RenderFn:
    """Return a function (text, rng) -> image: that of the package, or a faster one with the same pixels."""
    from captcha_exp.data.sources import captcha_package

    fonts = [str(path) for path in font_files(data)] or None
    if captcha_package.is_known():
        return captcha_package.Renderer(data.width, data.height, fonts)
    return make_package_renderer(data.width, data.height, fonts)


def make_package_renderer(width: int, height: int, fonts: list[str] | None) -> RenderFn:
    """Return a function (text, rng) -> image that uses a seeded version of the package's `secrets`."""
    import captcha.image

    generator = captcha.image.ImageCaptcha(width, height, fonts=fonts)

    def render(text: str, rng: random.Random) -> Image.Image:
        seeded = SimpleNamespace(randbelow=rng.randrange, choice=rng.choice, randbits=rng.getrandbits)
        original = captcha.image.secrets  # type: ignore[attr-defined]  # imported there, not exported
        captcha.image.secrets = seeded  # type: ignore[assignment, attr-defined]  # not a module
        try:
            return generator.generate_image(text)
        finally:
            captcha.image.secrets = original  # type: ignore[attr-defined]  # as above

    return render


def _make_wheezy_renderer(data: WheezyLibraryConfig) -> RenderFn:
    """Return a function (text, rng) -> image that uses `rng` for the module's `random`."""
    import wheezy.captcha.image as wheezy

    def random_color() -> tuple[int, int, int]:
        rng: random.Random = wheezy.random
        return rng.randrange(10, 170), rng.randrange(10, 170), rng.randrange(10, 170)

    draw = wheezy.captcha(
        width=data.width,
        height=data.height,
        drawings=[
            wheezy.background(),
            wheezy.text(
                fonts=[str(path) for path in font_files(data)],
                font_sizes=data.font_sizes,
                drawings=[wheezy.warp(), wheezy.rotate(), wheezy.offset()],
                color=random_color,
            ),
            wheezy.curve(color=random_color, width=2),
            wheezy.noise(color=random_color),
            wheezy.smooth(),
        ],
    )

    def render(text: str, rng: random.Random) -> Image.Image:
        original, wheezy.random = wheezy.random, rng
        try:
            image: Image.Image = draw(text)
            return image
        finally:
            wheezy.random = original

    return render
