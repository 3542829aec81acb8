"""Measure the CPU time of drawing an image of the package `captcha`, by the package and by this project.

The two take turns in one process; prints one JSON line with the medians in milliseconds per image.

    python benchmarks/captcha_drawing.py [--count 2000]
"""

import argparse
import json
import random
import statistics
import time

from interference import interference

from captcha_exp import compose, load
from captcha_exp.config import CaptchaLibraryConfig
from captcha_exp.data.sources.captcha_package import Renderer, is_known
from captcha_exp.data.sources.generators import RenderFn, image_rng, make_package_renderer

ROUND = 50  # images


def draw(render: RenderFn, rngs: list[tuple[str, random.Random]]) -> tuple[float, list[bytes]]:
    """Return the CPU milliseconds per image, and the pixels."""
    start = time.thread_time()
    pixels = [render(text, rng).tobytes() for text, rng in rngs]
    return 1000 * (time.thread_time() - start) / len(rngs), pixels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000)
    count = parser.parse_args().count
    config = load(compose("experiment=quickstart"))
    data, captcha = config.data, config.captcha
    assert isinstance(data, CaptchaLibraryConfig)
    assert is_known()
    renderers = make_package_renderer(data.width, data.height, None), Renderer(data.width, data.height, None)
    seconds: list[tuple[float, float]] = []
    are_equal = True
    for start in range(0, count, ROUND):
        results = []
        for render in renderers:
            rngs = [image_rng(data, index) for index in range(start, start + ROUND)]
            texts = ["".join(rng.choices(captcha.alphabet, k=captcha.length)) for rng in rngs]
            results.append(draw(render, list(zip(texts, rngs, strict=True))))
        seconds.append((results[0][0], results[1][0]))
        are_equal = are_equal and results[0][1] == results[1][1]
    package, ours = (statistics.median(each) for each in zip(*seconds, strict=True))
    ratio = statistics.median(old / new for old, new in seconds)
    figures = {"package_ms": round(package, 3), "here_ms": round(ours, 3), "ratio": round(ratio, 2)}
    line = {"benchmark": "captcha_drawing", "count": count, **figures, "equal": are_equal}
    print(json.dumps({**line, **interference()}))


if __name__ == "__main__":
    main()
