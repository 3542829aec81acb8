"""Query the NVIDIA driver, the GPUs, and the build of torch."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from captcha_exp.doctor.machine_info import DriverInfo, GpuInfo, GpuProcess, TorchInfo
from captcha_exp.errors import one_line

MIB = 2**20
VERSION_MISMATCH = 18  # NVML_ERROR_LIB_RM_VERSION_MISMATCH


def query_nvml() -> dict[str, Any]:
    """Return the NVIDIA driver and its GPUs. A query that fails leaves its field empty."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError as error:
        return {"driver": DriverInfo(error=f"cannot import nvidia-ml-py: {error}")}
    except pynvml.NVMLError as error:
        return {"driver": DriverInfo(error=str(error), version_mismatch=error.value == VERSION_MISMATCH)}

    def query(function: str, *arguments: Any, default: Any = None) -> Any:
        try:
            return getattr(pynvml, function)(*arguments)
        except (pynvml.NVMLError, AttributeError):  # AttributeError: not in this version of nvidia-ml-py
            return default

    gpus, unreachable = [], []
    for index in range(query("nvmlDeviceGetCount", default=0)):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        except pynvml.NVMLError as error:
            unreachable.append(f"{index}: {error}")
            continue
        memory = query("nvmlDeviceGetMemoryInfo", handle)
        processes = {  # by id: a process that computes and draws is in both lists
            process.pid: GpuProcess(
                process.pid, _process_name(process.pid), (process.usedGpuMemory or 0) / MIB
            )
            for kind in ("Compute", "Graphics")
            for process in query(f"nvmlDeviceGet{kind}RunningProcesses", handle, default=())
            if process.pid != os.getpid()
        }
        gpu = GpuInfo(
            name=query("nvmlDeviceGetName", handle, default="NVIDIA GPU"),
            capability=tuple(query("nvmlDeviceGetCudaComputeCapability", handle, default=())),
            total_mib=memory.total / MIB if memory else 0,
            free_mib=memory.free / MIB if memory else 0,
            processes=tuple(processes.values()),
            uuid=query("nvmlDeviceGetUUID", handle, default=str(index)).removeprefix("GPU-"),
        )
        gpus.append(gpu)
    driver = DriverInfo(query("nvmlSystemGetDriverVersion"), unreachable=tuple(unreachable))
    query("nvmlShutdown")
    return {"driver": driver, "gpus": tuple(gpus)}


def _process_name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "?"  # another user's process, or one outside this container


def query_torch_build() -> TorchInfo:
    """Return the build of torch, and its warning if it cannot use CUDA."""
    import torch

    from captcha_exp.runtime.device import cpu_flags

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.is_available()
    build = "MPS" if torch.backends.mps.is_built() else ""
    if torch.version.cuda or torch.version.hip:
        rocm = f"ROCm {torch.version.hip}, which is not supported here"
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else rocm
    return TorchInfo(
        version=torch.__version__,
        build=build,
        warning=one_line(caught[0].message) if caught else "",
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cpu_flags=cpu_flags(),
    )


def query_torch_gpus(gpus: Sequence[GpuInfo], devices: Sequence[str]) -> dict[str, Any]:
    """Return the GPUs among torch's devices with their device names, then those that only NVML sees."""
    if "cuda" not in devices:
        return {}
    import torch

    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    visible = []
    with warnings.catch_warnings(record=True) as caught:  # names a GPU that the build does not support
        warnings.simplefilter("always")
        for index, device in enumerate(name for name in devices if name.startswith("cuda:")):
            properties = torch.cuda.get_device_properties(index)
            gpu = by_uuid.pop(str(properties.uuid), None)
            if gpu is None:
                free, total = torch.cuda.mem_get_info(index)
                gpu = GpuInfo(properties.name, total_mib=total / MIB, free_mib=free / MIB)
            is_supported = not any(f"{properties.name} " in str(warning.message) for warning in caught)
            capability = properties.major, properties.minor
            visible.append(replace(gpu, device=device, capability=capability, is_supported=is_supported))
    # torch sees the MIG instances of a GPU in its place, and they have UUIDs of their own.
    names = " ".join(gpu.name for gpu in visible)
    return {"gpus": (*visible, *(gpu for gpu in by_uuid.values() if f"{gpu.name} MIG" not in names))}


def count_pci_gpus() -> dict[str, int]:
    """Count the NVIDIA display controllers on the PCI bus, with or without a driver; only on Linux."""
    bus = Path("/sys/bus/pci/devices")
    if not bus.is_dir():
        return {}
    devices = [((path / "vendor").read_text(), (path / "class").read_text()) for path in bus.iterdir()]
    # 0x10de is NVIDIA; 0x03 a display controller, and 0x04 the audio device of a GPU.
    return {"num_pci_gpus": sum(v.strip() == "0x10de" and c.startswith("0x03") for v, c in devices)}
