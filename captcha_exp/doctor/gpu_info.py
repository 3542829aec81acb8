"""Query the NVIDIA driver, the GPUs, and the build of torch."""

import os
import platform
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from captcha_exp.doctor.machine_info import DriverInfo, GpuInfo, GpuProcess, TorchInfo

MIB = 2**20
VERSION_MISMATCH = 18  # NVML_ERROR_LIB_RM_VERSION_MISMATCH


def query_nvml() -> tuple[DriverInfo, dict[str, GpuInfo]]:
    """Return the NVIDIA driver, and the GPUs by UUID. A query that fails leaves its field empty."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError as error:
        return DriverInfo(error=f"cannot import nvidia-ml-py: {error}"), {}
    except pynvml.NVMLError as error:
        return DriverInfo(error=str(error), version_mismatch=error.value == VERSION_MISMATCH), {}

    def query(function: str, *arguments: Any, default: Any = None) -> Any:
        try:
            return getattr(pynvml, function)(*arguments)
        except (pynvml.NVMLError, AttributeError):  # AttributeError: not in this version of nvidia-ml-py
            return default

    def query_gpu(handle: Any) -> GpuInfo:
        memory = query("nvmlDeviceGetMemoryInfo", handle)
        capability = query("nvmlDeviceGetCudaComputeCapability", handle)
        processes = {}  # by id: a process that computes and draws is in both lists
        for kind in ("Compute", "Graphics"):
            for process in query(f"nvmlDeviceGet{kind}RunningProcesses", handle, default=()):
                if process.pid != os.getpid():
                    used_mib = process.usedGpuMemory / MIB if process.usedGpuMemory else None
                    processes[process.pid] = GpuProcess(process.pid, _process_name(process.pid), used_mib)
        return GpuInfo(
            name=query("nvmlDeviceGetName", handle) or "NVIDIA GPU",
            capability=tuple(capability) if capability else None,
            total_mib=memory.total / MIB if memory else None,
            free_mib=memory.free / MIB if memory else None,
            processes=tuple(processes.values()),
        )

    try:
        max_cuda = query("nvmlSystemGetCudaDriverVersion_v2")  # 12020 is 12.2
        gpus, unreachable = {}, []
        for index in range(query("nvmlDeviceGetCount", default=0)):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            except pynvml.NVMLError as error:
                unreachable.append(f"{index}: {error}")
                continue
            uuid = query("nvmlDeviceGetUUID", handle) or str(index)
            gpus[uuid.removeprefix("GPU-")] = query_gpu(handle)
        driver = DriverInfo(
            version=query("nvmlSystemGetDriverVersion"),
            max_cuda=(max_cuda // 1000, max_cuda % 1000 // 10) if max_cuda else None,
            unreachable=tuple(unreachable),
        )
        return driver, gpus
    finally:
        query("nvmlShutdown")


def _process_name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "?"  # another user's process, or one outside this container


def query_torch_build() -> TorchInfo:
    """Return the build of torch, and whether it can use CUDA."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cuda_available = torch.cuda.is_available()
    # Since torch 2.12 the table has a set of capabilities for each processor of a CUDA version.
    processor = "aarch64" if platform.machine().lower() in ("aarch64", "arm64") else "x86_64"
    table: dict[str, Any] = getattr(torch.cuda, "PYTORCH_RELEASES_CODE_CC", {})
    release_archs = {
        cuda: tuple(sorted(archs.get(processor, ()) if isinstance(archs, dict) else archs))
        for cuda, archs in table.items()
    }
    return TorchInfo(
        version=torch.__version__,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        mps_built=torch.backends.mps.is_built(),
        cuda_available=cuda_available,
        archs=tuple(torch.cuda.get_arch_list()),
        release_archs=release_archs,
        warning=" ".join(str(caught[0].message).split()) if caught else "",
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
    )


def with_torch_info(gpus: dict[str, GpuInfo]) -> tuple[GpuInfo, ...]:
    """Return the GPUs that torch sees with their device names, then those that only NVML sees."""
    import torch

    if not torch.cuda.is_available():
        return tuple(gpus.values())
    visible: dict[str, GpuInfo] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a GPU that the build does not support: a finding says so
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            uuid = str(getattr(properties, "uuid", index))
            gpu = gpus.get(uuid)
            if gpu is None:
                free, total = torch.cuda.mem_get_info(index)
                capability = None if torch.version.hip else (properties.major, properties.minor)
                gpu = GpuInfo(properties.name, None, capability, total / MIB, free / MIB)
            with torch.cuda.device(index):
                bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            visible[uuid] = replace(gpu, device=f"cuda:{index}", supports_bf16=bf16)
    # torch sees the MIG instances of a GPU in its place, and they have UUIDs of their own.
    names = " ".join(gpu.name for gpu in visible.values())
    hidden = [gpu for uuid, gpu in gpus.items() if uuid not in visible and f"{gpu.name} MIG" not in names]
    return (*visible.values(), *hidden)


def count_pci_gpus() -> int | None:
    """Count the NVIDIA display controllers on the PCI bus, with or without a driver; None if unknown."""
    bus = Path("/sys/bus/pci/devices")
    if not bus.is_dir():
        return None
    return sum(
        (device / "vendor").read_text().strip() == "0x10de"
        and (device / "class").read_text().startswith("0x03")  # 0x04 is the audio device of a GPU
        for device in bus.iterdir()
    )
