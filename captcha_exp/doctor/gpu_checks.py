"""What is said of torch's build, the NVIDIA driver and the cards."""

import re
from collections.abc import Iterator, Sequence

from captcha_exp.doctor.machine_info import (
    DriverInfo,
    Finding,
    GpuInfo,
    GpuProcess,
    Level,
    MachineInfo,
    TorchInfo,
)

TORCH_INSTALL_PAGE = "pytorch.org, 'Get started'"
DRIVER_DOWNLOAD_PAGE = "nvidia.com/drivers"
# docs.nvidia.com, 'CUDA Compatibility': from these on, a driver runs every minor version of the CUDA.
MIN_DRIVER_BY_CUDA = {11: 450, 12: 525, 13: 580}
MIN_FREE_FRACTION = 0.5  # share of a card that others hold
MIN_FREE_MIB = 512
UNATTRIBUTED_MIB = 1024  # more is in use than a driver and a desktop take for themselves

# Turing without tensor cores (TU116, TU117), though its capability, 7.5, is that of the cards with them.
_WITHOUT_TENSOR_CORES = re.compile(r"GTX 16\d\d|\bMX ?[45]50\b|\bT(400|500|550|600|1000|1200|2000)\b")


def check_gpus(info: MachineInfo) -> Iterator[Finding]:
    """The build, the driver, what is hidden, each card."""
    yield from _check_build(info)
    yield from _check_driver(info)
    yield from _check_hidden_gpus(info)
    for card in info.gpus:
        yield from _check_gpu(info, card)


def _check_build(facts: MachineInfo) -> Iterator[Finding]:
    torch = facts.torch
    if torch is None:
        if facts.torch_error:
            remedy = f"python -m pip install --force-reinstall torch (which build: {TORCH_INSTALL_PAGE})"
            yield Finding("problem", f"torch cannot be imported: {facts.torch_error}", remedy)
    elif torch.cuda:
        yield Finding("ok", f"torch {torch.version} is built for CUDA {torch.cuda}")
    elif torch.hip:
        text = f"torch {torch.version} is built for ROCm {torch.hip}"
        if any(name.startswith("cuda") for name in facts.devices):
            yield Finding("ok", text)
        else:
            text += f", which is not used here: training takes {', '.join(facts.devices[:1])}"
            yield Finding("note", text, f"go on without the card; CUDA builds: {TORCH_INSTALL_PAGE}")
    elif facts.gpus:
        names = ", ".join(gpu.name for gpu in facts.gpus)
        text = f"torch {torch.version} is a CPU-only build, on a machine with {names}"
        level: Level = "note" if facts.device_name == "cpu" else "problem"
        yield Finding(level, text, _recommend_build(torch, facts.driver, facts.gpus))
    elif torch.mps_built:
        yield Finding("ok", f"torch {torch.version} is built with MPS")
    else:
        yield Finding("ok", f"torch {torch.version} is a CPU-only build, no NVIDIA card answers")


def _recommend_build(torch: TorchInfo, driver: DriverInfo, cards: Sequence[GpuInfo]) -> str:
    """What to install, for a driver and cards."""
    fitting = _compatible_builds(torch, driver, cards)
    if fitting:
        return f"install torch built for CUDA {' or '.join(fitting)} ({TORCH_INSTALL_PAGE})"
    if torch.release_archs and driver.max_cuda:
        return (
            f"install the newest driver ({DRIVER_DOWNLOAD_PAGE}), "
            f"then torch built for CUDA ({TORCH_INSTALL_PAGE})"
        )
    newest = (
        f"{driver.max_cuda[0]}.x" if driver.max_cuda else "(nvidia-smi says which version the driver takes)"
    )
    return f"install torch built for CUDA {newest} ({TORCH_INSTALL_PAGE})"


def _compatible_builds(torch: TorchInfo, driver: DriverInfo, cards: Sequence[GpuInfo]) -> list[str]:
    """CUDA of the builds of this release that the driver and one of the cards take, the newest first."""
    fitting = [
        cuda
        for cuda, capabilities in torch.release_archs.items()
        if (driver.max_cuda is None or _parse_version(cuda)[0] <= driver.max_cuda[0])
        and any(_arch_support(card, [f"sm_{number}" for number in capabilities]) == "" for card in cards)
    ]
    return sorted(fitting, key=_parse_version, reverse=True)


def _parse_version(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _check_driver(facts: MachineInfo) -> Iterator[Finding]:
    driver, torch = facts.driver, facts.torch
    for card in driver.unreachable:
        yield Finding("problem", f"NVIDIA card {card}", "restart the machine; see nvidia-smi")
    if driver.version_mismatch:
        yield Finding(
            "problem",
            f"NVIDIA driver: it was updated and the old one still runs ({driver.error})",
            "restart the machine",
        )
    elif driver.error and facts.gpus and not (torch and torch.hip):
        text = f"NVML does not answer ({driver.error}): who holds the memory of the cards is unknown"
        remedy = "python -m pip install nvidia-ml-py; in a container, see nvidia-smi on the host"
        yield Finding("note", text, remedy)
    elif driver.error and facts.num_pci_gpus:
        yield Finding(
            "note",
            f"NVIDIA driver: none answers ({driver.error}), {facts.num_pci_gpus} NVIDIA cards on the bus",
            f"install it ({DRIVER_DOWNLOAD_PAGE}); start a container with --gpus all",
        )
    elif driver.error and facts.num_pci_gpus is None and torch is not None and torch.cuda:
        text = f"NVIDIA driver: none answers ({driver.error}); torch is built for CUDA"
        yield Finding(
            "note", text, f"if there is an NVIDIA card, install its driver ({DRIVER_DOWNLOAD_PAGE})"
        )
    elif driver.error:
        yield Finding("ok", f"NVIDIA driver: none ({driver.error}), and none is needed without a card")
    elif driver.version:
        takes = f", takes CUDA {driver.max_cuda[0]}.{driver.max_cuda[1]}" if driver.max_cuda else ""
        text = f"NVIDIA driver {driver.version}{takes}"
        if not _is_driver_too_old(facts):
            build = _parse_version(torch.cuda) if torch and torch.cuda else ()
            if driver.max_cuda and driver.max_cuda < build:
                text += " and, by minor-version compatibility, torch's"
            yield Finding("ok", text)
            return
        assert torch is not None  # or no driver would be too old for it
        assert torch.cuda is not None
        needed = MIN_DRIVER_BY_CUDA.get(_parse_version(torch.cuda)[0])
        newer = f"a driver from {needed} on" if needed else "the newest driver"
        fitting = _compatible_builds(torch, driver, facts.gpus)
        older = f", or torch built for CUDA {' or '.join(fitting)} ({TORCH_INSTALL_PAGE})" if fitting else ""
        yield Finding(
            "problem",
            f"{text}: too old for torch's CUDA {torch.cuda}",
            f"install {newer} ({DRIVER_DOWNLOAD_PAGE}){older}",
        )


def _is_driver_too_old(facts: MachineInfo) -> bool:
    """Whether the driver is of a CUDA before the build's; minor versions get on."""
    torch, newest = facts.torch, facts.driver.max_cuda
    return bool(torch and torch.cuda and newest and newest[0] < _parse_version(torch.cuda)[0])


def _check_hidden_gpus(facts: MachineInfo) -> Iterator[Finding]:
    """Cards that NVML has and torch, though built for them, has not."""
    torch = facts.torch
    missing = [gpu.name for gpu in facts.gpus if gpu.device is None]
    if torch is None or torch.cuda is None or not missing or _is_driver_too_old(facts):
        return
    if facts.visible_devices is not None:
        hides = f"hides {len(missing)} of {len(facts.gpus)} cards from torch: {', '.join(missing)}"
        text = f"CUDA_VISIBLE_DEVICES={facts.visible_devices!r} {hides}"
        yield Finding("note", text, "unset CUDA_VISIBLE_DEVICES")
    elif not torch.cuda_available:
        says = f": {torch.warning[:200]}" if torch.warning else ""
        yield Finding(
            "problem",
            f"torch sees no card, the driver has {', '.join(missing)}{says}",
            "restart the machine; start a container with --gpus all; see nvidia-smi",
        )


def _check_gpu(facts: MachineInfo, gpu: GpuInfo) -> Iterator[Finding]:
    if gpu.device is None:
        yield Finding("ok", f"a card that torch does not use: {gpu.name}{_format_gpu(gpu)}")
        return
    chosen = _selected_device(facts) == gpu.device
    name = f"{gpu.device} ({gpu.name})"
    yield from _check_archs(facts, gpu, name, chosen)
    yield from _check_memory(facts, gpu, name, chosen)
    capable = gpu.capability is not None and gpu.capability >= (7, 0)
    if gpu.capability == (7, 5) and _WITHOUT_TENSOR_CORES.search(gpu.name):
        capable = False
        level: Level = "problem" if chosen and facts.precision == "fp16" else "note"
        text = f"{name} has no tensor cores: fp16 gives NaN in some convolutions, 2 to 4 times slower"
        yield Finding(level, text, "device.precision=auto (tries it), or fp32")
    if chosen and facts.precision == "bf16" and not gpu.supports_bf16:
        text = f"{name}: device.precision=bf16 is only emulated on this card, and slower than fp32"
        yield Finding("note", text, "device.precision=fp32")
    elif gpu.capability is not None:  # AMD's cards have none
        kinds = [kind for kind, has in (("bf16", gpu.supports_bf16), ("fp16", capable)) if has]
        yield Finding("ok", f"{name}: 16 bits at full speed: {' and '.join(kinds) or 'none, take fp32'}")


def _check_archs(facts: MachineInfo, card: GpuInfo, name: str, chosen: bool) -> Iterator[Finding]:
    """Whether the build has programs for the card."""
    torch = facts.torch
    if torch is None or torch.cuda is None or card.capability is None or not torch.archs:
        return
    capability = "{}.{}".format(*card.capability)
    level: Level = "problem" if chosen else "note"
    verdict = _arch_support(card, torch.archs)
    if verdict and verdict != "translated":
        others = [c for c in _compatible_builds(torch, facts.driver, [card]) if c != torch.cuda]
        if others:
            builds = f"torch built for CUDA {' or '.join(others)} ({TORCH_INSTALL_PAGE})"
            remedy = f"install {builds}, or device.name=cpu"
        elif verdict == "too old for":
            remedy = "device.name=cpu"
        else:
            remedy = f"install the newest torch that is supported ({TORCH_INSTALL_PAGE}), or device.name=cpu"
        archs = " ".join(torch.archs)
        text = f"{name}: capability {capability} is {verdict} this torch, which has {archs}"
        yield Finding(level, text, remedy)
    elif verdict and facts.driver.max_cuda and facts.driver.max_cuda < _parse_version(torch.cuda):
        # By minor-version compatibility a driver runs machine code, and does not translate.
        text = f"{name}: the driver must translate torch's programs, and is older than CUDA {torch.cuda}"
        yield Finding(level, text, f"install the newest driver ({DRIVER_DOWNLOAD_PAGE})")


def _arch_support(card: GpuInfo, archs: Sequence[str]) -> str:
    """Empty if there is machine code for the card, else `translated`, `too old for`, `too new for` ...

    Machine code for 8.0 runs on 8.6 and not on 9.0 or 7.5; a program to be translated runs on every
    later card. What ends in `a` is for that very card alone.
    """
    if card.capability is None:
        return ""
    here = card.capability
    kinds = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch) for arch in archs]
    known = [(m[1], (int(m[2]), int(m[3])), m[4]) for m in kinds if m]
    for kind, made_for, only in known:
        suits = made_for == here if only == "a" else made_for <= here
        if kind == "sm" and made_for[0] == here[0] and suits:
            return ""
    if any(kind == "compute" and made_for <= here and not only for kind, made_for, only in known):
        return "translated"
    if not known:
        return ""
    numbers = [made_for for _, made_for, _ in known]
    if here < min(numbers):
        return "too old for"
    return "too new for" if here > max(numbers) else "left out of"


def _selected_device(facts: MachineInfo) -> str | None:
    name = facts.devices[0] if facts.device_name == "auto" and facts.devices else facts.device_name
    return "cuda:0" if name == "cuda" else name


def _format_gpu(gpu: GpuInfo) -> str:
    """Capability, memory and who holds it."""
    capability = ", capability {}.{}".format(*gpu.capability) if gpu.capability else ""
    if gpu.total_mib is None or gpu.free_mib is None:
        return capability
    text = f"{capability}: {gpu.free_mib:,.0f} of {gpu.total_mib:,.0f} MiB free"
    if gpu.processes:
        return f"{text}, held by {', '.join(map(_format_process, gpu.processes))}"
    unknown = gpu.total_mib - gpu.free_mib > UNATTRIBUTED_MIB
    return text + (", who holds the rest is unknown (a container hides it)" if unknown else "")


def _format_process(holder: GpuProcess) -> str:
    return f"{holder.pid} {holder.name}" + (f" {holder.memory_mib:,.0f} MiB" if holder.memory_mib else "")


def _check_memory(facts: MachineInfo, gpu: GpuInfo, name: str, chosen: bool) -> Iterator[Finding]:
    text = name + _format_gpu(gpu)
    if gpu.total_mib is None or gpu.free_mib is None or gpu.free_mib > MIN_FREE_FRACTION * gpu.total_mib:
        yield Finding("ok", text)
        return
    freer = [c for c in facts.gpus if c.device and (c.free_mib or 0) > 2 * gpu.free_mib]
    best = max(freer, key=lambda c: c.free_mib or 0, default=None)
    other = f"device.name={best.device} has {best.free_mib:,.0f} MiB free; or " if best else ""
    largest = max(gpu.processes, key=lambda holder: holder.memory_mib or 0, default=None)
    wait = (
        f"end process {largest.pid} ({largest.name}), or wait for it"
        if largest
        else "see on the host, with nvidia-smi, who holds it"
    )
    full = chosen and gpu.free_mib < MIN_FREE_MIB
    yield Finding("problem" if full else "note", text, other + wait)
