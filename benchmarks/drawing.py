"""Pictures per second of each source, on one worker and on all cores, and what the second core brings.

Prints one JSON line for each source. The figures are those of this machine at this moment; the ratio is of
two measurements in one process.

    python benchmarks/drawing.py [--count 4000]
"""

import argparse
import dataclasses
import json
import time

from captcha_exp import compose, load
from captcha_exp.config import CaptchaLibrary, Config, WheezyLibrary
from captcha_exp.data import sources
from captcha_exp.runtime.console import Silent
from captcha_exp.runtime.device import this_machine


def pictures_per_second(config: Config, workers: int, count: int) -> float:
    """The rate, the start of the workers included."""
    assert isinstance(config.data, CaptchaLibrary | WheezyLibrary)  # conf/data/ has two generators
    data = dataclasses.replace(config.data, workers=workers)
    began = time.perf_counter()
    sources.draw(data, config.captcha, range(count), Silent())
    return count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=4000)
    count = parser.parse_args().count
    cores = this_machine().cores
    for source in ("captcha", "wheezy"):
        config = load(compose(f"data={source}"))
        one, all_cores = (pictures_per_second(config, workers, count) for workers in (1, cores))
        figures = {
            "one_worker": round(one),
            "all_cores": round(all_cores),
            "ratio": round(all_cores / one, 2),
        }
        print(
            json.dumps({"benchmark": "drawing", "source": source, "cores": cores, "count": count, **figures})
        )


if __name__ == "__main__":
    main()
