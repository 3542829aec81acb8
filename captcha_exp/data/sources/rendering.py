"""Drawing on all cores: a process for each worker, asked for blocks of pictures.

A worker is this package, started as a program; it reads one JSON line that says what to draw and then one
line for each block of pictures, and answers with raw bytes. It ends with its standard input, so with its
parent, however that ends. Every picture has a random stream of its own, from (seed, index): the same pictures
come out of any number of workers, in any order.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from captcha_exp.config import CaptchaConfig, FolderConfig, GeneratorConfig, data_from_json, to_dict
from captcha_exp.data import images
from captcha_exp.data.sources.generators import get_renderer_spec, image_rng
from captcha_exp.errors import RunFailed
from captcha_exp.runtime.console import Display

CHUNK_SIZE = (
    100  # pictures asked for at a time: a tenth of a second, small enough to share the last ones fairly
)


def render_images(
    data: GeneratorConfig, captcha: CaptchaConfig, indices: Sequence[int], display: Display
) -> npt.NDArray[np.uint8]:
    """(N, H, W, C) uint8 of the pictures with these indices, drawn on all workers.

    Raises:
        RunFailed: a drawing process failed; the line gives its last words.
    """
    began = time.perf_counter()
    shape = (captcha.height, captcha.width, captcha.channels)
    pictures = np.empty((len(indices), *shape), np.uint8)
    blocks = [(start, indices[start : start + CHUNK_SIZE]) for start in range(0, len(indices), CHUNK_SIZE)]
    workers = min(int(data.workers), len(blocks))
    pending = iter(blocks)  # shared by the threads, each of which takes the next block
    stop = threading.Event()  # the first failure, or Ctrl-C, is heard at once and not after the last picture
    with display.progress_bar(f"drawing {len(indices):,} pictures", len(indices)) as bar:

        def serve() -> None:
            with _Worker(data, captcha) as worker:
                for start, block in pending:
                    answer = worker.render(block, int(np.prod(shape)) * len(block))
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
    seconds = time.perf_counter() - began
    display.info(
        f"drew {len(indices):,} pictures in {seconds:.1f} s ({len(indices) / seconds:,.0f} pictures/s)"
    )
    return pictures


class _Worker:
    """A drawing process, seen from its parent."""

    def __init__(self, data: GeneratorConfig, captcha: CaptchaConfig) -> None:
        # One core each: the workers share the machine by processes, not by threads of their arithmetic.
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        home = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        # Not a pipe: one that nobody reads would fill up and stop the worker.
        self.stderr_file = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self.process = subprocess.Popen(
            # -P: a file captcha.py in the working directory is not the package of that name.
            [sys.executable, "-P", "-m", "captcha_exp.data.sources"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr_file,
            env={**os.environ, **single, "PYTHONPATH": path},
        )
        self._send({"data": to_dict(data), "captcha": to_dict(captcha)})

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()  # it holds nothing: whatever it has drawn has been read
        self.process.communicate()
        self.stderr_file.close()

    def render(self, indices: Sequence[int], size: int) -> bytes:
        self._send(list(indices))
        assert self.process.stdout is not None
        answer = self.process.stdout.read(size)
        if len(answer) != size:
            raise self._make_error()
        return answer

    def _send(self, message: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._make_error() from None

    def _make_error(self) -> RunFailed:
        code = self.process.wait()
        self.stderr_file.seek(0)
        words = self.stderr_file.read().decode(errors="replace").strip().splitlines()
        reason = words[-1] if words else "it said nothing"
        return RunFailed(f"a drawing process ended with exit code {code}: {reason}")


def worker_main() -> None:
    """Draw blocks of pictures for the parent until standard input ends."""
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever a library prints must not get between the pictures
    order = json.loads(sys.stdin.readline())
    data = data_from_json(json.dumps(order["data"]))
    assert not isinstance(data, FolderConfig)  # a folder is read, not drawn
    captcha = CaptchaConfig(**order["captcha"])
    generator = get_renderer_spec(data)
    draw_one = generator.make_renderer()
    for line in sys.stdin:
        drawn = []
        for index in json.loads(line):
            chance = image_rng(data, index)
            picture = draw_one(generator.sample_label(captcha, chance), chance)
            drawn.append(images.to_array(picture, captcha.channels))
        answers.write(images.resize(np.stack(drawn), captcha.height, captcha.width).tobytes())
        answers.flush()
