"""The pictures of `article` are the recipe's: its labels, its layers, chance from the stream alone."""

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

FONTS = [
    Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    for name in ("cmss10.ttf", "STIXGeneral.ttf", "DejaVuSansMono-Bold.ttf")
]
DRAW = article.make_renderer(120, 50, FONTS)
TILE = 30  # pixels: 120 shared by four
TILTED = 43  # pixels: the side of a tile turned by 45 degrees
SOFT = 1  # pixels that the blur reaches


def pixels(text: str, seed: int = 0) -> npt.NDArray[np.int16]:
    return np.asarray(DRAW(text, random.Random(seed)), np.int16)


def labels(alphabet: str, count: int, length: int = 4) -> list[str]:
    stream = random.Random(7)
    return [article.sample_label(alphabet, length, stream) for _ in range(count)]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., npt.NDArray[np.int16]]:
    """A function that draws a picture with some constants of the recipe changed."""

    def draw(text: str, seed: int, **changed: object) -> npt.NDArray[np.int16]:
        with monkeypatch.context() as patch:
            for name, value in changed.items():
                patch.setattr(article, name, value)
            return pixels(text, seed)

    return draw


# -- chance ---------------------------------------------------------------------------------------------


def test_the_same_stream_draws_the_same_bytes_and_another_stream_others() -> None:
    pictures = [pixels("r865", seed) for seed in range(20)]
    again = article.make_renderer(120, 50, FONTS)
    for seed, picture in enumerate(pictures):
        assert (np.asarray(again("r865", random.Random(seed))) == picture).all()
    assert len({picture.tobytes() for picture in pictures}) == 20


def test_no_other_chance_and_no_earlier_picture_has_a_part_in_it() -> None:
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


def test_the_text_does_not_move_the_stream() -> None:
    """So that labels and pictures of one stream cannot run apart."""
    left = set()
    for text in ("2222", "aaaa", "jjjj", "WmR8"):
        stream = random.Random(5)
        DRAW(text, stream)
        left.add(stream.random())
    assert len(left) == 1


# -- labels ---------------------------------------------------------------------------------------------


def test_the_classes_are_31() -> None:
    assert article.CLASSES == "23456789abcdefghjkmnpqrstuvwxyz"


def test_labels_have_the_frequencies_of_the_recipe() -> None:
    count = Counter("".join(labels(article.CLASSES, 10_000)))
    letters = {c: 0.5 * (1 if c == "j" else 2) / 45 for c in article.CLASSES[8:]}
    share = {**dict.fromkeys("23456789", 0.5 / 8), **letters}
    assert set(count) == set(share)
    chi_square = sum((count[c] - 40_000 * p) ** 2 / (40_000 * p) for c, p in share.items())
    assert chi_square < 59.7  # of 30 degrees of freedom: one in a thousand is above


def test_the_places_of_a_label_are_independent() -> None:
    kinds = Counter(tuple(c.isdigit() for c in text) for text in labels(article.CLASSES, 10_000))
    assert len(kinds) == 16
    assert (
        sum((n - 625) ** 2 / 625 for n in kinds.values()) < 37.7
    )  # 15 degrees of freedom, one in a thousand


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
def test_a_label_has_what_both_the_alphabet_and_the_recipe_have(alphabet: str, expected: str) -> None:
    assert set("".join(labels(alphabet, 2_000))) == set(expected)


def test_the_case_of_the_alphabet_is_the_only_difference_it_makes() -> None:
    assert labels(article.CLASSES.upper(), 50) == [text.upper() for text in labels(article.CLASSES, 50)]


def test_half_of_the_places_are_digits_however_many_digits_there_are() -> None:
    text = "".join(labels("2abcdefgh", 10_000))
    assert abs(text.count("2") / len(text) - 0.5) < 0.01


@pytest.mark.parametrize("length", [1, 8])
def test_a_label_has_the_length_asked_for(length: int) -> None:
    assert {len(text) for text in labels(article.CLASSES, 20, length)} == {length}


def test_an_alphabet_without_any_of_the_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"none of .* is in the alphabet '01lo'"):
        article.sample_label("01lo", 4, random.Random(0))


# -- pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(1, 9))
@pytest.mark.parametrize("size", [(60, 30), (120, 50), (100, 100), (333, 77)], ids=str)
def test_any_length_in_any_size_has_ink(size: tuple[int, int], length: int) -> None:
    draw = article.make_renderer(*size, FONTS)
    text = "r865mwj2"[:length]
    picture, bare = (draw(t, random.Random(length)) for t in (text, " " * length))
    assert (picture.mode, picture.size) == ("RGB", size)
    changed = (np.asarray(picture) != np.asarray(bare)).any(axis=2).mean()
    assert 0.005 < changed < 0.5


@pytest.mark.parametrize("place", range(4))
def test_a_character_inks_its_own_tile_and_nothing_else(place: int) -> None:
    """A tilted tile reaches to the right and below, as far as its diagonal."""
    for seed in range(30):
        text = "".join("K" if i == place else " " for i in range(4))
        rows, columns = np.nonzero((pixels(text, seed) != pixels("    ", seed)).any(axis=2))
        assert len(rows) >= 20, f"seed {seed}: it can hardly be seen"
        assert columns.min() >= place * TILE - SOFT
        assert columns.max() < place * TILE + TILTED + SOFT
        assert rows.min() >= (50 - TILE) // 2 - SOFT


@pytest.mark.parametrize("other", article.CLASSES.replace("8", ""))
def test_every_class_has_a_shape_of_its_own(other: str) -> None:
    different = [(pixels("8888", seed) != pixels("888" + other, seed)).any() for seed in range(10)]
    assert all(different)


def test_a_letter_is_drawn_in_either_case_whatever_its_own(
    without: Callable[..., npt.NDArray[np.int16]],
) -> None:
    seeds = range(20)
    both = [pixels("aaaa", seed) for seed in seeds]
    assert all((one == pixels("AAAA", seed)).all() for one, seed in zip(both, seeds, strict=True))
    capitals = [without("aaaa", seed, _FORMS={"a": "A"}) for seed in seeds]
    assert sum((one == other).all() for one, other in zip(both, capitals, strict=True)) < 10


def test_a_j_is_always_a_capital(without: Callable[..., npt.NDArray[np.int16]]) -> None:
    for seed in range(10):
        assert (pixels("jjjj", seed) == without("jjjj", seed, _FORMS={"j": "J"})).all()


def test_the_ground_is_light() -> None:
    for seed in range(20):
        assert np.median(pixels("r865", seed).mean(axis=2)) > 190


def test_the_ground_has_each_of_the_colours(without: Callable[..., npt.NDArray[np.int16]]) -> None:
    """The upper right corner is beyond the glow and beyond the tiles."""
    corners = Counter(tuple(without("r865", seed, RINGS=0)[0, -1]) for seed in range(200))
    assert {ImageColor.getrgb(colour) for colour in article.LIGHT_COLORS} == set(dict(corners.most_common(8)))


def test_the_glow_is_full_in_the_middle_and_gone_at_the_corners() -> None:
    glow = np.asarray(article._glow_mask(120, 50))
    assert glow[24:26, 59:61].min() >= 250
    assert 12 <= glow[25, 0] <= 16, "a twentieth is left at the sides"
    assert glow[[0, 0, -1, -1], [0, -1, 0, -1]].max() == 0
    assert (glow == glow[::-1, ::-1]).all()


def test_rings_are_white(without: Callable[..., npt.NDArray[np.int16]]) -> None:
    """With all else in black, what is left of the picture is how much of each pixel they cover."""
    black = ("#000000",)
    for seed in range(10):
        rings = without("r865", seed, LIGHT=black, STRONG=black)
        assert (rings == rings[..., :1]).all()
        assert rings.max() > 240
        assert 250 < rings[..., 0].sum() / 255 < 700, (
            "pixels: about 15 x 2 pi x 4.5 x 1.2, less what is outside"
        )


def test_rings_lie_over_the_text(without: Callable[..., npt.NDArray[np.int16]]) -> None:
    for seed in range(10):
        picture, bare = pixels("WWWW", seed), without("WWWW", seed, RINGS=0)
        assert (picture >= bare).all(), "a ring only lightens"
        assert picture.min(axis=2)[bare.mean(axis=2) < 128].max() > 230, "some ink is covered"


def test_a_ring_is_hollow_and_as_large_as_the_recipe_says() -> None:
    ring = np.asarray(article._ring_mask(5.0, 1.2))
    middle = ring.shape[0] // 2
    assert ring[middle, middle] == 0
    along = np.nonzero(ring[middle])[0] - middle + 0.5
    assert abs(along.max() - 5) < 1
    assert abs(along.min() + 5) < 1
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
        for drawn in article.DIGITS + article.LETTERS:
            assert article._fit_font(path, size, drawn, TILE).getlength(drawn) <= TILE
