"""How far the trace of a training lies beside what torch's profiler sees of the same on this CPU.

Prints one JSON line: the worst errors, then for each network, head, lever and batch size the bytes that are
foretold of a training step, the error without what oneDNN takes and gives back inside one convolution, and
the raw one with it: of one layer, and so much beside passes of fewer pictures
than 32 (up to 11 %). The oracle is that of tests/memory/test_trace.py.

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

LEVERS = {
    "fp32": (),
    "bf16": ("device.precision=bf16",),
    "checkpointing": ("train.activation_checkpointing=true",),
    "micro-batches": ("train.micro_batch_size=32",),
    "checkpointing, bf16": ("train.activation_checkpointing=true", "device.precision=bf16"),
}
SIZES = (32, 48, 64, 96)


def compared(model: str, head: str, lever: str, size: int) -> dict[str, Any]:
    """One configuration, foretold and run for an epoch of two steps."""
    overrides = ("train.epochs=1", f"train.eval_batch_size={size}", *LEVERS[lever])
    config = with_batch_size(network(model, head, "fp32", *overrides), size)
    pictures = {"train": 2 * size, "validation": 2 * size}
    foretold = trace(config, size, pictures).peak_bytes("step")
    moments = run_for_real(config, pictures)
    errors = {
        name: real_peaks(moments, with_reorders)["step"] / foretold - 1
        for name, with_reorders in (("error", False), ("raw_error", True))
    }
    kept = {name: round(value, 4) for name, value in errors.items()}
    return {"model": model, "head": head, "lever": lever, "size": size, "bytes": foretold, **kept}


def main() -> None:
    torch.set_num_threads(1)
    found = []
    if "--modules" in sys.argv[1:]:
        for name, size in itertools.product(modules.CASES, (32, 48)):
            found.append(modules.compared(name, size))
            print(found[-1], file=sys.stderr)
    else:
        for model, head, lever, size in itertools.product(("compact", "resnet18"), HEADS, LEVERS, SIZES):
            found.append(compared(model, head, lever, size))
            print(found[-1], file=sys.stderr)
    worst = {key: max((abs(each[key]) for each in found), default=0.0) for key in ("error", "raw_error")}
    print(json.dumps({"benchmark": "oracle", "configs": len(found), "worst": worst, "all": found}))


if __name__ == "__main__":
    main()
