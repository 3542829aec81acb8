"""What was seen of a machine, as plain values; and what is said of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line: a thing, what is the matter with it, and what to type or do about it."""

    level: Level
    message: str
    remedy: str = ""
    """empty where nothing is to be done"""


@dataclass(frozen=True)
class PackageInfo:
    """A dependency: the versions that pyproject.toml allows, and the one that is here."""

    name: str
    specifier: str
    installed: str | None
    is_supported: bool


@dataclass(frozen=True)
class TorchInfo:
    """The build of torch, and what it says of the machine."""

    version: str
    cuda: str | None = None
    """the CUDA that it was built for"""
    hip: str | None = None
    """the ROCm that it was built for"""
    mps_built: bool = False
    cuda_available: bool = False
    """torch.cuda.is_available()"""
    archs: tuple[str, ...] = ()
    """the cards that it holds programs for: sm_90 is machine code, compute_90 is to be translated"""
    release_archs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """CUDA version -> capabilities (75 is 7.5) of the builds of this release; {} if unknown"""
    warning: str = ""
    """what it warned of when it was asked for cards"""
    cpu_capability: str = ""
    """the vector instructions that it uses"""


@dataclass(frozen=True)
class DriverInfo:
    """NVIDIA's driver, by NVML."""

    version: str | None = None
    max_cuda: tuple[int, int] | None = None
    """the newest CUDA that it runs"""
    error: str = ""
    """why NVML does not answer"""
    version_mismatch: bool = False
    """the driver was updated and the old one is still running"""
    unreachable: tuple[str, ...] = ()
    """cards that are counted and do not answer, with the reason"""


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory of a card."""

    pid: int
    name: str
    memory_mib: float | None


@dataclass(frozen=True)
class GpuInfo:
    """A card, by NVML and by torch."""

    name: str
    device: str | None = None
    """as device.name has it; None for a card that torch does not see"""
    capability: tuple[int, int] | None = None
    total_mib: float | None = None
    free_mib: float | None = None
    processes: tuple[GpuProcess, ...] = ()
    """processes other than this one; empty also where a container hides them"""
    supports_bf16: bool = False
    """has it, not only emulates it"""


@dataclass(frozen=True)
class DirectoryInfo:
    """A folder that runs write into."""

    path: str
    free_bytes: int
    """bytes"""
    device_id: int
    """folders with the same number share their free space"""
    write_error: str = ""
    """why nothing can be written there"""


@dataclass(frozen=True)
class StoreInfo:
    """The MLflow store of the config."""

    uri: str
    state: str
    """see tracking.store.look_at_store"""
    detail: str = ""


@dataclass(frozen=True)
class GitInfo:
    """What the records say of the code."""

    is_installed: bool
    """git is on this machine"""
    checkout_dir: str | None
    """the folder of the checkout that the code runs from; None for an installed package"""
    commit: str | None


@dataclass(frozen=True)
class MachineInfo:
    """Everything that was seen. A default is the value of what could not be looked at."""

    device_name: str
    """device.name, device.precision and device.threads of the config, as asked"""
    precision: str
    threads: int | str
    python_version: str = ""
    python_specifier: str = ""
    is_python_supported: bool = True
    packages: tuple[PackageInfo, ...] = ()
    torch: TorchInfo | None = None
    torch_error: str = ""
    driver: DriverInfo = DriverInfo()
    gpus: tuple[GpuInfo, ...] = ()
    num_pci_gpus: int | None = None
    """NVIDIA cards on the PCI bus, driver or not"""
    visible_devices: str | None = None
    """CUDA_VISIBLE_DEVICES"""
    devices: tuple[str, ...] = ()
    """as config.Machine has them"""
    unavailable_reason: Mapping[str, str] = field(default_factory=dict)
    cores: int | None = None
    cpu_quota: float | None = None
    """cores' worth of time that a container is given"""
    cpu_flags: frozenset[str] | None = None
    available_memory_bytes: int | None = None
    """bytes that can still be had"""
    image_bytes: int = 0
    """bytes of the prepared pictures of the config"""
    directories: tuple[DirectoryInfo, ...] = ()
    store: StoreInfo | None = None
    """None for tracking=none"""
    stale_runs: tuple[tuple[str, int], ...] = ()
    """(folder, process id) of runs whose record says RUNNING and whose process is gone"""
    unreadable_runs: tuple[str, ...] = ()
    fonts: str | None = None
    """the names of fonts that have every character; None for a source that draws nothing"""
    fonts_error: str = ""
    git: GitInfo | None = None
    unavailable: tuple[tuple[str, str], ...] = ()
    """(what, why) of everything that could not be looked at"""
