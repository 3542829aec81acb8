"""Devices of this machine: availability, precision, threads, determinism, and memory measurements.

Environment variables for threads are ignored: launchers set them, and results would depend on the launcher.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from captcha_exp.config import Config, Machine, Precision, precision_of_cpu, precision_of_gpu, resolve
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.runtime.paths import root_dir, tracking_uri_variable

logger = logging.getLogger(__name__)

MIB = 2**20

_CUDA_ERROR_MEMORY_ALLOCATION = 2
_OOM_MARKERS = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")

T = TypeVar("T")


def detect_machine() -> Machine:
    """Return what `resolve` needs to know about this machine."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if _is_cuda_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    devices = ["cuda", *gpus, *mps, "cpu"] if gpus else [*mps, "cpu"]
    if torch.version.cuda is None:
        no_cuda = "this build of torch has no CUDA support (see pytorch.org, 'Get started', for one that has)"
    else:
        no_cuda = "torch finds no usable CUDA GPU (check nvidia-smi and the driver version)"
    unavailable_reason = {
        "cuda": f"this machine has {len(gpus)} CUDA GPUs" if gpus else no_cuda,
        "mps": "mps requires a Mac with Apple silicon",
    }
    precisions: dict[str, Precision] = {"cpu": precision_of_cpu(cpu_flags())}
    for number, name in reversed(list(enumerate(gpus))):
        with contextlib.suppress(RuntimeError, AssertionError):  # a lost GPU, which `doctor` reports
            properties = torch.cuda.get_device_properties(number)
            found = precision_of_gpu((properties.major, properties.minor), properties.name)
            precisions |= {name: found, "cuda": found}  # cuda is the first GPU
    uri = tracking_uri_variable()
    return Machine(tuple(devices), num_physical_cores(), root_dir(), unavailable_reason, uri, precisions)


def cpu_flags() -> frozenset[str]:
    """Return the instruction sets of the CPU, as torch names them."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return frozenset(name for name, value in capabilities.items() if value is True)


def _is_cuda_available() -> bool:
    return torch.version.cuda is not None and torch.cuda.is_available()


def num_physical_cores() -> int:
    """Return the physical cores that this process may use; convolutions do not profit from hyper-threads."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else (os.cpu_count() or 1)
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    quota = cpu_quota()
    return max(1, cores if quota is None else min(cores, int(quota)))


def cpu_quota() -> float | None:
    """Return the CPU limit of this process in cores, from cgroup v2; None without a limit."""
    limits = [limit.split() for limit in read_cgroup_files("cpu.max")]
    return min((int(quota) / int(period) for quota, period in limits if quota != "max"), default=None)


def read_cgroup_files(filename: str) -> list[str]:
    """Return the content of a file in the cgroup of this process and in each of its parents."""
    groups = Path("/proc/self/cgroup")
    lines = groups.read_text().splitlines() if groups.is_file() else []
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None:  # another system, or version 1
        return []
    cgroup = Path("/sys/fs/cgroup") / own.lstrip("/")
    cgroups = [cgroup, *(parent for parent in cgroup.parents if parent.is_relative_to("/sys/fs/cgroup"))]
    return [(path / filename).read_text().strip() for path in cgroups if (path / filename).is_file()]


def free_memory_bytes() -> int:
    """Return the bytes that can be allocated without swapping or exceeding the memory limit of the cgroup."""
    available: int = psutil.virtual_memory().available
    limits = [int(limit) for limit in read_cgroup_files("memory.max") if limit != "max"]
    used = [int(amount) for amount in read_cgroup_files("memory.current")]
    return min([available, *(limit - max(used, default=0) for limit in limits)]) if limits else available


def setup_device(config: Config) -> torch.device:
    """Return the device of a resolved config, and set threads and determinism for the whole process."""
    device = torch.device(config.device.name)
    torch.set_num_threads(int(config.device.threads))
    if config.train.deterministic and device.type == "cuda":
        # Read by cuBLAS at CUDA initialization; deterministic matrix products fail without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # As torch.use_deterministic_algorithms does, but without importing torch._inductor, which takes seconds.
    torch.set_deterministic_debug_mode("error" if config.train.deterministic else "default")
    torch.backends.cudnn.benchmark = not config.train.deterministic
    # Filling helps only to find reads of uninitialized memory; every tensor here is written first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # added at run time
    return device


def set_memory_limit(config: Config, device: torch.device) -> None:
    """Limit the GPU memory of this process to device.vram_budget_mib, or to all of it without a budget.

    torch's allocator does not count the CUDA context, so it gets the budget minus gpu.context_mib.max. The
    upper bound is used instead of the actual context because memory.plan uses it to decide what fits.

    Raises:
        ConfigError: the context alone may exceed the budget.
    """
    if device.type != "cuda":
        return
    budget, context = config.device.vram_budget_mib, config.gpu.context_mib.max
    fraction = 1.0  # an earlier run in this process may have set a limit
    if budget is not None:
        if budget <= context:
            raise ConfigError(
                f"device.vram_budget_mib={budget}: the CUDA context of gpu={config.gpu.name} alone takes up "
                f"to {context:g} MiB; set a larger budget, null for the whole GPU, or gpu=FILE with a "
                "tighter bound (captcha-exp calibrate writes one)"
            )
        _, total = torch.cuda.mem_get_info(device)
        # Half a byte more: the allocator truncates fraction * total, which may lose one byte to rounding.
        fraction = min(1.0, ((budget - context) * MIB + 0.5) / total)
    # set_per_process_memory_fraction needs an index.
    number = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(fraction, number)


def for_inference(config: Config, name: str) -> Config:
    """Resolve the config of a run for inference, which is in fp32, on a device of this machine.

    Raises:
        UserError: the device is not available; the line lists those that are.
    """
    machine = detect_machine()
    if name not in ("auto", *machine.devices):
        reason = machine.unavailable_reason.get(name.split(":")[0], "not a device name")
        raise UserError(f"--device={name}: {reason}; available here: {', '.join(['auto', *machine.devices])}")
    return in_fp32(
        resolve(replace(config, device=replace(config.device, name=name, threads="auto")), machine)
    )


def in_fp32(config: Config) -> Config:
    """Return the config for evaluation in fp32, with batches that take no more memory than before."""
    if config.device.precision == "fp32":
        return config
    size = max(1, config.train.eval_batch_size // 2)
    return replace(
        config,
        device=replace(config.device, precision="fp32"),
        train=replace(config.train, eval_batch_size=size),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that GPU or CPU memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, torch.AcceleratorError):  # raised by CUDA itself, outside torch's allocator
        return getattr(error, "error_code", None) == _CUDA_ERROR_MEMORY_ALLOCATION
    # torch's CPU allocator, cuBLAS and cuDNN raise a plain RuntimeError.
    return isinstance(error, RuntimeError) and any(marker in str(error) for marker in _OOM_MARKERS)


def describe(config: Config) -> str:
    """Describe the device of a resolved config in one line."""
    name = config.device.name
    gpu = f" ({torch.cuda.get_device_name(torch.device(name))})" if name.startswith("cuda") else ""
    return f"{name}{gpu}, {config.device.precision}, {config.device.threads} CPU threads"


def widest_float(device: torch.device) -> torch.dtype:
    """Return fp64, or fp32 on MPS, which has no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to the precision of the config; for the forward pass only, the loss is computed in fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.device.precision)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def gpu_total_mib(config: Config) -> float | None:
    """Return the total memory in MiB of the CUDA device of a resolved config; None if it is not available."""
    name = config.device.name
    if not name.startswith("cuda") or not _is_cuda_available():
        return None
    if (torch.device(name).index or 0) >= torch.cuda.device_count():
        return None
    return float(torch.cuda.get_device_properties(torch.device(name)).total_memory / MIB)


def process_peak_mib(device: torch.device) -> float:
    """Return the peak memory of this process in MiB: resident memory on the CPU, GPU memory on CUDA."""
    if device.type == "cuda":
        return _cuda_process_bytes(device) / MIB
    return _peak_rss_bytes() / MIB


def _peak_rss_bytes() -> int:
    """Return the peak resident memory of this process in bytes.

    On Linux from VmHWM: ru_maxrss also includes the parent's memory at the time of the fork.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cuda_process_bytes(device: torch.device) -> int:
    """Return the peak GPU memory of this process in bytes.

    Where NVML does not report processes (containers, Windows): the peak of torch's reserved memory plus all
    other used memory of the GPU, part of which may belong to other processes.
    """
    reserved = torch.cuda.memory_reserved(device)
    peak_reserved = torch.cuda.max_memory_reserved(device)
    if (used := nvml_process_bytes(device)) is not None:
        return used - reserved + peak_reserved
    free, total = torch.cuda.mem_get_info(device)
    return peak_reserved + max(0, total - free - reserved)


def nvml_process_bytes(device: torch.device) -> int | None:
    """Return the GPU memory of this process in bytes as NVML reports it, or None."""

    def query(nvml: Any) -> int | None:
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid() and process.usedGpuMemory:
                return int(process.usedGpuMemory)
        return None

    return _query_nvml(query)


def nvml_free_bytes() -> dict[str, int]:
    """Return the free bytes of each GPU by its UUID, in torch's format; does not initialize CUDA."""

    def query(nvml: Any) -> dict[str, int]:
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        return {
            nvml.nvmlDeviceGetUUID(handle).removeprefix("GPU-"): int(
                nvml.nvmlDeviceGetMemoryInfo(handle).free
            )
            for handle in handles
        }

    return _query_nvml(query) or {}


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, or None."""
    return _query_nvml(lambda nvml: str(nvml.nvmlSystemGetDriverVersion()))


def _query_nvml(query: Callable[[Any], T]) -> T | None:
    """Return the result of an NVML query; None if the driver has no NVML or it fails."""
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            return query(pynvml)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


class MemoryMeter:
    """Peak memory of torch's CUDA allocator per phase, and of the process over all phases."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._process_peak_mib = 0.0

    def start_phase(self) -> None:
        """Reset the peak of the allocator."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peaks(self, phase: str) -> dict[str, float]:
        """Return the peaks of the CUDA allocator in this phase in MiB, as metrics; empty on other devices."""
        self._process_peak_mib = max(self._process_peak_mib, process_peak_mib(self.device))
        if self.device.type != "cuda":
            return {}
        return {
            f"memory/{phase}_peak_allocated_mib": torch.cuda.max_memory_allocated(self.device) / MIB,
            f"memory/{phase}_peak_reserved_mib": torch.cuda.max_memory_reserved(self.device) / MIB,
        }

    def process_peak_mib(self) -> float:
        """Return the peak memory of the process over all phases so far, in MiB."""
        return self._process_peak_mib
