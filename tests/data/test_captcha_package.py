"""Images drawn like those of the package `captcha` have its pixels, bit for bit."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import captcha.image
import pytest
from test_sources import LIBRARY

from captcha_exp.data.sources.captcha_package import Renderer
from captcha_exp.data.sources.generators import font_files, get_renderer_spec, make_package_renderer

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def matplotlib_fonts(*names: str) -> list[str]:
    return [str(path) for path in font_files(replace(LIBRARY, fonts=names))]


@pytest.mark.parametrize(
    ("width", "height", "alphabet", "length", "fonts"),
    [
        (160, 60, "0123456789", 4, []),
        (160, 60, LETTERS, 7, []),  # wider than the image
        (64, 32, "01234+-=", 2, []),
        (300, 100, "jfyQWÄéñß.,'|", 5, ["DejaVuSans-Oblique.ttf", "STIXGeneralBolIta.ttf"]),
        (400, 40, "iIl1 ", 3, ["DejaVuSerif.ttf"]),  # a space in the text has no ink
        (3, 3, "8", 1, []),
        (1, 1, "8", 1, []),
    ],
)
def test_pixels_are_those_of_the_package(
    width: int, height: int, alphabet: str, length: int, fonts: Sequence[str]
) -> None:
    paths = matplotlib_fonts(*fonts) or None
    draw, package = Renderer(width, height, paths), make_package_renderer(width, height, paths)
    for index in range(150):
        text = "".join(random.Random(index).choices(alphabet, k=length))
        ours, theirs = random.Random(index), random.Random(index)
        image, expected = draw(text, ours), package(text, theirs)
        assert (image.mode, image.size) == (expected.mode, expected.size)
        assert image.tobytes() == expected.tobytes(), (index, text)
        assert ours.getstate() == theirs.getstate()


class UprightRandom(random.Random):
    """A random generator of characters that are neither rotated nor warped, which Pillow treats apart."""

    def getrandbits(self, k: int, /) -> int:
        number = super().getrandbits(k)
        return 2**31 if k == 32 else number


def test_characters_that_are_not_rotated_are_those_of_the_package() -> None:
    draw, package = Renderer(160, 60, None), make_package_renderer(160, 60, None)
    for index in range(20):
        image, expected = (render("4711", UprightRandom(index)) for render in (draw, package))
        assert image.tobytes() == expected.tobytes()


def test_another_version_of_the_package_draws_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert isinstance(get_renderer_spec(LIBRARY).make_renderer(), Renderer)
    source = tmp_path / "image.py"
    source.write_bytes(Path(captcha.image.__file__).read_bytes() + b"\n")
    monkeypatch.setattr(captcha.image, "__file__", str(source))
    draw = get_renderer_spec(LIBRARY).make_renderer()
    assert not isinstance(draw, Renderer)
    expected = Renderer(LIBRARY.width, LIBRARY.height, None)("12", random.Random(0))
    assert draw("12", random.Random(0)).tobytes() == expected.tobytes()
