"""Render images in parallel processes.

A worker is `python -m captcha_exp.data.sources DATA CAPTCHA`, with two config groups as JSON. It reads one
line of image indices per chunk and writes raw pixels. It exits when standard input is closed, and thus with
its parent. Each image has its own random generator, seeded by (seed, index): the images do not depend on the
number of workers or on their order.
"""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import numpy.typing as npt

from captcha_exp.config import CaptchaConfig, FolderConfig, GeneratorConfig, data_from_json, to_dict
from captcha_exp.data import images
from captcha_exp.data.resize import resize
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
    with progress_bar(f"Rendering {len(indices):,} images", len(indices)) as bar:

        def render_chunks() -> None:
            with _start_worker(data, captcha) as render:
                for start, chunk in pending:
                    render(chunk, rendered[start : start + len(chunk)])
                    bar.advance(len(chunk))

        with ThreadPoolExecutor(num_workers) as threads:
            try:
                for future in as_completed([threads.submit(render_chunks) for _ in range(num_workers)]):
                    future.result()
            finally:  # after a failure or Ctrl-C, the other threads stop at the end of their chunk
                for _ in pending:
                    pass
    seconds = time.perf_counter() - start_time
    logger.info(
        f"Rendered {len(indices):,} images in {seconds:.1f} s ({len(indices) / seconds:,.0f} images/s)"
    )
    return rendered


@contextlib.contextmanager
def _start_worker(
    data: GeneratorConfig, captcha: CaptchaConfig
) -> Iterator[Callable[[Sequence[int], npt.NDArray[np.uint8]], None]]:
    """Start a rendering process, and yield a function that renders the images of indices into an array."""
    configs = [json.dumps(to_dict(group)) for group in (data, captcha)]
    # One thread each: the parallelism is in the number of workers.
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    package_parent = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    with (
        tempfile.TemporaryFile() as stderr,  # not a pipe, which would fill up and block the worker
        subprocess.Popen(
            # -P: do not import captcha.py from the working directory.
            [sys.executable, "-P", "-m", "captcha_exp.data.sources", *configs],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, **one_thread, "PYTHONPATH": path},
        ) as process,
    ):

        def render(indices: Sequence[int], pixels: npt.NDArray[np.uint8]) -> None:
            assert process.stdin is not None
            assert isinstance(process.stdout, io.BufferedReader)
            with contextlib.suppress(BrokenPipeError):  # it has exited; there are no pixels to read, either
                os.write(process.stdin.fileno(), json.dumps(list(indices)).encode() + b"\n")
            if process.stdout.readinto(pixels.data) != pixels.nbytes:
                code = process.wait()
                stderr.seek(0)
                lines = stderr.read().decode(errors="replace").strip().splitlines() or ["no error output"]
                raise RunFailed(f"a rendering process exited with code {code}: {lines[-1]}")

        try:
            yield render
        finally:
            process.kill()  # it has nothing to clean up


def worker_main() -> None:
    """Render chunks of images for the parent process until standard input is closed."""
    output = sys.stdout.buffer
    sys.stdout = sys.stderr  # output of libraries must not mix with the pixels
    data, captcha = data_from_json(sys.argv[1]), CaptchaConfig(**json.loads(sys.argv[2]))
    assert not isinstance(data, FolderConfig)  # its images are decoded, not rendered
    generator = get_renderer_spec(data)
    render = generator.make_renderer()
    for line in sys.stdin:
        for index in json.loads(line):
            rng = image_rng(data, index)
            pixels = images.to_array(render(generator.sample_label(captcha, rng), rng), captcha.channels)
            output.write(resize(pixels[None], captcha.height, captcha.width).tobytes())
        output.flush()
