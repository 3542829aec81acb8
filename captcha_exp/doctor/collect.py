"""Collect information about this machine. Failed queries are listed in `MachineInfo.unavailable`."""

import contextlib
import math
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from captcha_exp.config import Config, FolderConfig, MlflowConfig, sqlite_path, with_tracking_uri
from captcha_exp.doctor import gpu_info
from captcha_exp.doctor.machine_info import DirectoryInfo, GitInfo, MachineInfo, StoreInfo
from captcha_exp.errors import UserError, one_line
from captcha_exp.runtime.environment import fill_in_environment, filled_in
from captcha_exp.runtime.files import describe_broken_link
from captcha_exp.runtime.paths import root_dir, tracking_uri_variable

DISTRIBUTION = "captcha-exp"


def collect_info(config: Config) -> MachineInfo:
    """Query this machine, for a checked config; values of `auto` need not be resolved."""
    captcha, device = config.captcha, config.device
    count = getattr(config.data, "count", 0)  # a folder of images has none
    values: dict[str, Any] = {
        "device_name": device.name,
        "precision": device.precision,
        "threads": device.threads,
        "gpus": (),
        "devices": (),
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "root": str(root_dir()),
        "image_bytes": math.prod((count, captcha.width, captcha.height, captcha.channels)),
    }
    queries: dict[str, Callable[[], dict[str, Any]]] = {
        "the package versions": _collect_versions,
        "the NVIDIA driver": gpu_info.query_nvml,
        "torch": _collect_torch,
        "the GPUs with torch": lambda: gpu_info.query_torch_gpus(values["gpus"], values["devices"]),
        "the PCI bus": gpu_info.count_pci_gpus,
        "the memory": _collect_memory,
        "the environment": _collect_environment,
        "the directories": lambda: _collect_directories(config),
        "the MLflow store": lambda: _inspect_store(config),
        "git": _collect_git,
        "the runs": _collect_runs,
        "the fonts": lambda: _collect_fonts(config),
    }
    unavailable = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries at import
        for name, query in queries.items():
            try:
                values |= query()
            except Exception as error:  # one failure must not hide the other results
                unavailable.append((name, _describe(error)))
    return MachineInfo(**values, unavailable=tuple(unavailable))


def _describe(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")[:300]


# -- software -------------------------------------------------------------------------------------------


def _collect_versions() -> dict[str, Any]:
    """Return the versions of Python and the dependencies, and the installed project's requirements.

    Raises:
        PackageNotFoundError: the project is not installed; install it with pip.
    """
    python = f"Python{metadata(DISTRIBUTION)['Requires-Python'] or ''}"
    requirements = [Requirement(text) for text in (python, *(requires(DISTRIBUTION) or ()))]
    return {
        "versions": tuple(
            (requirement, _installed_version(requirement.name))
            for requirement in requirements
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        )
    }


def _installed_version(name: str) -> str | None:
    try:
        return platform.python_version() if name == "Python" else version(name)
    except PackageNotFoundError:
        return None


def _collect_git() -> dict[str, Any]:
    from captcha_exp.runs.source_code import git_info

    project_dir = Path(__file__).resolve().parents[2]
    checkout = str(project_dir) if (project_dir / ".git").exists() else None
    return {"git": GitInfo(shutil.which("git") is not None, checkout, (git_info() or {}).get("commit"))}


# -- torch, CPU -----------------------------------------------------------------------------------------


def _collect_torch() -> dict[str, Any]:
    try:
        build = gpu_info.query_torch_build()
        from captcha_exp.runtime.device import cpu_quota, detect_machine

        machine = detect_machine()
    except Exception as error:  # a missing library raises ImportError, OSError and others
        return {"torch_error": _describe(error)}
    return {
        "torch": build,
        "devices": machine.devices,
        "unavailable_reason": machine.unavailable_reason,
        "cores": machine.num_cores,
        "cpu_quota": cpu_quota(),
    }


def _collect_memory() -> dict[str, Any]:
    from captcha_exp.runtime.device import free_memory_bytes  # imports torch

    return {"available_memory_bytes": free_memory_bytes()}


# -- requirements of a run ------------------------------------------------------------------------------


def _collect_environment() -> dict[str, Any]:
    from captcha_exp.doctor.checks import UNUSED_VARIABLES

    fill_in_environment()
    unused = {name: value for name in UNUSED_VARIABLES if (value := os.environ.get(name))}
    if unused.get("MPLBACKEND", "").lower() == "agg":
        del unused["MPLBACKEND"]
    values: dict[str, Any] = {"filled_in": dict(filled_in), "unused_variables": unused}
    try:
        import captcha_exp.report  # noqa: F401 - imports matplotlib
    except Exception as error:  # as of torch
        values["figures_error"] = _describe(error)
    return values


def _collect_directories(config: Config) -> dict[str, Any]:
    directories = [root_dir(), root_dir() / "outputs", root_dir() / config.data.cache]
    with contextlib.suppress(UserError):  # reported with the store
        tracking = _resolve_tracking(config)
        if tracking is not None and (store := sqlite_path(tracking.uri)) is not None:
            directories.append(store.parent)
    existing = (next(path for path in (each, *each.parents) if path.exists()) for each in directories)
    broken = dict.fromkeys(filter(None, map(describe_broken_link, directories)))
    return {
        "directories": tuple(map(_inspect_directory, dict.fromkeys(existing))),
        "broken_links": tuple(broken),
    }


def _inspect_directory(path: Path) -> DirectoryInfo:
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0" * 4096)
        write_error = ""
    except OSError as error:
        write_error = error.strerror or str(error)
    return DirectoryInfo(str(path), shutil.disk_usage(path).free, path.stat().st_dev, write_error)


def _inspect_store(config: Config) -> dict[str, Any]:
    try:
        tracking = _resolve_tracking(config)
    except UserError as error:
        return {"store_error": one_line(error)}
    if tracking is None:
        return {}
    from captcha_exp.tracking.problems import source_of

    try:
        from captcha_exp.tracking.inspection import inspect_store
        from captcha_exp.tracking.store import find_moved_artifacts
    except Exception as error:  # a missing library raises ImportError, OSError and others
        return {"store_error": f"cannot import MLflow: {_describe(error)}"}
    uri = tracking.uri
    state, detail = inspect_store(uri, tracking.experiment)
    moved: list[str] = []
    if state == "current" and (path := sqlite_path(uri)) is not None:
        moved = [str(directory) for _, directory in find_moved_artifacts(path)]
    return {"store": StoreInfo(uri, state, detail, source_of(uri), tuple(dict.fromkeys(moved)))}


def _resolve_tracking(config: Config) -> MlflowConfig | None:
    tracking = with_tracking_uri(config, root_dir(), tracking_uri_variable()).tracking
    return tracking if isinstance(tracking, MlflowConfig) else None


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
        return {"fonts_error": one_line(error)}
    files = font_files(config.data) or get_renderer_spec(config.data).default_fonts
    return {"fonts": ", ".join(path.name for path in files)}
