"""Compare whole training steps with the fastest convolution of this machine, and list where the rest goes.

The fastest convolution is the best forward rate over a few shapes, in channels_last and in the precision that
trainings use. A step of the article's network (batch size 100) and one of `compact` (batch size 128) take
turns with it in one process: loader, forward, backward, update. Their rates count the operations of
convolutions and matrix products alone. Prints tables of torch's profiler and of oneDNN to standard error, and
one JSON line: GFLOP/s, the steps as fractions of the fastest convolution, and the shares of the kinds of
operation.

    python benchmarks/roofline.py [--rounds 5] [--threads 1] [--networks article compact] [OVERRIDE ...]

A rate counts CPU seconds with one thread and wall seconds with more. Both depend on other processes: a
convolution on one thread has been seen at a quarter of its CPU rate on a busy machine.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from interference import conclude, exit_code
from loops import Step, prepare, requested_config, temporary_root
from operations import profile_shares, reorder_shares
from rich.console import Console
from rich.table import Table
from rounds import Timing, interleave, ratios, spread, timed
from torch.utils.flop_counter import FlopCounterMode

from captcha_exp.runtime import device as devices

EXPERIMENTS = {"article": "experiment=article", "compact": "experiment=alnum"}
GOALS = {"article": 0.88, "compact": 0.5}
# Images, channels, height, width of 3x3 convolutions: those of the article's network, and larger ones.
SHAPES = (
    (100, 64, 24, 56),
    (100, 128, 12, 28),
    (100, 256, 6, 14),
    (100, 512, 3, 7),
    (32, 256, 32, 32),
    (16, 512, 32, 32),
    (64, 256, 12, 28),
)
MATRIX_SIZE = 2048
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TRIES = 3  # of each shape
MIN_SECONDS = 0.5  # of a piece of work in a round

Work = Callable[[], object]


def convolution(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Work:
    """Return a 3x3 convolution in channels_last."""
    images, channels, height, width = shape
    tensors = torch.randn(images, channels, height, width), torch.randn(channels, channels, 3, 3)
    x, weight = (t.to(device, dtype).to(memory_format=torch.channels_last) for t in tensors)
    return lambda: F.conv2d(x, weight, padding=1)


def flops_of(work: Work) -> int:
    """Return the floating-point operations of the convolutions and matrix products in a piece of work."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def repeated(work: Work, times: int, device: torch.device) -> Work:
    """Return the work several times over, until the device has finished it."""

    def run() -> None:
        for _ in range(times):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def seconds_of(timing: Timing) -> float:
    """Return CPU seconds with one thread on a CPU, else wall seconds."""
    is_single = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return timing.cpu if is_single else timing.wall


def best_shape(dtype: torch.dtype, device: torch.device) -> tuple[dict[str, int], tuple[int, int, int, int]]:
    """Return the best rate of each shape in GFLOP/s, and the fastest shape."""
    rates = {}
    for shape in SHAPES:
        work = repeated(convolution(shape, dtype, device), 5, device)
        flops = flops_of(work)
        rates[shape] = max(flops / seconds_of(timed(work)) / 1e9 for _ in range(TRIES))
    table = {"x".join(map(str, shape)): round(rate) for shape, rate in rates.items()}
    return table, max(rates, key=rates.__getitem__)


def print_shares(title: str, shares: dict[str, float]) -> None:
    """Print the shares of a step, the largest first."""
    table = Table(title=title, title_justify="left")
    table.add_column("operation")
    table.add_column("share of the step", justify="right")
    for name, share in sorted(shares.items(), key=lambda pair: -pair[1]):
        table.add_row(name, f"{share:.1%}")
    Console(stderr=True).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="(default: those that a training uses)")
    parser.add_argument("--networks", nargs="+", choices=tuple(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    options = parser.parse_args()
    if min(options.rounds, options.threads or 1) < 1:
        parser.error("--rounds and --threads must be at least 1")
    overrides = [*options.overrides, "data.count=1000"]
    overrides += [f"device.threads={options.threads}"] if options.threads else []
    with temporary_root():
        steps = {
            name: Step(*prepare(requested_config(EXPERIMENTS[name], *overrides))) for name in options.networks
        }
    config = next(iter(steps.values())).config
    device, dtype = devices.setup_device(config), DTYPES[config.device.precision]
    table, shape = best_shape(dtype, device)
    left, right = (torch.randn(MATRIX_SIZE, MATRIX_SIZE).to(device, dtype) for _ in range(2))
    pieces: dict[str, Work] = {"convolution": convolution(shape, dtype, device), **steps}
    pieces["matrix product"] = lambda: left @ right
    flops = {name: flops_of(work) for name, work in pieces.items()}
    works = {}
    for name, work in pieces.items():
        one = statistics.median(timed(repeated(work, 1, device)).wall for _ in range(2))
        works[name] = repeated(work, max(1, round(MIN_SECONDS / one)), device)
        flops[name] *= max(1, round(MIN_SECONDS / one))
    found = interleave(works, options.rounds)
    rates = {
        name: [flops[name] / seconds_of(each) / 1e9 for each in timings] for name, timings in found.items()
    }
    rows, conclusions = {}, []
    for name, step in steps.items():
        fraction = ratios(rates[name], rates["convolution"])
        conclusions.append(conclude(fraction["median"], at_least=GOALS[name]))
        shares, reorders = profile_shares(step.load, step.train), reorder_shares(step)
        print_shares(f"{name}: torch's profiler", shares)
        print_shares(f"{name}: oneDNN", reorders)
        rows[name] = {
            "gflops": spread(rates[name]),
            "fraction": fraction,
            "shares": {key: round(value, 4) for key, value in shares.items()},
            "onednn": {key: round(value, 4) for key, value in reorders.items()},
            **conclusions[-1],
        }
    about = {
        "precision": config.device.precision,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
    }
    peaks = {
        "convolution_gflops": spread(rates["convolution"]),
        "matrix_product_gflops": spread(rates["matrix product"]),
        "by_shape_gflops": table,
    }
    print(json.dumps({"benchmark": "roofline", **about, **peaks, "networks": rows}))
    sys.exit(exit_code(*conclusions))


if __name__ == "__main__":
    main()
