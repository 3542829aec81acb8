"""Looking at this machine. What cannot be looked at is named in `Facts.unseen`; nothing raises."""

import math
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any, TypeVar

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from captcha_exp.config import Config, Machine, MlflowConfig, resolve
from captcha_exp.config import FolderConfig as PictureFolder
from captcha_exp.doctor import gpu_info
from captcha_exp.doctor.machine_info import (
    DirectoryInfo,
    GitInfo,
    GpuInfo,
    MachineInfo,
    PackageInfo,
    StoreInfo,
)
from captcha_exp.errors import UserError
from captcha_exp.runtime.paths import root_dir

T = TypeVar("T")

DISTRIBUTION = "captcha-exp"


def collect_info(config: Config) -> MachineInfo:
    """What is seen of this machine, for a checked config whose `auto`s may stand."""
    unseen: list[tuple[str, str]] = []

    def look(what: str, at: Callable[[], T], otherwise: T) -> T:
        try:
            return at()
        except Exception as error:  # a thing that is broken must not hide all others
            unseen.append((what, _one_line(error)))
            return otherwise

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say at import is not what this person asked
        nothing: dict[str, Any] = {}
        facts = MachineInfo(config.device.name, config.device.precision, config.device.threads)
        facts = replace(facts, **look("the versions of packages", collect_versions, nothing))
        by_nvml: dict[str, GpuInfo] = {}
        facts, by_nvml = look("torch", lambda: _add_torch_info(facts), (facts, by_nvml))
        if facts.torch is not None:
            seen = look("the cards, by torch", lambda: gpu_info.with_torch_info(by_nvml), facts.gpus)
            facts = replace(facts, gpus=seen)
        facts = replace(
            facts,
            num_pci_gpus=look("the PCI bus", gpu_info.count_pci_gpus, None),
            visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
            cpu_quota=look("the share of the CPU", _cpu_quota, None),
            cpu_flags=look("the CPU", _cpu_flags, None),
            available_memory_bytes=look("the memory", _available_memory, None),
            image_bytes=_image_bytes(config),
            directories=look("the folders", lambda: _collect_directories(config), ()),
            store=look("the MLflow store", lambda: _inspect_store(config), None),
            git=look("git", _collect_git, None),
        )
        facts = replace(facts, **look("the runs", _collect_runs, nothing))
        facts = replace(facts, **look("the fonts", lambda: _collect_fonts(config), nothing))
    return replace(facts, unavailable=tuple(unseen))


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# -- software -------------------------------------------------------------------------------------------


def collect_versions() -> dict[str, Any]:
    """Python's and the packages' versions, beside what the installed project says that it needs."""
    allowed = metadata(DISTRIBUTION)["Requires-Python"] or ""
    packages = []
    for text in requires(DISTRIBUTION) or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            packages.append(_collect_package(requirement))
    here = platform.python_version()
    fits = SpecifierSet(allowed).contains(here, prereleases=True)
    return {
        "python": here,
        "python_allowed": allowed,
        "python_fits": fits,
        "packages": tuple(packages),
    }


def _collect_package(requirement: Requirement) -> PackageInfo:
    try:
        here = version(requirement.name)
    except PackageNotFoundError:
        return PackageInfo(requirement.name, str(requirement.specifier), None, is_supported=False)
    fits = requirement.specifier.contains(here, prereleases=True)
    return PackageInfo(requirement.name, str(requirement.specifier), here, fits)


def _collect_git() -> GitInfo:
    home = Path(__file__).resolve().parents[2]
    checkout = str(home) if (home / ".git").exists() else None
    if shutil.which("git") is None:
        return GitInfo(is_installed=False, checkout_dir=checkout, commit=None)
    from captcha_exp.runs.source_code import git_info

    return GitInfo(is_installed=True, checkout_dir=checkout, commit=(git_info() or {}).get("commit"))


# -- torch, cards, cores --------------------------------------------------------------------------------


def _add_torch_info(facts: MachineInfo) -> tuple[MachineInfo, dict[str, GpuInfo]]:
    """With the driver, its cards, and torch if it can be imported; and the cards by their UUIDs."""
    driver, by_nvml = gpu_info.query_nvml()
    facts = replace(facts, driver=driver, gpus=tuple(by_nvml.values()))
    try:
        build = gpu_info.query_torch_build()
        from captcha_exp.runtime.device import detect_machine

        machine = detect_machine()
    except Exception as error:  # libraries that are missing raise OSError, ImportError and others
        return replace(facts, torch_error=_one_line(error)), by_nvml
    facts = replace(
        facts, torch=build, devices=machine.devices, unavailable_reason=machine.unavailable_reason
    )
    return replace(facts, cores=machine.num_cores), by_nvml


def _cpu_flags() -> frozenset[str] | None:
    """What Linux says that the processor can do; None elsewhere."""
    if sys.platform != "linux":
        return None
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(words.split())
    return None


def _cpu_quota() -> float | None:
    from captcha_exp.runtime.device import cpu_quota  # brings torch

    return cpu_quota()


def _available_memory() -> int:
    from captcha_exp.runtime.device import free_memory_bytes  # brings torch

    return free_memory_bytes()


# -- what a run needs -----------------------------------------------------------------------------------


def _image_bytes(config: Config) -> int:
    captcha = config.captcha
    count = getattr(config.data, "count", 0)  # a source that draws nothing has none
    return math.prod((count, captcha.width, captcha.height, captcha.channels))


def _collect_directories(config: Config) -> tuple[DirectoryInfo, ...]:
    places = [root_dir(), root_dir() / "outputs", root_dir() / config.data.cache]
    if isinstance(config.tracking, MlflowConfig) and config.tracking.uri == "auto":
        places.append(root_dir() / "mlruns")
    return tuple({place: _inspect_directory(place) for place in map(_nearest_existing, places)}.values())


def _nearest_existing(place: Path) -> Path:
    """The place, or the lowest folder above it that is there already."""
    return next(path for path in (place, *place.parents) if path.exists())


def _inspect_directory(path: Path) -> DirectoryInfo:
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0" * 4096)
        refusal = ""
    except OSError as error:
        refusal = error.strerror or str(error)
    return DirectoryInfo(str(path), shutil.disk_usage(path).free, path.stat().st_dev, refusal)


def _inspect_store(config: Config) -> StoreInfo | None:
    if not isinstance(config.tracking, MlflowConfig):
        return None
    from captcha_exp.tracking.store import inspect_store

    somewhere = Machine(devices=("cpu",), num_cores=1, root=root_dir(), unavailable_reason={})
    anywhere = replace(config, device=replace(config.device, name="cpu"))
    tracking = resolve(anywhere, somewhere).tracking
    assert isinstance(tracking, MlflowConfig)
    return StoreInfo(tracking.uri, *inspect_store(tracking.uri, tracking.experiment))


def _collect_runs() -> dict[str, Any]:
    from captcha_exp.runs import find_stale, list_runs

    unreadable: list[str] = []
    list_runs(warn=unreadable.append)
    return {
        "dead_runs": tuple(
            (str(left.run_dir), int(left.state["pid"])) for left in find_stale() if left.is_running
        ),
        "unreadable_runs": tuple(unreadable),
    }


def _collect_fonts(config: Config) -> dict[str, Any]:
    if isinstance(config.data, PictureFolder):
        return {}  # nothing is drawn
    from captcha_exp.data.sources import check_glyphs, font_files, get_renderer_spec

    try:
        check_glyphs(config.data, config.captcha)
    except UserError as error:
        return {"fonts_error": " ".join(str(error).split())}
    files = font_files(config.data) or get_renderer_spec(config.data).default_fonts
    return {"fonts": ", ".join(path.name for path in files)}
