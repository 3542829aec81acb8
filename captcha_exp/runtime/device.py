"""The machine: which devices, precision, threads and determinism it gives, and how much memory a run takes.

Nothing here depends on environment variables for threads: launchers set them, and results would depend on
launchers.
"""

import contextlib
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from captcha_exp.config import Config, Machine, Precision, resolve
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.runtime.console import Display
from captcha_exp.runtime.paths import root_dir

MIB = 2**20

_CUDA_ERROR_MEMORY_ALLOCATION = 2
_OOM_MARKERS = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")

T = TypeVar("T")


def detect_machine() -> Machine:
    """Return the facts about this machine that `resolve` needs."""
    cards = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if _is_cuda_available() else []
    devices = (
        (["cuda", *cards] if cards else []) + (["mps"] if torch.backends.mps.is_available() else []) + ["cpu"]
    )
    if torch.version.hip is not None:
        no_cuda = "this build of torch is for ROCm, which nobody has tried here"
    elif torch.version.cuda is None:
        no_cuda = "this build of torch has no CUDA in it (pytorch.org, 'Get started', names one that has)"
    else:
        no_cuda = "torch finds no usable CUDA card (see nvidia-smi, and the driver's version)"
    why_not = {"cuda": f"this machine has {len(cards)} CUDA cards" if cards else no_cuda}
    why_not["mps"] = "only Macs with Apple's own processors have mps"
    return Machine(tuple(devices), _num_physical_cores(), root_dir(), why_not)


def _is_cuda_available() -> bool:
    return torch.version.cuda is not None and torch.cuda.is_available()


def _num_physical_cores() -> int:
    """Physical cores that this process may use; hyper-threads share what a convolution keeps busy."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else (os.cpu_count() or 1)
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    quota = cpu_quota()
    return max(1, cores if quota is None else min(cores, int(quota)))


def cpu_quota() -> float | None:
    """Cores' worth of time that control groups (version 2) give this process; None without a limit."""
    limits = [limit.split() for limit in read_cgroup_files("cpu.max")]
    return min((int(quota) / int(period) for quota, period in limits if quota != "max"), default=None)


def read_cgroup_files(filename: str) -> list[str]:
    """The content of this file in the process's control group and in each above it."""
    groups = Path("/proc/self/cgroup")
    if not groups.is_file():
        return []
    own = next((line[3:] for line in groups.read_text().splitlines() if line.startswith("0::")), None)
    if own is None:  # version 1
        return []
    folder = Path("/sys/fs/cgroup") / own.lstrip("/")
    above = [folder, *(parent for parent in folder.parents if parent.is_relative_to("/sys/fs/cgroup"))]
    return [(place / filename).read_text().strip() for place in above if (place / filename).is_file()]


def free_memory_bytes() -> int:
    """Bytes that can be had before the machine swaps or the container's limit ends the process."""
    available: int = psutil.virtual_memory().available
    limits = [int(limit) for limit in read_cgroup_files("memory.max") if limit != "max"]
    used = [int(amount) for amount in read_cgroup_files("memory.current")]
    return min([available, *(limit - max(used, default=0) for limit in limits)]) if limits else available


def setup_device(config: Config) -> torch.device:
    """The device of a resolved config, with threads and determinism set for the whole process."""
    device = torch.device(config.device.name)
    torch.set_num_threads(int(config.device.threads))
    if config.train.deterministic and device.type == "cuda":
        # cuBLAS reads this when CUDA starts; without it a deterministic matrix product is an error.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.train.deterministic)
    torch.backends.cudnn.benchmark = not config.train.deterministic
    # Filling fresh memory would find reads of memory that nobody wrote; every tensor here is written first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # added at run time
    return device


def set_memory_limit(config: Config, device: torch.device) -> None:
    """The process held to device.vram_budget_mib, if it is on a CUDA card; without a budget, to all of it.

    torch's allocator is given the budget less gpu.context_mib.most, since it does not count the context.
    The most, and not what the context takes here: by that bound memory.plan calls a batch fitting, and
    so what is called fitting runs.

    Raises:
        ConfigError: the context alone may take the whole budget.
    """
    budget = config.device.vram_budget_mib
    if device.type != "cuda":
        return
    # It takes no bare "cuda".
    number = torch.cuda.current_device() if device.index is None else device.index
    if budget is None:  # there may have been one, for another run of this process
        torch.cuda.set_per_process_memory_fraction(1.0, number)
        return
    context = config.gpu.context_mib.max
    if budget <= context:
        raise ConfigError(
            f"device.vram_budget_mib={budget}: gpu={config.gpu.name} takes up to {context:g} MiB for "
            "its context alone; write more than that, null for all of the card, or take a card file with a "
            "closer figure (captcha-exp calibrate measures one)"
        )
    _, total = torch.cuda.mem_get_info(device)
    # Half a byte more: the allocator cuts fraction * total down to whole bytes, at times one too few.
    fraction = min(1.0, ((budget - context) * MIB + 0.5) / total)
    torch.cuda.set_per_process_memory_fraction(fraction, number)


def for_inference(config: Config, name: str, display: Display) -> Config:
    """The config of a finished run, resolved for reading with it on a device of this machine.

    Raises:
        UserError: there is no such device; the line says which there are.
    """
    machine = detect_machine()
    if name not in ("auto", *machine.devices):
        reason = machine.unavailable_reason.get(name.split(":")[0], "there is no such device")
        raise UserError(f"--device={name}: {reason}; available here: {', '.join(['auto', *machine.devices])}")
    config = resolve(replace(config, device=replace(config.device, name=name, threads="auto")), machine)
    precision = config.device.precision
    if precision in ("fp32", *half_precisions(torch.device(config.device.name))):
        return config
    display.info(f"{precision} was the run's precision; {config.device.name} reads in fp32")
    return replace(config, device=replace(config.device, precision="fp32"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory is short: that of the card, or the machine's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, torch.AcceleratorError):  # CUDA itself, beside torch's allocator
        return getattr(error, "error_code", None) == _CUDA_ERROR_MEMORY_ALLOCATION
    # What has no type of its own: torch's allocator of the machine's memory, and libraries that start up.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OOM_MARKERS)


def describe(config: Config) -> str:
    """The device of a resolved config in one line."""
    name = config.device.name
    card = f" ({torch.cuda.get_device_name(torch.device(name))})" if name.startswith("cuda") else ""
    return f"{name}{card}, {config.device.precision}, {config.device.threads} CPU threads"


@contextlib.contextmanager
def autocast(config: Config, device: torch.device) -> Iterator[None]:
    """The precision of the config, inside the network; the loss is taken in fp32 outside."""
    match config.device.precision:
        case "fp32" | "auto":  # autotuning has replaced auto before any training
            yield
        case "bf16" | "fp16" as half:
            with torch.autocast(device.type, torch.bfloat16 if half == "bf16" else torch.float16):
                yield


def half_precisions(device: torch.device) -> tuple[Precision, ...]:
    """The 16-bit numbers that are worth a try on a device."""
    match device.type:
        case "cpu":
            return ("bf16",)  # no CPU that torch knows is quick at fp16 training
        case "cuda" if torch.cuda.is_bf16_supported(including_emulation=False):
            return ("bf16", "fp16")
        case "cuda":
            return ("fp16",)
        case _:
            return ("bf16", "fp16")


def gpu_total_mib(config: Config) -> float | None:
    """What the CUDA card that a resolved config names has in all; None where it is not here."""
    name = config.device.name
    if not name.startswith("cuda") or not _is_cuda_available():
        return None
    if (torch.device(name).index or 0) >= torch.cuda.device_count():
        return None
    return float(torch.cuda.get_device_properties(torch.device(name)).total_memory / MIB)


def process_peak_mib(device: torch.device) -> float:
    """MiB: on the CPU the peak of resident memory so far; on CUDA what the process holds of the card."""
    if device.type == "cuda":
        return _cuda_process_bytes(device) / MIB
    return _peak_rss_bytes() / MIB


def _peak_rss_bytes() -> int:
    """Peak resident bytes of this process alone.

    Linux has two figures: ru_maxrss also counts what the parent held when it started this process; VmHWM
    does not.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def _cuda_process_bytes(device: torch.device) -> int:
    """Bytes of the card that belong to this process.

    By NVML. Where that does not know (containers, Windows): the reserved peak, plus what the card has in use
    beyond torch's reservation, of which a part may belong to other processes.
    """
    reserved = torch.cuda.memory_reserved(device)
    peak_reserved = torch.cuda.max_memory_reserved(device)
    if (used := nvml_process_bytes(device)) is not None:
        return used - reserved + peak_reserved
    free, total = torch.cuda.mem_get_info(device)
    return peak_reserved + max(0, total - free - reserved)


def nvml_process_bytes(device: torch.device) -> int | None:
    """Bytes of the card that the driver counts for this process, or None."""

    def own(nvml: Any) -> int | None:
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid() and process.usedGpuMemory:
                return int(process.usedGpuMemory)
        return None

    return _query_nvml(own)


def nvml_free_bytes() -> dict[str, int]:
    """Free bytes of each card by its UUID, as torch writes it; to ask takes nothing of a card."""

    def free(nvml: Any) -> dict[str, int]:
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        return {
            _decode_nvml(nvml.nvmlDeviceGetUUID(handle)).removeprefix("GPU-"): int(
                nvml.nvmlDeviceGetMemoryInfo(handle).free
            )
            for handle in handles
        }

    return _query_nvml(free) or {}


def driver_version() -> str | None:
    """The version of NVIDIA's driver, or None."""
    return _query_nvml(lambda nvml: _decode_nvml(nvml.nvmlSystemGetDriverVersion()))


def _query_nvml(query: Callable[[Any], T]) -> T | None:
    """NVML's answer; None where it is not there or fails."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            return query(pynvml)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _decode_nvml(value: str | bytes) -> str:
    """NVML's texts; its older versions answer in bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


class MemoryMeter:
    """Peaks of memory: of the card's allocator one phase at a time, of the process over all phases."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._process_peak_mib = 0.0

    def start_phase(self) -> None:
        """A new phase begins."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peaks(self, phase: str) -> dict[str, float]:
        """MiB of the card's allocator since the phase began, as metrics; none on other devices."""
        self._process_peak_mib = max(self._process_peak_mib, process_peak_mib(self.device))
        if self.device.type != "cuda":
            return {}
        return {
            f"memory/{phase}_peak_allocated_mib": torch.cuda.max_memory_allocated(self.device) / MIB,
            f"memory/{phase}_peak_reserved_mib": torch.cuda.max_memory_reserved(self.device) / MIB,
        }

    def process_peak_mib(self) -> float:
        """MiB: the highest of all phases that have ended."""
        return self._process_peak_mib
