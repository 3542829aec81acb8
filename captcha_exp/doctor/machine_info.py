"""What was seen of a machine, as plain values; and what is said of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line: a thing, what is the matter with it, and what to type or do about it."""

    level: Level
    what: str
    remedy: str = ""
    """empty where nothing is to be done"""


@dataclass(frozen=True)
class Package:
    """A dependency: the versions that pyproject.toml allows, and the one that is here."""

    name: str
    allowed: str
    installed: str | None
    fits: bool


@dataclass(frozen=True)
class Torch:
    """The build of torch, and what it says of the machine."""

    version: str
    cuda: str | None = None
    """the CUDA that it was built for"""
    hip: str | None = None
    """the ROCm that it was built for"""
    mps: bool = False
    works: bool = False
    """torch.cuda.is_available()"""
    archs: tuple[str, ...] = ()
    """the cards that it holds programs for: sm_90 is machine code, compute_90 is to be translated"""
    releases: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """CUDA version -> capabilities (75 is 7.5) of the builds of this release; {} if unknown"""
    says: str = ""
    """what it warned of when it was asked for cards"""
    cpu: str = ""
    """the vector instructions that it uses"""


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver, by NVML."""

    version: str | None = None
    cuda: tuple[int, int] | None = None
    """the newest CUDA that it runs"""
    error: str = ""
    """why NVML does not answer"""
    mismatch: bool = False
    """the driver was updated and the old one is still running"""
    unreachable: tuple[str, ...] = ()
    """cards that are counted and do not answer, with the reason"""


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of a card."""

    pid: int
    name: str
    mib: float | None


@dataclass(frozen=True)
class Card:
    """A card, by NVML and by torch."""

    name: str
    device: str | None = None
    """as device.name has it; None for a card that torch does not see"""
    capability: tuple[int, int] | None = None
    total_mib: float | None = None
    free_mib: float | None = None
    holders: tuple[Holder, ...] = ()
    """processes other than this one; empty also where a container hides them"""
    bf16: bool = False
    """has it, not only emulates it"""


@dataclass(frozen=True)
class Folder:
    """A folder that runs write into."""

    path: str
    free: int
    """bytes"""
    disk: int
    """folders with the same number share their free space"""
    refusal: str = ""
    """why nothing can be written there"""


@dataclass(frozen=True)
class Store:
    """The MLflow store of the config."""

    uri: str
    state: str
    """see tracking.store.look_at_store"""
    detail: str = ""


@dataclass(frozen=True)
class Git:
    """What the records say of the code."""

    here: bool
    """git is on this machine"""
    checkout: str | None
    """the folder of the checkout that the code runs from; None for an installed package"""
    commit: str | None


@dataclass(frozen=True)
class Facts:
    """Everything that was seen. A default is the value of what could not be looked at."""

    device_name: str
    """device.name, device.precision and device.threads of the config, as asked"""
    precision: str
    threads: int | str
    python: str = ""
    python_allowed: str = ""
    python_fits: bool = True
    packages: tuple[Package, ...] = ()
    torch: Torch | None = None
    torch_error: str = ""
    driver: Driver = Driver()
    cards: tuple[Card, ...] = ()
    pci_cards: int | None = None
    """NVIDIA cards on the PCI bus, driver or not"""
    visible_devices: str | None = None
    """CUDA_VISIBLE_DEVICES"""
    devices: tuple[str, ...] = ()
    """as config.Machine has them"""
    why_not: Mapping[str, str] = field(default_factory=dict)
    cores: int | None = None
    cpu_quota: float | None = None
    """cores' worth of time that a container is given"""
    cpu_flags: frozenset[str] | None = None
    memory: int | None = None
    """bytes that can still be had"""
    pictures: int = 0
    """bytes of the prepared pictures of the config"""
    folders: tuple[Folder, ...] = ()
    store: Store | None = None
    """None for tracking=none"""
    dead_runs: tuple[tuple[str, int], ...] = ()
    """(folder, process id) of runs whose record says RUNNING and whose process is gone"""
    unreadable_runs: tuple[str, ...] = ()
    fonts: str | None = None
    """the names of fonts that have every character; None for a source that draws nothing"""
    fonts_error: str = ""
    git: Git | None = None
    unseen: tuple[tuple[str, str], ...] = ()
    """(what, why) of everything that could not be looked at"""
