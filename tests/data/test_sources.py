"""The pictures are a function of (seed, index), whoever draws them; a drawing process ends and says why."""

import hashlib
import os
import platform
import random
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from PIL import features

from captcha_exp.config import (
    ArticleConfig,
    CaptchaConfig,
    CaptchaLibraryConfig,
    GeneratorConfig,
    WheezyLibraryConfig,
)
from captcha_exp.data import images, sources
from captcha_exp.data.sources import article
from captcha_exp.errors import RunFailed, UserError
from captcha_exp.runtime import seeding
from captcha_exp.runtime.console import Display, NullDisplay, ProgressBar

CAPTCHA = CaptchaConfig(width=32, height=16, channels=3, alphabet="01234", length=2, case="fold")

SPLIT = {"validation_fraction": 0.1, "test_fraction": 0.1, "split_seed": 0, "cache": "unused"}
DRAWN = {"count": 250, "seed": 0, "width": 64, "height": 32, "workers": 1, **SPLIT}
LIBRARY = CaptchaLibraryConfig(source="captcha", fonts=(), **DRAWN)  # type: ignore[arg-type]  # a dict has one type
WHEEZY = WheezyLibraryConfig(source="wheezy", fonts=("DejaVuSans.ttf",), font_sizes=(20, 24), **DRAWN)  # type: ignore[arg-type]
ARTICLE = ArticleConfig(source="article", fonts=("DejaVuSans.ttf",), **DRAWN)  # type: ignore[arg-type]

each_source = pytest.mark.parametrize("data", [LIBRARY, WHEEZY, ARTICLE], ids=lambda data: str(data.source))


def draw(
    data: GeneratorConfig, indices: Sequence[int], display: Display | None = None
) -> npt.NDArray[np.uint8]:
    return sources.render_images(data, CAPTCHA, indices, display or NullDisplay())


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "captcha_exp.data.sources" in " ".join(p.cmdline())]


@pytest.fixture
def sixteen_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that several workers have something to do."""
    monkeypatch.setattr(sources.rendering, "BLOCK", 16)


@pytest.fixture
def nobody_hangs() -> Iterator[None]:
    """Ends drawing processes that are still there after 10 seconds, so that a hang becomes a failure."""

    def end() -> None:
        for child in children():
            child.kill()

    timer = threading.Timer(10, end)
    timer.start()
    yield
    timer.cancel()
    timer.join()


class Broken(NullDisplay):
    """A display whose bar fails after some blocks."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.calls = 0

    def bar(self, what: str, total: int) -> AbstractContextManager[ProgressBar]:
        return nullcontext(self)

    def advance(self, amount: int, note: str = "") -> None:
        self.calls += 1
        if self.calls == self.after:
            raise OSError("the terminal is gone")


# -- the same pictures ---------------------------------------------------------------------------------------


@each_source
def test_any_number_of_workers_draws_the_same_bytes(data: GeneratorConfig, sixteen_at_a_time: None) -> None:
    one, two, three = (draw(replace(data, workers=workers), range(50)).tobytes() for workers in (1, 2, 3))
    assert one == two == three


@each_source
def test_a_picture_depends_on_its_number_alone(data: GeneratorConfig, sixteen_at_a_time: None) -> None:
    """Not on how many there are, nor on which stand before it, nor on the size of the blocks."""
    together = draw(data, range(40))
    backwards = draw(replace(data, count=999), range(39, -1, -1))
    assert (backwards[::-1] == together).all()
    assert (draw(data, [17])[0] == together[17]).all()


@each_source
def test_another_seed_draws_other_pictures_and_labels(data: GeneratorConfig) -> None:
    other = replace(data, seed=1)
    assert (draw(data, range(8)) != draw(other, range(8))).any(axis=(1, 2, 3)).all()
    assert [sources.generate_label(data, CAPTCHA, i) for i in range(20)] != [
        sources.generate_label(other, CAPTCHA, i) for i in range(20)
    ]


@each_source
def test_pictures_differ_from_each_other(data: GeneratorConfig) -> None:
    assert len({picture.tobytes() for picture in draw(data, range(30))}) == 30


VERSIONS = {
    "pillow": "13.0.0",
    "freetype": "2.14.3",
    "captcha": "0.7.1",
    "wheezy.captcha": "3.2.2",
    "python": "3.11",
}
PINNED = {
    "captcha": "3fb73ba6925292b0ea6a2288d73d9cc2a66c013750a6924183c0a7adde87fafb",
    "wheezy": "254dc0dd7d07553c7238367174945950974aa6e170ee181f542affe2f4668b1b",
    "article": "91259ee9a60e4cdc98cb1f72762e39252f8a40e7434e784aa5b0dcacf591d7c3",
}


@each_source
def test_the_bytes_of_known_versions_are_known(data: GeneratorConfig) -> None:
    """Another version of a package may draw otherwise; then there is only that it repeats."""
    pictures = draw(data, range(5)).tobytes()
    here = {name: version(name) for name in ("pillow", "captcha", "wheezy.captcha")}
    here["freetype"] = features.version("freetype2") or ""
    here["python"] = ".".join(platform.python_version_tuple()[:2])
    if here == VERSIONS:
        assert hashlib.sha256(pictures).hexdigest() == PINNED[data.source]
    assert draw(data, range(5)).tobytes() == pictures


@each_source
def test_grey_pictures_have_one_channel(data: GeneratorConfig) -> None:
    grey = replace(CAPTCHA, channels=1)
    assert sources.render_images(data, grey, range(3), NullDisplay()).shape == (3, 16, 32, 1)


# -- the labels ----------------------------------------------------------------------------------------------


@each_source
def test_the_label_is_the_text_that_the_worker_draws(
    data: GeneratorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn here, from the label as it is told, the picture is the worker's to the byte."""
    import captcha.image
    import wheezy.captcha.image

    monkeypatch.setattr(captcha.image, "secrets", secrets)
    monkeypatch.setattr(wheezy.captcha.image, "random", random)
    by_worker = draw(data, range(6))
    library = sources.get_renderer_spec(data)
    draw_one = library.make_renderer()
    for index in range(6):
        stream = seeding.rng(data.seed, "picture", index)
        library.sample_label(CAPTCHA, stream)  # the text comes first out of the stream
        image = draw_one(sources.generate_label(data, CAPTCHA, index), stream)
        ours = images.resize(images.to_array(image, 3)[None], 16, 32)[0]
        assert (ours == by_worker[index]).all()


@each_source
def test_labels_take_every_character_about_as_often(data: GeneratorConfig) -> None:
    text = "".join(sources.generate_label(data, CAPTCHA, index) for index in range(1000))
    assert len(text) == 2000
    characters = "234" if data.source == "article" else "01234"  # its recipe has no 0 and no 1
    counts, share = {c: text.count(c) for c in characters}, 1 / len(characters)
    assert sum(counts.values()) == 2000
    assert all(abs(n - 2000 * share) < 5 * (2000 * share * (1 - share)) ** 0.5 for n in counts.values())


@each_source
def test_labels_at_once_are_those_of_each_picture(data: GeneratorConfig) -> None:
    """A generator that is seeded again gives the stream of a new one."""
    source = sources.make_source(data, CAPTCHA, NullDisplay())
    assert source.scan(NullDisplay()).labels == [
        sources.generate_label(data, CAPTCHA, index) for index in range(data.count)
    ]


def test_the_article_s_labels_are_written_as_the_alphabet_writes_them() -> None:
    """An alphabet in capitals has the same texts in capitals, under the same pictures."""
    small, large = (replace(CAPTCHA, alphabet=alphabet) for alphabet in ("34abcdef", "34ABCDEF"))
    texts = [sources.generate_label(ARTICLE, small, index) for index in range(100)]
    assert set("".join(texts)) == set("34abcdef")
    assert [sources.generate_label(ARTICLE, large, index) for index in range(100)] == [
        t.upper() for t in texts
    ]
    pictures = [
        sources.render_images(ARTICLE, captcha, range(5), NullDisplay()) for captcha in (small, large)
    ]
    assert (pictures[0] == pictures[1]).all()


def test_half_of_the_article_s_characters_are_digits_among_however_many_letters() -> None:
    """In 4,000 characters, half of them within four standard deviations."""
    letters = replace(CAPTCHA, alphabet="7abcdefgh", length=4)
    text = "".join(sources.generate_label(ARTICLE, letters, index) for index in range(1000))
    assert abs(text.count("7") - 2000) < 4 * (4000 * 0.5 * 0.5) ** 0.5


# -- the parent ----------------------------------------------------------------------------------------------


@each_source
def test_the_parents_chance_is_untouched(data: GeneratorConfig) -> None:
    import captcha.image
    import wheezy.captcha.image

    state = random.getstate()
    draw(data, range(3))
    assert random.getstate() == state
    assert vars(captcha.image)["secrets"] is secrets
    assert vars(wheezy.captcha.image)["random"] is random


def test_no_process_is_left_after_drawing() -> None:
    draw(replace(LIBRARY, workers=2), range(150))
    assert children() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_no_process_is_left_after_an_exception(workers: int, sixteen_at_a_time: None) -> None:
    with pytest.raises(OSError, match="the terminal is gone"):
        draw(replace(LIBRARY, workers=workers), range(100), Broken(after=2))
    assert children() == []


def test_the_first_failure_stops_the_other_workers(sixteen_at_a_time: None) -> None:
    """Who waits an hour for pictures is not to wait that hour for the news that drawing has failed."""
    display = Broken(after=2)
    with pytest.raises(OSError, match="the terminal is gone"):
        draw(replace(LIBRARY, workers=2), range(16 * 50), display)
    assert display.calls < 25


WAIT = """
import sys, time
from captcha_exp.display import Silent
from captcha_exp import sources
from test_sources import CAPTCHA, LIBRARY, Broken, replace

class Stuck(Broken):
    def advance(self, amount, note=""):
        print("drawn", flush=True)
        time.sleep(600)

sources.draw(replace(LIBRARY, workers=2), CAPTCHA, range(250), Stuck(0))
"""


def test_a_worker_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", WAIT],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert parent.stdout is not None
    with parent.stdout:
        assert parent.stdout.readline() == b"drawn\n"
        workers = psutil.Process(parent.pid).children()
        parent.kill()
        parent.wait()
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=10)
    for worker in alive:
        worker.kill()
    assert alive == []


# -- what goes wrong -----------------------------------------------------------------------------------------


@pytest.fixture
def shadow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a package `captcha` of these lines before the real one, for the drawing processes alone."""

    def put(image: str) -> None:
        package = tmp_path / "captcha"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "image.py").write_text(f"DEFAULT_FONTS = []\n{image}")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return put


def test_a_worker_that_dies_fails_the_run_with_its_last_words(shadow: Any) -> None:
    shadow("raise ImportError('libfreetype is of another age')")
    with pytest.raises(RunFailed) as failure:
        draw(replace(LIBRARY, workers=2), range(150))
    (line,) = failure.value.lines
    assert line == "a drawing process ended with exit code 1: ImportError: libfreetype is of another age"
    assert children() == []


def test_a_killed_worker_fails_the_run(shadow: Any) -> None:
    shadow("import psutil; psutil.Process().kill()")
    with pytest.raises(RunFailed, match=r"a drawing process ended with exit code (-9|15): it said nothing"):
        draw(LIBRARY, range(5))


def test_a_worker_that_dies_in_the_middle_fails_the_run(shadow: Any, sixteen_at_a_time: None) -> None:
    """It draws one block, then the text of the next is too much for it."""
    shadow(
        "from PIL import Image\n"
        "class ImageCaptcha:\n"
        "    drawn = 0\n"
        "    def __init__(self, *a, **k): pass\n"
        "    def generate_image(self, text):\n"
        "        self.drawn += 1\n"
        "        if self.drawn > 20: raise MemoryError('no room for a picture')\n"
        "        return Image.new('RGB', (64, 32))\n"
    )
    with pytest.raises(RunFailed, match="exit code 1: MemoryError: no room for a picture"):
        draw(LIBRARY, range(50))


def test_a_library_that_talks_does_not_get_between_the_pictures(shadow: Any, nobody_hangs: None) -> None:
    """200 kB are more than a pipe holds: somebody has to read what is said, or both sides wait for ever."""
    shadow(
        "from PIL import Image\n"
        "print('deprecated! ' * 20_000)\n"
        "class ImageCaptcha:\n"
        "    def __init__(self, *a, **k): pass\n"
        "    def generate_image(self, text): return Image.new('RGB', (64, 32), (1, 2, 3))\n"
    )
    assert (draw(LIBRARY, range(5)) == [1, 2, 3]).all()


def test_files_of_the_working_directory_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody's captcha.py beside their pictures is not the library, and is not run."""
    (tmp_path / "captcha.py").write_text("raise SystemExit('the wrong captcha')")
    monkeypatch.chdir(tmp_path)
    assert draw(LIBRARY, range(2)).shape == (2, 16, 32, 3)


def test_a_missing_font_is_named_with_those_that_there_are() -> None:
    with pytest.raises(UserError) as error:
        sources.check_glyphs(replace(LIBRARY, fonts=("Comic.ttf",)), CAPTCHA)
    (line,) = error.value.lines
    assert line.startswith("data.fonts: 'Comic.ttf' is no file and no font of matplotlib; it brings DejaVu")


def test_a_file_that_is_no_font_is_named() -> None:
    with pytest.raises(UserError) as error:
        sources.check_glyphs(replace(LIBRARY, fonts=(__file__,)), CAPTCHA)
    (line,) = error.value.lines
    assert "data.fonts" in line
    assert Path(__file__).name in line


def test_characters_that_a_font_lacks_are_named() -> None:
    with pytest.raises(UserError) as error:
        sources.check_glyphs(
            replace(LIBRARY, fonts=("DejaVuSans.ttf", "DejaVuSansMono.ttf")),
            replace(CAPTCHA, alphabet="a中b文"),
        )
    (line,) = error.value.lines
    assert line.startswith("captcha.alphabet: DejaVuSans.ttf has no picture of '中文'")


def test_the_library_s_own_font_is_checked_too() -> None:
    with pytest.raises(UserError, match=r"DroidSansMono\.ttf has no picture of '中'"):
        sources.check_glyphs(LIBRARY, replace(CAPTCHA, alphabet="a中"))
    sources.check_glyphs(LIBRARY, replace(CAPTCHA, alphabet="aé+="))


@pytest.mark.parametrize(("data", "name"), [(WHEEZY, "wheezy.captcha"), (ARTICLE, "article")])
def test_a_generator_that_brings_no_font_asks_for_one_in_one_line(data: GeneratorConfig, name: str) -> None:
    with pytest.raises(UserError) as error:
        sources.make_source(replace(data, fonts=()), CAPTCHA, NullDisplay())
    assert error.value.lines == (f"data.fonts=[]: {name} brings none; name one, such as DejaVuSans.ttf",)


def test_an_alphabet_of_which_the_article_draws_nothing_is_one_line() -> None:
    with pytest.raises(UserError) as error:
        sources.make_source(ARTICLE, replace(CAPTCHA, alphabet="01lo"), NullDisplay()).scan(NullDisplay())
    (line,) = error.value.lines
    assert line.startswith("captcha.alphabet=01lo: data=article: ")
    assert f"none of {article.CLASSES} is in the alphabet" in line


def test_a_font_is_known_by_its_bytes_not_by_its_name(tmp_path: Path) -> None:
    (font,) = sources.font_files(WHEEZY)
    copy = tmp_path / "mine.ttf"
    copy.write_bytes(font.read_bytes())
    digest = hashlib.sha256(font.read_bytes()).hexdigest()
    assert sources.rendering_dependencies(replace(WHEEZY, fonts=(str(copy),)))["fonts"] == [digest]
    assert sources.rendering_dependencies(WHEEZY)["package"] == f"wheezy.captcha {version('wheezy.captcha')}"
    assert sources.rendering_dependencies(ARTICLE)["package"] == f"article {article.VERSION}"
    assert sources.rendering_dependencies(LIBRARY)["fonts"] == []
