"""Shares of the kinds of operation in a training step: by torch's profiler, and inside oneDNN."""

import contextlib
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

NUM_STEPS = 5  # profiled, after one that is not
OTHER, OUTSIDE = "other operations", "Python and dispatch"

# The first rule that matches the names of an operation and of those around it, joined by " < ", decides.
RULES = (
    ("loader", r"\bloader\b"),
    ("optimizer", r"Optimizer\."),
    ("batch norm, backward", r"BatchNormBackward"),
    ("convolution, backward", r"ConvolutionBackward"),
    ("ReLU and addition, backward", r"(Relu|Threshold|Add)Backward"),
    ("casts and copies, backward", r"ToCopyBackward|AccumulateGrad"),
    ("head and loss, backward", r"Backward\d"),
    ("convolution, forward", r"aten::(conv2d|convolution|_convolution|mkldnn_convolution)\b"),
    ("batch norm, forward", r"aten::(batch_norm|native_batch_norm)"),
    ("ReLU and addition, forward", r"^aten::(relu_?|clamp_min_?|add_?)\b"),
    ("casts and copies, forward", r"aten::(to|_to_copy|copy_|clone|contiguous)\b"),
    ("checks for finite numbers", r"aten::(linalg_vector_norm|_foreach_norm|isfinite|where|stack)\b"),
)


def profile_shares(load: Callable[[], Any], train: Callable[[Any], object]) -> dict[str, float]:
    """Return the share of the wall seconds of several steps by kind of operation.

    Operations are those of the main thread, which waits for the others; the share of `OUTSIDE` is time in
    which it runs none, the profiler's own included.
    """
    train(load())
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        start = time.perf_counter()
        for _ in range(NUM_STEPS):
            with record_function("loader"):
                batch = load()
            train(batch)
        wall = time.perf_counter() - start
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        seconds[_kind_of(event)] += event.self_cpu_time_total / 1e6
    shares = {kind: value / wall for kind, value in seconds.items()}
    return {**shares, OUTSIDE: max(0.0, 1 - sum(shares.values()))}


def _kind_of(event: Any) -> str:
    names = [event.name]
    while (event := event.cpu_parent) is not None:
        names.append(event.name)
    path = " < ".join(names)
    return next((kind for kind, pattern in RULES if re.search(pattern, path)), OTHER)


def reorder_shares(step: Callable[[], object]) -> dict[str, float]:
    """Return the share of the wall seconds of a step by primitive of oneDNN, as oneDNN times them.

    Reorders of layout or precision, which happen inside the operators of torch, are primitives of their own.
    Empty where torch has no oneDNN.
    """
    mkldnn: Any = torch.backends.mkldnn  # without types
    if not mkldnn.is_available():
        return {}
    step()
    start = time.perf_counter()
    with _captured_stdout() as lines, mkldnn.verbose(mkldnn.VERBOSE_ON):
        for _ in range(NUM_STEPS):
            step()
    wall = time.perf_counter() - start
    seconds: dict[str, float] = defaultdict(float)
    for line in lines():
        fields = line.split(",")
        if "primitive" in fields and "exec" in fields:
            kind, where = fields[fields.index("exec") + 2], fields[fields.index("exec") + 4]
            name = kind if kind == "reorder" else f"{kind}, {where}"
            seconds[name] += float(fields[-1]) / 1e3
    return {name: value / wall for name, value in seconds.items()}


@contextlib.contextmanager
def _captured_stdout() -> Iterator[Callable[[], list[str]]]:
    """Redirect the file descriptor of the standard output, to which oneDNN writes; yield its lines."""
    sys.stdout.flush()
    original = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        found: list[str] = []
        try:
            yield lambda: found
        finally:
            os.dup2(original, 1)
            os.close(original)
            file.seek(0)
            found += file.read().decode(errors="replace").splitlines()
