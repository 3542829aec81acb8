"""Test that generated images depend only on (seed, index), and that rendering processes end or report why."""

import hashlib
import os
import platform
import random
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
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
from captcha_exp.data.resize import resize
from captcha_exp.data.sources import article, rendering
from captcha_exp.errors import RunFailed, UserError
from captcha_exp.runtime import seeding
from captcha_exp.runtime.console import ProgressBar

CAPTCHA = CaptchaConfig(
    width=32, height=16, channels=3, alphabet="01234", length=2, min_length=None, case="fold"
)

SPLIT = {
    "validation_fraction": 0.1,
    "test_fraction": 0.1,
    "folds": None,
    "fold": 0,
    "split_seed": 0,
    "cache": "unused",
}
GENERATOR = {
    "count": 250,
    "text": "characters",
    "seed": 0,
    "width": 64,
    "height": 32,
    "workers": 1,
    **SPLIT,
}
LIBRARY = CaptchaLibraryConfig(source="captcha", fonts=(), **GENERATOR)  # type: ignore[arg-type]  # a dict has one value type
WHEEZY = WheezyLibraryConfig(source="wheezy", fonts=("DejaVuSans.ttf",), font_sizes=(20, 24), **GENERATOR)  # type: ignore[arg-type]
ARTICLE = ArticleConfig(source="article", fonts=("DejaVuSans.ttf",), **GENERATOR)  # type: ignore[arg-type]

each_source = pytest.mark.parametrize("data", [LIBRARY, WHEEZY, ARTICLE], ids=lambda data: str(data.source))


def render(data: GeneratorConfig, indices: Sequence[int]) -> npt.NDArray[np.uint8]:
    return sources.render_images(data, CAPTCHA, indices)


def generate_labels(data: GeneratorConfig, captcha: CaptchaConfig, count: int) -> list[str]:
    return sources.generate_labels(replace(data, count=count), captcha)


def rendering_processes() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "captcha_exp.data.sources" in " ".join(p.cmdline())]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use chunks so small that every worker gets some."""
    monkeypatch.setattr(rendering, "CHUNK_SIZE", 16)


@pytest.fixture
def worker_timeout() -> Iterator[None]:
    """Kill rendering processes after 10 seconds: a deadlock then fails the test."""

    def kill_workers() -> None:
        for child in rendering_processes():
            child.kill()

    timer = threading.Timer(10, kill_workers)
    timer.start()
    yield
    timer.cancel()
    timer.join()


class FailingBar(ProgressBar):
    """A progress bar that raises after some chunks."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.calls = 0

    def advance(self, amount: int, status: str = "") -> None:
        self.calls += 1
        if self.calls == self.after:
            raise OSError("the terminal was closed")


@pytest.fixture
def failing_bar(monkeypatch: pytest.MonkeyPatch) -> FailingBar:
    """Replace the progress bar of rendering by one that raises after two chunks."""
    bar = FailingBar(after=2)
    monkeypatch.setattr(rendering, "progress_bar", lambda *_: nullcontext(bar))
    return bar


# -- reproducibility -----------------------------------------------------------------------------------------


@pytest.mark.long
@each_source
def test_images_do_not_depend_on_the_number_of_workers(data: GeneratorConfig, small_chunks: None) -> None:
    one, two, three = (render(replace(data, workers=workers), range(50)).tobytes() for workers in (1, 2, 3))
    assert one == two == three


@pytest.mark.long
@each_source
def test_an_image_depends_only_on_its_index(data: GeneratorConfig, small_chunks: None) -> None:
    """Not on the number of images, their order, or the chunk size."""
    together = render(data, range(40))
    backwards = render(replace(data, count=999), range(39, -1, -1))
    assert (backwards[::-1] == together).all()
    assert (render(data, [17])[0] == together[17]).all()


@each_source
def test_another_seed_gives_other_images_and_labels(data: GeneratorConfig) -> None:
    other = replace(data, seed=1)
    assert (render(data, range(8)) != render(other, range(8))).any(axis=(1, 2, 3)).all()
    assert generate_labels(data, CAPTCHA, 20) != generate_labels(other, CAPTCHA, 20)


@each_source
def test_all_images_are_different(data: GeneratorConfig) -> None:
    assert len({image.tobytes() for image in render(data, range(30))}) == 30


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
def test_pixels_of_pinned_versions_are_unchanged(data: GeneratorConfig) -> None:
    """With other versions of the packages, only reproducibility is tested."""
    pixels = render(data, range(5)).tobytes()
    installed = {name: version(name) for name in ("pillow", "captcha", "wheezy.captcha")}
    installed["freetype"] = features.version("freetype2") or ""
    installed["python"] = ".".join(platform.python_version_tuple()[:2])
    if installed == VERSIONS:
        assert hashlib.sha256(pixels).hexdigest() == PINNED[data.source]
    assert render(data, range(5)).tobytes() == pixels


@each_source
def test_grayscale_images_have_one_channel(data: GeneratorConfig) -> None:
    grayscale = replace(CAPTCHA, channels=1)
    assert sources.render_images(data, grayscale, range(3)).shape == (3, 16, 32, 1)


# -- labels --------------------------------------------------------------------------------------------------


@each_source
def test_the_label_is_the_rendered_text(data: GeneratorConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering the label in this process gives the pixels of the worker."""
    import captcha.image
    import wheezy.captcha.image

    monkeypatch.setattr(captcha.image, "secrets", secrets)
    monkeypatch.setattr(wheezy.captcha.image, "random", random)
    expected = render(data, range(6))
    spec = sources.get_renderer_spec(data)
    render_one = spec.make_renderer()
    for index in range(6):
        rng = seeding.rng(data.seed, "picture", index)
        label = spec.sample_label(CAPTCHA, rng)  # drawn before the image
        image = render_one(label, rng)
        pixels = resize(images.to_array(image, 3)[None], 16, 32)[0]
        assert (pixels == expected[index]).all()


@each_source
def test_characters_of_labels_are_uniform(data: GeneratorConfig) -> None:
    text = "".join(generate_labels(data, CAPTCHA, 1000))
    assert len(text) == 2000
    characters = "234" if data.source == "article" else "01234"  # its classes exclude 0 and 1
    counts, probability = {c: text.count(c) for c in characters}, 1 / len(characters)
    assert sum(counts.values()) == 2000
    assert all(
        abs(n - 2000 * probability) < 5 * (2000 * probability * (1 - probability)) ** 0.5
        for n in counts.values()
    )


def test_labels_of_the_article_have_the_case_of_the_alphabet() -> None:
    """An alphabet of capitals gives the same labels in capitals, and the same images."""
    lower, upper = (replace(CAPTCHA, alphabet=alphabet) for alphabet in ("34abcdef", "34ABCDEF"))
    labels = generate_labels(ARTICLE, lower, 100)
    assert set("".join(labels)) == set("34abcdef")
    assert generate_labels(ARTICLE, upper, 100) == [label.upper() for label in labels]
    rendered = [sources.render_images(ARTICLE, captcha, range(5)) for captcha in (lower, upper)]
    assert (rendered[0] == rendered[1]).all()


def test_half_of_the_characters_of_the_article_are_digits() -> None:
    """Within four standard deviations of 4,000 characters."""
    letters = replace(CAPTCHA, alphabet="7abcdefgh", length=4)
    text = "".join(generate_labels(ARTICLE, letters, 1000))
    assert abs(text.count("7") - 2000) < 4 * (4000 * 0.5 * 0.5) ** 0.5


# -- processes -----------------------------------------------------------------------------------------------


@each_source
def test_generators_of_the_parent_process_are_unchanged(data: GeneratorConfig) -> None:
    import captcha.image
    import wheezy.captcha.image

    state = random.getstate()
    render(data, range(3))
    assert random.getstate() == state
    assert vars(captcha.image)["secrets"] is secrets
    assert vars(wheezy.captcha.image)["random"] is random


def test_no_process_is_left_after_rendering() -> None:
    render(replace(LIBRARY, workers=2), range(150))
    assert rendering_processes() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_no_process_is_left_after_an_exception(
    workers: int, small_chunks: None, failing_bar: FailingBar
) -> None:
    with pytest.raises(OSError, match="the terminal was closed"):
        render(replace(LIBRARY, workers=workers), range(100))
    assert rendering_processes() == []


def test_the_first_failure_stops_the_other_workers(small_chunks: None, failing_bar: FailingBar) -> None:
    with pytest.raises(OSError, match="the terminal was closed"):
        render(replace(LIBRARY, workers=2), range(16 * 50))
    assert failing_bar.calls < 25


WAIT = """
import time
from captcha_exp.data.sources import rendering
from captcha_exp.runtime.console import ProgressBar
from test_sources import LIBRARY, nullcontext, render, replace

class BlockingBar(ProgressBar):
    def advance(self, amount, status=""):
        print("rendered", flush=True)
        time.sleep(600)

rendering.progress_bar = lambda *_: nullcontext(BlockingBar())
render(replace(LIBRARY, workers=2), range(250))
"""


def test_a_worker_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", WAIT],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert parent.stdout is not None
    with parent.stdout:
        assert parent.stdout.readline() == b"rendered\n"
        workers = psutil.Process(parent.pid).children()
        parent.kill()
        parent.wait()
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=10)
    for worker in alive:
        worker.kill()
    assert alive == []


# -- errors --------------------------------------------------------------------------------------------------


@pytest.fixture
def shadow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that shadows the package `captcha` in the rendering processes."""

    def write_package(image: str) -> None:
        package = tmp_path / "captcha"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "image.py").write_text(f"import secrets\nDEFAULT_FONTS = []\n{image}")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return write_package


def test_an_error_of_a_worker_fails_the_run_with_its_message(shadow: Any) -> None:
    shadow("raise ImportError('libfreetype is too old')")
    with pytest.raises(RunFailed) as failure:
        render(replace(LIBRARY, workers=2), range(150))
    (line,) = failure.value.lines
    assert line == "a rendering process exited with code 1: ImportError: libfreetype is too old"
    assert rendering_processes() == []


def test_a_killed_worker_fails_the_run(shadow: Any) -> None:
    shadow("import psutil; psutil.Process().kill()")
    with pytest.raises(RunFailed, match=r"a rendering process exited with code (-9|15): no error output"):
        render(LIBRARY, range(5))


def test_a_worker_that_fails_in_a_later_chunk_fails_the_run(shadow: Any, small_chunks: None) -> None:
    """The first chunk succeeds."""
    shadow(
        "from PIL import Image\n"
        "class ImageCaptcha:\n"
        "    count = 0\n"
        "    def __init__(self, *a, **k): pass\n"
        "    def generate_image(self, text):\n"
        "        self.count += 1\n"
        "        if self.count > 20: raise MemoryError('out of memory')\n"
        "        return Image.new('RGB', (64, 32))\n"
    )
    with pytest.raises(RunFailed, match="exited with code 1: MemoryError: out of memory"):
        render(LIBRARY, range(50))


def test_output_of_a_library_does_not_mix_with_the_pixels(shadow: Any, worker_timeout: None) -> None:
    """200 kB exceed the buffer of a pipe, which would deadlock if it is not read."""
    shadow(
        "from PIL import Image\n"
        "print('deprecated! ' * 20_000)\n"
        "class ImageCaptcha:\n"
        "    def __init__(self, *a, **k): pass\n"
        "    def generate_image(self, text): return Image.new('RGB', (64, 32), (1, 2, 3))\n"
    )
    assert (render(LIBRARY, range(5)) == [1, 2, 3]).all()


def test_files_of_the_working_directory_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file captcha.py in the working directory must not shadow the package."""
    (tmp_path / "captcha.py").write_text("raise SystemExit('the wrong captcha')")
    monkeypatch.chdir(tmp_path)
    assert render(LIBRARY, range(2)).shape == (2, 16, 32, 3)


def test_a_missing_font_is_an_error_that_lists_the_available_fonts() -> None:
    with pytest.raises(UserError) as error:
        sources.check_glyphs(replace(LIBRARY, fonts=("Comic.ttf",)), CAPTCHA)
    (line,) = error.value.lines
    assert line.startswith(
        "data.fonts: 'Comic.ttf' is neither a file nor a font of matplotlib, such as DejaVu"
    )


def test_a_file_that_is_not_a_font_is_an_error() -> None:
    with pytest.raises(UserError) as error:
        sources.check_glyphs(replace(LIBRARY, fonts=(__file__,)), CAPTCHA)
    (line,) = error.value.lines
    assert "data.fonts" in line
    assert Path(__file__).name in line


def test_missing_glyphs_are_an_error() -> None:
    with pytest.raises(UserError) as error:
        sources.check_glyphs(
            replace(LIBRARY, fonts=("DejaVuSans.ttf", "DejaVuSansMono.ttf")),
            replace(CAPTCHA, alphabet="a中b文"),
        )
    (line,) = error.value.lines
    assert line.startswith("captcha.alphabet: DejaVuSans.ttf has no glyphs for '中文'")


def test_the_default_font_of_the_library_is_checked() -> None:
    with pytest.raises(UserError, match=r"DroidSansMono\.ttf has no glyphs for '中'"):
        sources.check_glyphs(LIBRARY, replace(CAPTCHA, alphabet="a中"))
    sources.check_glyphs(LIBRARY, replace(CAPTCHA, alphabet="aé+="))


@pytest.mark.parametrize(("data", "name"), [(WHEEZY, "wheezy.captcha"), (ARTICLE, "article")])
def test_a_generator_without_default_fonts_needs_a_font(data: GeneratorConfig, name: str) -> None:
    with pytest.raises(UserError) as error:
        sources.make_source(replace(data, fonts=()), CAPTCHA)
    assert error.value.lines == (
        f"data.fonts=[]: {name} has no default font; add one, such as DejaVuSans.ttf",
    )


def test_an_alphabet_without_characters_of_the_article_is_an_error() -> None:
    with pytest.raises(UserError) as error:
        sources.make_source(ARTICLE, replace(CAPTCHA, alphabet="01lo")).scan()
    (line,) = error.value.lines
    assert line.startswith("captcha.alphabet=01lo: data=article: ")
    assert f"none of {article.CLASSES} is in the alphabet" in line


def test_a_font_is_identified_by_its_content(tmp_path: Path) -> None:
    (font,) = sources.font_files(WHEEZY)
    copy = tmp_path / "mine.ttf"
    copy.write_bytes(font.read_bytes())
    digest = hashlib.sha256(font.read_bytes()).hexdigest()
    assert sources.rendering_dependencies(replace(WHEEZY, fonts=(str(copy),)))["fonts"] == [digest]
    assert sources.rendering_dependencies(WHEEZY)["package"] == f"wheezy.captcha {version('wheezy.captcha')}"
    assert sources.rendering_dependencies(ARTICLE)["package"] == f"article {article.VERSION}"
    assert sources.rendering_dependencies(LIBRARY)["fonts"] == []
