"""Helpers shared by the parts of gpu_session: configs, random data, and GPU memory measurements.

Importing this module does not initialize CUDA; imports are few, since each part is a process of its own.
"""

import functools
import gc
import hashlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from gpu_comparison import PROJECT

from captcha_exp import compose, load
from captcha_exp.config import Config
from captcha_exp.data.augment import Augmenter
from captcha_exp.data.dataset import Batch, Dataset
from captcha_exp.model.evaluate import evaluate
from captcha_exp.model.step import init_train_state, train_step
from captcha_exp.runtime import device as devices

MIB = 2**20
GPU_CONFIG = "h200"  # conf/gpu/ file of the measured configs; has no effect on measurements
STREAMED = "device.preload_limit_mib=0"  # images stay on the host
NETWORKS = {"resnet18": "experiment=article", "compact": "experiment=alnum"}
VARIANTS: dict[str, tuple[str, ...]] = {
    "fp32": ("device.precision=fp32",),
    "bf16": ("device.precision=bf16",),
    "fp16": ("device.precision=fp16",),
    "fp32-again": (
        "device.precision=fp32",
        "train.activation_checkpointing=true",
    ),  # activation checkpointing
    "bf16-again": ("device.precision=bf16", "train.activation_checkpointing=true"),
}
_NO_MEMORY = ("out of memory", "ALLOC_FAILED", "unable to find an engine")  # the driver, cuBLAS, cuDNN


class Case(NamedTuple):
    """A training whose memory is predicted and measured."""

    network: str
    variant: str
    batch: int

    @property
    def name(self) -> str:
        """Return the name, e.g. resnet18-fp32-100."""
        return f"{self.network}-{self.variant}-{self.batch}"


def make_config(case: Case, device: str, *more: str, gpu: str = GPU_CONFIG) -> Config:
    """Return the config of a case, for one epoch on the named device."""
    fixed = ("train.epochs=1", f"train.batch_size={case.batch}", f"gpu={gpu}", "tracking=none")
    device_overrides = (f"device.name={device}", f"device.threads={1 if device == 'cpu' else 4}")
    return load(compose(NETWORKS[case.network], *VARIANTS[case.variant], *fixed, *device_overrides, *more))


def noise_dataset(config: Config, split_sizes: Mapping[str, int]) -> Dataset:
    """Return random images, with the given number in each split."""
    captcha, count = config.captcha, sum(split_sizes.values())
    generator = torch.Generator().manual_seed(0)
    shape = (count, captcha.height, captcha.width, captcha.channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, len(captcha.alphabet), (count, captcha.length), generator=generator)
    indices = torch.split(torch.arange(count), list(split_sizes.values()))
    return Dataset(images, targets, [], dict(zip(split_sizes, indices, strict=True)), {})


def noise_batch(config: Config, device: torch.device) -> Batch:
    """Return one random batch on the device."""
    data = noise_dataset(config, {"train": int(config.train.batch_size)})
    return next(data.split("train", device, config.device.preload_limit_mib).batches(len(data.targets)))


def run_epoch(config: Config, data: Dataset, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train and evaluate for one epoch; return the peak memory of each. All tensors are freed on return.

    Allocates in the same order as `fit`, hence as memory.trace predicts; progress and sanity checks, which
    allocate only scalars, are left out.
    """
    limit = config.device.preload_limit_mib
    training, validation = (data.split(name, device, limit) for name in ("train", "validation"))
    state = init_train_state(config, device)
    reset_peaks(device)
    augmenter = Augmenter(config, 1, len(data.images), device)
    state.model.train()
    for batch in training.batches(int(config.train.batch_size), training.epoch_order(config.seed, 1)):
        _kept = train_step(state, augmenter(batch), config)  # freed in the next iteration, as in fit
    trained = peak_memory(device)
    reset_peaks(device)
    evaluate(state.model, validation, config)
    state.update_best(0.0, 0.0)
    return trained, peak_memory(device)


# -- GPU memory ----------------------------------------------------------------------------------------------


def reset_peaks(device: torch.device) -> None:
    """Reset the peak memory statistics."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Return the peaks, in MiB, since `reset_peaks`; None on the CPU, which has no caching allocator."""
    if device.type != "cuda":
        return {"requested_mib": None, "allocated_mib": None, "reserved_mib": None}
    torch.cuda.synchronize(device)
    stats = torch.cuda.memory_stats(device)
    return {
        "requested_mib": stats["requested_bytes.all.peak"] / MIB,
        "allocated_mib": stats["allocated_bytes.all.peak"] / MIB,
        "reserved_mib": stats["reserved_bytes.all.peak"] / MIB,
    }


def reserved_mib(device: torch.device) -> float | None:
    """Return the MiB that torch's allocator has reserved; None on the CPU."""
    return torch.cuda.memory_reserved(device) / MIB if device.type == "cuda" else None


def allocated_mib(device: torch.device) -> float | None:
    """Return the MiB that torch's allocator has allocated; None on the CPU."""
    return torch.cuda.memory_allocated(device) / MIB if device.type == "cuda" else None


def clear(device: torch.device) -> None:
    """Release all unused cached memory, including cuBLAS workspaces, to the driver."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def oom_reason(function: Callable[[], object], device: torch.device) -> str | None:
    """Call the function; return None, or the first line of its out-of-memory error. Frees its memory."""
    reason: str | None = None
    try:
        function()
    except RuntimeError as error:
        message = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in message for sign in _NO_MEMORY):
            raise
        reason = message.splitlines()[0]
    clear(device)  # after the except block: the traceback, which holds the tensors, is freed
    return reason


class ProcessMeter:
    """Measures the GPU memory of this process; must be created before CUDA is initialized."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.free_before = None if device.type == "cpu" else _free_bytes()

    @property
    def free_before_mib(self) -> float | None:
        """Return the MiB of the GPU that were free before this process initialized CUDA, by NVML."""
        return None if self.free_before is None else self.free_before / MIB

    def measure(self) -> dict[str, Any]:
        """Return the MiB of the process, their source, and those that torch's allocator did not reserve.

        The source is NVML's figure for this process. In many containers it is missing: then the used memory
        of the GPU minus that before CUDA was initialized; without NVML, all of its used memory.
        """
        if self.device.type != "cuda":
            return {"process_mib": _resident_mib(), "process_by": "resident memory", "context_mib": None}
        torch.cuda.synchronize(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        used, own = total - free, devices.nvml_process_bytes(self.device)
        if own is not None:
            process, source = own, "NVML, this process"
        elif self.free_before is not None and (now := _free_bytes()) is not None:
            process, source = self.free_before - now, "NVML, difference since start"
        else:
            process, source = used, "all used memory of the GPU"
        return {
            "process_mib": process / MIB,
            "process_by": source,
            "context_mib": (process - reserved) / MIB,
            "gpu_used_mib": used / MIB,
            "gpu_free_before_mib": self.free_before_mib,
        }


def limit_memory(process_mib: float, context_mib: float) -> None:
    """Limit torch's allocator on the current GPU such that the process stays within `process_mib`."""
    _, total = torch.cuda.mem_get_info()
    share = (process_mib - context_mib) * MIB / total
    # Unlike similar functions, this one does not accept torch.device("cuda") without an index.
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)))


def _free_bytes() -> int | None:
    """Return the free bytes of the first GPU, or None without NVML. Does not initialize CUDA."""
    return next(iter(devices.nvml_free_bytes().values()), None)


def _resident_mib() -> float:
    """Return the peak resident memory in MiB, the figure of a dry run."""
    return devices.process_peak_mib(torch.device("cpu"))


def step_seconds(function: Callable[[], object], steps: int, device: torch.device) -> float:
    """Return the median seconds of `steps` synchronized calls."""
    seconds = []
    for _ in range(steps):
        wait(device)
        began = time.perf_counter()
        function()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def wait(device: torch.device) -> None:
    """Synchronize the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def code_sha256() -> str:
    """Return the SHA-256 of the code and the config files that a prediction depends on."""
    digest = hashlib.sha256()
    for file in sorted([*PROJECT.glob("captcha_exp/**/*.py"), *PROJECT.glob("conf/**/*.yaml")]):
        digest.update(f"{file.relative_to(PROJECT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()
