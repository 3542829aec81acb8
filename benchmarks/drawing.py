"""Measure the images per second of each renderer, with one worker and on all cores.

Prints one JSON line per renderer. The figures depend on this machine and its load; the ratio compares two
measurements of one process.

    python benchmarks/drawing.py [--count 4000]
"""

import argparse
import dataclasses
import json
import time

from interference import interference

from captcha_exp import compose, load
from captcha_exp.config import CaptchaLibraryConfig, Config, WheezyLibraryConfig
from captcha_exp.data import sources
from captcha_exp.runtime.device import detect_machine


def images_per_second(config: Config, workers: int, count: int) -> float:
    """Return the rendering rate, including the start of the workers."""
    assert isinstance(
        config.data, CaptchaLibraryConfig | WheezyLibraryConfig
    )  # conf/data/ has two generators
    data = dataclasses.replace(config.data, workers=workers)
    began = time.perf_counter()
    sources.render_images(data, config.captcha, range(count))
    return count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=4000)
    count = parser.parse_args().count
    cores = detect_machine().num_cores
    for source in ("captcha", "wheezy"):
        config = load(compose(f"data={source}"))
        one, all_cores = (images_per_second(config, workers, count) for workers in (1, cores))
        figures = {
            "one_worker": round(one),
            "all_cores": round(all_cores),
            "ratio": round(all_cores / one, 2),
        }
        print(
            json.dumps(
                {
                    "benchmark": "drawing",
                    "source": source,
                    "cores": cores,
                    "count": count,
                    **figures,
                    **interference(),
                }
            )
        )


if __name__ == "__main__":
    main()
