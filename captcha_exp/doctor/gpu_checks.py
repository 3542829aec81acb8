"""Check the build of torch, the NVIDIA driver, and each GPU."""

from collections.abc import Iterator

from captcha_exp.config import fast_precisions, has_tensor_cores
from captcha_exp.doctor.machine_info import Finding, GpuInfo, Level, MachineInfo

TORCH_INSTALL_PAGE = "pytorch.org, 'Get started'"
DRIVER_DOWNLOAD_PAGE = "nvidia.com/drivers"
MIN_FREE_FRACTION = 0.5
MIN_FREE_MIB = 512
UNATTRIBUTED_MIB = 1024  # more than the driver and a desktop use


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
    torch = info.torch
    if torch is None:
        if info.torch_error:
            remedy = f"python -m pip install --force-reinstall torch (which build: {TORCH_INSTALL_PAGE})"
            yield Finding("problem", f"cannot import torch: {info.torch_error}", remedy)
        return
    build = f"built for {torch.build}" if torch.build else "a CPU-only build"
    if info.gpus and not torch.has_cuda:
        names = ", ".join(gpu.name for gpu in info.gpus)
        level: Level = "info" if info.device_name == "cpu" else "problem"
        remedy = f"install torch built for CUDA ({TORCH_INSTALL_PAGE})"
        yield Finding(level, f"torch {torch.version} is {build}, but this machine has {names}", remedy)
    else:
        yield Finding("ok", f"torch {torch.version}, {build}")


def _check_driver(info: MachineInfo) -> Iterator[Finding]:
    driver, num_pci_gpus = info.driver, info.num_pci_gpus
    for gpu in driver.unreachable:
        yield Finding("problem", f"NVIDIA GPU {gpu}", "restart the machine; see nvidia-smi")
    if driver.version_mismatch:
        text = f"NVIDIA driver: updated, but the old version is still loaded ({driver.error})"
        yield Finding("problem", text, "restart the machine")
    elif driver.error and info.gpus:
        text = f"NVML is not available ({driver.error}): cannot list the processes that use GPU memory"
        remedy = "python -m pip install nvidia-ml-py; in a container, run nvidia-smi on the host"
        yield Finding("info", text, remedy)
    elif driver.error and num_pci_gpus:
        text = f"NVIDIA driver: not loaded ({driver.error}), but the PCI bus has {num_pci_gpus} NVIDIA GPUs"
        remedy = f"install it ({DRIVER_DOWNLOAD_PAGE}); start a container with --gpus all"
        yield Finding("info", text, remedy)
    elif driver.error:
        yield Finding("ok", f"NVIDIA driver: none ({driver.error}); only an NVIDIA GPU needs one")
    elif driver.version:
        yield Finding("ok", f"NVIDIA driver {driver.version}")


def _check_hidden_gpus(info: MachineInfo) -> Iterator[Finding]:
    """Check that a CUDA build of torch sees every GPU that NVML lists."""
    torch, hidden = info.torch, [gpu.name for gpu in info.gpus if gpu.device is None]
    if torch is None or not torch.has_cuda or not hidden:
        return
    names = ", ".join(hidden)
    if info.visible_devices is not None:
        text = f"CUDA_VISIBLE_DEVICES={info.visible_devices!r} hides {len(hidden)} of {len(info.gpus)} GPUs"
        yield Finding("info", f"{text} from torch: {names}", "unset CUDA_VISIBLE_DEVICES")
    elif "cuda" not in info.devices:
        reason = f": {torch.warning[:200]}" if torch.warning else ""
        remedy = (
            f"install the newest driver ({DRIVER_DOWNLOAD_PAGE}) or an older CUDA build of torch "
            f"({TORCH_INSTALL_PAGE}), restart the machine; start a container with --gpus all"
        )
        yield Finding("problem", f"torch sees no GPU, but the driver lists {names}{reason}", remedy)


def _check_gpu(info: MachineInfo, gpu: GpuInfo, is_selected: bool) -> Iterator[Finding]:
    """Check a GPU that torch sees; what is a problem of the selected one is only mentioned of another."""
    name = f"{gpu.device} ({gpu.name})"
    problem: Level = "problem" if is_selected else "info"
    if not gpu.is_supported:
        text = f"{name}{_format_capability(gpu)} is not supported by this build of torch"
        yield Finding(problem, text, f"install another build ({TORCH_INSTALL_PAGE}), or device.name=cpu")
    yield from _check_memory(info, gpu, name, is_selected)
    types = fast_precisions(gpu.capability, gpu.name)
    if gpu.capability >= (7, 0) and not has_tensor_cores(gpu.capability, gpu.name):
        text = f"{name} has no tensor cores: in fp16 some convolutions return NaN or are 2 to 4 times slower"
        remedy = "device.precision=auto, which is fp32 on this GPU"
        yield Finding(problem if info.precision == "fp16" else "info", text, remedy)
    if is_selected and info.precision == "bf16" and "bf16" not in types:
        text = f"{name}: device.precision=bf16 is only emulated on this GPU, and slower than fp32"
        yield Finding("info", text, "device.precision=fp32")
    else:
        yield Finding("ok", f"{name}: fast 16-bit types: {' and '.join(types) or 'none, use fp32'}")


def _format_gpu(gpu: GpuInfo) -> str:
    """Format the capability, the memory, and the processes that use it."""
    capability = _format_capability(gpu)
    if not gpu.total_mib:
        return capability
    text = f"{capability}: {gpu.free_mib:,.0f} of {gpu.total_mib:,.0f} MiB free"
    if gpu.processes:
        return f"{text}, used by {', '.join(map(str, gpu.processes))}"
    hidden = gpu.total_mib - gpu.free_mib > UNATTRIBUTED_MIB
    return text + (", the rest by unknown processes (outside this container)" if hidden else "")


def _format_capability(gpu: GpuInfo) -> str:
    return ", capability " + ".".join(map(str, gpu.capability)) if gpu.capability else ""


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
