"""`captcha-exp doctor`: simulated machines, one for each finding; then this machine."""

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

import psutil
import pytest
import torch
from conftest import generator_config
from packaging.requirements import Requirement

import captcha_exp
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
    StoreInfo,
    TorchInfo,
)
from captcha_exp.runtime import device, environment
from captcha_exp.tracking.inspection import inspect_store
from captcha_exp.tracking.problems import StoreStatus
from captcha_exp.tracking.store import find_moved_artifacts, open_store

MIB, GIB = 2**20, 2**30
ADA = GpuInfo("NVIDIA GeForce RTX 4090", "cuda:0", (8, 9), 24_000, 23_000)
CUDA = TorchInfo(
    "2.13.0+cu130",
    build="CUDA 13.0",
    cpu_capability="AVX2",
    cpu_flags=frozenset({"avx2"}),
)
HEALTHY = MachineInfo(
    device_name="auto",
    precision="fp32",
    threads="auto",
    versions=(
        (Requirement("Python<3.14,>=3.11"), "3.12.3"),
        (Requirement("torch<2.14,>=2.10"), "2.13.0+cu130"),
    ),
    torch=CUDA,
    driver=DriverInfo("580.65.06"),
    gpus=(ADA,),
    num_pci_gpus=1,
    devices=("cuda", "cuda:0", "cpu"),
    cores=8,
    available_memory_bytes=16 * GIB,
    image_bytes=50 * MIB,
    directories=(DirectoryInfo("/runs", 100 * GIB, device_id=1),),
    store=StoreInfo("sqlite:////runs/mlruns/mlflow.db", "current"),
    fonts="DejaVuSans.ttf",
    git=GitInfo(is_installed=True, checkout_dir="/project", commit="0123456789abcdef"),
)
NO_GPU = replace(
    HEALTHY,
    torch=replace(CUDA, version="2.13.0+cpu", build=""),
    driver=DriverInfo(error="NVML Shared Library Not Found"),
    gpus=(),
    num_pci_gpus=0,
    devices=("cpu",),
)


def at_level(info: MachineInfo, level: str) -> list[Finding]:
    return [finding for finding in run_checks(info) if finding.level == level]


def only_finding(info: MachineInfo) -> Finding:
    """Return the only finding that is not "ok"."""
    (finding,) = [finding for finding in run_checks(info) if finding.level != "ok"]
    return finding


def all_messages(info: MachineInfo) -> str:
    return "\n".join(finding.message for finding in run_checks(info))


@pytest.mark.parametrize("info", [HEALTHY, NO_GPU], ids=["gpu", "no gpu"])
def test_a_healthy_machine_has_only_ok_findings(info: MachineInfo) -> None:
    assert {finding.level for finding in run_checks(info)} == {"ok"}
    assert not any(finding.remedy for finding in run_checks(info))
    assert len({finding.message for finding in run_checks(info)}) == len(run_checks(info))


def test_missing_information_is_not_a_problem() -> None:
    assert all(finding.level == "ok" for finding in run_checks(MachineInfo("auto", "fp32", "auto")))


# -- software -------------------------------------------------------------------------------------------


def test_unsupported_python() -> None:
    finding = only_finding(replace(HEALTHY, versions=((Requirement("Python<3.14,>=3.11"), "3.14.1"),)))
    assert finding.level == "problem"
    assert finding.message == "Python 3.14.1 is not supported; supported: <3.14,>=3.11"
    assert "make PYTHON=python3.12" in finding.remedy


@pytest.mark.parametrize(
    ("version", "message", "remedy"),
    [
        (
            (Requirement("hydra-core<1.4,>=1.3.8"), "1.2.0"),
            "hydra-core 1.2.0 is not supported; supported: <1.4,>=1.3.8",
            'python -m pip install "hydra-core<1.4,>=1.3.8"',
        ),
        (
            (Requirement("mlflow<4,>=3.13"), None),
            "mlflow is not installed; supported: <4,>=3.13",
            'python -m pip install "mlflow<4,>=3.13"',
        ),
        (
            (Requirement("torch<2.14,>=2.10"), "2.9.1"),
            "torch 2.9.1 is not supported; supported: <2.14,>=2.10",
            "python -m pip install \"torch<2.14,>=2.10\" (which build: pytorch.org, 'Get started')",
        ),
    ],
)
def test_unsupported_package(version: tuple[Requirement, str | None], message: str, remedy: str) -> None:
    assert only_finding(replace(HEALTHY, versions=(version,))) == Finding("problem", message, remedy)


def test_torch_that_cannot_be_imported() -> None:
    info = replace(NO_GPU, torch=None, devices=(), torch_error="OSError: libcudart.so.13: cannot open")
    finding = only_finding(info)
    assert finding.level == "problem"
    assert finding.message == "cannot import torch: OSError: libcudart.so.13: cannot open"
    assert finding.remedy.startswith("python -m pip install --force-reinstall torch")


def test_failed_queries_are_reported() -> None:
    finding = only_finding(replace(HEALTHY, unavailable=(("the memory", "OSError: no /proc"),)))
    assert finding == Finding("info", "cannot check the memory: OSError: no /proc")
    why = "PackageNotFoundError: No package metadata was found for captcha-exp"
    uninstalled = replace(HEALTHY, unavailable=(("the package versions", why),))
    assert only_finding(uninstalled).remedy == "python -m pip install --editable ."


@pytest.mark.parametrize(
    ("git", "message", "remedy"),
    [
        (
            GitInfo(is_installed=False, checkout_dir="/p", commit=None),
            "git is not installed",
            "install git",
        ),
        (
            GitInfo(is_installed=True, checkout_dir="/p", commit=None),
            "git: no commit of /p is readable",
            "safe.directory",
        ),
    ],
)
def test_missing_commit(git: GitInfo, message: str, remedy: str) -> None:
    finding = only_finding(replace(HEALTHY, git=git))
    assert finding.level == "info"
    assert finding.message.startswith(message)
    assert remedy in finding.remedy


def test_an_installed_package_needs_no_git() -> None:
    info = replace(HEALTHY, git=GitInfo(is_installed=False, checkout_dir=None, commit=None))
    assert not at_level(info, "info")


# -- torch's build and the driver -----------------------------------------------------------------------


def test_cpu_build_on_a_machine_with_a_gpu() -> None:
    gpu = replace(ADA, device=None)
    info = replace(NO_GPU, driver=DriverInfo("550.54.14"), gpus=(gpu,), num_pci_gpus=1)
    finding = only_finding(info)
    assert finding.level == "problem"
    assert finding.message.endswith(" is a CPU-only build, but this machine has NVIDIA GeForce RTX 4090")
    assert finding.remedy == "install torch built for CUDA (pytorch.org, 'Get started')"
    assert only_finding(replace(info, device_name="cpu")).level == "info"  # as requested


def test_no_remedy_names_a_package_index() -> None:
    info = replace(NO_GPU, driver=DriverInfo("550.54.14"), gpus=(replace(ADA, device=None),))
    remedies = " ".join(finding.remedy for finding in run_checks(info))
    hosts = set(re.findall(r"[\w.-]+\.(?:org|com|io|net)\b", remedies))
    assert hosts <= {"pytorch.org", "nvidia.com"}


def test_driver_updated_without_a_restart() -> None:
    driver = DriverInfo(error="Driver/library version mismatch", version_mismatch=True)
    finding = at_level(replace(NO_GPU, driver=driver, num_pci_gpus=1), "problem")[0]
    assert "updated, but the old version is still loaded" in finding.message
    assert finding.remedy == "restart the machine"


def test_gpu_on_the_pci_bus_without_a_driver() -> None:
    finding = only_finding(replace(NO_GPU, num_pci_gpus=2))
    assert finding.level == "info"
    assert "not loaded (NVML Shared Library Not Found), but the PCI bus has 2 NVIDIA GPUs" in finding.message
    assert "nvidia.com/drivers" in finding.remedy
    assert "--gpus all" in finding.remedy


def test_gpu_visible_to_torch_but_not_to_nvml() -> None:
    finding = only_finding(replace(HEALTHY, driver=DriverInfo(error="cannot import nvidia-ml-py: No module")))
    assert finding.level == "info"
    assert "cannot list the processes that use GPU memory" in finding.message
    assert "pip install nvidia-ml-py" in finding.remedy


def test_unreachable_gpu() -> None:
    driver = replace(HEALTHY.driver, unreachable=("1: GPU is lost",))
    finding = only_finding(replace(HEALTHY, driver=driver))
    assert finding == Finding("problem", "NVIDIA GPU 1: GPU is lost", "restart the machine; see nvidia-smi")


def test_gpus_not_visible_to_torch() -> None:
    build = replace(CUDA, warning="CUDA initialization: the NVIDIA driver is too old")
    finding = only_finding(replace(HEALTHY, torch=build, gpus=(replace(ADA, device=None),), devices=("cpu",)))
    assert finding.level == "problem"
    assert finding.message.endswith(
        "lists NVIDIA GeForce RTX 4090: CUDA initialization: the NVIDIA driver is too old"
    )
    assert finding.remedy.startswith("install the newest driver (nvidia.com/drivers)")


@pytest.mark.parametrize("value", ["", "1", "-1"])
def test_gpus_hidden_by_the_environment(value: str) -> None:
    hidden = replace(ADA, device=None)
    finding = only_finding(replace(HEALTHY, gpus=(ADA, hidden), visible_devices=value))
    assert finding.level == "info"
    assert finding.message == (
        f"CUDA_VISIBLE_DEVICES='{value}' hides 1 of 2 GPUs from torch: NVIDIA GeForce RTX 4090"
    )
    assert finding.remedy == "unset CUDA_VISIBLE_DEVICES"


def test_environment_that_lists_every_gpu_hides_none() -> None:
    assert not at_level(replace(HEALTHY, visible_devices="0"), "info")


def test_rocm_build() -> None:
    build = TorchInfo("2.13.0+rocm7.0", build="ROCm 7.0.1, which is not supported here")
    messages = all_messages(replace(NO_GPU, torch=build))
    assert "torch 2.13.0+rocm7.0, built for ROCm 7.0.1, which is not supported here" in messages


def test_mps_build() -> None:
    info = replace(NO_GPU, torch=TorchInfo("2.13.0", build="MPS"), devices=("mps", "cpu"))
    assert "torch 2.13.0, built for MPS" in all_messages(info)
    assert "device.name=auto selects mps" in all_messages(info)


# -- GPUs -----------------------------------------------------------------------------------------------


def test_gpu_not_supported_by_the_build() -> None:
    gpu = GpuInfo("NVIDIA GeForce GTX 1080", "cuda:0", (6, 1), 8000, 7900, is_supported=False)
    finding = only_finding(replace(HEALTHY, gpus=(gpu,)))
    assert finding.level == "problem"
    name = "cuda:0 (NVIDIA GeForce GTX 1080), capability 6.1"
    assert finding.message == f"{name} is not supported by this build of torch"
    assert finding.remedy == "install another build (pytorch.org, 'Get started'), or device.name=cpu"


def test_an_unsupported_second_gpu_is_not_a_problem() -> None:
    old = GpuInfo("NVIDIA GeForce GT 710", "cuda:1", (3, 5), 2000, 1900, is_supported=False)
    finding = only_finding(replace(HEALTHY, gpus=(ADA, old), devices=("cuda", "cuda:0", "cuda:1", "cpu")))
    assert finding.level == "info"
    assert finding.message.startswith("cuda:1 (NVIDIA GeForce GT 710), capability 3.5 is not")
    chosen = replace(HEALTHY, gpus=(ADA, old), device_name="cuda:1", devices=("cuda:1",))
    assert only_finding(chosen).level == "problem"


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce GTX 1650", "NVIDIA GeForce GTX 1660 Ti", "NVIDIA GeForce MX450", "NVIDIA T1000"],
)
def test_turing_without_tensor_cores(name: str) -> None:
    gpu = GpuInfo(name, "cuda:0", (7, 5), 4000, 3900)
    finding = only_finding(replace(HEALTHY, gpus=(gpu,)))
    assert finding.level == "info"
    assert finding.message.startswith(
        f"cuda:0 ({name}) has no tensor cores: in fp16 some convolutions return NaN"
    )
    assert finding.remedy == "device.precision=auto, which is fp32 on this GPU"
    assert only_finding(replace(HEALTHY, gpus=(gpu,), precision="fp16")).level == "problem"


@pytest.mark.parametrize("name", ["Tesla T4", "NVIDIA GeForce RTX 2080 Ti", "NVIDIA TITAN RTX"])
def test_turing_with_tensor_cores(name: str) -> None:
    info = replace(HEALTHY, gpus=(GpuInfo(name, "cuda:0", (7, 5), 15_000, 14_900),))
    assert f"cuda:0 ({name}): fast 16-bit types: fp16" in all_messages(info)
    finding = only_finding(replace(info, precision="bf16"))
    assert "only emulated" in finding.message
    assert finding.remedy == "device.precision=fp32"


def test_recent_gpu_supports_both_16_bit_types() -> None:
    assert "fast 16-bit types: bf16 and fp16" in all_messages(HEALTHY)
    assert not at_level(replace(HEALTHY, precision="bf16"), "info")


def test_processes_that_use_gpu_memory_are_listed() -> None:
    processes = (GpuProcess(4242, "python", 20_000), GpuProcess(99, "Xorg"))
    used = replace(ADA, free_mib=3000, processes=processes)
    finding = only_finding(replace(HEALTHY, gpus=(used,)))
    assert finding.level == "info"
    assert finding.message == (
        "cuda:0 (NVIDIA GeForce RTX 4090), capability 8.9: 3,000 of 24,000 MiB free, "
        "used by 4242 python 20,000 MiB, 99 Xorg"
    )
    assert finding.remedy == "stop process 4242 (python), or wait for it"


def test_gpu_with_more_free_memory_is_suggested() -> None:
    used = replace(ADA, free_mib=300, processes=(GpuProcess(4242, "python", 23_000),))
    free = replace(ADA, device="cuda:1")
    finding = only_finding(replace(HEALTHY, gpus=(used, free), devices=("cuda", "cuda:0", "cuda:1", "cpu")))
    assert finding.level == "problem"  # not enough memory to train
    assert finding.remedy.startswith("device.name=cuda:1 has 23,000 MiB free; or stop process 4242")


def test_processes_hidden_by_a_container() -> None:
    finding = only_finding(replace(HEALTHY, gpus=(replace(ADA, free_mib=3000),)))
    assert "the rest by unknown processes (outside this container)" in finding.message
    assert "nvidia-smi" in finding.remedy


def test_small_use_of_gpu_memory_is_ok() -> None:
    info = replace(HEALTHY, gpus=(replace(ADA, processes=(GpuProcess(99, "Xorg", 400),)),))
    assert not at_level(info, "info")
    assert "used by 99 Xorg 400 MiB" in all_messages(info)


# -- device, cores, memory, disk ------------------------------------------------------------------------


def test_unavailable_device() -> None:
    reasons = {"cuda": "torch finds no usable CUDA GPU"}
    finding = only_finding(replace(NO_GPU, device_name="cuda:1", unavailable_reason=reasons))
    assert finding.level == "problem"
    assert finding.message == "device.name=cuda:1 is not available: torch finds no usable CUDA GPU"
    assert finding.remedy == "device.name=auto (selects cpu), or one of cpu"


def test_available_device() -> None:
    assert "device.name=cpu is available" in all_messages(replace(HEALTHY, device_name="cpu"))
    assert "device.name=auto selects cuda" in all_messages(HEALTHY)


@pytest.mark.parametrize(
    ("flags", "precision", "text", "level"),
    [
        ({"amx_tile", "amx_bf16", "avx512_bf16"}, "auto", "AMX: device.precision=auto is bf16", "ok"),
        ({"amx_tile", "amx_bf16"}, "bf16", "AMX: device.precision=auto is bf16", "ok"),
        ({"amx_tile", "amx_bf16"}, "fp32", "device.precision=fp32 is slower than bf16", "info"),
        ({"avx512_bf16"}, "auto", "no AMX: device.precision=auto is fp32", "ok"),
        ({"avx2"}, "fp32", "no AMX: device.precision=auto is fp32", "ok"),
        ({"avx2"}, "bf16", "device.precision=bf16 is slower than fp32", "info"),
    ],
)
def test_16_bit_types_on_the_cpu(flags: set[str], precision: str, text: str, level: str) -> None:
    build = replace(CUDA, build="", cpu_flags=frozenset(flags))
    info = replace(NO_GPU, torch=build, precision=precision)
    (finding,) = [finding for finding in run_checks(info) if finding.message.startswith("CPU: AVX2")]
    assert text in finding.message
    assert (finding.level, finding.remedy) == (level, "device.precision=auto" if level == "info" else "")


def test_cpu_precision_is_not_checked_with_a_gpu() -> None:
    assert not any(finding.message.startswith("CPU") for finding in run_checks(HEALTHY))


def test_more_threads_than_cores() -> None:
    finding = only_finding(replace(HEALTHY, threads=16))
    assert finding.message.startswith("8 cores, device.threads=16: more threads than cores")
    assert finding.remedy == "device.threads=auto"


def test_cpu_limit_of_a_container() -> None:
    finding = only_finding(replace(HEALTHY, cpu_quota=1.5))
    assert "limited to 1.5 of them" in finding.message
    assert finding.remedy == "device.threads=1 data.workers=1"
    assert not at_level(replace(HEALTHY, cpu_quota=1.5, threads=1), "info")


def test_images_that_do_not_fit_in_memory() -> None:
    finding = only_finding(replace(HEALTHY, image_bytes=40 * GIB))
    assert finding.level == "problem"
    assert "16,384 MiB available, but the decoded images of this config need 40,960 MiB" in finding.message
    assert "data.count" in finding.remedy


def test_low_memory() -> None:
    finding = only_finding(replace(HEALTHY, available_memory_bytes=700 * MIB))
    assert finding.message == "memory: 700 MiB available, which is low"
    assert "data.workers=1" in finding.remedy


@pytest.mark.parametrize(
    ("free", "level", "text"),
    [
        (99 * MIB, "problem", "/runs: the disk is full, 99 MiB free"),
        (0, "problem", "/runs: the disk is full, 0 MiB free"),
        (100 * MIB, "info", "/runs: the disk is nearly full, 100 MiB free"),
        (1023 * MIB, "info", "/runs: the disk is nearly full, 1023 MiB free"),
    ],
)
def test_full_disk(free: int, level: str, text: str) -> None:
    folders = (
        DirectoryInfo("/runs", free, device_id=1, write_error="No space left on device" if not free else ""),
    )
    finding = only_finding(replace(HEALTHY, directories=folders))
    assert (finding.level, finding.message) == (level, text)
    assert 'du -sh "/runs"/*' in finding.remedy


def test_each_disk_is_reported_once() -> None:
    folders = (
        DirectoryInfo("/runs", GIB, device_id=1),
        DirectoryInfo("/runs/outputs", GIB, device_id=1),
        DirectoryInfo("/x", 2 * GIB, device_id=2),
    )
    lines = [f.message for f in run_checks(replace(HEALTHY, directories=folders)) if "GiB free" in f.message]
    assert sorted(lines) == ["/runs: 1.0 GiB free", "/x: 2.0 GiB free"]


@pytest.mark.parametrize(
    ("write_error", "remedy"),
    [
        ("Permission denied", 'chmod u+rwx "/runs", or set CAPTCHA_EXP_ROOT to'),
        ("Read-only file system", "set CAPTCHA_EXP_ROOT to"),
        ("Not a directory", 'mv "/runs" "/runs.old"'),
        ("No space left on device", 'df -i "/runs"'),
    ],
)
def test_unwritable_directory(write_error: str, remedy: str) -> None:
    finding = only_finding(
        replace(HEALTHY, directories=(DirectoryInfo("/runs", 9 * GIB, device_id=1, write_error=write_error),))
    )
    assert finding.level == "problem"
    assert finding.message == f"/runs: not writable: {write_error}"
    assert finding.remedy.startswith(remedy)


# -- store, runs, fonts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "text", "remedy"),
    [
        (
            "older",
            "created by an older MLflow",
            'cp "/m.db" "/m.db.old" && mlflow db upgrade "sqlite:////m.db"',
        ),
        ("newer", "created by a newer MLflow", "python -m pip install --upgrade"),
        ("locked", "locked by another process", "close the program that has it open"),
        ("deleted", "the experiment of this config is deleted", "restore it (see mlflow experiments restore"),
        ("broken", "cannot be used", "name another file in tracking.uri, or move this one away"),
        ("unreachable", "does not answer", "start the server"),
    ],
)
def test_unusable_store(state: StoreStatus, text: str, remedy: str) -> None:
    finding = only_finding(replace(HEALTHY, store=StoreInfo("sqlite:////m.db", state, "detail")))
    assert finding.level == "problem"
    assert finding.message == f"tracking.uri=sqlite:////m.db: {text} (detail)"
    assert finding.remedy.startswith(remedy)


def test_server_that_needs_a_token() -> None:
    finding = only_finding(replace(HEALTHY, store=StoreInfo("https://mlflow.example", "broken", "401")))
    assert "MLFLOW_TRACKING_TOKEN" in finding.remedy


def test_database_without_its_python_module() -> None:
    store = StoreInfo("postgresql://db/x", "broken", "No module named 'psycopg2'")
    assert only_finding(replace(HEALTHY, store=store)).remedy.startswith(
        "install that module with python -m pip (psycopg2"
    )


def test_a_new_store_is_ok() -> None:
    info = replace(HEALTHY, store=StoreInfo("sqlite:////m.db", "new"))
    assert "sqlite:////m.db (tracking.uri=auto): no store yet, the first run creates it" in all_messages(info)
    assert "tracking=none" in all_messages(replace(HEALTHY, store=None))
    assert "tracking=none" not in all_messages(
        replace(HEALTHY, store=None, unavailable=(("the MLflow store", "x"),))
    )


def test_stale_runs_are_listed() -> None:
    finding = only_finding(replace(HEALTHY, stale_runs=(("/runs/outputs/2026-01-02/030405-x", 4242),)))
    assert finding.level == "info"
    assert finding.message.startswith(
        "/runs/outputs/2026-01-02/030405-x: status RUNNING, but process 4242 has exited"
    )
    assert "its files are kept" in finding.remedy
    many = at_level(replace(HEALTHY, stale_runs=tuple((f"/run{n}", n) for n in range(9))), "info")
    assert [finding.message for finding in many][-1] == "4 more stale runs"
    assert len(many) == 6


def test_unreadable_runs_are_listed() -> None:
    finding = only_finding(replace(HEALTHY, unreadable_runs=("/r/run.json: cannot be read",)))
    assert finding == Finding("info", "/r/run.json: cannot be read")


def test_missing_font() -> None:
    line = "data.fonts: 'No.ttf' is neither a file nor a font of matplotlib, such as DejaVuSans.ttf"
    finding = only_finding(replace(HEALTHY, fonts=None, fonts_error=line))
    assert (finding.level, finding.message) == ("problem", line)
    assert finding.remedy.startswith("data.fonts=[DejaVuSans.ttf]")


def test_a_folder_of_images_needs_no_font() -> None:
    assert "font" not in all_messages(replace(HEALTHY, fonts=None))


# -- this machine ---------------------------------------------------------------------------------------


class NVMLError(Exception):
    """A simulated pynvml.NVMLError."""

    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


class Nvml(ModuleType):
    """A simulated pynvml with two GPUs, one of them lost. The function named by `fails` raises an error."""

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

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "550.54.14"

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
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)


def test_nvml_reports_driver_gpus_and_processes(
    no_gpu: None, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    info = collect_info(tiny)
    assert info.driver == DriverInfo("550.54.14", unreachable=("1: NVML error 15",))
    parent = GpuProcess(os.getppid(), psutil.Process(os.getppid()).name(), 2000)
    assert info.gpus == (
        GpuInfo("NVIDIA L4", None, (8, 9), 23_000, 20_000, (parent, GpuProcess(2**22 + 5, "?")), "1234"),
    )
    assert nvml.open == 0


NVML_FUNCTIONS = sorted(name for name in vars(Nvml) if name.startswith("nvml"))


@pytest.mark.parametrize("function", NVML_FUNCTIONS)
def test_a_failing_nvml_function_hides_no_other_result(
    no_gpu: None, tiny: Config, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(fails=function))
    info = collect_info(tiny)
    assert info.unavailable == ()
    assert info.torch is not None
    assert info.directories
    assert bool(info.driver.error) == (function == "nvmlInit")
    assert run_checks(info)


@pytest.mark.parametrize(("code", "mismatch"), [(18, True), (9, False), (4, False)])
def test_version_mismatch_is_recognized(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, code: int, mismatch: bool
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(fails="nvmlInit", code=code))
    assert collect_info(tiny).driver == DriverInfo(error=f"NVML error {code}", version_mismatch=mismatch)


def test_nvml_without_a_function(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    monkeypatch.delattr(Nvml, "nvmlSystemGetDriverVersion")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert collect_info(tiny).driver.version is None


@pytest.mark.parametrize("module", ["pynvml", "torch"])
def test_missing_package(tiny: Config, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    info = collect_info(tiny)
    assert (info.torch is None) == (module == "torch")
    assert bool(info.torch_error) == (module == "torch")
    assert info.directories
    assert info.fonts


def _simulate_torch_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: tuple[str, str]) -> None:
    """Let torch see GPUs with these UUIDs and names."""
    properties = [SimpleNamespace(uuid=uuid, name=name, major=8, minor=9) for uuid, name in gpus]
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(properties))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties[number])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (7 * MIB, 9 * MIB))


def test_gpus_of_torch_and_nvml_are_matched_by_uuid(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    _simulate_torch_gpus(monkeypatch, ("9999", "NVIDIA A2"), ("1234", "NVIDIA L4"))
    info = collect_info(tiny)
    assert info.unavailable == ()
    assert [(c.device, c.name, c.free_mib, c.capability) for c in info.gpus] == [
        ("cuda:0", "NVIDIA A2", 7, (8, 9)),  # unknown to NVML
        ("cuda:1", "NVIDIA L4", 20_000, (8, 9)),
    ]


def test_hidden_gpu_and_mig_instances(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    _simulate_torch_gpus(monkeypatch, ("9999", "NVIDIA A2"))
    assert [gpu.device for gpu in collect_info(tiny).gpus] == ["cuda:0", None]
    _simulate_torch_gpus(monkeypatch, ("9999", "NVIDIA L4 MIG 1g.6gb"))
    assert [gpu.device for gpu in collect_info(tiny).gpus] == ["cuda:0"]


def test_torchs_warning_names_an_unsupported_gpu(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    _simulate_torch_gpus(monkeypatch, ("1234", "NVIDIA L4"), ("9999", "NVIDIA A2"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: ("NVIDIA L4", "NVIDIA A2")[number])
    query = torch.cuda.get_device_properties

    def initialize_and_query(number: int) -> Any:
        torch.cuda._warn_unsupported_code(1, 86, [75])  # as at the initialization of CUDA
        return query(number)

    monkeypatch.setattr(torch.cuda, "get_device_properties", initialize_and_query)
    assert [gpu.is_supported for gpu in collect_info(tiny).gpus] == [True, False]


def test_gpu_that_fails_in_torch(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(number: int) -> None:
        raise RuntimeError("CUDA error: device is lost")

    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    _simulate_torch_gpus(monkeypatch, ("1234", "NVIDIA L4"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lost)
    info = collect_info(tiny)
    assert [gpu.name for gpu in info.gpus] == ["NVIDIA L4"]
    assert info.unavailable == (("the GPUs with torch", "RuntimeError: CUDA error: device is lost"),)


def test_a_failing_query_hides_no_other_result(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("no such\nthing")

    monkeypatch.setattr(psutil, "virtual_memory", broken)
    info = collect_info(tiny)
    assert info.unavailable == (("the memory", "OSError: no such thing"),)
    assert info.available_memory_bytes is None
    assert info.directories


def test_versions_of_the_installed_project(tiny: Config) -> None:
    info = collect_info(tiny)
    installed = {requirement.name: version for requirement, version in info.versions}
    # The version of a CUDA build ends with +cu130, that of its package does not.
    assert torch.__version__.startswith(installed["torch"] or "nothing")
    requirements = {str(requirement) for requirement, _ in info.versions}
    assert {"torch<2.14,>=2.10", "Python<3.14,>=3.11"} <= requirements
    assert not at_level(info, "problem")
    assert "pytest" not in installed  # an extra


def test_unsupported_versions(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = ["torch>99", "numpy>=2", "nosuchpackage>=1", 'other>=1; extra == "dev"']
    monkeypatch.setattr("captcha_exp.doctor.collect.requires", lambda _: requirements)
    monkeypatch.setattr("captcha_exp.doctor.collect.metadata", lambda _: {"Requires-Python": "<3"})
    info = collect_info(tiny)
    problems = [finding.message.split()[0] for finding in at_level(info, "problem")]
    assert problems == ["Python", "torch", "nosuchpackage"]
    assert [requirement.name for requirement, _ in info.versions] == [*problems[:2], "numpy", problems[2]]


def test_nothing_is_created_in_a_missing_root(
    root: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(root / "a" / "b"))
    info = collect_info(tiny)
    assert str(root) in {directory.path for directory in info.directories}
    assert list(root.iterdir()) == []


def test_file_instead_of_a_directory(root: Path, tiny: Config) -> None:
    (root / "outputs").write_text("")
    errors = {each.path: each.write_error for each in collect_info(tiny).directories if each.write_error}
    assert errors == {str(root / "outputs"): "Not a directory"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_directory_without_permission(root: Path, tiny: Config) -> None:
    root.chmod(0o500)
    errors = {each.path: each.write_error for each in collect_info(tiny).directories if each.write_error}
    assert errors == {str(root): "Permission denied"}


def test_runs_whose_process_has_exited(root: Path, tiny: Config) -> None:
    running, stale, finished = (runs.create_run(tiny, tiny) for _ in range(3))
    stale.update(process_started=1.0)
    finished.close("FINISHED")
    (root / "outputs/2026-01-01/x").mkdir(parents=True)
    (root / "outputs/2026-01-01/x/run.json").write_text("{")
    info = collect_info(tiny)
    assert info.stale_runs == ((str(stale.run_dir), os.getpid()),)
    assert running.run_dir != stale.run_dir
    (line,) = info.unreadable_runs
    assert "run.json: cannot be read" in line


def test_fonts_and_their_glyphs(tiny: Config) -> None:
    assert collect_info(tiny).fonts == "DroidSansMono.ttf"
    missing = replace(tiny, data=replace(generator_config(tiny), fonts=("No.ttf",)))
    assert collect_info(missing).fonts_error.startswith("data.fonts: 'No.ttf' is neither a file")
    lacking = replace(tiny, captcha=replace(tiny.captcha, alphabet="ab\u4e2d"))
    assert "DroidSansMono.ttf has no glyphs for" in collect_info(lacking).fonts_error


def test_limits_of_a_container(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {
        "cpu.max": ["max 100000", "150000 100000"],
        "memory.max": ["max", "1000"],
        "memory.current": ["300"],
    }
    monkeypatch.setattr(device, "read_cgroup_files", lambda name: limits[name])
    assert collect_info(tiny).cpu_quota == 1.5
    assert collect_info(tiny).available_memory_bytes == 700
    limits = {"cpu.max": ["max 100000"], "memory.max": [], "memory.current": []}
    assert collect_info(tiny).cpu_quota is None
    assert (collect_info(tiny).available_memory_bytes or 0) > 1000


# -- the store ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return an MLflow store with a deleted experiment."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    client = open_store(f"sqlite:///{path}")
    client.delete_experiment(client.create_experiment("deleted"))
    return path.read_bytes()


@pytest.fixture
def store(store_bytes: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "mlflow.db"
    path.write_bytes(store_bytes)
    return path


def inspect_file(path: Path, experiment: str = "captcha_exp") -> tuple[str, str]:
    return inspect_store(f"sqlite:///{path}", experiment)


def set_schema(path: Path, revision: str) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = ?", (revision,))


def test_store_of_this_mlflow(store: Path) -> None:
    before = store.read_bytes()
    assert inspect_file(store) == ("current", "")
    assert inspect_file(store, "deleted") == ("deleted", "")
    assert store.read_bytes() == before
    assert [path.name for path in store.parent.iterdir()] == ["mlflow.db"]


def test_a_missing_store_is_not_created(tmp_path: Path) -> None:
    assert inspect_file(tmp_path / "deep" / "mlflow.db") == ("new", "")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty.db").touch()
    assert inspect_file(tmp_path / "empty.db") == ("new", "")


def test_store_of_another_mlflow(store: Path) -> None:
    set_schema(store, "451aebb31d03")  # MLflow 1.0's
    assert inspect_file(store) == ("older", "schema 451aebb31d03")
    set_schema(store, "ffffffffffff")
    assert inspect_file(store) == ("newer", "schema ffffffffffff")


def test_files_that_are_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database, " * 99)
    assert inspect_file(tmp_path / "text.db") == ("broken", "file is not a database")
    with closing(sqlite3.connect(tmp_path / "other.db")) as database, database:
        database.execute("CREATE TABLE t (i)")
    assert inspect_file(tmp_path / "other.db") == ("broken", "not an MLflow database")
    state, detail = inspect_file(tmp_path / "text.db" / "mlflow.db")
    assert (state, detail) == ("broken", f"{tmp_path}/text.db is a file, not a directory")


@pytest.mark.parametrize("kind", ["EXCLUSIVE", "IMMEDIATE"])
def test_locked_store(store: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captcha_exp.tracking.inspection.LOCK_TIMEOUT_SECONDS", 0.05)
    with closing(sqlite3.connect(store, isolation_level=None)) as other:
        other.execute(f"BEGIN {kind}")
        assert inspect_file(store) == ("locked", "database is locked")
    assert inspect_file(store)[0] == "current"


class _Server(BaseHTTPRequestHandler):
    """A simulated MLflow server that responds with `status`."""

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


def test_server_with_and_without_access(server: tuple[str, type[_Server]]) -> None:
    uri, handler = server
    before = dict(os.environ)
    assert inspect_store(uri, "x") == ("current", "")
    handler.status, handler.answer = 401, b"Unauthorized"
    state, detail = inspect_store(uri, "x")
    assert state == "broken"
    assert "401" in detail
    assert dict(os.environ) == before


def test_unreachable_server() -> None:
    state, detail = inspect_store("http://127.0.0.1:9", "x")
    assert state == "unreachable"
    assert re.fullmatch(r"\[Errno \d+\] Connection refused", detail)


def test_server_behind_a_proxy_that_is_busy(server: tuple[str, type[_Server]]) -> None:
    uri, handler = server
    handler.status, handler.answer = 503, b"Service Unavailable"
    assert inspect_store(uri, "x")[0] == "unreachable"


def test_experiment_deleted_on_a_server(server: tuple[str, type[_Server]]) -> None:
    uri, handler = server
    handler.answer = b'{"experiments": [{"experiment_id": "7", "name": "x", "lifecycle_stage": "deleted"}]}'
    assert inspect_store(uri, "x") == ("deleted", "")


def test_store_that_does_not_respond(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captcha_exp.tracking.inspection.RESPONSE_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr("captcha_exp.tracking.inspection._inspect_file", lambda *_: time.sleep(1))
    assert inspect_file(store) == ("unreachable", "no answer within 0 s")


def test_other_databases(store: Path) -> None:
    assert inspect_store(f"sqlite+pysqlite:///{store}", "x") == ("current", "")
    assert inspect_store("sqlite://", "x") == ("broken", "a database in memory does not outlive its process")
    state, detail = inspect_store("postgresql://127.0.0.1:9/x", "x")  # no driver, or no server
    assert state == "broken"
    assert detail


def test_store_of_a_config(root: Path, tiny: Config) -> None:
    config = replace(
        tiny, tracking=MlflowConfig(backend="mlflow", uri="auto", experiment="x", required=False)
    )
    assert collect_info(config).store == StoreInfo(f"sqlite:///{root}/mlruns/mlflow.db", "new")
    assert collect_info(tiny).store is None
    assert list(root.iterdir()) == []


def test_store_of_the_environment(root: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(
        tiny, tracking=MlflowConfig(backend="mlflow", uri="auto", experiment="x", required=False)
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/other.db")
    info = replace(HEALTHY, store=collect_info(config).store, root=str(root))
    where = f"{root}/outputs and in MLflow at sqlite:///{root}/other.db (MLFLOW_TRACKING_URI)"
    assert f"runs are recorded in {where}" in all_messages(info)
    for value in ("http://me:secret@host", "./mlruns"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
        info = collect_info(config)
        (problem,) = at_level(replace(HEALTHY, store_error=info.store_error), "problem")
        assert problem.message.startswith("MLFLOW_TRACKING_URI: ")
        assert "secret@" not in problem.message
        assert info.directories


def test_artifacts_of_a_store_that_was_moved(store: Path, tiny: Config) -> None:
    with closing(sqlite3.connect(store)) as database, database:
        gone = "file:///gone/mlruns/artifacts"
        database.execute("INSERT INTO experiments (name, artifact_location) VALUES ('a', ?)", (gone,))
    (store.parent / "mlruns").mkdir()
    moved = store.rename(store.parent / "mlruns" / "mlflow.db")
    assert [path for _, path in find_moved_artifacts(moved)] == [Path("/gone/mlruns/artifacts")]
    uri = f"sqlite:///{moved}"
    config = replace(tiny, tracking=MlflowConfig(backend="mlflow", uri=uri, experiment="x", required=False))
    finding = only_finding(replace(HEALTHY, store=collect_info(config).store))
    assert finding.message == f"{uri}: was moved; MLflow searches for artifacts in /gone/mlruns/artifacts"
    assert finding.remedy == "the next captcha-exp train or ui corrects it"
    open_store(uri)
    assert find_moved_artifacts(moved) == []


# -- the environment ------------------------------------------------------------------------------------


def test_missing_variables_and_those_of_other_programs(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "user ID 12345 has no name: USER=12345 is used"
    monkeypatch.setitem(environment.filled_in, "USER", text)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    info = collect_info(tiny)
    found = at_level(
        replace(HEALTHY, filled_in=info.filled_in, unused_variables=info.unused_variables), "info"
    )
    assert [finding.message.split(":")[0] for finding in found] == [
        "user ID 12345 has no name",
        "MPLBACKEND=module",
        f"MLFLOW_RUN_ID={'0' * 32} is not used",
    ]
    assert [finding.remedy.split()[:2] for finding in found] == [
        ["set", "USER"],
        ["unset", "MPLBACKEND"],
        ["unset", "MLFLOW_RUN_ID"],
    ]
    monkeypatch.setenv("MPLBACKEND", "Agg")
    assert "MPLBACKEND" not in collect_info(tiny).unused_variables


@pytest.mark.parametrize("module", ["mlflow", "matplotlib"])
def test_a_library_that_cannot_be_imported_is_a_problem(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    for package in ("report", "tracking"):
        for name in [each for each in sys.modules if each.startswith(f"captcha_exp.{package}")]:
            monkeypatch.delitem(sys.modules, name)
        # The import replaces this attribute, too; it is restored like the modules.
        monkeypatch.setattr(captcha_exp, package, None, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    config = replace(
        tiny, tracking=MlflowConfig(backend="mlflow", uri="auto", experiment="x", required=False)
    )
    info = collect_info(config)
    broken = replace(HEALTHY, store_error=info.store_error, figures_error=info.figures_error)
    (problem,) = at_level(broken, "problem")
    assert problem.message.lower().startswith(f"cannot import {module}")


# -- the command ----------------------------------------------------------------------------------------

LINE = re.compile(r"(ok     |info   |problem) [^\n]+?( -> [^\n]+)?")


def run(root: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "captcha_exp", "doctor", *words],
        env={**os.environ, "CAPTCHA_EXP_ROOT": str(root)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "words",
    [pytest.param(("tracking=none",), marks=pytest.mark.long), ()],
    ids=["none", "sqlite"],
)
def test_command_on_this_machine(root: Path, words: tuple[str, ...]) -> None:
    code, out, err = run(root, *words)
    assert (code, err) == (0, "")
    assert all(LINE.fullmatch(line) for line in out.splitlines())
    for text in (
        "Python 3.",
        "torch 2.",
        "device.name=auto selects",
        "GiB free",
        "tracking",
        "fonts",
        "git",
    ):
        assert any(text in line for line in out.splitlines()), text
    assert list(root.iterdir()) == []


def test_an_unavailable_device_is_a_finding_not_an_error(root: Path) -> None:
    code, out, err = run(root, "tracking=none", "device.name=cuda:77", "--json")
    assert (code, err) == (1, "")
    found = json.loads(out)
    assert all(set(finding) == {"level", "message", "remedy"} for finding in found)
    (problem,) = [finding for finding in found if finding["level"] == "problem"]
    assert problem["message"].startswith("device.name=cuda:77 is not available: ")
    assert problem["remedy"].startswith("device.name=auto")


def test_invalid_config(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["captcha-exp", "doctor", "captcha.widht=56"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    assert "did you mean captcha.width?" in capsys.readouterr().err


def test_a_finding_is_printed_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    long = Finding("problem", f"[red]{'long ' * 99}", "fix [it]")
    output.print_findings([long, Finding("ok", "fi\nne")])
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"problem [red]{'long ' * 99} -> fix [it]"
    assert second == "ok      fi ne"
