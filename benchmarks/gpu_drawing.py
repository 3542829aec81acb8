"""Render the article's images as files; started by gpu_session once per core.

    python benchmarks/gpu_drawing.py FOLDER WORKER WORKERS COUNT    every WORKERS-th of COUNT, from WORKER on

Does not import torch: a process starts in half a second.
"""

import random
import sys
from dataclasses import replace
from pathlib import Path

from captcha_exp import compose, load
from captcha_exp.config import ArticleConfig
from captcha_exp.data import sources


def draw(directory: Path, worker: int, workers: int, count: int) -> None:
    """Render images of experiment=article with the article's file names: GIFs named .png."""
    config = load(compose("experiment=article"))
    assert isinstance(config.data, ArticleConfig)
    render = sources.get_renderer_spec(config.data).make_renderer()
    labels = sources.generate_labels(replace(config.data, count=count), config.captcha)
    for number in range(worker, count, workers):
        text = labels[number]
        image = render(text, random.Random(number))
        image.quantize(256).save(directory / f"{number:05}-{text.upper()}.png", "GIF")


if __name__ == "__main__":
    draw(Path(sys.argv[1]), *map(int, sys.argv[2:]))
