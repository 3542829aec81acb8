"""Collect information about this machine. Failed queries are listed in `MachineInfo.unavailable`."""

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

from captcha_exp.config import Config, FolderConfig, Machine, MlflowConfig, resolve
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
    """Query this machine, for a checked config; values of `auto` need not be resolved."""
    unavailable: list[tuple[str, str]] = []

    def query(name: str, function: Callable[[], T], default: T) -> T:
        try:
            return function()
        except Exception as error:  # one failure must not hide the other results
            unavailable.append((name, _one_line(error)))
            return default

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries at import
        nothing: dict[str, Any] = {}
        info = MachineInfo(config.device.name, config.device.precision, config.device.threads)
        info = replace(info, **query("the package versions", collect_versions, nothing))
        by_nvml: dict[str, GpuInfo] = {}
        info, by_nvml = query("torch", lambda: _add_torch_info(info), (info, by_nvml))
        if info.torch is not None:
            gpus = query("the GPUs with torch", lambda: gpu_info.with_torch_info(by_nvml), info.gpus)
            info = replace(info, gpus=gpus)
        info = replace(
            info,
            num_pci_gpus=query("the PCI bus", gpu_info.count_pci_gpus, None),
            visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
            cpu_quota=query("the CPU limit", _cpu_quota, None),
            cpu_flags=query("the CPU flags", _cpu_flags, None),
            available_memory_bytes=query("the memory", _available_memory, None),
            image_bytes=_image_bytes(config),
            directories=query("the directories", lambda: _collect_directories(config), ()),
            store=query("the MLflow store", lambda: _inspect_store(config), None),
            git=query("git", _collect_git, None),
        )
        info = replace(info, **query("the runs", _collect_runs, nothing))
        info = replace(info, **query("the fonts", lambda: _collect_fonts(config), nothing))
    return replace(info, unavailable=tuple(unavailable))


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# -- software -------------------------------------------------------------------------------------------


def collect_versions() -> dict[str, Any]:
    """Return the versions of Python and the dependencies, and the installed project's requirements.

    Raises:
        PackageNotFoundError: the project is not installed; install it with pip.
    """
    specifier = metadata(DISTRIBUTION)["Requires-Python"] or ""
    packages = []
    for text in requires(DISTRIBUTION) or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            packages.append(_collect_package(requirement))
    python_version = platform.python_version()
    return {
        "python_version": python_version,
        "python_specifier": specifier,
        "is_python_supported": SpecifierSet(specifier).contains(python_version, prereleases=True),
        "packages": tuple(packages),
    }


def _collect_package(requirement: Requirement) -> PackageInfo:
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return PackageInfo(requirement.name, str(requirement.specifier), None, is_supported=False)
    is_supported = requirement.specifier.contains(installed, prereleases=True)
    return PackageInfo(requirement.name, str(requirement.specifier), installed, is_supported)


def _collect_git() -> GitInfo:
    project_dir = Path(__file__).resolve().parents[2]
    checkout = str(project_dir) if (project_dir / ".git").exists() else None
    if shutil.which("git") is None:
        return GitInfo(is_installed=False, checkout_dir=checkout, commit=None)
    from captcha_exp.runs.source_code import git_info

    return GitInfo(is_installed=True, checkout_dir=checkout, commit=(git_info() or {}).get("commit"))


# -- torch, GPUs, CPU -----------------------------------------------------------------------------------


def _add_torch_info(info: MachineInfo) -> tuple[MachineInfo, dict[str, GpuInfo]]:
    """Add the driver, its GPUs, and torch if it can be imported; also return the GPUs by UUID."""
    driver, by_nvml = gpu_info.query_nvml()
    info = replace(info, driver=driver, gpus=tuple(by_nvml.values()))
    try:
        build = gpu_info.query_torch_build()
        from captcha_exp.runtime.device import detect_machine

        machine = detect_machine()
    except Exception as error:  # a missing library raises ImportError, OSError and others
        return replace(info, torch_error=_one_line(error)), by_nvml
    info = replace(info, torch=build, devices=machine.devices, unavailable_reason=machine.unavailable_reason)
    return replace(info, cores=machine.num_cores), by_nvml


def _cpu_flags() -> frozenset[str] | None:
    """Return the instruction set extensions of the CPU on Linux; None elsewhere."""
    if sys.platform != "linux":
        return None
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(words.split())
    return None


def _cpu_quota() -> float | None:
    from captcha_exp.runtime.device import cpu_quota  # imports torch

    return cpu_quota()


def _available_memory() -> int:
    from captcha_exp.runtime.device import free_memory_bytes  # imports torch

    return free_memory_bytes()


# -- requirements of a run ------------------------------------------------------------------------------


def _image_bytes(config: Config) -> int:
    captcha = config.captcha
    count = getattr(config.data, "count", 0)  # a folder of images has none
    return math.prod((count, captcha.width, captcha.height, captcha.channels))


def _collect_directories(config: Config) -> tuple[DirectoryInfo, ...]:
    directories = [root_dir(), root_dir() / "outputs", root_dir() / config.data.cache]
    if isinstance(config.tracking, MlflowConfig) and config.tracking.uri == "auto":
        directories.append(root_dir() / "mlruns")
    return tuple({path: _inspect_directory(path) for path in map(_nearest_existing, directories)}.values())


def _nearest_existing(directory: Path) -> Path:
    """Return the directory, or its nearest parent that exists."""
    return next(path for path in (directory, *directory.parents) if path.exists())


def _inspect_directory(path: Path) -> DirectoryInfo:
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0" * 4096)
        write_error = ""
    except OSError as error:
        write_error = error.strerror or str(error)
    return DirectoryInfo(str(path), shutil.disk_usage(path).free, path.stat().st_dev, write_error)


def _inspect_store(config: Config) -> StoreInfo | None:
    if not isinstance(config.tracking, MlflowConfig):
        return None
    from captcha_exp.tracking.store import inspect_store

    machine = Machine(devices=("cpu",), num_cores=1, root=root_dir(), unavailable_reason={})
    on_cpu = replace(config, device=replace(config.device, name="cpu"))  # its device may not be available
    tracking = resolve(on_cpu, machine).tracking
    assert isinstance(tracking, MlflowConfig)
    return StoreInfo(tracking.uri, *inspect_store(tracking.uri, tracking.experiment))


def _collect_runs() -> dict[str, Any]:
    from captcha_exp.runs import find_stale, list_runs

    unreadable: list[str] = []
    list_runs(warn=unreadable.append)
    return {
        "stale_runs": tuple((str(run.run_dir), run.info.pid) for run in find_stale() if run.info.is_running),
        "unreadable_runs": tuple(unreadable),
    }


def _collect_fonts(config: Config) -> dict[str, Any]:
    if isinstance(config.data, FolderConfig):
        return {}  # no rendering
    from captcha_exp.data.sources import check_glyphs, font_files, get_renderer_spec

    try:
        check_glyphs(config.data, config.captcha)
    except UserError as error:
        return {"fonts_error": " ".join(str(error).split())}
    files = font_files(config.data) or get_renderer_spec(config.data).default_fonts
    return {"fonts": ", ".join(path.name for path in files)}
