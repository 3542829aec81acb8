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

from captcha_exp.config import Article, Captcha, CaptchaLibrary, Drawn, Generator, WheezyLibrary
from captcha_exp.data.sources import article
from captcha_exp.errors import UserError
from captcha_exp.runtime import seeding

Draw = Callable[[str, random.Random], Image.Image]


@dataclass(frozen=True)
class Library:
    """A generator: what decides the pixels, with its version; its own fonts; how it comes to draw, and to a
    text."""

    maker: str
    own_fonts: Sequence[Path]
    make: Callable[[], Draw]
    text: Callable[[Captcha, random.Random], str]


def library(data: Generator) -> Library:
    """The generator of a config.

    Raises:
        UserError: it brings no font and the config names none.
    """
    match data:
        case CaptchaLibrary():
            from captcha.image import DEFAULT_FONTS

            return Library(
                _package("captcha"), [Path(path) for path in DEFAULT_FONTS], lambda: _captcha(data), _any_text
            )
        case WheezyLibrary():
            _need_fonts(data, "wheezy.captcha")
            return Library(_package("wheezy.captcha"), [], lambda: _wheezy(data), _any_text)
        case Article():
            _need_fonts(data, "article")

            def paint() -> Draw:
                return article.painter(data.width, data.height, font_files(data))

            return Library(f"article {article.VERSION}", [], paint, _article_text)
        case _:
            assert_never(data)


def _package(name: str) -> str:
    return f"{name} {version(name)}"


def _need_fonts(data: Drawn, generator: str) -> None:
    if not data.fonts:
        raise UserError(f"data.fonts=[]: {generator} brings none; name one, such as DejaVuSans.ttf")


def _article_text(captcha: Captcha, stream: random.Random) -> str:
    try:
        return article.label(captcha.alphabet, captcha.length, stream)
    except ValueError as error:
        raise UserError(f"captcha.alphabet={captcha.alphabet}: data=article: {error}") from None


def stream(data: Drawn, index: int) -> random.Random:
    """The chance of picture number `index`: first its text is drawn from it, then the picture."""
    return seeding.stream(data.seed, "picture", index)


def label(data: Generator, captcha: Captcha, index: int) -> str:
    """The text in picture number `index`."""
    return library(data).text(captcha, stream(data, index))


def labels(data: Generator, captcha: Captcha) -> list[str]:
    """Return the texts of all pictures, each equal to `label`.

    One generator is seeded again for every picture, which gives the stream of a new one in less time.
    """
    text, rng, seed_of = library(data).text, random.Random(0), seeding.seeds(data.seed, "picture")
    found = []
    for index in range(data.count):
        rng.seed(seed_of(index))
        found.append(text(captcha, rng))
    return found


def _any_text(captcha: Captcha, stream: random.Random) -> str:
    """Every character of the alphabet is as likely as any other."""
    return "".join(stream.choices(captcha.alphabet, k=captcha.length))


def origin(data: Generator) -> dict[str, Any]:
    """Everything beside the config that the pixels of a source depend on: packages and font files."""
    from PIL import features

    return {
        "package": library(data).maker,
        "pillow": version("pillow"),
        "freetype": features.version("freetype2"),
        "raqm": features.version("raqm"),
        "fonts": [hashlib.sha256(path.read_bytes()).hexdigest() for path in font_files(data)],
    }


def font_files(data: Drawn) -> list[Path]:
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


def check_glyphs(data: Generator, captcha: Captcha) -> None:
    """Nothing, if every font can draw every character.

    Raises:
        UserError: a font would draw an empty box; the line names it and the characters.
    """
    for path in font_files(data) or library(data).own_fonts:
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


def _captcha(data: CaptchaLibrary) -> Draw:
    """A function (text, random stream) -> picture; the generator's module is handed a seeded stand-in."""
    import captcha.image

    fonts = [str(path) for path in font_files(data)]
    generator = captcha.image.ImageCaptcha(data.width, data.height, fonts=fonts or None)

    def draw_one(text: str, stream: random.Random) -> Image.Image:
        captcha.image.secrets = _Secrets(stream)  # type: ignore[assignment, attr-defined]  # as a module is
        return generator.generate_image(text)

    return draw_one


class _Secrets:
    """What `captcha` asks of the module `secrets`, from a seeded stream."""

    def __init__(self, stream: random.Random) -> None:
        self.randbelow = stream.randrange
        self.choice = stream.choice
        self.randbits = stream.getrandbits


def _wheezy(data: WheezyLibrary) -> Draw:
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
