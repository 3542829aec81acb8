"""Test the labels and images of the `article` generator."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import pytest
from PIL import ImageColor

from captcha_exp.data.sources import article
from captcha_exp.errors import UserError

FONTS = [
    Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    for name in ("cmss10.ttf", "STIXGeneral.ttf", "DejaVuSansMono-Bold.ttf")
]
RENDER = article.make_renderer(120, 50, FONTS)
TILE = 30  # pixels: 120 / 4
TILTED = 43  # pixels: the side of a tile rotated by 45 degrees
BLUR_RADIUS = 1  # pixels


def pixels(text: str, seed: int = 0) -> npt.NDArray[np.int16]:
    return np.asarray(RENDER(text, random.Random(seed)), np.int16)


def labels(alphabet: str, count: int, length: int = 4) -> list[str]:
    rng = random.Random(7)
    return [article.sample_label(alphabet, length, rng) for _ in range(count)]


@pytest.fixture
def render_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., npt.NDArray[np.int16]]:
    """Return a function that renders an image with other constants of the generator."""

    def render(text: str, seed: int, **constants: object) -> npt.NDArray[np.int16]:
        with monkeypatch.context() as patch:
            for name, value in constants.items():
                patch.setattr(article, name, value)
            return pixels(text, seed)

    return render


# -- randomness ---------------------------------------------------------------------------------------------


def test_images_depend_on_the_seed() -> None:
    images = [pixels("r865", seed) for seed in range(20)]
    again = article.make_renderer(120, 50, FONTS)
    for seed, image in enumerate(images):
        assert (np.asarray(again("r865", random.Random(seed))) == image).all()
    assert len({image.tobytes() for image in images}) == 20


def test_images_do_not_depend_on_global_generators_or_earlier_images() -> None:
    random.seed(1)
    np.random.seed(1)
    first = pixels("r865")
    before = random.getstate()
    random.seed(2)
    np.random.seed(2)
    pixels("other", 3)
    assert (pixels("r865") == first).all()
    random.seed(1)
    assert random.getstate() == before


def test_the_number_of_draws_does_not_depend_on_the_text() -> None:
    next_draws = set()
    for text in ("2222", "aaaa", "jjjj", "WmR8"):
        rng = random.Random(5)
        RENDER(text, rng)
        next_draws.add(rng.random())
    assert len(next_draws) == 1


# -- labels ---------------------------------------------------------------------------------------------


def test_there_are_31_classes() -> None:
    assert article.CLASSES == "23456789abcdefghjkmnpqrstuvwxyz"


def test_characters_of_labels_have_the_expected_frequencies() -> None:
    count = Counter("".join(labels(article.CLASSES, 10_000)))
    letters = {c: 0.5 * (1 if c == "j" else 2) / 45 for c in article.CLASSES[8:]}
    expected = {**dict.fromkeys("23456789", 0.5 / 8), **letters}
    assert set(count) == set(expected)
    chi_square = sum((count[c] - 40_000 * p) ** 2 / (40_000 * p) for c, p in expected.items())
    assert chi_square < 59.7  # 30 degrees of freedom, p = 0.001


def test_the_positions_of_a_label_are_independent() -> None:
    kinds = Counter(tuple(c.isdigit() for c in text) for text in labels(article.CLASSES, 10_000))
    assert len(kinds) == 16
    assert sum((n - 625) ** 2 / 625 for n in kinds.values()) < 37.7  # 15 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("alphabet", "expected"),
    [
        (article.CLASSES.upper(), article.CLASSES.upper()),
        ("0123456789", "23456789"),
        ("abcdefghij", "abcdefghj"),
        ("0Ol1A7", "A7"),
        ("x", "x"),
    ],
    ids=["upper case", "digits", "letters", "some of each", "one"],
)
def test_labels_use_the_characters_common_to_alphabet_and_generator(alphabet: str, expected: str) -> None:
    assert set("".join(labels(alphabet, 2_000))) == set(expected)


def test_the_case_of_the_alphabet_changes_only_the_case_of_labels() -> None:
    assert labels(article.CLASSES.upper(), 50) == [text.upper() for text in labels(article.CLASSES, 50)]


def test_half_of_the_positions_are_digits_for_any_alphabet() -> None:
    text = "".join(labels("2abcdefgh", 10_000))
    assert abs(text.count("2") / len(text) - 0.5) < 0.01


@pytest.mark.parametrize("length", [1, 8])
def test_a_label_has_the_given_length(length: int) -> None:
    assert {len(text) for text in labels(article.CLASSES, 20, length)} == {length}


def test_an_alphabet_without_any_of_the_classes_is_rejected() -> None:
    with pytest.raises(UserError, match=r"captcha.alphabet=01lo: .*none of .* is in the alphabet"):
        article.sample_label("01lo", 4, random.Random(0))


# -- images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(1, 9))
@pytest.mark.parametrize("size", [(60, 30), (120, 50), (100, 100), (333, 77)], ids=str)
def test_characters_are_visible_in_any_length_and_size(size: tuple[int, int], length: int) -> None:
    render = article.make_renderer(*size, FONTS)
    text = "r865mwj2"[:length]
    image, background = (render(t, random.Random(length)) for t in (text, " " * length))
    assert (image.mode, image.size) == ("RGB", size)
    changed = (np.asarray(image) != np.asarray(background)).any(axis=2).mean()
    assert 0.005 < changed < 0.5


@pytest.mark.parametrize("position", range(4))
def test_a_character_changes_only_its_own_tile(position: int) -> None:
    """A rotated tile extends to the right and below."""
    for seed in range(30):
        text = "".join("K" if i == position else " " for i in range(4))
        rows, columns = np.nonzero((pixels(text, seed) != pixels("    ", seed)).any(axis=2))
        assert len(rows) >= 20, f"seed {seed}: hardly visible"
        assert columns.min() >= position * TILE - BLUR_RADIUS
        assert columns.max() < position * TILE + TILTED + BLUR_RADIUS
        assert rows.min() >= (50 - TILE) // 2 - BLUR_RADIUS


@pytest.mark.parametrize("other", article.CLASSES.replace("8", ""))
def test_every_class_has_its_own_shape(other: str) -> None:
    different = [(pixels("8888", seed) != pixels("888" + other, seed)).any() for seed in range(10)]
    assert all(different)


def test_a_letter_is_drawn_in_either_case(
    render_with: Callable[..., npt.NDArray[np.int16]],
) -> None:
    seeds = range(20)
    lower = [pixels("aaaa", seed) for seed in seeds]
    assert all((one == pixels("AAAA", seed)).all() for one, seed in zip(lower, seeds, strict=True))
    capitals = [render_with("aaaa", seed, _CASE_FORMS={"a": "A"}) for seed in seeds]
    assert sum((one == other).all() for one, other in zip(lower, capitals, strict=True)) < 10


def test_a_j_is_always_a_capital(render_with: Callable[..., npt.NDArray[np.int16]]) -> None:
    for seed in range(10):
        assert (pixels("jjjj", seed) == render_with("jjjj", seed, _CASE_FORMS={"j": "J"})).all()


def test_the_background_is_light() -> None:
    for seed in range(20):
        assert np.median(pixels("r865", seed).mean(axis=2)) > 190


def test_every_background_color_occurs(render_with: Callable[..., npt.NDArray[np.int16]]) -> None:
    """The upper right corner is outside of the glow and the tiles."""
    corners = Counter(tuple(render_with("r865", seed, NUM_RINGS=0)[0, -1]) for seed in range(200))
    assert {ImageColor.getrgb(color) for color in article.LIGHT_COLORS} == set(dict(corners.most_common(8)))


def test_the_glow_fades_from_the_center_to_the_corners() -> None:
    glow = np.asarray(article._glow_mask(120, 50))
    assert glow[24:26, 59:61].min() >= 250
    assert 12 <= glow[25, 0] <= 16, "5 % at the sides"
    assert glow[[0, 0, -1, -1], [0, -1, 0, -1]].max() == 0
    assert (glow == glow[::-1, ::-1]).all()


def test_rings_are_white(render_with: Callable[..., npt.NDArray[np.int16]]) -> None:
    """With everything else black, each pixel is the coverage by rings."""
    black = ("#000000",)
    for seed in range(10):
        rings = render_with("r865", seed, LIGHT_COLORS=black, DARK_COLORS=black)
        assert (rings == rings[..., :1]).all()
        assert rings.max() > 240
        assert 250 < rings[..., 0].sum() / 255 < 700, (
            "about 15 x 2 pi x 4.5 x 1.2 pixels, minus those outside"
        )


def test_rings_cover_the_text(render_with: Callable[..., npt.NDArray[np.int16]]) -> None:
    for seed in range(10):
        image, without_rings = pixels("WWWW", seed), render_with("WWWW", seed, NUM_RINGS=0)
        assert (image >= without_rings).all(), "rings only lighten"
        assert image.min(axis=2)[without_rings.mean(axis=2) < 128].max() > 230, "some text is covered"


def test_a_ring_has_the_given_radius_and_width() -> None:
    ring = np.asarray(article._ring_mask(5.0, 1.2))
    center = ring.shape[0] // 2
    assert ring[center, center] == 0
    offsets = np.nonzero(ring[center])[0] - center + 0.5
    assert abs(offsets.max() - 5) < 1
    assert abs(offsets.min() + 5) < 1
    assert abs(ring.sum() / 255 - 2 * np.pi * 5 * 1.2) < 1


def test_an_outline_is_hollow() -> None:
    filled, outlined = (article._glyph_mask("E", FONTS[2], 27, width, TILE) for width in (0, 1))
    inside = np.asarray(filled) == 255
    assert inside.sum() > 50
    assert (np.asarray(outlined)[inside] == 0).all()
    assert np.asarray(outlined).max() == 255


@pytest.mark.parametrize("size", [27, 33, 40])
def test_no_character_is_wider_than_its_tile(size: int) -> None:
    for path in FONTS:
        for character in article.DIGITS + article.LETTERS:
            assert article._fit_font(path, size, character, TILE).getlength(character) <= TILE
