"""The machine: what `auto` becomes, what memory is counted, and a card that is only played here."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import drawn, training

from captcha_exp.config import Config, Machine, resolve
from captcha_exp.errors import ConfigError
from captcha_exp.runtime import device

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
MIB = 2**20


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


# -- what there is -------------------------------------------------------------------------------------------


def test_a_machine_without_a_card_has_the_cpu(no_card: None, root: Path) -> None:
    machine = device.detect_machine()
    assert machine.devices == ("cpu",)
    assert 1 <= machine.num_cores <= (os.cpu_count() or 1)
    assert machine.root == root
    assert machine.unavailable_reason["cuda"]


@pytest.mark.parametrize(
    ("version", "reason"), [(None, "this build of torch has no CUDA in it"), ("13.0", "see nvidia-smi")]
)
def test_why_there_is_no_card_is_said(
    no_card: None, monkeypatch: pytest.MonkeyPatch, tiny: Config, version: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(ConfigError) as error:
        resolve(replace(tiny, device=replace(tiny.device, name="cuda")), device.detect_machine())
    (line,) = error.value.lines
    assert line.startswith("device.name=")
    assert reason in line
    assert "available here: auto, cpu" in line
    assert "cuda" in line.partition(": ")[0]


def test_two_cards_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.detect_machine().devices == ("cuda", "cuda:0", "cuda:1", "cpu")


@pytest.mark.parametrize(
    ("devices", "chosen"),
    [(("cpu",), "cpu"), (("mps", "cpu"), "mps"), (("cuda", "cuda:0", "cpu"), "cuda")],
)
def test_auto_takes_the_preferred_device_and_every_core(
    tiny: Config, devices: tuple[str, ...], chosen: str
) -> None:
    asked = replace(
        tiny,
        device=replace(tiny.device, name="auto", threads="auto"),
        data=replace(drawn(tiny), workers="auto"),
    )
    resolved = resolve(asked, Machine(devices=devices, num_cores=3, root=Path("/"), unavailable_reason={}))
    assert (resolved.device.name, resolved.device.threads, drawn(resolved).workers) == (chosen, 3, 3)


def test_what_was_asked_for_is_not_replaced(tiny: Config) -> None:
    machine = Machine(devices=("cuda", "cuda:0", "cpu"), num_cores=9, root=Path("/"), unavailable_reason={})
    asked = training(tiny, on_oom="record")
    assert resolve(asked, machine) == asked


# -- how it is set -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [True, False])
def test_threads_and_determinism_are_set_from_the_config(tiny: Config, deterministic: bool) -> None:
    config = replace(
        tiny,
        device=replace(tiny.device, threads=1),
        train=replace(tiny.train, deterministic=deterministic),
    )
    assert device.setup_device(config) == CPU
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.backends.cudnn.benchmark == (not deterministic)
    device.setup_device(tiny)
    assert torch.get_num_threads() == 2


def test_the_device_is_described_in_one_line(tiny: Config) -> None:
    assert device.describe(tiny) == "cpu, fp32, 2 CPU threads"


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_is_the_precision_of_the_config(tiny: Config, precision: Any, dtype: torch.dtype) -> None:
    config = replace(tiny, device=replace(tiny.device, precision=precision))
    with device.autocast(config, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


# -- a budget ------------------------------------------------------------------------------------------------


def on_a_budget(config: Config, budget: int | None, context: float = 800) -> Config:
    """The config with this budget, and a card with this upper bound of its context."""
    interval = replace(config.gpu.context_mib, min=0.0, max=context)
    return replace(
        config,
        device=replace(config.device, vram_budget_mib=budget),
        gpu=replace(config.gpu, name="any CUDA card", context_mib=interval),
    )


class Held:
    """torch's allocator, as far as a fraction of the memory goes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: int) -> None:
        self.total = total
        self.fractions: dict[int, float] = {}
        for name in ("mem_get_info", "set_per_process_memory_fraction"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)

    def mem_get_info(self, card: torch.device) -> tuple[int, int]:
        return self.total // 3, self.total

    def set_per_process_memory_fraction(self, fraction: float, card: object) -> None:
        number = torch.cuda._utils._get_device_index(
            card
        )  # torch's own refusal of what is no number of a card
        assert isinstance(fraction, float)
        assert 0 <= fraction <= 1
        self.fractions[number] = fraction

    def allowed(self, number: int) -> int:
        """Bytes, as the allocator counts them: cut down to a whole one."""
        return int(self.fractions[number] * self.total)


@pytest.mark.parametrize("total_mib", [3711, 3902.5, 8187.44, 23.64 * 1024, 80 * 1024, 143156.3])
@pytest.mark.parametrize("budget", [801, 1000, 1303, 2048, 3711])
def test_a_budget_leaves_the_allocator_what_the_context_does_not_take(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, total_mib: float, budget: int
) -> None:
    """To the byte: a plan that needs the last one of them fits."""
    held = Held(monkeypatch, int(total_mib * MIB))
    device.set_memory_limit(on_a_budget(tiny, budget), CARD)
    assert held.fractions.keys() == {0}
    assert held.allowed(0) == (budget - 800) * MIB


@pytest.mark.parametrize(("name", "number"), [("cuda", 2), ("cuda:1", 1)])
def test_a_budget_holds_on_the_card_that_is_meant(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    held = Held(monkeypatch, 4000 * MIB)
    device.set_memory_limit(on_a_budget(tiny, 1800), torch.device(name))
    assert held.fractions == {number: pytest.approx(0.25)}


def test_a_budget_beyond_the_card_is_all_of_it(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, 4000 * MIB)
    device.set_memory_limit(on_a_budget(tiny, 5000), CARD)
    assert held.fractions == {0: 1.0}


@pytest.mark.parametrize("budget", [1, 200, 800])
def test_a_budget_that_the_context_alone_may_take_is_refused(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    held = Held(monkeypatch, 4000 * MIB)
    with pytest.raises(ConfigError) as error:
        device.set_memory_limit(on_a_budget(tiny, budget), CARD)
    (line,) = error.value.lines
    expected = (
        f"device.vram_budget_mib={budget}: gpu=any CUDA card takes up to 800 MiB for its context alone; "
    )
    assert line.startswith(expected)
    assert held.fractions == {}


def test_without_a_budget_the_whole_card_is_free_again(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, 4000 * MIB)
    for budget in (2000, None):
        device.set_memory_limit(on_a_budget(tiny, budget), CARD)
    assert list(held.fractions.values()) == [1.0]


@pytest.mark.parametrize(("name", "budget"), [("cpu", 2000), ("cpu", 1), ("mps", 1), ("cpu", None)])
def test_without_a_card_nothing_is_held(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, name: str, budget: int | None
) -> None:
    held = Held(monkeypatch, 4000 * MIB)
    device.set_memory_limit(on_a_budget(tiny, budget), torch.device(name))
    assert held.fractions == {}


# -- memory of the process -----------------------------------------------------------------------------------

GROW = """
import torch
from captcha_exp.device import process_peak_mib
cpu = torch.device("cpu")
before = process_peak_mib(cpu)
block = torch.ones(200 * 2**18)
grown = process_peak_mib(cpu)
del block
print(before, grown, process_peak_mib(cpu))
"""


def test_the_peak_grows_with_what_is_held_and_stays() -> None:
    """In a process of its own: the peak of this one may lie higher already."""
    done = subprocess.run([sys.executable, "-c", GROW], capture_output=True, text=True, check=True)
    before, grown, after = map(float, done.stdout.split())
    assert before > 20
    assert grown - before == pytest.approx(200, abs=30)
    assert after > grown - 2  # the kernel's own count is off by a few pages


def test_the_cpu_has_no_peaks_of_phases() -> None:
    meter = device.MemoryMeter(CPU)
    meter.start_phase()
    assert meter.peaks("train") == {}


# -- memory of a card that is played -------------------------------------------------------------------------


class Card:
    """300 MiB reserved now, 500 at the peak; the card holds 4000 MiB, of which 1000 are in use."""

    def __init__(self) -> None:
        self.resets = 0

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        assert device == CARD
        self.resets += 1


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    played = Card()
    figures = {
        "memory_reserved": 300 * MIB,
        "max_memory_reserved": 500 * MIB,
        "max_memory_allocated": 450 * MIB,
        "mem_get_info": (3000 * MIB, 4000 * MIB),
        "get_device_properties": SimpleNamespace(uuid="1234"),
    }
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", played.reset_peak_memory_stats)
    return played


class NVMLError(Exception):
    """As pynvml has it."""


class Nvml(ModuleType):
    """pynvml, with these processes on the card."""

    NVMLError = NVMLError

    def __init__(self, processes: list[tuple[int, int | None]], fails: str | None = None) -> None:
        super().__init__("pynvml")
        self.processes = processes
        self.fails = fails
        self.open = 0

    def _maybe(self, name: str) -> None:
        if self.fails == name:
            raise NVMLError(name)

    def nvmlInit(self) -> None:  # noqa: N802 - pynvml's name
        self._maybe("nvmlInit")
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self._maybe("nvmlDeviceGetHandleByUUID")
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:  # noqa: N802
        self._maybe("nvmlDeviceGetComputeRunningProcesses")
        assert handle == "handle"
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes]


ME, ANOTHER = os.getpid(), os.getpid() + 1


def test_nvml_knows_the_process(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """700 MiB of which 300 are reserved: a context of 400, and the reservation's peak of 500."""
    nvml = Nvml([(ANOTHER, 2000 * MIB), (ME, 700 * MIB)])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert device.process_peak_mib(CARD) == 900
    assert nvml.open == 0


@pytest.mark.parametrize(
    "processes", [[], [(ANOTHER, 2000 * MIB)], [(ME, None)]], ids=["none", "another", "not told"]
)
def test_nvml_does_not_know_the_process(
    card: Card, monkeypatch: pytest.MonkeyPatch, processes: list[tuple[int, int | None]]
) -> None:
    """1000 MiB in use, 300 of them reserved here: 700 more may be ours, beside the peak of 500."""
    nvml = Nvml(processes)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert device.process_peak_mib(CARD) == 1200
    assert nvml.open == 0


@pytest.mark.parametrize(
    "call", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetComputeRunningProcesses"]
)
def test_nvml_fails(card: Card, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    nvml = Nvml([(ME, 700 * MIB)], fails=call)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert device.process_peak_mib(CARD) == 1200
    assert nvml.open == 0


def test_nvml_is_not_installed(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it raises ImportError
    assert device.process_peak_mib(CARD) == 1200


def test_a_card_that_claims_less_than_is_reserved_adds_nothing(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml([]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3900 * MIB, 4000 * MIB))
    assert device.process_peak_mib(CARD) == 500


class Cards(Nvml):
    """pynvml, with two cards; the second one writes its name in bytes, as old versions do."""

    def __init__(self, fails: str | None = None) -> None:
        super().__init__([], fails)

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self._maybe("nvmlDeviceGetCount")
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:  # noqa: N802
        return number

    def nvmlDeviceGetUUID(self, handle: int) -> str | bytes:  # noqa: N802
        return "GPU-1234" if handle == 0 else b"GPU-5678"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(free=(3000 + handle) * MIB)

    def nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802
        self._maybe("nvmlSystemGetDriverVersion")
        return b"550.54.14"


def test_nvml_tells_what_is_free_and_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Cards()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert device.nvml_free_bytes() == {"1234": 3000 * MIB, "5678": 3001 * MIB}
    assert device.driver_version() == "550.54.14"
    assert nvml.open == 0


@pytest.mark.parametrize(
    "nvml", [None, Cards("nvmlInit"), Cards("nvmlDeviceGetCount")], ids=["none", "init", "count"]
)
def test_without_nvml_nobody_knows_what_is_free(monkeypatch: pytest.MonkeyPatch, nvml: Cards | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert device.nvml_free_bytes() == {}


@pytest.mark.parametrize("nvml", [None, Cards("nvmlSystemGetDriverVersion")], ids=["none", "version"])
def test_without_nvml_nobody_knows_the_driver(monkeypatch: pytest.MonkeyPatch, nvml: Cards | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert device.driver_version() is None


@pytest.mark.parametrize("phase", ["train", "eval"])
def test_a_card_has_the_peaks_of_each_phase(card: Card, phase: str) -> None:
    meter = device.MemoryMeter(CARD)
    meter.start_phase()
    assert card.resets == 1
    assert meter.peaks(phase) == {
        f"memory/{phase}_peak_allocated_mib": 450,
        f"memory/{phase}_peak_reserved_mib": 500,
    }
