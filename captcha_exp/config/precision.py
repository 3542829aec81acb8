"""The precision that `device.precision=auto` becomes: 16 bits where the hardware computes with them.

It depends on the hardware alone and not on a measured speed, so that a command gives the same bits whatever
else a machine does. A training checks the precision in a few steps (`training.autotune`).
"""

import re
from collections.abc import Set
from dataclasses import replace

from captcha_exp.config.schema import Config, Precision

AMX = frozenset({"amx_tile", "amx_bf16"})  # without it, AVX512_BF16 trains at 0.8 times the speed of fp32
# Turing without tensor cores (TU116, TU117); other GPUs with compute capability 7.5 have them.
_WITHOUT_TENSOR_CORES = re.compile(r"GTX 16\d\d|\bMX ?[45]50\b|\bT(400|500|550|600|1000|1200|2000)\b")


def has_tensor_cores(capability: tuple[int, ...], name: str) -> bool:
    """Return whether a CUDA GPU has units for 16-bit matrix products.

    Source: CUDA C++ programming guide, "Compute Capabilities"; of capability 7.5, some GPUs lack them.
    """
    return capability >= (7, 0) and not (capability == (7, 5) and _WITHOUT_TENSOR_CORES.search(name))


def fast_precisions(capability: tuple[int, ...], name: str) -> tuple[Precision, ...]:
    """Return the 16-bit precisions that a CUDA GPU computes faster than fp32, the preferred one first."""
    if not has_tensor_cores(capability, name):
        return ()
    return ("bf16", "fp16") if capability >= (8, 0) else ("fp16",)


def precision_of_gpu(capability: tuple[int, ...], name: str) -> Precision:
    """Return the precision for a CUDA GPU."""
    return next(iter(fast_precisions(capability, name)), "fp32")


def precision_of_cpu(flags: Set[str]) -> Precision:
    """Return the precision for a CPU with these instructions, named as by `torch.cpu.get_capabilities`."""
    return "bf16" if flags >= AMX else "fp32"


def with_planned_precision(config: Config, requested: Config) -> Config:
    """Replace the precision of a resolved config, if it was `auto`, by that for the GPU of a plan.

    For any GPU, it is that of the CUDA device, or without one fp32, which needs the most memory.
    """
    if requested.device.precision != "auto":
        return config
    device, capability = config.device, config.gpu.compute_capability
    if capability is not None:
        numbers = tuple(map(int, capability.split(".")))
        device = replace(device, precision=precision_of_gpu(numbers, config.gpu.name))
    elif not device.name.startswith("cuda"):
        device = replace(device, precision="fp32")
    return replace(config, device=device)
