"""Plain data classes: information about a machine, and the findings about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from packaging.requirements import Requirement

from captcha_exp.tracking.problems import StoreStatus

Level = Literal["ok", "info", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report, and how to fix the problem that it states."""

    level: Level
    message: str
    remedy: str = ""
    """a command to type or a step to take; empty if no action is needed"""


@dataclass(frozen=True)
class TorchInfo:
    """The build of torch, and its view of the machine."""

    version: str
    build: str = ""
    """CUDA with its version, ROCm with its version, or MPS; empty for a CPU-only build"""
    warning: str = ""
    """the first warning of torch.cuda.is_available()"""
    cpu_capability: str = ""
    """torch.backends.cpu.get_cpu_capability()"""
    cpu_flags: frozenset[str] = frozenset()
    """instruction set extensions in torch.cpu.get_capabilities(); empty if this torch lacks the function"""

    @property
    def has_cuda(self) -> bool:
        """Whether the build can use NVIDIA GPUs."""
        return self.build.startswith("CUDA")


@dataclass(frozen=True)
class DriverInfo:
    """The NVIDIA driver, as NVML reports it."""

    version: str | None = None
    error: str = ""
    """why NVML is not available"""
    version_mismatch: bool = False
    """the driver was updated and the old kernel module is still loaded"""
    unreachable: tuple[str, ...] = ()
    """GPUs that are counted but do not respond, with the reason"""


@dataclass(frozen=True)
class GpuProcess:
    """A process that uses GPU memory."""

    pid: int
    name: str
    memory_mib: float = 0
    """0 if unknown"""

    def __str__(self) -> str:
        return f"{self.pid} {self.name}" + (f" {self.memory_mib:,.0f} MiB" if self.memory_mib else "")


@dataclass(frozen=True)
class GpuInfo:
    """A GPU, as NVML and torch report it."""

    name: str
    device: str | None = None
    """its device.name; None for a GPU that is not visible to torch"""
    capability: tuple[int, ...] = ()
    """compute capability; empty if unknown"""
    total_mib: float = 0
    """0 if unknown"""
    free_mib: float = 0
    processes: tuple[GpuProcess, ...] = ()
    """processes other than this one; empty also if a container hides them"""
    uuid: str = ""
    is_supported: bool = True
    """torch did not warn that this build has no code for it"""


@dataclass(frozen=True)
class DirectoryInfo:
    """A directory that runs write to."""

    path: str
    free_bytes: int
    device_id: int
    """st_dev: directories with the same number share their free space"""
    write_error: str = ""
    """why a test file could not be written"""


@dataclass(frozen=True)
class StoreInfo:
    """The MLflow store of the config."""

    uri: str
    state: StoreStatus
    detail: str = ""
    source: str = "tracking.uri=auto"
    """see tracking.problems.source_of"""
    moved_from: tuple[str, ...] = ()
    """directories in which MLflow searches for artifacts, although they are now next to the store"""


@dataclass(frozen=True)
class GitInfo:
    """The source code version that a run can record."""

    is_installed: bool
    """the git command is available"""
    checkout_dir: str | None
    """root of the checkout that the code runs from; None for an installed package"""
    commit: str | None


@dataclass(frozen=True)
class MachineInfo:
    """Everything that was collected. A default means: the query failed or does not apply."""

    device_name: str
    """device.name, device.precision and device.threads as in the config"""
    precision: str
    threads: int | str
    versions: tuple[tuple[Requirement, str | None], ...] = ()
    """Python and the packages that pyproject.toml requires, each with the installed version"""
    torch: TorchInfo | None = None
    torch_error: str = ""
    """why torch cannot be imported"""
    driver: DriverInfo = DriverInfo()
    gpus: tuple[GpuInfo, ...] = ()
    num_pci_gpus: int | None = None
    """NVIDIA GPUs on the PCI bus, with or without a driver; None if unknown"""
    visible_devices: str | None = None
    """CUDA_VISIBLE_DEVICES"""
    devices: tuple[str, ...] = ()
    """see config.Machine"""
    unavailable_reason: Mapping[str, str] = field(default_factory=dict)
    cores: int | None = None
    cpu_quota: float | None = None
    """CPU limit of the container, in cores"""
    available_memory_bytes: int | None = None
    image_bytes: int = 0
    """memory of the decoded images of the config"""
    root: str = ""
    """directory of outputs/"""
    filled_in: Mapping[str, str] = field(default_factory=dict)
    """environment variable that the libraries need and that was missing -> what is used, and why"""
    unused_variables: Mapping[str, str] = field(default_factory=dict)
    """environment variable that is set for other programs -> its value"""
    figures_error: str = ""
    """why matplotlib cannot be imported"""
    directories: tuple[DirectoryInfo, ...] = ()
    broken_links: tuple[str, ...] = ()
    store: StoreInfo | None = None
    """None for tracking=none"""
    store_error: str = ""
    """why the store of the config is not known, or cannot be checked"""
    stale_runs: tuple[tuple[str, int], ...] = ()
    """(run directory, process id) of runs with status RUNNING whose process has exited"""
    unreadable_runs: tuple[str, ...] = ()
    fonts: str | None = None
    """names of the fonts, which have every character; None for a source that renders nothing"""
    fonts_error: str = ""
    git: GitInfo | None = None
    unavailable: tuple[tuple[str, str], ...] = ()
    """(query, reason) of every query that failed"""
