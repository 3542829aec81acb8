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

from captcha_exp.config import Config, Machine, Mlflow, resolve
from captcha_exp.config import Folder as PictureFolder
from captcha_exp.doctor import gpu_info
from captcha_exp.doctor.machine_info import Card, Facts, Folder, Git, Package, Store
from captcha_exp.errors import UserError
from captcha_exp.runtime.paths import root

T = TypeVar("T")

PROJECT = "captcha-exp"


def gather(config: Config) -> Facts:
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
        facts = Facts(config.device.name, config.device.precision, config.device.threads)
        facts = replace(facts, **look("the versions of packages", versions, nothing))
        by_nvml: dict[str, Card] = {}
        facts, by_nvml = look("torch", lambda: _with_torch(facts), (facts, by_nvml))
        if facts.torch is not None:
            seen = look("the cards, by torch", lambda: gpu_info.torch_cards(by_nvml), facts.cards)
            facts = replace(facts, cards=seen)
        facts = replace(
            facts,
            pci_cards=look("the PCI bus", gpu_info.pci_cards, None),
            visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
            cpu_quota=look("the share of the CPU", _cpu_quota, None),
            cpu_flags=look("the CPU", _cpu_flags, None),
            memory=look("the memory", _memory, None),
            pictures=_bytes_of_pictures(config),
            folders=look("the folders", lambda: _folders(config), ()),
            store=look("the MLflow store", lambda: _store(config), None),
            git=look("git", _git, None),
        )
        facts = replace(facts, **look("the runs", _runs, nothing))
        facts = replace(facts, **look("the fonts", lambda: _fonts(config), nothing))
    return replace(facts, unseen=tuple(unseen))


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# -- software -------------------------------------------------------------------------------------------


def versions() -> dict[str, Any]:
    """Python's and the packages' versions, beside what the installed project says that it needs."""
    allowed = metadata(PROJECT)["Requires-Python"] or ""
    packages = []
    for text in requires(PROJECT) or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            packages.append(_package(requirement))
    here = platform.python_version()
    fits = SpecifierSet(allowed).contains(here, prereleases=True)
    return {
        "python": here,
        "python_allowed": allowed,
        "python_fits": fits,
        "packages": tuple(packages),
    }


def _package(requirement: Requirement) -> Package:
    try:
        here = version(requirement.name)
    except PackageNotFoundError:
        return Package(requirement.name, str(requirement.specifier), None, fits=False)
    fits = requirement.specifier.contains(here, prereleases=True)
    return Package(requirement.name, str(requirement.specifier), here, fits)


def _git() -> Git:
    home = Path(__file__).resolve().parents[2]
    checkout = str(home) if (home / ".git").exists() else None
    if shutil.which("git") is None:
        return Git(here=False, checkout=checkout, commit=None)
    from captcha_exp.runs.source_code import git

    return Git(here=True, checkout=checkout, commit=(git() or {}).get("commit"))


# -- torch, cards, cores --------------------------------------------------------------------------------


def _with_torch(facts: Facts) -> tuple[Facts, dict[str, Card]]:
    """With the driver, its cards, and torch if it can be imported; and the cards by their UUIDs."""
    driver, by_nvml = gpu_info.nvml_cards()
    facts = replace(facts, driver=driver, cards=tuple(by_nvml.values()))
    try:
        build = gpu_info.torch_build()
        from captcha_exp.runtime.device import this_machine

        machine = this_machine()
    except Exception as error:  # libraries that are missing raise OSError, ImportError and others
        return replace(facts, torch_error=_one_line(error)), by_nvml
    facts = replace(facts, torch=build, devices=machine.devices, why_not=machine.why_not)
    return replace(facts, cores=machine.cores), by_nvml


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


def _memory() -> int:
    from captcha_exp.runtime.device import free_memory_bytes  # brings torch

    return free_memory_bytes()


# -- what a run needs -----------------------------------------------------------------------------------


def _bytes_of_pictures(config: Config) -> int:
    captcha = config.captcha
    count = getattr(config.data, "count", 0)  # a source that draws nothing has none
    return math.prod((count, captcha.width, captcha.height, captcha.channels))


def _folders(config: Config) -> tuple[Folder, ...]:
    places = [root(), root() / "outputs", root() / config.data.cache]
    if isinstance(config.tracking, Mlflow) and config.tracking.uri == "auto":
        places.append(root() / "mlruns")
    return tuple({place: _folder(place) for place in map(_standing, places)}.values())


def _standing(place: Path) -> Path:
    """The place, or the lowest folder above it that is there already."""
    return next(path for path in (place, *place.parents) if path.exists())


def _folder(path: Path) -> Folder:
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0" * 4096)
        refusal = ""
    except OSError as error:
        refusal = error.strerror or str(error)
    return Folder(str(path), shutil.disk_usage(path).free, path.stat().st_dev, refusal)


def _store(config: Config) -> Store | None:
    if not isinstance(config.tracking, Mlflow):
        return None
    from captcha_exp.tracking.store import look_at_store

    somewhere = Machine(devices=("cpu",), cores=1, root=root(), why_not={})
    anywhere = replace(config, device=replace(config.device, name="cpu"))
    tracking = resolve(anywhere, somewhere).tracking
    assert isinstance(tracking, Mlflow)
    return Store(tracking.uri, *look_at_store(tracking.uri, tracking.experiment))


def _runs() -> dict[str, Any]:
    from captcha_exp.runs import left_open, runs

    unreadable: list[str] = []
    runs(tell=unreadable.append)
    return {
        "dead_runs": tuple((str(left.folder), int(left.state["pid"])) for left in left_open() if left.runs),
        "unreadable_runs": tuple(unreadable),
    }


def _fonts(config: Config) -> dict[str, Any]:
    if isinstance(config.data, PictureFolder):
        return {}  # nothing is drawn
    from captcha_exp.data.sources import check_glyphs, font_files, library

    try:
        check_glyphs(config.data, config.captcha)
    except UserError as error:
        return {"fonts_error": " ".join(str(error).split())}
    files = font_files(config.data) or library(config.data).own_fonts
    return {"fonts": ", ".join(path.name for path in files)}
