"""Cards, driver and torch's build, as they are seen here."""

import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from captcha_exp.doctor.machine_info import Card, Driver, Holder, Torch

MIB = 2**20


def nvml_cards() -> tuple[Driver, dict[str, Card]]:
    """The driver, and each card by its UUID; an error in the place of what NVML does not tell."""
    try:
        import pynvml
    except ImportError as error:
        return Driver(error=f"nvidia-ml-py cannot be imported: {error}"), {}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        code = getattr(error, "value", None)
        mismatch = code == getattr(pynvml, "NVML_ERROR_LIB_RM_VERSION_MISMATCH", 18)
        return Driver(error=str(error), mismatch=mismatch), {}

    def ask(function: str, *arguments: Any, otherwise: Any = None) -> Any:
        try:  # AttributeError: a pynvml too old to know the question
            return getattr(pynvml, function)(*arguments)
        except (pynvml.NVMLError, AttributeError):
            return otherwise

    try:
        newest = ask("nvmlSystemGetCudaDriverVersion_v2")  # 12020 is 12.2
        driver = Driver(
            version=_text(ask("nvmlSystemGetDriverVersion")),
            cuda=(newest // 1000, newest % 1000 // 10) if newest else None,
        )
        cards, unreachable = {}, []
        for number in range(ask("nvmlDeviceGetCount", otherwise=0)):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            except pynvml.NVMLError as error:
                unreachable.append(f"number {number}: {error}")
                continue
            uuid = _text(ask("nvmlDeviceGetUUID", handle)) or f"number {number}"
            cards[uuid.removeprefix("GPU-")] = _nvml_card(ask, handle)
        return replace(driver, unreachable=tuple(unreachable)), cards
    finally:
        ask("nvmlShutdown")


def _nvml_card(ask: Callable[..., Any], handle: Any) -> Card:
    memory = ask("nvmlDeviceGetMemoryInfo", handle)
    capability = ask("nvmlDeviceGetCudaComputeCapability", handle)
    holders = {}  # a process that computes and draws is in both lists, with the same figure
    for kind in ("Compute", "Graphics"):
        for process in ask(f"nvmlDeviceGet{kind}RunningProcesses", handle, otherwise=()):
            if process.pid != os.getpid():
                mib = process.usedGpuMemory / MIB if process.usedGpuMemory else None
                holders[process.pid] = Holder(process.pid, _name_of(process.pid), mib)
    return Card(
        name=_text(ask("nvmlDeviceGetName", handle)) or "NVIDIA card",
        capability=tuple(capability) if capability else None,
        total_mib=memory.total / MIB if memory else None,
        free_mib=memory.free / MIB if memory else None,
        holders=tuple(holders.values()),
    )


def _text(value: Any) -> str | None:
    """NVML's texts; its older versions answer in bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _name_of(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "?"  # another person's, or outside this container


def torch_build() -> Torch:
    """The build of torch and what it makes of this machine."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        works = torch.cuda.is_available()
    return Torch(
        version=torch.__version__,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        mps=torch.backends.mps.is_built(),
        works=works,
        archs=tuple(torch.cuda.get_arch_list()),
        releases=_releases(getattr(torch.cuda, "PYTORCH_RELEASES_CODE_CC", {})),
        says=" ".join(str(said[0].message).split()) if said else "",
        cpu=torch.backends.cpu.get_cpu_capability(),
    )


def _releases(known: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the capabilities that torch's releases are built for, by CUDA version.

    Up to torch 2.11 the table has a set for each version; later, a set for each processor of each version.
    """
    processor = "aarch64" if platform.machine().lower() in ("aarch64", "arm64") else "x86_64"
    sets = {
        cuda: built.get(processor, ()) if isinstance(built, dict) else built for cuda, built in known.items()
    }
    return {cuda: tuple(sorted(capabilities)) for cuda, capabilities in sets.items()}


def torch_cards(cards: dict[str, Card]) -> tuple[Card, ...]:
    """The cards with torch's names for those that it sees, and torch's own where NVML knows none."""
    import torch

    if not torch.cuda.is_available():
        return tuple(cards.values())
    seen: dict[str, Card] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a card that does not suit the build: findings say it
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            uuid = str(getattr(properties, "uuid", number))
            card = cards.get(uuid) or _torch_card(number, properties)
            with torch.cuda.device(number):
                bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            seen[uuid] = replace(card, device=f"cuda:{number}", bf16=bf16)
    # A card that is cut into MIG instances is seen as these, which have UUIDs of their own.
    names = " ".join(card.name for card in seen.values())
    cut = {uuid for uuid, card in cards.items() if f"{card.name} MIG" in names}
    return (*seen.values(), *(card for uuid, card in cards.items() if uuid not in seen.keys() | cut))


def _torch_card(number: int, properties: Any) -> Card:
    import torch

    free, total = torch.cuda.mem_get_info(number)
    capability = None if torch.version.hip else (properties.major, properties.minor)
    return Card(properties.name, capability=capability, total_mib=total / MIB, free_mib=free / MIB)


def pci_cards() -> int | None:
    """NVIDIA's display controllers on the PCI bus, with a driver or without; None where nobody tells."""
    bus = Path("/sys/bus/pci/devices")
    if not bus.is_dir():
        return None
    return sum(
        (device / "vendor").read_text().strip() == "0x10de"
        and (device / "class").read_text().startswith("0x03")  # 0x04 is the card's sound
        for device in bus.iterdir()
    )
