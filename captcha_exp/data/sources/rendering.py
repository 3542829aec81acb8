"""Render images in parallel processes.

A worker is `python -m captcha_exp.data.sources`. It reads the config as one JSON line, then one line of image
indices per chunk, and writes raw pixels. It exits when standard input is closed, and thus with its parent.
Each image has its own random generator, seeded by (seed, index): the images do not depend on the number of
workers or on their order.
"""

import json
import logging
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
from captcha_exp.runtime.console import progress_bar

logger = logging.getLogger(__name__)

CHUNK_SIZE = 100  # images per request: about 0.1 s, which keeps all workers busy until the end


def render_images(
    data: GeneratorConfig, captcha: CaptchaConfig, indices: Sequence[int]
) -> npt.NDArray[np.uint8]:
    """Render the images of these indices in parallel; returns (N, H, W, C) uint8.

    Raises:
        RunFailed: a rendering process failed; the line has the last line of its error output.
    """
    start_time = time.perf_counter()
    shape = (captcha.height, captcha.width, captcha.channels)
    rendered = np.empty((len(indices), *shape), np.uint8)
    chunks = [(start, indices[start : start + CHUNK_SIZE]) for start in range(0, len(indices), CHUNK_SIZE)]
    num_workers = min(int(data.workers), len(chunks))
    pending = iter(chunks)  # shared by the threads
    stop = threading.Event()  # set on the first failure or Ctrl-C
    with progress_bar(f"Rendering {len(indices):,} images", len(indices)) as bar:

        def render_chunks() -> None:
            with _Worker(data, captcha) as worker:
                for start, chunk in pending:
                    pixels = worker.render(chunk, int(np.prod(shape)) * len(chunk))
                    rendered[start : start + len(chunk)] = np.frombuffer(pixels, np.uint8).reshape(-1, *shape)
                    bar.advance(len(chunk))
                    if stop.is_set():
                        return

        with ThreadPoolExecutor(num_workers) as threads:
            try:
                for future in as_completed([threads.submit(render_chunks) for _ in range(num_workers)]):
                    future.result()
            except BaseException:
                stop.set()
                raise
    seconds = time.perf_counter() - start_time
    logger.info(
        f"Rendered {len(indices):,} images in {seconds:.1f} s ({len(indices) / seconds:,.0f} images/s)"
    )
    return rendered


class _Worker:
    """A handle of a rendering process."""

    def __init__(self, data: GeneratorConfig, captcha: CaptchaConfig) -> None:
        # One thread each: the parallelism is in the number of workers.
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        package_parent = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
        # Not a pipe, which would fill up and block the worker.
        self.stderr_file = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self.process = subprocess.Popen(
            # -P: do not import captcha.py from the working directory.
            [sys.executable, "-P", "-m", "captcha_exp.data.sources"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr_file,
            env={**os.environ, **one_thread, "PYTHONPATH": path},
        )
        self._send({"data": to_dict(data), "captcha": to_dict(captcha)})

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()  # it has nothing to clean up
        self.process.communicate()
        self.stderr_file.close()

    def render(self, indices: Sequence[int], num_bytes: int) -> bytes:
        self._send(list(indices))
        assert self.process.stdout is not None
        pixels = self.process.stdout.read(num_bytes)
        if len(pixels) != num_bytes:
            raise self._make_error()
        return pixels

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
        lines = self.stderr_file.read().decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else "no error output"
        return RunFailed(f"a rendering process exited with code {code}: {reason}")


def worker_main() -> None:
    """Render chunks of images for the parent process until standard input is closed."""
    output = sys.stdout.buffer
    sys.stdout = sys.stderr  # output of libraries must not mix with the pixels
    request = json.loads(sys.stdin.readline())
    data = data_from_json(json.dumps(request["data"]))
    assert not isinstance(data, FolderConfig)  # its images are decoded, not rendered
    captcha = CaptchaConfig(**request["captcha"])
    generator = get_renderer_spec(data)
    render = generator.make_renderer()
    for line in sys.stdin:
        rendered = []
        for index in json.loads(line):
            rng = image_rng(data, index)
            image = render(generator.sample_label(captcha, rng), rng)
            rendered.append(images.to_array(image, captcha.channels))
        output.write(images.resize(np.stack(rendered), captcha.height, captcha.width).tobytes())
        output.flush()
