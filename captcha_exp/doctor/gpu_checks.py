"""Check the build of torch, the NVIDIA driver, and each GPU."""

import re
from collections.abc import Iterator, Sequence

from packaging.version import Version

from captcha_exp.doctor.machine_info import Finding, GpuInfo, Level, MachineInfo

TORCH_INSTALL_PAGE = "pytorch.org, 'Get started'"
DRIVER_DOWNLOAD_PAGE = "nvidia.com/drivers"
# The first driver that runs every minor version of a CUDA. Source: docs.nvidia.com, 'CUDA Compatibility'.
MIN_DRIVER_BY_CUDA = {11: 450, 12: 525, 13: 580}
MIN_FREE_FRACTION = 0.5
MIN_FREE_MIB = 512
UNATTRIBUTED_MIB = 1024  # more than the driver and a desktop use

# Turing without tensor cores (TU116, TU117); other GPUs with compute capability 7.5 have them.
_WITHOUT_TENSOR_CORES = re.compile(r"GTX 16\d\d|\bMX ?[45]50\b|\bT(400|500|550|600|1000|1200|2000)\b")


def check_gpus(info: MachineInfo) -> Iterator[Finding]:
    """Check the build, the driver, the visibility of the GPUs, and each GPU."""
    yield from _check_build(info)
    yield from _check_driver(info)
    yield from _check_hidden_gpus(info)
    for gpu in info.gpus:
        if gpu.device is None:
            yield Finding("ok", f"GPU not used by torch: {gpu.name}{_format_gpu(gpu)}")
        else:
            selected = {"auto": "cuda:0", "cuda": "cuda:0"}.get(info.device_name, info.device_name)
            yield from _check_gpu(info, gpu, is_selected=gpu.device == selected)


def _check_build(info: MachineInfo) -> Iterator[Finding]:
    torch, names = info.torch, ", ".join(gpu.name for gpu in info.gpus)
    if torch is None:
        if info.torch_error:
            remedy = f"python -m pip install --force-reinstall torch (which build: {TORCH_INSTALL_PAGE})"
            yield Finding("problem", f"cannot import torch: {info.torch_error}", remedy)
    elif torch.cuda:
        yield Finding("ok", f"torch {torch.version}, built for CUDA {torch.cuda}")
    elif torch.hip:
        text = f"torch {torch.version}, built for ROCm {torch.hip}, which is not supported here"
        remedy = f"train without the GPU; CUDA builds: {TORCH_INSTALL_PAGE}"
        yield Finding("info", f"{text}: training uses {', '.join(info.devices[:1])}", remedy)
    elif names:
        newer = (
            f"the newest driver ({DRIVER_DOWNLOAD_PAGE}), then torch built for CUDA ({TORCH_INSTALL_PAGE})"
        )
        text = f"torch {torch.version} is a CPU-only build, but this machine has {names}"
        level: Level = "info" if info.device_name == "cpu" else "problem"
        yield Finding(level, text, f"install {_compatible_builds(info, info.gpus) or newer}")
    else:
        build = "built with MPS" if torch.mps_built else "a CPU-only build; no NVIDIA GPU found"
        yield Finding("ok", f"torch {torch.version}, {build}")


def _compatible_builds(info: MachineInfo, gpus: Sequence[GpuInfo]) -> str:
    """Name the other builds of this release that the driver and one of the GPUs support, newest first."""
    max_cuda = info.driver.max_cuda
    versions = [
        cuda
        for cuda, capabilities in (info.torch.release_archs if info.torch else {}).items()
        if cuda != (info.torch and info.torch.cuda)
        and (not max_cuda or Version(cuda).major <= max_cuda[0])
        and any(_is_supported(gpu, [f"sm_{number}" for number in capabilities]) for gpu in gpus)
    ]
    versions.sort(key=Version, reverse=True)
    return f"torch built for CUDA {' or '.join(versions)} ({TORCH_INSTALL_PAGE})" if versions else ""


def _cuda_of_build(info: MachineInfo) -> tuple[int, ...]:
    return Version(info.torch.cuda).release[:2] if info.torch and info.torch.cuda else ()


def _is_driver_too_old(info: MachineInfo) -> bool:
    """Return whether the driver supports only earlier major versions of CUDA than the build's."""
    build, newest = _cuda_of_build(info), info.driver.max_cuda
    return bool(build and newest and newest[0] < build[0])


def _check_driver(info: MachineInfo) -> Iterator[Finding]:
    driver, build, num_pci_gpus = info.driver, _cuda_of_build(info), info.num_pci_gpus
    for gpu in driver.unreachable:
        yield Finding("problem", f"NVIDIA GPU {gpu}", "restart the machine; see nvidia-smi")
    if driver.version_mismatch:
        text = f"NVIDIA driver: updated, but the old version is still loaded ({driver.error})"
        yield Finding("problem", text, "restart the machine")
    elif driver.error and info.gpus:
        text = f"NVML is not available ({driver.error}): cannot list the processes that use GPU memory"
        remedy = "python -m pip install nvidia-ml-py; in a container, run nvidia-smi on the host"
        yield Finding("info", text, remedy)
    elif driver.error and (num_pci_gpus or (num_pci_gpus is None and build)):
        sign = f"the PCI bus has {num_pci_gpus} NVIDIA GPUs" if num_pci_gpus else "torch is built for CUDA"
        condition = "" if num_pci_gpus else " if there is an NVIDIA GPU"
        remedy = f"install it{condition} ({DRIVER_DOWNLOAD_PAGE}); start a container with --gpus all"
        yield Finding("info", f"NVIDIA driver: not loaded ({driver.error}), but {sign}", remedy)
    elif driver.error:
        yield Finding("ok", f"NVIDIA driver: none ({driver.error}); only an NVIDIA GPU needs one")
    elif driver.version:
        text = f"NVIDIA driver {driver.version}"
        if driver.max_cuda:
            text += ", supports CUDA " + ".".join(map(str, driver.max_cuda))
        if _is_driver_too_old(info):
            min_driver = MIN_DRIVER_BY_CUDA.get(build[0])
            newer = f"driver {min_driver} or newer" if min_driver else "the newest driver"
            remedies = f"{newer} ({DRIVER_DOWNLOAD_PAGE})", _compatible_builds(info, info.gpus)
            text += f": too old for CUDA {'.'.join(map(str, build))} of torch"
            yield Finding("problem", text, "install " + ", or ".join(filter(None, remedies)))
        else:
            older = driver.max_cuda and driver.max_cuda < build
            yield Finding("ok", text + (" and newer minor versions, as torch needs" if older else ""))


def _check_hidden_gpus(info: MachineInfo) -> Iterator[Finding]:
    """Check that a CUDA build of torch sees every GPU that NVML lists."""
    torch, hidden = info.torch, [gpu.name for gpu in info.gpus if gpu.device is None]
    if torch is None or torch.cuda is None or not hidden or _is_driver_too_old(info):
        return
    names = ", ".join(hidden)
    if info.visible_devices is not None:
        text = f"CUDA_VISIBLE_DEVICES={info.visible_devices!r} hides {len(hidden)} of {len(info.gpus)} GPUs"
        yield Finding("info", f"{text} from torch: {names}", "unset CUDA_VISIBLE_DEVICES")
    elif "cuda" not in info.devices:
        warning = f": {torch.warning[:200]}" if torch.warning else ""
        remedy = "restart the machine; start a container with --gpus all; see nvidia-smi"
        yield Finding("problem", f"torch sees no GPU, but the driver lists {names}{warning}", remedy)


def _check_gpu(info: MachineInfo, gpu: GpuInfo, is_selected: bool) -> Iterator[Finding]:
    """Check a GPU that torch sees; what is a problem of the selected one is only mentioned of another."""
    name = f"{gpu.device} ({gpu.name})"
    problem: Level = "problem" if is_selected else "info"
    archs = info.torch.archs if info.torch else ()
    if archs and not _is_supported(gpu, archs):
        targets = sorted(tuple(map(int, match)) for match in re.findall(r"_(\d+)(\d)", " ".join(archs)))
        is_old = gpu.capability < targets[0]
        support = "too old to be" if is_old else "too new to be" if gpu.capability > targets[-1] else "not"
        capability = ".".join(map(str, gpu.capability))
        text = f"{name}: capability {capability} is {support} supported by this torch: {' '.join(archs)}"
        newest = "" if is_old else f"the newest supported torch ({TORCH_INSTALL_PAGE})"
        build = _compatible_builds(info, [gpu]) or newest
        yield Finding(problem, text, f"{f'install {build}, or ' if build else ''}device.name=cpu")
    yield from _check_memory(info, gpu, name, is_selected)
    types = [kind for kind, since in (("bf16", (8, 0)), ("fp16", (7, 0))) if gpu.capability >= since]
    if gpu.capability == (7, 5) and _WITHOUT_TENSOR_CORES.search(gpu.name):
        types = []
        text = f"{name} has no tensor cores: in fp16 some convolutions return NaN or are 2 to 4 times slower"
        remedy = "device.precision=auto (tests fp16 first), or fp32"
        yield Finding(problem if info.precision == "fp16" else "info", text, remedy)
    if is_selected and info.precision == "bf16" and "bf16" not in types:
        text = f"{name}: device.precision=bf16 is only emulated on this GPU, and slower than fp32"
        yield Finding("info", text, "device.precision=fp32")
    else:
        yield Finding("ok", f"{name}: fast 16-bit types: {' and '.join(types) or 'none, use fp32'}")


def _is_supported(gpu: GpuInfo, archs: Sequence[str]) -> bool:
    """Return whether the GPU can run code for one of the archs, by torch's table of machine code.

    PTX (compute_90) runs on every later GPU. The suffix `a` means exactly this capability. Source: CUDA C++
    Programming Guide, 'Compute Capability'.
    """
    from torch.cuda import DEVICE_REQUIREMENT

    if not gpu.capability:
        return True  # unknown
    here = gpu.capability[0] * 10 + gpu.capability[1]
    for kind, number, suffix in re.findall(r"(sm|compute)_(\d+)([af]?)", " ".join(archs)):
        target = int(number)
        if target == here or (kind == "compute" and target < here and not suffix):
            return True
        if kind == "sm" and suffix != "a" and here in DEVICE_REQUIREMENT.get(target, ()):
            return True
    return False


def _format_gpu(gpu: GpuInfo) -> str:
    """Format the capability, the memory, and the processes that use it."""
    capability = ", capability " + ".".join(map(str, gpu.capability)) if gpu.capability else ""
    if not gpu.total_mib:
        return capability
    text = f"{capability}: {gpu.free_mib:,.0f} of {gpu.total_mib:,.0f} MiB free"
    if gpu.processes:
        return f"{text}, used by {', '.join(map(str, gpu.processes))}"
    hidden = gpu.total_mib - gpu.free_mib > UNATTRIBUTED_MIB
    return text + (", the rest by unknown processes (outside this container)" if hidden else "")


def _check_memory(info: MachineInfo, gpu: GpuInfo, name: str, is_selected: bool) -> Iterator[Finding]:
    text = name + _format_gpu(gpu)
    if not gpu.total_mib or gpu.free_mib > MIN_FREE_FRACTION * gpu.total_mib:
        yield Finding("ok", text)
        return
    best = max((other for other in info.gpus if other.device), key=lambda other: other.free_mib)
    remedy = "run nvidia-smi on the host to see the processes"
    if gpu.processes:
        largest = max(gpu.processes, key=lambda process: process.memory_mib)
        remedy = f"stop process {largest.pid} ({largest.name}), or wait for it"
    if best.free_mib > 2 * gpu.free_mib:
        remedy = f"device.name={best.device} has {best.free_mib:,.0f} MiB free; or {remedy}"
    is_full = is_selected and gpu.free_mib < MIN_FREE_MIB
    yield Finding("problem" if is_full else "info", text, remedy)
