"""The generators: what draws a picture of a text, and the fonts that it draws with.

A generator takes its chance from the stream that it is handed and from nothing else. Those of the packages
keep their chance in a module: they draw in processes of their own (`drawing`), where a seeded stand-in is put
in its place.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, assert_never

from PIL import Image, ImageFont

from captcha_exp.config import (
    ArticleConfig,
    BaseGeneratorConfig,
    CaptchaConfig,
    CaptchaLibraryConfig,
    GeneratorConfig,
    WheezyLibraryConfig,
)
from captcha_exp.data.sources import article
from captcha_exp.errors import UserError
from captcha_exp.runtime import seeding

RenderFn = Callable[[str, random.Random], Image.Image]


@dataclass(frozen=True)
class RendererSpec:
    """A generator: what decides the pixels, with its version; its own fonts; how it comes to draw, and to a
    text."""

    package: str
    default_fonts: Sequence[Path]
    make_renderer: Callable[[], RenderFn]
    sample_label: Callable[[CaptchaConfig, random.Random], str]


def get_renderer_spec(data: GeneratorConfig) -> RendererSpec:
    """The generator of a config.

    Raises:
        UserError: it brings no font and the config names none.
    """
    match data:
        case CaptchaLibraryConfig():
            from captcha.image import DEFAULT_FONTS

            return RendererSpec(
                _package_version("captcha"),
                [Path(path) for path in DEFAULT_FONTS],
                lambda: _make_captcha_renderer(data),
                _sample_uniform_label,
            )
        case WheezyLibraryConfig():
            _require_fonts(data, "wheezy.captcha")
            return RendererSpec(
                _package_version("wheezy.captcha"),
                [],
                lambda: _make_wheezy_renderer(data),
                _sample_uniform_label,
            )
        case ArticleConfig():
            _require_fonts(data, "article")

            def paint() -> RenderFn:
                return article.make_renderer(data.width, data.height, font_files(data))

            return RendererSpec(f"article {article.VERSION}", [], paint, _sample_article_label)
        case _:
            assert_never(data)


def _package_version(name: str) -> str:
    return f"{name} {version(name)}"


def _require_fonts(data: BaseGeneratorConfig, generator: str) -> None:
    if not data.fonts:
        raise UserError(f"data.fonts=[]: {generator} brings none; name one, such as DejaVuSans.ttf")


def _sample_article_label(captcha: CaptchaConfig, rng: random.Random) -> str:
    try:
        return article.sample_label(captcha.alphabet, captcha.length, rng)
    except ValueError as error:
        raise UserError(f"captcha.alphabet={captcha.alphabet}: data=article: {error}") from None


def image_rng(data: BaseGeneratorConfig, index: int) -> random.Random:
    """The chance of picture number `index`: first its text is drawn from it, then the picture."""
    return seeding.rng(data.seed, "picture", index)


def generate_label(data: GeneratorConfig, captcha: CaptchaConfig, index: int) -> str:
    """The text in picture number `index`."""
    return get_renderer_spec(data).sample_label(captcha, image_rng(data, index))


def generate_labels(data: GeneratorConfig, captcha: CaptchaConfig) -> list[str]:
    """Return the texts of all pictures, each equal to `label`.

    One generator is seeded again for every picture, which gives the stream of a new one in less time.
    """
    text, rng, seed_of = (
        get_renderer_spec(data).sample_label,
        random.Random(0),
        seeding.make_seed_fn(data.seed, "picture"),
    )
    found = []
    for index in range(data.count):
        rng.seed(seed_of(index))
        found.append(text(captcha, rng))
    return found


def _sample_uniform_label(captcha: CaptchaConfig, rng: random.Random) -> str:
    """Every character of the alphabet is as likely as any other."""
    return "".join(rng.choices(captcha.alphabet, k=captcha.length))


def rendering_dependencies(data: GeneratorConfig) -> dict[str, Any]:
    """Everything beside the config that the pixels of a source depend on: packages and font files."""
    from PIL import features

    return {
        "package": get_renderer_spec(data).package,
        "pillow": version("pillow"),
        "freetype": features.version("freetype2"),
        "raqm": features.version("raqm"),
        "fonts": [hashlib.sha256(path.read_bytes()).hexdigest() for path in font_files(data)],
    }


def font_files(data: BaseGeneratorConfig) -> list[Path]:
    """The font files that data.fonts names.

    Raises:
        UserError: a font is not to be found; the line names those that matplotlib brings.
    """
    if not data.fonts:
        return []
    spec = find_spec("matplotlib")  # importing it would take longer than all the rest
    assert spec is not None
    assert spec.origin is not None
    free = Path(spec.origin).with_name("mpl-data") / "fonts" / "ttf"
    found = []
    for name in data.fonts:
        path = next((path for path in (Path(name).expanduser(), free / name) if path.is_file()), None)
        if path is None:
            choices = ", ".join(sorted(path.name for path in free.glob("DejaVu*.ttf")))
            raise UserError(f"data.fonts: {name!r} is no file and no font of matplotlib; it brings {choices}")
        found.append(path)
    return found


def check_glyphs(data: GeneratorConfig, captcha: CaptchaConfig) -> None:
    """Nothing, if every font can draw every character.

    Raises:
        UserError: a font would draw an empty box; the line names it and the characters.
    """
    for path in font_files(data) or get_renderer_spec(data).default_fonts:
        try:
            font = ImageFont.truetype(str(path), 32)
        except OSError as error:
            raise UserError(f"data.fonts: {path} is no font: {error}") from None
        # A font draws what it lacks as the same box as a code point that no font has.
        box = bytes(font.getmask("\U0010fffe"))
        lacking = "".join(c for c in captcha.alphabet if bytes(font.getmask(c)) == box)
        if lacking:
            raise UserError(
                f"captcha.alphabet: {path.name} has no picture of {lacking!r}; "
                "take these out, or name a font that has them in data.fonts"
            )


def _make_captcha_renderer(data: CaptchaLibraryConfig) -> RenderFn:
    """A function (text, random stream) -> picture; the generator's module is handed a seeded stand-in."""
    import captcha.image

    fonts = [str(path) for path in font_files(data)]
    generator = captcha.image.ImageCaptcha(data.width, data.height, fonts=fonts or None)

    def draw_one(text: str, stream: random.Random) -> Image.Image:
        captcha.image.secrets = _SeededSecrets(stream)  # type: ignore[assignment, attr-defined]  # as a module is
        return generator.generate_image(text)

    return draw_one


class _SeededSecrets:
    """What `captcha` asks of the module `secrets`, from a seeded stream."""

    def __init__(self, rng: random.Random) -> None:
        self.randbelow = rng.randrange
        self.choice = rng.choice
        self.randbits = rng.getrandbits


def _make_wheezy_renderer(data: WheezyLibraryConfig) -> RenderFn:
    import wheezy.captcha.image as wheezy

    def colour() -> tuple[int, int, int]:
        stream: random.Random = wheezy.random
        return stream.randrange(10, 170), stream.randrange(10, 170), stream.randrange(10, 170)

    render = wheezy.captcha(
        width=data.width,
        height=data.height,
        drawings=[
            wheezy.background(),
            wheezy.text(
                fonts=[str(path) for path in font_files(data)],
                font_sizes=data.font_sizes,
                drawings=[wheezy.warp(), wheezy.rotate(), wheezy.offset()],
                color=colour,
            ),
            wheezy.curve(color=colour, width=2),
            wheezy.noise(color=colour),
            wheezy.smooth(),
        ],
    )

    def draw_one(text: str, stream: random.Random) -> Image.Image:
        wheezy.random = stream
        picture: Image.Image = render(text)
        return picture

    return draw_one
