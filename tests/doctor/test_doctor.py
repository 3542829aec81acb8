"""The doctor: machines that are played, one for each finding; this machine, looked at for real."""

import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType, SimpleNamespace
from typing import Any

import filelock
import psutil
import pytest
import torch
from conftest import drawn

from captcha_exp import runs
from captcha_exp.cli import main, output
from captcha_exp.config import Config, MlflowConfig
from captcha_exp.doctor import Finding, MachineInfo, collect_info, run_checks
from captcha_exp.doctor.machine_info import (
    DirectoryInfo,
    DriverInfo,
    GitInfo,
    GpuInfo,
    GpuProcess,
    PackageInfo,
    StoreInfo,
    TorchInfo,
)
from captcha_exp.runtime import device
from captcha_exp.tracking.store import inspect_store, open_store

MIB, GIB = 2**20, 2**30
RELEASES = {
    "12.6": (50, 60, 70, 75, 80, 86, 90),
    "12.9": (75, 80, 86, 90, 120),
    "13.0": (75, 80, 86, 90, 120),
}

ADA = GpuInfo("NVIDIA GeForce RTX 4090", "cuda:0", (8, 9), 24_000, 23_000, supports_bf16=True)
CUDA = TorchInfo(
    "2.13.0+cu130",
    cuda="13.0",
    cuda_available=True,
    archs=("sm_75", "sm_80", "sm_86", "sm_90", "sm_120", "compute_120"),
    release_archs=RELEASES,
    cpu_capability="AVX2",
)
HEALTHY = MachineInfo(
    device_name="auto",
    precision="fp32",
    threads="auto",
    python_version="3.12.3",
    python_specifier=">=3.11,<3.14",
    packages=(PackageInfo("torch", "<2.14,>=2.10", "2.13.0+cu130", is_supported=True),),
    torch=CUDA,
    driver=DriverInfo("580.65.06", (13, 0)),
    gpus=(ADA,),
    num_pci_gpus=1,
    devices=("cuda", "cuda:0", "cpu"),
    cores=8,
    cpu_flags=frozenset({"avx2"}),
    available_memory_bytes=16 * GIB,
    image_bytes=50 * MIB,
    directories=(DirectoryInfo("/runs", 100 * GIB, device_id=1),),
    store=StoreInfo("sqlite:////runs/mlruns/mlflow.db", "current"),
    fonts="DejaVuSans.ttf",
    git=GitInfo(is_installed=True, checkout_dir="/project", commit="0123456789abcdef"),
)
NO_CARD = replace(
    HEALTHY,
    torch=replace(CUDA, version="2.13.0+cpu", cuda=None, cuda_available=False, archs=()),
    driver=DriverInfo(error="NVML Shared Library Not Found"),
    gpus=(),
    num_pci_gpus=0,
    devices=("cpu",),
)


def the(facts: MachineInfo, level: str) -> list[Finding]:
    return [finding for finding in run_checks(facts) if finding.level == level]


def only(facts: MachineInfo) -> Finding:
    """The one thing that is not well."""
    (finding,) = [finding for finding in run_checks(facts) if finding.level != "ok"]
    return finding


def said(facts: MachineInfo) -> str:
    return "\n".join(finding.message for finding in run_checks(facts))


@pytest.mark.parametrize("facts", [HEALTHY, NO_CARD], ids=["gpu", "no card"])
def test_a_healthy_machine_needs_nothing(facts: MachineInfo) -> None:
    assert {finding.level for finding in run_checks(facts)} == {"ok"}
    assert not any(finding.remedy for finding in run_checks(facts))
    assert len({finding.message for finding in run_checks(facts)}) == len(run_checks(facts))


def test_a_machine_of_which_nothing_is_known_is_no_trouble() -> None:
    assert all(finding.level == "ok" for finding in run_checks(MachineInfo("auto", "fp32", "auto")))


# -- software -------------------------------------------------------------------------------------------


def test_python_that_is_not_supported() -> None:
    finding = only(replace(HEALTHY, python_version="3.14.1", is_python_supported=False))
    assert finding.level == "problem"
    assert finding.message == "Python 3.14.1 is not supported, >=3.11,<3.14 is"
    assert "make PYTHON=python3.12" in finding.remedy


@pytest.mark.parametrize(
    ("package", "what", "remedy"),
    [
        (
            PackageInfo("hydra-core", "<1.4,>=1.3.8", "1.2.0", is_supported=False),
            "hydra-core 1.2.0 is here, supported is <1.4,>=1.3.8",
            'python -m pip install "hydra-core<1.4,>=1.3.8"',
        ),
        (
            PackageInfo("mlflow", "<4,>=3.13", None, is_supported=False),
            "mlflow is not installed, supported is <4,>=3.13",
            'python -m pip install "mlflow<4,>=3.13"',
        ),
        (
            PackageInfo("torch", "<2.14,>=2.10", "2.9.1", is_supported=False),
            "torch 2.9.1 is here, supported is <2.14,>=2.10",
            "python -m pip install \"torch<2.14,>=2.10\" (which build: pytorch.org, 'Get started')",
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_package_that_is_not_supported(package: PackageInfo, what: str, remedy: str) -> None:
    assert only(replace(HEALTHY, packages=(package,))) == Finding("problem", what, remedy)


def test_torch_that_cannot_be_imported() -> None:
    facts = replace(NO_CARD, torch=None, devices=(), torch_error="OSError: libcudart.so.13: cannot open")
    finding = only(facts)
    assert finding.level == "problem"
    assert finding.message == "torch cannot be imported: OSError: libcudart.so.13: cannot open"
    assert finding.remedy.startswith("python -m pip install --force-reinstall torch")


def test_what_could_not_be_looked_at_is_named() -> None:
    finding = only(replace(HEALTHY, unavailable=(("the memory", "OSError: no /proc"),)))
    assert finding == Finding("note", "the memory could not be looked at: OSError: no /proc")
    why = "PackageNotFoundError: No package metadata was found for captcha-exp"
    uninstalled = replace(HEALTHY, unavailable=(("the versions of packages", why),))
    assert only(uninstalled).remedy == "python -m pip install --editable ."


@pytest.mark.parametrize(
    ("git", "what", "remedy"),
    [
        (
            GitInfo(is_installed=False, checkout_dir="/p", commit=None),
            "git is not on this machine",
            "install git",
        ),
        (
            GitInfo(is_installed=True, checkout_dir="/p", commit=None),
            "git tells no commit of /p",
            "safe.directory",
        ),
    ],
)
def test_a_commit_that_records_will_lack(git: GitInfo, what: str, remedy: str) -> None:
    finding = only(replace(HEALTHY, git=git))
    assert finding.level == "note"
    assert finding.message.startswith(what)
    assert remedy in finding.remedy


def test_an_installed_package_needs_no_git() -> None:
    facts = replace(HEALTHY, git=GitInfo(is_installed=False, checkout_dir=None, commit=None))
    assert not the(facts, "note")


# -- torch's build and the driver -----------------------------------------------------------------------


def test_a_cpu_build_beside_a_card() -> None:
    card = replace(ADA, device=None, supports_bf16=False)
    facts = replace(NO_CARD, driver=DriverInfo("550.54.14", (12, 4)), gpus=(card,), num_pci_gpus=1)
    finding = only(facts)
    assert finding.level == "problem"
    assert finding.message.endswith(" is a CPU-only build, on a machine with NVIDIA GeForce RTX 4090")
    assert finding.remedy == "install torch built for CUDA 12.9 or 12.6 (pytorch.org, 'Get started')"
    assert only(replace(facts, device_name="cpu")).level == "note"  # as asked


def test_a_cpu_build_beside_a_card_whose_driver_is_too_old_for_every_build() -> None:
    facts = replace(
        NO_CARD, driver=DriverInfo("470.82", (11, 4)), gpus=(replace(ADA, device=None),), num_pci_gpus=1
    )
    assert only(facts).remedy.startswith("install the newest driver (nvidia.com/drivers), then torch")


def test_builds_are_not_known_of_every_release_of_torch() -> None:
    assert NO_CARD.torch is not None
    facts = replace(
        NO_CARD,
        torch=replace(NO_CARD.torch, release_archs={}),
        driver=DriverInfo("550.54.14", (12, 4)),
        gpus=(replace(ADA, device=None),),
        num_pci_gpus=1,
    )
    assert only(facts).remedy == "install torch built for CUDA 12.x (pytorch.org, 'Get started')"


@pytest.mark.parametrize(
    "known",
    [{"12.6": {86, 75}}, {"12.6": {"x86_64": {86, 75}, "aarch64": {86, 75}}}],
    ids=["up to torch 2.11", "later"],
)
def test_both_forms_of_torchs_table_of_builds_are_read(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, known: dict[str, Any]
) -> None:
    monkeypatch.setattr(torch.cuda, "PYTORCH_RELEASES_CODE_CC", known, raising=False)
    seen = collect_info(tiny)

    assert seen.torch is not None, seen.torch_error
    assert seen.torch.release_archs == {"12.6": (75, 86)}


def test_no_remedy_names_an_index_of_packages() -> None:
    facts = replace(NO_CARD, driver=DriverInfo("550.54.14", (12, 4)), gpus=(replace(ADA, device=None),))
    remedies = " ".join(finding.remedy for finding in run_checks(facts))
    hosts = set(re.findall(r"[\w.-]+\.(?:org|com|io|net)\b", remedies))
    assert hosts <= {"pytorch.org", "nvidia.com"}


@pytest.mark.parametrize(
    ("build", "driver", "remedy"),
    [
        (
            "13.0",
            DriverInfo("535.54.03", (12, 2)),
            "a driver from 580 on (nvidia.com/drivers), or torch built for",
        ),
        ("12.9", DriverInfo("470.82.01", (11, 4)), "a driver from 525 on (nvidia.com/drivers)"),
        ("11.8", DriverInfo("440.33.01", (10, 2)), "a driver from 450 on (nvidia.com/drivers)"),
        (
            "14.0",
            DriverInfo("580.65.06", (13, 0)),
            "the newest driver (nvidia.com/drivers), or torch built for",
        ),
    ],
)
def test_a_driver_too_old_for_the_build(build: str, driver: DriverInfo, remedy: str) -> None:
    facts = replace(
        HEALTHY,
        torch=replace(CUDA, cuda=build, cuda_available=False, archs=()),
        driver=driver,
        gpus=(replace(ADA, device=None),),
        devices=("cpu",),
    )
    finding = only(facts)
    assert finding.level == "problem"
    assert driver.version is not None
    assert finding.message.startswith(f"NVIDIA driver {driver.version}, takes CUDA ")
    assert finding.message.endswith(f"too old for torch's CUDA {build}")
    assert finding.remedy.startswith(f"install {remedy}")


def test_the_build_that_the_old_driver_takes_is_named_for_the_card_that_is_here() -> None:
    pascal = GpuInfo("NVIDIA GeForce GTX 1080", None, (6, 1), 8000, 7000)
    facts = replace(HEALTHY, torch=replace(CUDA, cuda_available=False), driver=DriverInfo("535.54", (12, 2)))
    (finding,) = the(replace(facts, gpus=(pascal,), devices=("cpu",)), "problem")
    assert finding.remedy.endswith("or torch built for CUDA 12.6 (pytorch.org, 'Get started')")


def test_minor_versions_of_a_cuda_get_on() -> None:
    facts = replace(HEALTHY, torch=replace(CUDA, cuda="12.9"), driver=DriverInfo("525.60", (12, 0)))
    assert not the(facts, "problem")
    assert not the(facts, "note")
    assert "minor-version compatibility" in said(facts)


def test_a_driver_that_was_updated_under_way() -> None:
    driver = DriverInfo(error="Driver/library version mismatch", version_mismatch=True)
    finding = the(replace(NO_CARD, driver=driver, num_pci_gpus=1), "problem")[0]
    assert "it was updated and the old one still runs" in finding.message
    assert finding.remedy == "restart the machine"


def test_a_card_on_the_bus_without_a_driver() -> None:
    finding = only(replace(NO_CARD, num_pci_gpus=2))
    assert finding.level == "note"
    assert "none answers (NVML Shared Library Not Found), 2 NVIDIA cards on the bus" in finding.message
    assert "nvidia.com/drivers" in finding.remedy
    assert "--gpus all" in finding.remedy


def test_a_bus_that_tells_nothing() -> None:
    finding = only(replace(NO_CARD, num_pci_gpus=None, torch=replace(CUDA, cuda_available=False, archs=())))
    assert finding.level == "note"
    assert finding.remedy.startswith("if there is an NVIDIA card, install its driver")


def test_a_card_that_torch_sees_and_nvml_does_not() -> None:
    finding = only(replace(HEALTHY, driver=DriverInfo(error="nvidia-ml-py cannot be imported: No module")))
    assert finding.level == "note"
    assert "who holds the memory of the cards is unknown" in finding.message
    assert "pip install nvidia-ml-py" in finding.remedy


def test_a_card_that_does_not_answer() -> None:
    driver = replace(HEALTHY.driver, unreachable=("number 1: GPU is lost",))
    finding = only(replace(HEALTHY, driver=driver))
    assert finding == Finding(
        "problem", "NVIDIA card number 1: GPU is lost", "restart the machine; see nvidia-smi"
    )


def test_cards_that_torch_does_not_see_without_anybody_hiding_them() -> None:
    build = replace(CUDA, cuda_available=False, archs=(), warning="CUDA initialization: unknown error")
    finding = only(replace(HEALTHY, torch=build, gpus=(replace(ADA, device=None),), devices=("cpu",)))
    assert finding.level == "problem"
    assert finding.message.endswith("has NVIDIA GeForce RTX 4090: CUDA initialization: unknown error")
    assert finding.remedy.startswith("restart the machine")


@pytest.mark.parametrize("value", ["", "1", "-1"])
def test_cards_hidden_by_the_environment(value: str) -> None:
    hidden = replace(ADA, device=None)
    finding = only(replace(HEALTHY, gpus=(ADA, hidden), visible_devices=value))
    assert finding.level == "note"
    assert finding.message == (
        f"CUDA_VISIBLE_DEVICES='{value}' hides 1 of 2 cards from torch: NVIDIA GeForce RTX 4090"
    )
    assert finding.remedy == "unset CUDA_VISIBLE_DEVICES"


def test_cards_that_are_all_named_by_the_environment_are_not_hidden() -> None:
    assert not the(replace(HEALTHY, visible_devices="0"), "note")


def test_rocm_is_told_as_what_training_makes_of_it() -> None:
    radeon = GpuInfo("AMD Radeon RX 7900 XTX", "cuda:0", None, 24_000, 23_000, supports_bf16=True)
    build = TorchInfo(
        "2.13.0+rocm7.0", hip="7.0.1", cuda_available=True, archs=("gfx1100",), cpu_capability="AVX2"
    )
    facts = replace(NO_CARD, torch=build, gpus=(radeon,))
    finding = only(facts)
    assert finding.level == "note"
    assert finding.message == (
        "torch 2.13.0+rocm7.0 is built for ROCm 7.0.1, which is not used here: training takes cpu"
    )
    assert finding.remedy
    assert not the(replace(facts, devices=("cuda", "cuda:0", "cpu")), "note")


def test_mps_is_named() -> None:
    facts = replace(
        NO_CARD, torch=TorchInfo("2.13.0", mps_built=True), devices=("mps", "cpu"), cpu_flags=None
    )
    assert "torch 2.13.0 is built with MPS" in said(facts)
    assert "device.name=auto takes mps" in said(facts)


# -- cards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "capability", "verdict", "remedy"),
    [
        (
            "NVIDIA GeForce GTX 1080",
            (6, 1),
            "too old for",
            "install torch built for CUDA 12.6 (pytorch.org",
        ),
        ("NVIDIA Tesla K80", (3, 7), "too old for", "device.name=cpu"),
        ("NVIDIA next", (8, 0), "too new for", "install torch built for CUDA 13.0 or 12.9 or 12.6"),
        ("NVIDIA after next", (15, 0), "too new for", "install the newest torch that is supported"),
    ],
)
def test_a_card_that_the_build_has_no_programs_for(
    name: str, capability: tuple[int, int], verdict: str, remedy: str
) -> None:
    archs = ("sm_75",) if verdict == "too new for" else ("sm_75", "sm_80", "sm_90")
    cuda = "13.2" if verdict == "too new for" else "13.0"
    card = GpuInfo(name, "cuda:0", capability, 8000, 7900, supports_bf16=True)
    driver = DriverInfo("590.1", (13, 2))
    facts = replace(HEALTHY, torch=replace(CUDA, cuda=cuda, archs=archs), gpus=(card,), driver=driver)
    finding = only(facts)
    assert finding.level == "problem"
    text = "capability {}.{} is {} this torch, which has sm_75"
    assert text.format(*capability, verdict) in finding.message
    assert finding.remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("capability", "archs", "well"),
    [
        ((8, 6), ("sm_80",), True),  # machine code runs on later cards of its kind
        ((8, 0), ("sm_86",), False),  # and not on earlier ones
        ((9, 0), ("sm_80", "sm_86"), False),  # nor on another kind
        ((9, 0), ("sm_90a",), True),
        ((12, 1), ("sm_120",), True),
        ((10, 3), ("sm_100a",), False),  # for that very card
        ((10, 3), ("sm_100f",), True),  # for its family
        ((12, 0), ("sm_90", "compute_90"), True),  # to be translated
        ((12, 0), ("sm_90", "compute_90a"), False),
        ((7, 5), ("sm_90", "compute_90"), False),
        ((8, 7), ("sm_75", "sm_90"), False),
    ],
)
def test_which_programs_run_on_which_card(
    capability: tuple[int, int], archs: tuple[str, ...], well: bool
) -> None:
    card = replace(ADA, capability=capability)
    problems = the(replace(HEALTHY, torch=replace(CUDA, archs=archs), gpus=(card,)), "problem")
    assert [("this torch, which has" in p.message) for p in problems] == ([] if well else [True])


def test_a_second_card_that_does_not_suit_is_no_problem() -> None:
    old = GpuInfo("NVIDIA GeForce GT 710", "cuda:1", (3, 5), 2000, 1900)
    finding = only(replace(HEALTHY, gpus=(ADA, old), devices=("cuda", "cuda:0", "cuda:1", "cpu")))
    assert finding.level == "note"
    assert finding.message.startswith("cuda:1 (NVIDIA GeForce GT 710): capability 3.5 is too old")
    chosen = replace(HEALTHY, gpus=(ADA, old), device_name="cuda:1", devices=("cuda:1",))
    assert only(chosen).level == "problem"


def test_a_program_to_be_translated_needs_a_driver_of_the_builds_own_cuda() -> None:
    build = replace(CUDA, cuda="12.9", archs=("sm_90", "compute_90"))
    card = replace(ADA, capability=(12, 0))
    facts = replace(HEALTHY, torch=build, gpus=(card,), driver=DriverInfo("525.60", (12, 0)))
    finding = only(facts)
    assert finding.level == "problem"
    assert "the driver must translate torch's programs, and is older than CUDA 12.9" in finding.message
    assert finding.remedy.startswith("install the newest driver")
    assert not the(replace(facts, driver=DriverInfo("575.1", (12, 9))), "problem")


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce GTX 1650", "NVIDIA GeForce GTX 1660 Ti", "NVIDIA GeForce MX450", "NVIDIA T1000"],
)
def test_turing_without_tensor_cores(name: str) -> None:
    card = GpuInfo(name, "cuda:0", (7, 5), 4000, 3900)
    finding = only(replace(HEALTHY, gpus=(card,)))
    assert finding.level == "note"
    assert finding.message.startswith(f"cuda:0 ({name}) has no tensor cores: fp16 gives NaN")
    assert finding.remedy == "device.precision=auto (tries it), or fp32"
    assert only(replace(HEALTHY, gpus=(card,), precision="fp16")).level == "problem"


@pytest.mark.parametrize("name", ["Tesla T4", "NVIDIA GeForce RTX 2080 Ti", "NVIDIA TITAN RTX"])
def test_turing_with_tensor_cores(name: str) -> None:
    facts = replace(HEALTHY, gpus=(GpuInfo(name, "cuda:0", (7, 5), 15_000, 14_900),))
    assert f"cuda:0 ({name}): 16 bits at full speed: fp16" in said(facts)
    finding = only(replace(facts, precision="bf16"))
    assert "only emulated" in finding.message
    assert finding.remedy == "device.precision=fp32"


def test_a_card_of_today_has_both_kinds_of_16_bits() -> None:
    assert "16 bits at full speed: bf16 and fp16" in said(HEALTHY)
    assert not the(replace(HEALTHY, precision="bf16"), "note")


def test_who_holds_a_card_is_named() -> None:
    holders = (GpuProcess(4242, "python", 20_000), GpuProcess(99, "Xorg", None))
    held = replace(ADA, free_mib=3000, processes=holders)
    finding = only(replace(HEALTHY, gpus=(held,)))
    assert finding.level == "note"
    assert finding.message == (
        "cuda:0 (NVIDIA GeForce RTX 4090), capability 8.9: 3,000 of 24,000 MiB free, "
        "held by 4242 python 20,000 MiB, 99 Xorg"
    )
    assert finding.remedy == "end process 4242 (python), or wait for it"


def test_a_freer_card_is_named() -> None:
    held = replace(ADA, free_mib=300, processes=(GpuProcess(4242, "python", 23_000),))
    free = replace(ADA, device="cuda:1")
    finding = only(replace(HEALTHY, gpus=(held, free), devices=("cuda", "cuda:0", "cuda:1", "cpu")))
    assert finding.level == "problem"  # there is no room to train in
    assert finding.remedy.startswith("device.name=cuda:1 has 23,000 MiB free; or end process 4242")


def test_holders_that_a_container_hides_are_said_to_be_unknown() -> None:
    finding = only(replace(HEALTHY, gpus=(replace(ADA, free_mib=3000),)))
    assert "who holds the rest is unknown (a container hides it)" in finding.message
    assert "nvidia-smi" in finding.remedy


def test_little_that_is_held_is_well() -> None:
    facts = replace(HEALTHY, gpus=(replace(ADA, processes=(GpuProcess(99, "Xorg", 400),)),))
    assert not the(facts, "note")
    assert "held by 99 Xorg 400 MiB" in said(facts)


# -- device, cores, memory, disk ------------------------------------------------------------------------


def test_a_device_that_is_not_here() -> None:
    why = {"cuda": "torch finds no usable CUDA card"}
    finding = only(replace(NO_CARD, device_name="cuda:1", unavailable_reason=why))
    assert finding.level == "problem"
    assert finding.message == "device.name=cuda:1 is not here: torch finds no usable CUDA card"
    assert finding.remedy == "device.name=auto (takes cpu), or one of cpu"


def test_a_device_that_is_here() -> None:
    assert "device.name=cpu is here" in said(replace(HEALTHY, device_name="cpu"))
    assert "device.name=auto takes cuda" in said(HEALTHY)


@pytest.mark.parametrize(
    ("flags", "precision", "text", "level"),
    [
        ({"amx_tile", "amx_bf16", "avx512_bf16"}, "fp32", "AMX: device.precision=bf16 is faster", "ok"),
        ({"avx512_bf16"}, "fp32", "bf16, no AMX", "ok"),
        ({"avx2"}, "fp32", "16 bits would be slower here", "ok"),
        ({"avx2"}, "bf16", "device.precision=bf16 is slower", "note"),
        ({"amx_tile", "amx_bf16"}, "bf16", "device.precision=bf16 is faster", "ok"),
    ],
)
def test_16_bits_on_the_cpu(flags: set[str], precision: str, text: str, level: str) -> None:
    facts = replace(NO_CARD, cpu_flags=frozenset(flags), precision=precision)
    (finding,) = [finding for finding in run_checks(facts) if finding.message.startswith("CPU: AVX2")]
    assert text in finding.message
    assert (finding.level, finding.remedy) == (level, "device.precision=fp32" if level == "note" else "")


def test_16_bits_of_the_cpu_are_no_matter_on_a_card() -> None:
    assert not any(finding.message.startswith("CPU") for finding in run_checks(HEALTHY))


def test_more_threads_than_cores() -> None:
    finding = only(replace(HEALTHY, threads=16))
    assert finding.message.startswith("8 cores, device.threads=16: threads wait")
    assert finding.remedy == "device.threads=auto"


def test_a_container_with_less_time_than_cores() -> None:
    finding = only(replace(HEALTHY, cpu_quota=1.5))
    assert "given the time of 1.5 of them" in finding.message
    assert finding.remedy == "device.threads=1 data.workers=1"
    assert not the(replace(HEALTHY, cpu_quota=1.5, threads=1), "note")


def test_pictures_that_do_not_go_into_memory() -> None:
    finding = only(replace(HEALTHY, image_bytes=40 * GIB))
    assert finding.level == "problem"
    assert "16,384 MiB available, the prepared pictures of this config take 40,960 MiB" in finding.message
    assert "data.count" in finding.remedy


def test_little_memory() -> None:
    finding = only(replace(HEALTHY, available_memory_bytes=700 * MIB))
    assert finding.message == "memory: 700 MiB available, which is little"
    assert "data.workers=1" in finding.remedy


@pytest.mark.parametrize(
    ("free", "level", "text"),
    [
        (99 * MIB, "problem", "/runs: the disk is full, 99 MiB are free"),
        (0, "problem", "/runs: the disk is full, 0 MiB are free"),
        (100 * MIB, "note", "/runs: the disk is nearly full, 100 MiB are free"),
        (1023 * MIB, "note", "/runs: the disk is nearly full, 1023 MiB are free"),
    ],
)
def test_a_full_disk(free: int, level: str, text: str) -> None:
    folders = (
        DirectoryInfo("/runs", free, device_id=1, write_error="No space left on device" if not free else ""),
    )
    finding = only(replace(HEALTHY, directories=folders))
    assert (finding.level, finding.message) == (level, text)
    assert 'du -sh "/runs"/*' in finding.remedy


def test_a_gibibyte_is_enough_and_a_disk_is_told_once() -> None:
    folders = (
        DirectoryInfo("/runs", GIB, device_id=1),
        DirectoryInfo("/runs/outputs", GIB, device_id=1),
        DirectoryInfo("/x", 2 * GIB, device_id=2),
    )
    lines = [f.message for f in run_checks(replace(HEALTHY, directories=folders)) if "GiB free" in f.message]
    assert sorted(lines) == ["/runs: 1.0 GiB free", "/x: 2.0 GiB free"]


@pytest.mark.parametrize(
    ("refusal", "remedy"),
    [
        ("Permission denied", 'chmod u+rwx "/runs", or CAPTCHA_EXP_ROOT='),
        ("Read-only file system", "CAPTCHA_EXP_ROOT=FOLDER"),
        ("Not a directory", 'mv "/runs" "/runs.old"'),
        ("No space left on device", 'df -i "/runs"'),
    ],
)
def test_a_folder_that_cannot_be_written_to(refusal: str, remedy: str) -> None:
    finding = only(
        replace(HEALTHY, directories=(DirectoryInfo("/runs", 9 * GIB, device_id=1, write_error=refusal),))
    )
    assert finding.level == "problem"
    assert finding.message == f"/runs: nothing can be written there: {refusal}"
    assert finding.remedy.startswith(remedy)


# -- store, runs, fonts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "text", "remedy"),
    [
        (
            "older",
            "was made by an older MLflow",
            'cp "/m.db" "/m.db.old" && mlflow db upgrade "sqlite:////m.db"',
        ),
        ("newer", "was made by a newer MLflow", "python -m pip install --upgrade"),
        ("locked", "is locked by another process", "end what has it open"),
        ("deleted", "the experiment of this config was deleted in it", "mlflow experiments restore"),
        ("broken", "cannot be used", "mend it or move it away"),
        ("silent", "does not answer", "start the server"),
    ],
)
def test_a_store_that_takes_no_run(state: str, text: str, remedy: str) -> None:
    finding = only(replace(HEALTHY, store=StoreInfo("sqlite:////m.db", state, "its own words")))
    assert finding.level == "problem"
    assert finding.message == f"tracking.uri=sqlite:////m.db: {text} (its own words)"
    assert finding.remedy.startswith(remedy)


def test_a_server_that_refuses_wants_a_token() -> None:
    finding = only(replace(HEALTHY, store=StoreInfo("https://mlflow.example", "broken", "401")))
    assert "MLFLOW_TRACKING_TOKEN" in finding.remedy


def test_a_database_whose_driver_is_missing() -> None:
    store = StoreInfo("postgresql://db/x", "broken", "No module named 'psycopg2'")
    assert only(replace(HEALTHY, store=store)).remedy.startswith(
        "python -m pip install that module (psycopg2"
    )


def test_a_store_that_is_not_there_yet_is_well() -> None:
    facts = replace(HEALTHY, store=StoreInfo("sqlite:////m.db", "new"))
    assert "sqlite:////m.db: no store yet, it is made at the first run" in said(facts)
    assert "tracking=none" in said(replace(HEALTHY, store=None))
    assert "tracking=none" not in said(replace(HEALTHY, store=None, unavailable=(("the MLflow store", "x"),)))


def test_runs_that_died_are_named() -> None:
    finding = only(replace(HEALTHY, stale_runs=(("/runs/outputs/2026-01-02/030405-x", 4242),)))
    assert finding.level == "note"
    assert finding.message.startswith(
        "/runs/outputs/2026-01-02/030405-x: says RUNNING, but its process 4242 is gone"
    )
    assert "stays in its folder" in finding.remedy
    many = the(replace(HEALTHY, stale_runs=tuple((f"/run{n}", n) for n in range(9))), "note")
    assert [finding.message for finding in many][-1] == "4 more runs died in the same way"
    assert len(many) == 6


def test_records_that_cannot_be_read_are_named() -> None:
    finding = only(replace(HEALTHY, unreadable_runs=("/r/run.json: cannot be read",)))
    assert finding == Finding("note", "/r/run.json: cannot be read", "move its folder out of outputs/")


def test_a_font_that_is_missing() -> None:
    line = "data.fonts: 'No.ttf' is neither a file nor a font of matplotlib, such as DejaVuSans.ttf"
    finding = only(replace(HEALTHY, fonts=None, fonts_error=line))
    assert (finding.level, finding.message) == ("problem", line)
    assert finding.remedy.startswith("data.fonts=[DejaVuSans.ttf]")


def test_a_source_that_draws_nothing_needs_no_font() -> None:
    assert "font" not in said(replace(HEALTHY, fonts=None))


# -- this machine ---------------------------------------------------------------------------------------


class NVMLError(Exception):
    """As pynvml has it."""

    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


class Nvml(ModuleType):
    """pynvml of a machine with two cards, one of which is lost; the function `fails` does not work."""

    NVMLError = NVMLError
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18

    def __init__(self, fails: str = "", code: int = 999) -> None:
        super().__init__("pynvml")
        self.fails, self.code, self.open = fails, code, 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name == self.fails:

            def fail(*_: object) -> None:
                raise NVMLError(self.code)

            return fail
        return super().__getattribute__(name)

    def nvmlInit(self) -> None:  # noqa: N802 - pynvml's names
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802
        return 12040

    def nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802 - bytes, as older ones answer
        return b"550.54.14"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:  # noqa: N802
        if number == 1:
            raise NVMLError(15)
        return number

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return "GPU-1234"

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return "NVIDIA L4"

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> list[int]:  # noqa: N802
        return [8, 9]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(total=23_000 * MIB, free=20_000 * MIB, used=3000 * MIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:  # noqa: N802
        return [
            _process(os.getpid(), 100 * MIB),
            _process(os.getppid(), 2000 * MIB),
            _process(2**22 + 5, None),
        ]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: int) -> list[SimpleNamespace]:  # noqa: N802
        return [_process(os.getppid(), 2000 * MIB)]


def _process(pid: int, used: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)


def test_nvml_tells_of_the_driver_the_cards_and_who_holds_them(
    no_card: None, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    facts = collect_info(tiny)
    assert facts.driver == DriverInfo("550.54.14", (12, 4), unreachable=("number 1: NVML error 15",))
    parent = GpuProcess(os.getppid(), psutil.Process(os.getppid()).name(), 2000)
    assert facts.gpus == (
        GpuInfo("NVIDIA L4", None, (8, 9), 23_000, 20_000, (parent, GpuProcess(2**22 + 5, "?", None))),
    )
    assert nvml.open == 0


NVML_FUNCTIONS = sorted(name for name in vars(Nvml) if name.startswith("nvml"))


@pytest.mark.parametrize("function", NVML_FUNCTIONS)
def test_whatever_of_nvml_fails_the_rest_is_told(
    no_card: None, tiny: Config, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(fails=function))
    facts = collect_info(tiny)
    assert facts.unavailable == ()
    assert facts.torch is not None
    assert facts.directories
    assert bool(facts.driver.error) == (function == "nvmlInit")
    assert run_checks(facts)


@pytest.mark.parametrize(("code", "mismatch"), [(18, True), (9, False), (4, False)])
def test_a_driver_that_was_updated_is_told_from_one_that_is_not_there(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, code: int, mismatch: bool
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(fails="nvmlInit", code=code))
    assert collect_info(tiny).driver == DriverInfo(error=f"NVML error {code}", version_mismatch=mismatch)


def test_nvml_that_is_too_old_for_a_question(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    monkeypatch.delattr(Nvml, "nvmlSystemGetCudaDriverVersion_v2")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert collect_info(tiny).driver.max_cuda is None


@pytest.mark.parametrize("module", ["pynvml", "torch"])
def test_a_package_that_cannot_be_imported(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    facts = collect_info(tiny)
    assert (facts.torch is None) == (module == "torch")
    assert bool(facts.torch_error) == (module == "torch")
    assert facts.directories
    assert facts.fonts


def _cards_of_torch(monkeypatch: pytest.MonkeyPatch, *cards: tuple[str, str]) -> None:
    """torch sees cards with these UUIDs and names."""
    played = [SimpleNamespace(uuid=uuid, name=name, major=8, minor=9) for uuid, name in cards]
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(played))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: played[number])
    monkeypatch.setattr(torch.cuda, "device", lambda number: memoryview(b""))  # any context manager
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (7 * MIB, 9 * MIB))


def test_torchs_cards_are_nvmls_by_their_uuids(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    _cards_of_torch(monkeypatch, ("9999", "NVIDIA A2"), ("1234", "NVIDIA L4"))
    facts = collect_info(tiny)
    assert facts.unavailable == ()
    assert [(c.device, c.name, c.free_mib, c.supports_bf16) for c in facts.gpus] == [
        ("cuda:0", "NVIDIA A2", 7, True),  # NVML does not know it: as torch says
        ("cuda:1", "NVIDIA L4", 20_000, True),
    ]


def test_a_card_that_is_hidden_and_one_that_is_cut_into_instances(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    _cards_of_torch(monkeypatch, ("9999", "NVIDIA A2"))
    assert [card.device for card in collect_info(tiny).gpus] == ["cuda:0", None]
    _cards_of_torch(monkeypatch, ("9999", "NVIDIA L4 MIG 1g.6gb"))
    assert [card.device for card in collect_info(tiny).gpus] == ["cuda:0"]


def test_a_card_that_fails_under_torchs_eyes(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(number: int) -> None:
        raise RuntimeError("CUDA error: device is lost")

    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    _cards_of_torch(monkeypatch, ("1234", "NVIDIA L4"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lost)
    facts = collect_info(tiny)
    assert [gpu.name for gpu in facts.gpus] == ["NVIDIA L4"]
    assert facts.unavailable == (("the cards, by torch", "RuntimeError: CUDA error: device is lost"),)


def test_what_fails_is_named_and_hides_no_other(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("no such\nthing")

    monkeypatch.setattr(psutil, "virtual_memory", broken)
    facts = collect_info(tiny)
    assert facts.unavailable == (("the memory", "OSError: no such thing"),)
    assert facts.available_memory_bytes is None
    assert facts.directories


def test_versions_come_from_the_installed_project(tiny: Config) -> None:
    facts = collect_info(tiny)
    here = {package.name: package for package in facts.packages}
    # A CUDA build says +cu130 of itself; the package that it came in does not.
    assert torch.__version__.startswith(here["torch"].installed or "nothing")
    assert here["torch"].specifier == "<2.14,>=2.10"
    assert all(package.is_supported for package in here.values())
    assert "pytest" not in here  # an extra
    assert facts.is_python_supported


def test_versions_that_do_not_fit(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["torch>99", "numpy>=2", "nosuchpackage>=1", 'other>=1; extra == "dev"']
    monkeypatch.setattr("captcha_exp.doctor.collect.requires", lambda _: asked)
    monkeypatch.setattr("captcha_exp.doctor.collect.metadata", lambda _: {"Requires-Python": "<3"})
    facts = collect_info(tiny)
    assert [(package.name, package.is_supported) for package in facts.packages] == [
        ("torch", False),
        ("numpy", True),
        ("nosuchpackage", False),
    ]
    assert not facts.is_python_supported


def test_a_root_that_is_not_there_yet_is_its_parent_and_nothing_is_made(
    root: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(root / "a" / "b"))
    facts = collect_info(tiny)
    assert str(root) in {folder.path for folder in facts.directories}
    assert list(root.iterdir()) == []


def test_a_file_where_a_folder_should_be(root: Path, tiny: Config) -> None:
    (root / "outputs").write_text("")
    refused = {
        folder.path: folder.write_error for folder in collect_info(tiny).directories if folder.write_error
    }
    assert refused == {str(root / "outputs"): "Not a directory"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(root: Path, tiny: Config) -> None:
    root.chmod(0o500)
    refused = {
        folder.path: folder.write_error for folder in collect_info(tiny).directories if folder.write_error
    }
    assert refused == {str(root): "Permission denied"}


def test_runs_whose_process_is_gone(root: Path, tiny: Config) -> None:
    alive, died, ended = (runs.create_run(tiny, tiny) for _ in range(3))
    died.update(process_started=1.0)
    ended.close("FINISHED")
    (root / "outputs/2026-01-01/x").mkdir(parents=True)
    (root / "outputs/2026-01-01/x/run.json").write_text("{")
    facts = collect_info(tiny)
    assert facts.stale_runs == ((str(died.run_dir), os.getpid()),)
    assert alive.run_dir != died.run_dir
    (line,) = facts.unreadable_runs
    assert "run.json: cannot be read" in line


def test_fonts_and_their_characters(tiny: Config) -> None:
    assert collect_info(tiny).fonts == "DroidSansMono.ttf"
    missing = replace(tiny, data=replace(drawn(tiny), fonts=("No.ttf",)))
    assert collect_info(missing).fonts_error.startswith("data.fonts: 'No.ttf' is neither a file")
    lacking = replace(tiny, captcha=replace(tiny.captcha, alphabet="ab\u4e2d"))
    assert "DroidSansMono.ttf has no glyphs for" in collect_info(lacking).fonts_error


def test_limits_of_a_container(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {
        "cpu.max": ["max 100000", "150000 100000"],
        "memory.max": ["max", "1000"],
        "memory.current": ["300"],
    }
    monkeypatch.setattr(device, "control_group", lambda name: limits[name])
    assert collect_info(tiny).cpu_quota == 1.5
    assert collect_info(tiny).available_memory_bytes == 700
    limits = {"cpu.max": ["max 100000"], "memory.max": [], "memory.current": []}
    assert collect_info(tiny).cpu_quota is None
    assert (collect_info(tiny).available_memory_bytes or 0) > 1000


# -- the store ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A store of this MLflow, with an experiment that was deleted."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    client = open_store(f"sqlite:///{path}")
    client.delete_experiment(client.create_experiment("gone"))
    return path.read_bytes()


@pytest.fixture
def store(made: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "mlflow.db"
    path.write_bytes(made)
    return path


def look(path: Path, experiment: str = "captcha_exp") -> tuple[str, str]:
    return inspect_store(f"sqlite:///{path}", experiment)


def revise(path: Path, revision: str) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = ?", (revision,))


def test_a_store_of_this_mlflow(store: Path) -> None:
    before = store.read_bytes()
    assert look(store) == ("current", "")
    assert look(store, "gone") == ("deleted", "")
    assert store.read_bytes() == before
    assert [path.name for path in store.parent.iterdir()] == ["mlflow.db"]


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    assert look(tmp_path / "deep" / "mlflow.db") == ("new", "")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty.db").touch()
    assert look(tmp_path / "empty.db") == ("new", "")


def test_a_store_of_another_mlflow(store: Path) -> None:
    revise(store, "451aebb31d03")  # MLflow 1.0's
    assert look(store) == ("older", "schema 451aebb31d03")
    revise(store, "ffffffffffff")
    assert look(store) == ("newer", "schema ffffffffffff")


def test_files_that_are_no_store(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database, " * 99)
    assert look(tmp_path / "text.db") == ("broken", "file is not a database")
    with closing(sqlite3.connect(tmp_path / "other.db")) as database, database:
        database.execute("CREATE TABLE t (i)")
    assert look(tmp_path / "other.db") == ("broken", "a database, but not one of MLflow's")
    state, words = look(tmp_path / "text.db" / "mlflow.db")
    assert (state, words) == ("broken", f"{tmp_path}/text.db is a file, not a folder")


@pytest.mark.parametrize("kind", ["EXCLUSIVE", "IMMEDIATE"])
def test_a_store_that_is_locked(store: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captcha_exp.tracking.store.SECONDS_FOR_A_LOCK", 0.05)
    with closing(sqlite3.connect(store, isolation_level=None)) as other:
        other.execute(f"BEGIN {kind}")
        assert look(store) == ("locked", "database is locked")
    assert look(store)[0] == "current"


def test_a_store_that_another_process_is_making(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captcha_exp.tracking.store.SECONDS_FOR_A_LOCK", 0.05)
    with filelock.FileLock(store.with_suffix(".lock")):
        state, words = look(store)
    assert state == "locked"
    assert "mlflow.lock is held by another process" in words
    assert look(store)[0] == "current"


class _Server(BaseHTTPRequestHandler):
    """An MLflow server: one that answers, or one that wants a password."""

    status, answer = 200, b'{"experiments": []}'

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[_Server]]]:
    class Handler(_Server):
        pass

    served = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=served.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}", Handler
    served.shutdown()
    thread.join()
    served.server_close()


def test_a_server_that_answers_and_one_that_refuses(server: tuple[str, type[_Server]]) -> None:
    uri, handler = server
    before = dict(os.environ)
    assert inspect_store(uri, "x") == ("current", "")
    handler.status, handler.answer = 401, b"Unauthorized"
    state, words = inspect_store(uri, "x")
    assert state == "broken"
    assert "401" in words
    assert dict(os.environ) == before


def test_a_server_that_is_not_there() -> None:
    state, words = inspect_store("http://127.0.0.1:9", "x")
    assert state == "silent"
    assert words


def test_a_store_that_never_answers_is_given_up(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captcha_exp.tracking.store.SECONDS_TO_ANSWER", 0.05)
    monkeypatch.setattr("captcha_exp.tracking.store._look_at_file", lambda *_: time.sleep(1))
    assert look(store) == ("silent", "no answer within 0 s")


def test_other_databases(store: Path) -> None:
    assert inspect_store(f"sqlite+pysqlite:///{store}", "x") == ("current", "")
    assert inspect_store("sqlite://", "x") == ("new", "")
    state, words = inspect_store("postgresql://127.0.0.1:9/x", "x")  # no driver, or no server
    assert state == "broken"
    assert words


def test_the_store_of_a_config_is_looked_at(root: Path, tiny: Config) -> None:
    config = replace(tiny, tracking=MlflowConfig(backend="mlflow", uri="auto", experiment="x"))
    assert collect_info(config).store == StoreInfo(f"sqlite:///{root}/mlruns/mlflow.db", "new")
    assert collect_info(tiny).store is None
    assert list(root.iterdir()) == []


# -- the command ----------------------------------------------------------------------------------------

LINE = re.compile(r"(ok     |note   |problem) [^\n]+?( -> [^\n]+)?")


def run(root: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "captcha_exp", "doctor", *words],
        env={**os.environ, "CAPTCHA_EXP_ROOT": str(root)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("words", [("tracking=none",), ()], ids=["none", "sqlite"])
def test_the_real_command_on_this_machine(root: Path, words: tuple[str, ...]) -> None:
    code, out, err = run(root, *words)
    assert (code, err) == (0, "")
    assert all(LINE.fullmatch(line) for line in out.splitlines())
    for thing in (
        "Python 3.",
        "torch 2.",
        "device.name=auto takes",
        "GiB free",
        "tracking",
        "fonts",
        "git",
    ):
        assert sum(thing in line for line in out.splitlines()) >= 1, thing
    assert list(root.iterdir()) == []


def test_a_device_that_is_not_here_is_found_and_not_refused(root: Path) -> None:
    code, out, err = run(root, "tracking=none", "device.name=cuda:77", "--json")
    assert (code, err) == (1, "")
    found = json.loads(out)
    assert all(set(finding) == {"level", "what", "remedy"} for finding in found)
    (problem,) = [finding for finding in found if finding["level"] == "problem"]
    assert problem["what"].startswith("device.name=cuda:77 is not here: ")
    assert problem["remedy"].startswith("device.name=auto")


def test_a_config_that_cannot_be_composed_is_the_usual_mistake(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["captcha-exp", "doctor", "captcha.widht=56"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    assert "did you mean captcha.width?" in capsys.readouterr().err


def test_a_line_stays_one_line_whatever_stands_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    long = Finding("problem", f"[red]{'long ' * 99}", "mend [it]")
    output.print_findings([long, Finding("ok", "fi\nne")])
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"problem [red]{'long ' * 99} -> mend [it]"
    assert second == "ok      fi ne"
