"""Labelled pictures, drawn by a generator.

Drawing runs in processes of its own, one for each worker: a generator keeps its chance in a module, where
each process can be handed a seeded stand-in. A worker is this module, started as a program; it reads one
JSON line that says what to draw and then one line for each block of pictures, and answers with raw bytes. It
ends with its standard input, so with its parent, however that ends. Every picture has a random stream of its
own, from (seed, index): the same pictures come out of any number of workers, in any order.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFont

from captcha_exp import chance, pixels
from captcha_exp.config import Captcha, CaptchaLibrary, Data, Drawn, WheezyLibrary, data_from_json, to_dict
from captcha_exp.display import Display
from captcha_exp.errors import RunFailed, UserError

Draw = Callable[[str, random.Random], Image.Image]

BLOCK = 100  # pictures asked for at a time: a tenth of a second, small enough to share the last ones fairly


@dataclass(frozen=True)
class Library:
    """A generator: the package whose version decides the pixels, its own fonts, and how it comes to draw."""

    package: str
    own_fonts: Sequence[Path]
    make: Callable[[], Draw]


def library(data: Data) -> Library:
    """The generator of a config.

    Raises:
        UserError: it brings no font and the config names none.
    """
    match data:
        case CaptchaLibrary():
            from captcha.image import DEFAULT_FONTS

            return Library("captcha", [Path(path) for path in DEFAULT_FONTS], lambda: _captcha(data))
        case WheezyLibrary():
            if not data.fonts:
                raise UserError("data.fonts=[]: wheezy.captcha brings none; name one, such as DejaVuSans.ttf")
            return Library("wheezy.captcha", [], lambda: _wheezy(data))
        case _:
            assert_never(data)


def label(data: Drawn, captcha: Captcha, index: int) -> str:
    """The text in picture number `index`."""
    return _label(captcha, _stream(data, index))


def _stream(data: Drawn, index: int) -> random.Random:
    return chance.stream(data.seed, "picture", index)


def _label(captcha: Captcha, stream: random.Random) -> str:
    return "".join(stream.choices(captcha.alphabet, k=captcha.length))


def origin(data: Data) -> dict[str, Any]:
    """Everything beside the config that the pixels of a source depend on: packages and font files."""
    from PIL import features

    package = library(data).package
    return {
        "package": f"{package} {version(package)}",
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
    import matplotlib

    free = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = []
    for name in data.fonts:
        path = next((path for path in (Path(name).expanduser(), free / name) if path.is_file()), None)
        if path is None:
            choices = ", ".join(sorted(path.name for path in free.glob("DejaVu*.ttf")))
            raise UserError(f"data.fonts: {name!r} is no file and no font of matplotlib; it brings {choices}")
        found.append(path)
    return found


def draw(data: Data, captcha: Captcha, indices: Sequence[int], display: Display) -> npt.NDArray[np.uint8]:
    """(N, H, W, C) uint8 of the pictures with these indices, drawn on all workers.

    Raises:
        RunFailed: a drawing process failed; the line gives its last words.
    """
    shape = (captcha.height, captcha.width, captcha.channels)
    pictures = np.empty((len(indices), *shape), np.uint8)
    blocks = [(start, indices[start : start + BLOCK]) for start in range(0, len(indices), BLOCK)]
    workers = min(int(data.workers), len(blocks))
    pending = iter(blocks)  # shared by the threads, each of which takes the next block
    stop = threading.Event()  # the first failure, or Ctrl-C, is heard at once and not after the last picture
    with display.bar(f"drawing {len(indices):,} pictures", len(indices)) as bar:

        def serve() -> None:
            with _Worker(data, captcha) as worker:
                for start, block in pending:
                    answer = worker.draw(block, int(np.prod(shape)) * len(block))
                    pictures[start : start + len(block)] = np.frombuffer(answer, np.uint8).reshape(-1, *shape)
                    bar.advance(len(block))
                    if stop.is_set():
                        return

        with ThreadPoolExecutor(workers) as threads:
            try:
                for future in as_completed([threads.submit(serve) for _ in range(workers)]):
                    future.result()
            except BaseException:
                stop.set()
                raise
    return pictures


def check_glyphs(data: Data, captcha: Captcha) -> None:
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


class _Worker:
    """A drawing process, seen from its parent."""

    def __init__(self, data: Drawn, captcha: Captcha) -> None:
        # One core each: the workers share the machine by processes, not by threads of their arithmetic.
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        home = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        # Not a pipe: one that nobody reads would fill up and stop the worker.
        self.words = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self.process = subprocess.Popen(
            # -P: a file captcha.py in the working directory is not the package of that name.
            [sys.executable, "-P", "-m", "captcha_exp.sources"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            env={**os.environ, **single, "PYTHONPATH": path},
        )
        self._tell({"data": to_dict(data), "captcha": to_dict(captcha)})

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()  # it holds nothing: whatever it has drawn has been read
        self.process.communicate()
        self.words.close()

    def draw(self, indices: Sequence[int], size: int) -> bytes:
        self._tell(list(indices))
        assert self.process.stdout is not None
        answer = self.process.stdout.read(size)
        if len(answer) != size:
            raise self._failure()
        return answer

    def _tell(self, what: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(what).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None

    def _failure(self) -> RunFailed:
        code = self.process.wait()
        self.words.seek(0)
        words = self.words.read().decode(errors="replace").strip().splitlines()
        reason = words[-1] if words else "it said nothing"
        return RunFailed(f"a drawing process ended with exit code {code}: {reason}")


# -- in the drawing process ----------------------------------------------------------------------------------


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


def _serve() -> None:
    """Draw blocks of pictures for the parent until standard input ends."""
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever a library prints must not get between the pictures
    order = json.loads(sys.stdin.readline())
    data = data_from_json(json.dumps(order["data"]))
    captcha = Captcha(**order["captcha"])
    draw_one = library(data).make()
    for line in sys.stdin:
        drawn = []
        for index in json.loads(line):
            stream = _stream(data, index)
            drawn.append(pixels.to_array(draw_one(_label(captcha, stream), stream), captcha.channels))
        answers.write(pixels.resize(np.stack(drawn), captcha.height, captcha.width).tobytes())
        answers.flush()


if __name__ == "__main__":
    _serve()
