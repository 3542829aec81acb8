"""How long a trace of a training takes, beside one step of that training on this machine's CPU.

Prints one JSON line: CPU seconds of the first trace of the process, with the import of torch's compiler; for
each batch size CPU seconds of its first trace and the median of all, CPU seconds of one real `train_step` in
fp32 on noise, and how many traces (the median) that step is worth. All share a process and its threads. A
trace and a step of a small batch come before those that count.

    python benchmarks/planning.py [--experiment article] [--sizes 25 50 100 200 400 800] [--runs 5]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from captcha_exp import compose, load
from captcha_exp.config import Config
from captcha_exp.dataset import Batch
from captcha_exp.memory.trace import trace
from captcha_exp.step import fresh_state, train_step

WARM_UP = 8  # pictures in a batch
PICTURES = {"train": 80_000, "validation": 10_000, "test": 10_000}


def cpu_seconds(call: Callable[..., object], *arguments: object) -> float:
    """Seconds of one call on all cores together, of which other processes take nothing."""
    began = time.process_time()
    call(*arguments)
    return time.process_time() - began


def noise(config: Config, size: int) -> Batch:
    """A batch of pictures that say nothing."""
    captcha = config.captcha
    shape = (size, captcha.height, captcha.width, captcha.channels)
    return Batch(
        torch.randint(0, 256, shape, dtype=torch.uint8),
        torch.randint(0, len(captcha.alphabet), (size, captcha.length)),
        torch.arange(size),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", default="article")
    parser.add_argument("--sizes", type=int, nargs="+", default=[25, 50, 100, 200, 400, 800])
    parser.add_argument("--runs", type=int, default=5, help="traces of each size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = load(compose(f"experiment={arguments.experiment}", "device.name=cpu", "device.precision=fp32"))
    first = cpu_seconds(trace, config, WARM_UP, PICTURES)
    traces = {
        size: [cpu_seconds(trace, config, size, PICTURES) for _ in range(arguments.runs)]
        for size in arguments.sizes
    }
    medians = {size: statistics.median(values) for size, values in traces.items()}
    state = fresh_state(config, torch.device("cpu"))
    train_step(state, noise(config, WARM_UP), config)
    steps = {}
    for size in arguments.sizes:
        steps[size] = cpu_seconds(train_step, state, noise(config, size), config)
    sizes = [
        {
            "size": size,
            "new_trace_seconds": round(traces[size][0], 3),
            "trace_seconds": round(medians[size], 3),
            "step_seconds": round(steps[size], 3),
            "step_to_trace": round(steps[size] / medians[size], 2),
        }
        for size in arguments.sizes
    ]
    print(
        json.dumps(
            {
                "benchmark": "planning",
                "experiment": arguments.experiment,
                "threads": arguments.threads,
                "runs": arguments.runs,
                "first_trace_seconds": round(first, 3),
                "trace_seconds": round(statistics.median(medians.values()), 3),
                "sizes": sizes,
            }
        )
    )


if __name__ == "__main__":
    main()
