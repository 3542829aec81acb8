"""Check the build of torch, the NVIDIA driver, and each GPU."""

import re
from collections.abc import Iterator, Sequence

from captcha_exp.doctor.machine_info import Finding, GpuInfo, GpuProcess, Level, MachineInfo

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
        yield from _check_gpu(info, gpu)


def _check_build(info: MachineInfo) -> Iterator[Finding]:
    torch = info.torch
    if torch is None:
        if info.torch_error:
            remedy = f"python -m pip install --force-reinstall torch (which build: {TORCH_INSTALL_PAGE})"
            yield Finding("problem", f"cannot import torch: {info.torch_error}", remedy)
    elif torch.cuda:
        yield Finding("ok", f"torch {torch.version}, built for CUDA {torch.cuda}")
    elif torch.hip:
        text = f"torch {torch.version}, built for ROCm {torch.hip}"
        if any(name.startswith("cuda") for name in info.devices):
            yield Finding("ok", text)
        else:
            text += f", which is not supported here: training uses {', '.join(info.devices[:1])}"
            yield Finding("info", text, f"train without the GPU; CUDA builds: {TORCH_INSTALL_PAGE}")
    elif info.gpus:
        names = ", ".join(gpu.name for gpu in info.gpus)
        text = f"torch {torch.version} is a CPU-only build, but this machine has {names}"
        yield Finding("info" if info.device_name == "cpu" else "problem", text, _recommend_build(info))
    elif torch.mps_built:
        yield Finding("ok", f"torch {torch.version}, built with MPS")
    else:
        yield Finding("ok", f"torch {torch.version}, a CPU-only build; no NVIDIA GPU found")


def _recommend_build(info: MachineInfo) -> str:
    """Return which build of torch to install for the driver and the GPUs."""
    max_cuda = info.driver.max_cuda
    if builds := _compatible_builds(info, info.gpus):
        return f"install {builds}"
    if info.torch and info.torch.release_archs and max_cuda:
        return (
            f"install the newest driver ({DRIVER_DOWNLOAD_PAGE}), "
            f"then torch built for CUDA ({TORCH_INSTALL_PAGE})"
        )
    version = f"{max_cuda[0]}.x" if max_cuda else "(run nvidia-smi to see which version the driver supports)"
    return f"install torch built for CUDA {version} ({TORCH_INSTALL_PAGE})"


def _compatible_builds(info: MachineInfo, gpus: Sequence[GpuInfo]) -> str:
    """Name the other builds of this release that the driver and one of the GPUs support, newest first."""
    if info.torch is None:
        return ""
    max_cuda = info.driver.max_cuda
    versions = [
        cuda
        for cuda, capabilities in info.torch.release_archs.items()
        if cuda != info.torch.cuda
        and (max_cuda is None or _parse_version(cuda)[0] <= max_cuda[0])
        and any(not _arch_problem(gpu, [f"sm_{number}" for number in capabilities]) for gpu in gpus)
    ]
    versions.sort(key=_parse_version, reverse=True)
    return f"torch built for CUDA {' or '.join(versions)} ({TORCH_INSTALL_PAGE})" if versions else ""


def _parse_version(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _check_driver(info: MachineInfo) -> Iterator[Finding]:
    driver, torch = info.driver, info.torch
    for gpu in driver.unreachable:
        yield Finding("problem", f"NVIDIA GPU {gpu}", "restart the machine; see nvidia-smi")
    if driver.version_mismatch:
        text = f"NVIDIA driver: updated, but the old version is still loaded ({driver.error})"
        yield Finding("problem", text, "restart the machine")
    elif driver.error and info.gpus and not (torch and torch.hip):
        text = f"NVML is not available ({driver.error}): cannot list the processes that use GPU memory"
        remedy = "python -m pip install nvidia-ml-py; in a container, run nvidia-smi on the host"
        yield Finding("info", text, remedy)
    elif driver.error and info.num_pci_gpus:
        text = (
            f"NVIDIA driver: not loaded ({driver.error}), but the PCI bus has {info.num_pci_gpus} NVIDIA GPUs"
        )
        remedy = f"install it ({DRIVER_DOWNLOAD_PAGE}); start a container with --gpus all"
        yield Finding("info", text, remedy)
    elif driver.error and info.num_pci_gpus is None and torch is not None and torch.cuda:
        text = f"NVIDIA driver: not loaded ({driver.error}), but torch is built for CUDA"
        yield Finding("info", text, f"install it if there is an NVIDIA GPU ({DRIVER_DOWNLOAD_PAGE})")
    elif driver.error:
        yield Finding("ok", f"NVIDIA driver: none ({driver.error}); only an NVIDIA GPU needs one")
    elif driver.version:
        supported = f", supports CUDA {driver.max_cuda[0]}.{driver.max_cuda[1]}" if driver.max_cuda else ""
        text, build = f"NVIDIA driver {driver.version}{supported}", _cuda_of_build(info)
        if _is_driver_too_old(info):
            min_driver = MIN_DRIVER_BY_CUDA.get(build[0])
            newer = f"driver {min_driver} or newer" if min_driver else "the newest driver"
            builds = _compatible_builds(info, info.gpus)
            text += f": too old for CUDA {'.'.join(map(str, build))} of torch"
            remedy = f"install {newer} ({DRIVER_DOWNLOAD_PAGE}){', or ' if builds else ''}{builds}"
            yield Finding("problem", text, remedy)
        else:
            older = driver.max_cuda and driver.max_cuda < build
            yield Finding("ok", text + (" and newer minor versions, as torch needs" if older else ""))


def _cuda_of_build(info: MachineInfo) -> tuple[int, ...]:
    return _parse_version(info.torch.cuda) if info.torch and info.torch.cuda else ()


def _is_driver_too_old(info: MachineInfo) -> bool:
    """Return whether the driver supports only earlier major versions of CUDA than the build's."""
    build, newest = _cuda_of_build(info), info.driver.max_cuda
    return bool(build and newest and newest[0] < build[0])


def _check_hidden_gpus(info: MachineInfo) -> Iterator[Finding]:
    """Check that a CUDA build of torch sees every GPU that NVML lists."""
    torch = info.torch
    hidden = [gpu.name for gpu in info.gpus if gpu.device is None]
    if torch is None or torch.cuda is None or not hidden or _is_driver_too_old(info):
        return
    if info.visible_devices is not None:
        hides = f"hides {len(hidden)} of {len(info.gpus)} GPUs from torch: {', '.join(hidden)}"
        text = f"CUDA_VISIBLE_DEVICES={info.visible_devices!r} {hides}"
        yield Finding("info", text, "unset CUDA_VISIBLE_DEVICES")
    elif not torch.cuda_available:
        warning = f": {torch.warning[:200]}" if torch.warning else ""
        yield Finding(
            "problem",
            f"torch sees no GPU, but the driver lists {', '.join(hidden)}{warning}",
            "restart the machine; start a container with --gpus all; see nvidia-smi",
        )


def _check_gpu(info: MachineInfo, gpu: GpuInfo) -> Iterator[Finding]:
    if gpu.device is None:
        yield Finding("ok", f"GPU not used by torch: {gpu.name}{_format_gpu(gpu)}")
        return
    selected = info.devices[0] if info.device_name == "auto" and info.devices else info.device_name
    is_selected = gpu.device == ("cuda:0" if selected == "cuda" else selected)
    name = f"{gpu.device} ({gpu.name})"
    yield from _check_archs(info, gpu, name, is_selected)
    yield from _check_memory(info, gpu, name, is_selected)
    has_fast_fp16 = gpu.capability is not None and gpu.capability >= (7, 0)
    if gpu.capability == (7, 5) and _WITHOUT_TENSOR_CORES.search(gpu.name):
        has_fast_fp16 = False
        text = f"{name} has no tensor cores: in fp16 some convolutions return NaN or are 2 to 4 times slower"
        level: Level = "problem" if is_selected and info.precision == "fp16" else "info"
        yield Finding(level, text, "device.precision=auto (tests fp16 first), or fp32")
    if is_selected and info.precision == "bf16" and not gpu.supports_bf16:
        text = f"{name}: device.precision=bf16 is only emulated on this GPU, and slower than fp32"
        yield Finding("info", text, "device.precision=fp32")
    elif gpu.capability is not None:
        fast = [kind for kind, fast in (("bf16", gpu.supports_bf16), ("fp16", has_fast_fp16)) if fast]
        yield Finding("ok", f"{name}: fast 16-bit types: {' and '.join(fast) or 'none, use fp32'}")


def _check_archs(info: MachineInfo, gpu: GpuInfo, name: str, is_selected: bool) -> Iterator[Finding]:
    """Check that the build of torch contains code for the GPU."""
    torch = info.torch
    if torch is None or torch.cuda is None or gpu.capability is None or not torch.archs:
        return
    problem, max_cuda = _arch_problem(gpu, torch.archs), info.driver.max_cuda
    if problem == "PTX":
        # Minor-version compatibility covers machine code only, not the JIT compiler.
        if not max_cuda or max_cuda >= _cuda_of_build(info):
            return
        text = f"{name}: torch has only PTX for it, and the driver is older than CUDA {torch.cuda}"
        remedy = f"install the newest driver ({DRIVER_DOWNLOAD_PAGE})"
    elif problem:
        capability = "{}.{}".format(*gpu.capability)
        text = f"{name}: capability {capability} is {problem} by this torch: {' '.join(torch.archs)}"
        if builds := _compatible_builds(info, [gpu]):
            remedy = f"install {builds}, or device.name=cpu"
        elif problem == "too old to be supported":
            remedy = "device.name=cpu"
        else:
            remedy = f"install the newest supported torch ({TORCH_INSTALL_PAGE}), or device.name=cpu"
    else:
        return
    yield Finding("problem" if is_selected else "info", text, remedy)


def _arch_problem(gpu: GpuInfo, archs: Sequence[str]) -> str:
    """Return "" if `archs` have machine code for the GPU, "PTX" if only that, else why it is unsupported.

    Machine code for 8.0 runs on 8.6, but not on 9.0 or 7.5; PTX runs on every later GPU. The suffix `a` means
    exactly this capability. Source: CUDA C++ Programming Guide, 'Compute Capability'.
    """
    here = gpu.capability
    matches = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch) for arch in archs]
    targets = [(m[1], (int(m[2]), int(m[3])), m[4]) for m in matches if m]
    if here is None or not targets:
        return ""
    for kind, target, suffix in targets:
        if kind == "sm" and target[0] == here[0] and (target == here if suffix == "a" else target <= here):
            return ""
    if any(kind == "compute" and target <= here and not suffix for kind, target, suffix in targets):
        return "PTX"
    capabilities = [target for _, target, _ in targets]
    age = "too old" if here < min(capabilities) else "too new" if here > max(capabilities) else ""
    return f"{age} to be supported" if age else "not supported"


def _format_gpu(gpu: GpuInfo) -> str:
    """Format the capability, the memory, and the processes that use it."""
    capability = ", capability {}.{}".format(*gpu.capability) if gpu.capability else ""
    if gpu.total_mib is None or gpu.free_mib is None:
        return capability
    text = f"{capability}: {gpu.free_mib:,.0f} of {gpu.total_mib:,.0f} MiB free"
    if gpu.processes:
        return f"{text}, used by {', '.join(map(_format_process, gpu.processes))}"
    hidden = gpu.total_mib - gpu.free_mib > UNATTRIBUTED_MIB
    return text + (", the rest by unknown processes (outside this container)" if hidden else "")


def _format_process(process: GpuProcess) -> str:
    return f"{process.pid} {process.name}" + (f" {process.memory_mib:,.0f} MiB" if process.memory_mib else "")


def _check_memory(info: MachineInfo, gpu: GpuInfo, name: str, is_selected: bool) -> Iterator[Finding]:
    text = name + _format_gpu(gpu)
    if gpu.total_mib is None or gpu.free_mib is None or gpu.free_mib > MIN_FREE_FRACTION * gpu.total_mib:
        yield Finding("ok", text)
        return
    freer = [other for other in info.gpus if other.device and (other.free_mib or 0) > 2 * gpu.free_mib]
    best = max(freer, key=lambda other: other.free_mib or 0, default=None)
    switch = f"device.name={best.device} has {best.free_mib:,.0f} MiB free; or " if best else ""
    largest = max(gpu.processes, key=lambda process: process.memory_mib or 0, default=None)
    stop = (
        f"stop process {largest.pid} ({largest.name}), or wait for it"
        if largest
        else "run nvidia-smi on the host to see the processes"
    )
    is_full = is_selected and gpu.free_mib < MIN_FREE_MIB
    yield Finding("problem" if is_full else "info", text, switch + stop)
