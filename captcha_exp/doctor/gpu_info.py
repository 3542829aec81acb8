"""Cards, driver and torch's build, as they are seen here."""

import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from captcha_exp.doctor.machine_info import DriverInfo, GpuInfo, GpuProcess, TorchInfo

MIB = 2**20


def query_nvml() -> tuple[DriverInfo, dict[str, GpuInfo]]:
    """The driver, and each card by its UUID; an error in the place of what NVML does not tell."""
    try:
        import pynvml
    except ImportError as error:
        return DriverInfo(error=f"nvidia-ml-py cannot be imported: {error}"), {}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        code = getattr(error, "value", None)
        mismatch = code == getattr(pynvml, "NVML_ERROR_LIB_RM_VERSION_MISMATCH", 18)
        return DriverInfo(error=str(error), version_mismatch=mismatch), {}

    def ask(function: str, *arguments: Any, otherwise: Any = None) -> Any:
        try:  # AttributeError: a pynvml too old to know the question
            return getattr(pynvml, function)(*arguments)
        except (pynvml.NVMLError, AttributeError):
            return otherwise

    try:
        newest = ask("nvmlSystemGetCudaDriverVersion_v2")  # 12020 is 12.2
        driver = DriverInfo(
            version=_decode(ask("nvmlSystemGetDriverVersion")),
            max_cuda=(newest // 1000, newest % 1000 // 10) if newest else None,
        )
        cards, unreachable = {}, []
        for number in range(ask("nvmlDeviceGetCount", otherwise=0)):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            except pynvml.NVMLError as error:
                unreachable.append(f"number {number}: {error}")
                continue
            uuid = _decode(ask("nvmlDeviceGetUUID", handle)) or f"number {number}"
            cards[uuid.removeprefix("GPU-")] = _query_nvml_gpu(ask, handle)
        return replace(driver, unreachable=tuple(unreachable)), cards
    finally:
        ask("nvmlShutdown")


def _query_nvml_gpu(ask: Callable[..., Any], handle: Any) -> GpuInfo:
    memory = ask("nvmlDeviceGetMemoryInfo", handle)
    capability = ask("nvmlDeviceGetCudaComputeCapability", handle)
    holders = {}  # a process that computes and draws is in both lists, with the same figure
    for kind in ("Compute", "Graphics"):
        for process in ask(f"nvmlDeviceGet{kind}RunningProcesses", handle, otherwise=()):
            if process.pid != os.getpid():
                mib = process.usedGpuMemory / MIB if process.usedGpuMemory else None
                holders[process.pid] = GpuProcess(process.pid, _process_name(process.pid), mib)
    return GpuInfo(
        name=_decode(ask("nvmlDeviceGetName", handle)) or "NVIDIA card",
        capability=tuple(capability) if capability else None,
        total_mib=memory.total / MIB if memory else None,
        free_mib=memory.free / MIB if memory else None,
        processes=tuple(holders.values()),
    )


def _decode(value: Any) -> str | None:
    """NVML's texts; its older versions answer in bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _process_name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "?"  # another person's, or outside this container


def query_torch_build() -> TorchInfo:
    """The build of torch and what it makes of this machine."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        works = torch.cuda.is_available()
    return TorchInfo(
        version=torch.__version__,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        mps_built=torch.backends.mps.is_built(),
        cuda_available=works,
        archs=tuple(torch.cuda.get_arch_list()),
        release_archs=_release_archs(getattr(torch.cuda, "PYTORCH_RELEASES_CODE_CC", {})),
        warning=" ".join(str(said[0].message).split()) if said else "",
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
    )


def _release_archs(known: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the capabilities that torch's releases are built for, by CUDA version.

    Up to torch 2.11 the table has a set for each version; later, a set for each processor of each version.
    """
    processor = "aarch64" if platform.machine().lower() in ("aarch64", "arm64") else "x86_64"
    sets = {
        cuda: built.get(processor, ()) if isinstance(built, dict) else built for cuda, built in known.items()
    }
    return {cuda: tuple(sorted(capabilities)) for cuda, capabilities in sets.items()}


def with_torch_info(gpus: dict[str, GpuInfo]) -> tuple[GpuInfo, ...]:
    """The cards with torch's names for those that it sees, and torch's own where NVML knows none."""
    import torch

    if not torch.cuda.is_available():
        return tuple(gpus.values())
    seen: dict[str, GpuInfo] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a card that does not suit the build: findings say it
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            uuid = str(getattr(properties, "uuid", number))
            gpu = gpus.get(uuid) or _query_torch_gpu(number, properties)
            with torch.cuda.device(number):
                bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            seen[uuid] = replace(gpu, device=f"cuda:{number}", supports_bf16=bf16)
    # A card that is cut into MIG instances is seen as these, which have UUIDs of their own.
    names = " ".join(gpu.name for gpu in seen.values())
    cut = {uuid for uuid, gpu in gpus.items() if f"{gpu.name} MIG" in names}
    return (*seen.values(), *(gpu for uuid, gpu in gpus.items() if uuid not in seen.keys() | cut))


def _query_torch_gpu(number: int, properties: Any) -> GpuInfo:
    import torch

    free, total = torch.cuda.mem_get_info(number)
    capability = None if torch.version.hip else (properties.major, properties.minor)
    return GpuInfo(properties.name, capability=capability, total_mib=total / MIB, free_mib=free / MIB)


def count_pci_gpus() -> int | None:
    """NVIDIA's display controllers on the PCI bus, with a driver or without; None where nobody tells."""
    bus = Path("/sys/bus/pci/devices")
    if not bus.is_dir():
        return None
    return sum(
        (device / "vendor").read_text().strip() == "0x10de"
        and (device / "class").read_text().startswith("0x03")  # 0x04 is the card's sound
        for device in bus.iterdir()
    )
