"""Draw the article's pictures as files; started by gpu_session once for each core.

    python benchmarks/gpu_drawing.py FOLDER WORKER WORKERS COUNT    every WORKERS-th of COUNT, from WORKER on

Without torch, so that a start takes half a second.
"""

import random
import sys
from pathlib import Path

from captcha_exp import compose, load
from captcha_exp.config import ArticleConfig
from captcha_exp.data import sources


def draw(folder: Path, worker: int, workers: int, count: int) -> None:
    """Draw pictures of experiment=article with the article's names: GIFs whose names end in .png."""
    config = load(compose("experiment=article"))
    assert isinstance(config.data, ArticleConfig)
    draw_one = sources.get_renderer_spec(config.data).make_renderer()
    for number in range(worker, count, workers):
        text = sources.generate_label(config.data, config.captcha, number)
        picture = draw_one(text, random.Random(number))
        picture.quantize(256).save(folder / f"{number:05}-{text.upper()}.png", "GIF")


if __name__ == "__main__":
    draw(Path(sys.argv[1]), *map(int, sys.argv[2:]))
