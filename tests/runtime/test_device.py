"""Test device detection, settings, memory limits, and memory measurements with a simulated GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import generator_config, with_train

from captcha_exp.config import Config, Machine, resolve
from captcha_exp.errors import ConfigError
from captcha_exp.runtime import device

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MIB = 2**20


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


# -- detection -----------------------------------------------------------------------------------------------


def test_a_machine_without_a_gpu_has_the_cpu(no_gpu: None, root: Path) -> None:
    machine = device.detect_machine()
    assert machine.devices == ("cpu",)
    assert 1 <= machine.num_cores <= (os.cpu_count() or 1)
    assert machine.root == root
    assert machine.unavailable_reason["cuda"]


@pytest.mark.parametrize(
    ("version", "reason"), [(None, "this build of torch has no CUDA support"), ("13.0", "check nvidia-smi")]
)
def test_why_there_is_no_gpu_is_said(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, tiny: Config, version: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(ConfigError) as error:
        resolve(replace(tiny, device=replace(tiny.device, name="cuda")), device.detect_machine())
    (line,) = error.value.lines
    assert line.startswith("device.name=")
    assert reason in line
    assert "available here: auto, cpu" in line
    assert "cuda" in line.partition(": ")[0]


def test_all_gpus_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.detect_machine().devices == ("cuda", "cuda:0", "cuda:1", "cpu")


@pytest.mark.parametrize(
    ("devices", "chosen"),
    [(("cpu",), "cpu"), (("mps", "cpu"), "mps"), (("cuda", "cuda:0", "cpu"), "cuda")],
)
def test_auto_uses_the_preferred_device_and_all_cores(
    tiny: Config, devices: tuple[str, ...], chosen: str
) -> None:
    config = replace(
        tiny,
        device=replace(tiny.device, name="auto", threads="auto"),
        data=replace(generator_config(tiny), workers="auto"),
    )
    resolved = resolve(config, Machine(devices=devices, num_cores=3, root=Path("/"), unavailable_reason={}))
    assert (resolved.device.name, resolved.device.threads, generator_config(resolved).workers) == (
        chosen,
        3,
        3,
    )


def test_resolve_keeps_explicit_values(tiny: Config) -> None:
    machine = Machine(devices=("cuda", "cuda:0", "cpu"), num_cores=9, root=Path("/"), unavailable_reason={})
    config = with_train(tiny, on_oom="record")
    config = replace(config, model=replace(config.model, head="position"))
    assert resolve(config, machine) == config


# -- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [True, False])
def test_threads_and_determinism_are_set_from_the_config(tiny: Config, deterministic: bool) -> None:
    config = replace(
        tiny,
        device=replace(tiny.device, threads=2),
        train=replace(tiny.train, deterministic=deterministic),
    )
    assert device.setup_device(config) == CPU
    assert torch.get_num_threads() == 2
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.backends.cudnn.benchmark == (not deterministic)
    device.setup_device(tiny)
    assert torch.get_num_threads() == 1


def test_the_device_is_described_in_one_line(tiny: Config) -> None:
    config = replace(tiny, device=replace(tiny.device, threads=2))
    assert device.describe(config) == "cpu, fp32, 2 CPU threads"


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_is_the_precision_of_the_config(tiny: Config, precision: Any, dtype: torch.dtype) -> None:
    config = replace(tiny, device=replace(tiny.device, precision=precision))
    with device.autocast(config, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


# -- memory limit --------------------------------------------------------------------------------------------


def with_budget(config: Config, budget: int | None, context: float = 800) -> Config:
    """Return the config with a budget, and an upper bound of the CUDA context."""
    bounds = replace(config.gpu.context_mib, min=0.0, max=context)
    return replace(
        config,
        device=replace(config.device, vram_budget_mib=budget),
        gpu=replace(config.gpu, name="any CUDA GPU", context_mib=bounds),
    )


class FakeAllocator:
    """A replacement for the memory fraction functions of torch.cuda."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: int) -> None:
        self.total = total
        self.fractions: dict[int, float] = {}
        for name in ("mem_get_info", "set_per_process_memory_fraction"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.total // 3, self.total

    def set_per_process_memory_fraction(self, fraction: float, device: object) -> None:
        index = torch.cuda._utils._get_device_index(device)  # raises as torch does
        assert isinstance(fraction, float)
        assert 0 <= fraction <= 1
        self.fractions[index] = fraction

    def limit_bytes(self, index: int) -> int:
        """Return the limit in bytes, truncated as in torch's allocator."""
        return int(self.fractions[index] * self.total)


@pytest.mark.parametrize("total_mib", [3711, 3902.5, 8187.44, 23.64 * 1024, 80 * 1024, 143156.3])
@pytest.mark.parametrize("budget", [801, 1000, 1303, 2048, 3711])
def test_the_allocator_is_limited_to_the_budget_minus_the_context(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, total_mib: float, budget: int
) -> None:
    """Exact to the byte: a plan that needs all of it fits."""
    allocator = FakeAllocator(monkeypatch, int(total_mib * MIB))
    device.set_memory_limit(with_budget(tiny, budget), GPU)
    assert allocator.fractions.keys() == {0}
    assert allocator.limit_bytes(0) == (budget - 800) * MIB


@pytest.mark.parametrize(("name", "index"), [("cuda", 2), ("cuda:1", 1)])
def test_the_limit_is_set_on_the_configured_gpu(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, name: str, index: int
) -> None:
    allocator = FakeAllocator(monkeypatch, 4000 * MIB)
    device.set_memory_limit(with_budget(tiny, 1800), torch.device(name))
    assert allocator.fractions == {index: pytest.approx(0.25)}


def test_a_budget_above_the_total_is_the_whole_gpu(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = FakeAllocator(monkeypatch, 4000 * MIB)
    device.set_memory_limit(with_budget(tiny, 5000), GPU)
    assert allocator.fractions == {0: 1.0}


@pytest.mark.parametrize("budget", [1, 200, 800])
def test_a_budget_below_the_context_is_an_error(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    allocator = FakeAllocator(monkeypatch, 4000 * MIB)
    with pytest.raises(ConfigError) as error:
        device.set_memory_limit(with_budget(tiny, budget), GPU)
    (line,) = error.value.lines
    expected = (
        f"device.vram_budget_mib={budget}: the CUDA context of gpu=any CUDA GPU alone takes up to 800 MiB; "
    )
    assert line.startswith(expected)
    assert allocator.fractions == {}


def test_without_a_budget_the_limit_is_removed(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = FakeAllocator(monkeypatch, 4000 * MIB)
    for budget in (2000, None):
        device.set_memory_limit(with_budget(tiny, budget), GPU)
    assert list(allocator.fractions.values()) == [1.0]


@pytest.mark.parametrize(("name", "budget"), [("cpu", 2000), ("cpu", 1), ("mps", 1), ("cpu", None)])
def test_without_cuda_no_limit_is_set(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, name: str, budget: int | None
) -> None:
    allocator = FakeAllocator(monkeypatch, 4000 * MIB)
    device.set_memory_limit(with_budget(tiny, budget), torch.device(name))
    assert allocator.fractions == {}


# -- process memory ------------------------------------------------------------------------------------------

MEASURE_PEAK = """
import torch
from captcha_exp.runtime.device import process_peak_mib
cpu = torch.device("cpu")
before = process_peak_mib(cpu)
block = torch.ones(200 * 2**18)
grown = process_peak_mib(cpu)
del block
print(before, grown, process_peak_mib(cpu))
"""


def test_the_process_peak_grows_and_stays() -> None:
    """In a new process, because the peak of this one may be higher already."""
    done = subprocess.run([sys.executable, "-c", MEASURE_PEAK], capture_output=True, text=True, check=True)
    before, grown, after = map(float, done.stdout.split())
    assert before > 20
    assert grown - before == pytest.approx(200, abs=30)
    assert after > grown - 2  # the count of the kernel is off by a few pages


def test_the_cpu_has_no_peak_per_phase() -> None:
    meter = device.MemoryMeter(CPU)
    meter.start_phase()
    assert meter.peaks("train") == {}


# -- memory of a simulated GPU -------------------------------------------------------------------------------


class FakeGpu:
    """A GPU with 4000 MiB, 1000 of them used; torch has reserved 300 now and 500 at the peak."""

    def __init__(self) -> None:
        self.resets = 0

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        assert device == GPU
        self.resets += 1


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = FakeGpu()
    figures = {
        "memory_reserved": 300 * MIB,
        "max_memory_reserved": 500 * MIB,
        "max_memory_allocated": 450 * MIB,
        "mem_get_info": (3000 * MIB, 4000 * MIB),
        "get_device_properties": SimpleNamespace(uuid="1234"),
    }
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", gpu.reset_peak_memory_stats)
    return gpu


class NVMLError(Exception):
    """The exception of pynvml."""


class FakeNvml(ModuleType):
    """A replacement for pynvml with these processes on the GPU."""

    NVMLError = NVMLError

    def __init__(self, processes: list[tuple[int, int | None]], fails: str | None = None) -> None:
        super().__init__("pynvml")
        self.processes = processes
        self.fails = fails
        self.open = 0

    def _raise_if_failing(self, name: str) -> None:
        if self.fails == name:
            raise NVMLError(name)

    def nvmlInit(self) -> None:  # noqa: N802 - pynvml's name
        self._raise_if_failing("nvmlInit")
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self._raise_if_failing("nvmlDeviceGetHandleByUUID")
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:  # noqa: N802
        self._raise_if_failing("nvmlDeviceGetComputeRunningProcesses")
        assert handle == "handle"
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes]


OWN_PID, OTHER_PID = os.getpid(), os.getpid() + 1


def test_process_memory_from_nvml(fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """700 MiB, 300 of them reserved: the context of 400 plus the reserved peak of 500."""
    nvml = FakeNvml([(OTHER_PID, 2000 * MIB), (OWN_PID, 700 * MIB)])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert device.process_peak_mib(GPU) == 900
    assert nvml.open == 0


@pytest.mark.parametrize(
    "processes", [[], [(OTHER_PID, 2000 * MIB)], [(OWN_PID, None)]], ids=["none", "another", "unknown"]
)
def test_process_memory_if_nvml_does_not_report_it(
    fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, processes: list[tuple[int, int | None]]
) -> None:
    """1000 MiB used, 300 of them reserved: up to 700 more, plus the reserved peak of 500."""
    nvml = FakeNvml(processes)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert device.process_peak_mib(GPU) == 1200
    assert nvml.open == 0


@pytest.mark.parametrize(
    "call", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetComputeRunningProcesses"]
)
def test_process_memory_if_nvml_fails(fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    nvml = FakeNvml([(OWN_PID, 700 * MIB)], fails=call)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert device.process_peak_mib(GPU) == 1200
    assert nvml.open == 0


def test_used_memory_below_reserved_memory_adds_nothing(
    fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3900 * MIB, 4000 * MIB))
    assert device.process_peak_mib(GPU) == 500


class FakeNvmlWithTwoGpus(FakeNvml):
    """Two GPUs."""

    def __init__(self, fails: str | None = None) -> None:
        super().__init__([], fails)

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self._raise_if_failing("nvmlDeviceGetCount")
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:  # noqa: N802
        return number

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return "GPU-1234" if handle == 0 else "GPU-5678"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(free=(3000 + handle) * MIB)

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        self._raise_if_failing("nvmlSystemGetDriverVersion")
        return "550.54.14"


def test_free_memory_and_driver_version_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvmlWithTwoGpus()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert device.nvml_free_bytes() == {"1234": 3000 * MIB, "5678": 3001 * MIB}
    assert device.driver_version() == "550.54.14"
    assert nvml.open == 0


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetCount"])
def test_free_memory_is_empty_if_nvml_fails(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvmlWithTwoGpus(call))
    assert device.nvml_free_bytes() == {}


def test_driver_version_is_none_if_nvml_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvmlWithTwoGpus("nvmlSystemGetDriverVersion"))
    assert device.driver_version() is None


@pytest.mark.parametrize("phase", ["train", "eval"])
def test_a_gpu_has_a_peak_per_phase(fake_gpu: FakeGpu, phase: str) -> None:
    meter = device.MemoryMeter(GPU)
    meter.start_phase()
    assert fake_gpu.resets == 1
    assert meter.peaks(phase) == {
        f"memory/{phase}_peak_allocated_mib": 450,
        f"memory/{phase}_peak_reserved_mib": 500,
    }
