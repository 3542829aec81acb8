"""Compare the traced memory of a training step with torch's profiler on this CPU.

Prints one JSON line: the worst errors, then for each network, head, option and batch size the predicted bytes
of a training step, the error without the temporary buffers of oneDNN inside a convolution, and the raw error
with them, which reaches 11 % for batches of fewer than 32 images. The reference is that of
tests/memory/test_trace.py.

    python benchmarks/trace_accuracy.py
    python benchmarks/trace_accuracy.py --modules     plan_module on tests/support/networks.py
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from support import networks as modules
from support.profiling import HEADS, network, real_peaks, run_for_real

from captcha_exp.memory.plan import with_batch_size
from captcha_exp.memory.trace import trace

OPTIONS = {
    "fp32": (),
    "bf16": ("device.precision=bf16",),
    "checkpointing": ("train.activation_checkpointing=true",),
    "micro-batches": ("train.micro_batch_size=32",),
    "checkpointing, bf16": ("train.activation_checkpointing=true", "device.precision=bf16"),
}
SIZES = (32, 48, 64, 96)


def compare(model: str, head: str, option: str, size: int) -> dict[str, Any]:
    """Compare one configuration, predicted and run for an epoch of two steps."""
    overrides = ("train.epochs=1", f"train.eval_batch_size={size}", *OPTIONS[option])
    config = with_batch_size(network(model, head, "fp32", *overrides), size)
    split_sizes = {"train": 2 * size, "validation": 2 * size}
    predicted = trace(config, size, split_sizes).peak_bytes("step")
    snapshots = run_for_real(config, split_sizes)
    errors = {
        name: real_peaks(snapshots, with_reorders)["step"] / predicted - 1
        for name, with_reorders in (("error", False), ("raw_error", True))
    }
    rounded = {name: round(value, 4) for name, value in errors.items()}
    return {"model": model, "head": head, "option": option, "size": size, "bytes": predicted, **rounded}


def main() -> None:
    torch.set_num_threads(1)
    found = []
    if "--modules" in sys.argv[1:]:
        for name, size in itertools.product(modules.CASES, (32, 48)):
            found.append(modules.compared(name, size))
            print(found[-1], file=sys.stderr)
    else:
        for model, head, option, size in itertools.product(("compact", "resnet18"), HEADS, OPTIONS, SIZES):
            found.append(compare(model, head, option, size))
            print(found[-1], file=sys.stderr)
    worst = {key: max((abs(each[key]) for each in found), default=0.0) for key in ("error", "raw_error")}
    print(json.dumps({"benchmark": "trace_accuracy", "configs": len(found), "worst": worst, "all": found}))


if __name__ == "__main__":
    main()
